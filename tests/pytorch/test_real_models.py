"""Models as they come from PyPI, with nn.LSTM inside: an audio codec, a speech recogniser, reinforcement learning.

With random weights, small, and unchanged but for `lstm_triton.replace_lstm` or `lstm_triton.accelerate`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton.interpreter import interpret
from tests.support.comparing import assert_as_accurate, assert_same, floor_of, nudged

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

WAYS = ("replace_lstm", "accelerate")


@dataclass
class Subject:
    """A model, where its LSTMs are, and something to compute with it."""

    model: nn.Module
    lstms: list[str]
    compute: Callable[[nn.Module], Tensor]

    def results(self, model: nn.Module) -> dict[str, Tensor]:
        """Output and gradients, by name."""
        model.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = self.compute(model)
        output.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert any("lstm" in name for name in gradients)
        return {"output": output.detach()} | gradients


def encodec() -> Subject:
    """transformers' EnCodec: convolutions around an LSTM of two layers, in the encoder and in the decoder."""
    import transformers

    config = transformers.EncodecConfig(
        num_filters=2,
        hidden_size=4,
        codebook_size=8,
        codebook_dim=4,
        upsampling_ratios=[2, 2],
        num_lstm_layers=2,
        target_bandwidths=[24.0],
        kernel_size=3,
        last_kernel_size=3,
    )
    torch.manual_seed(0)
    model = transformers.EncodecModel(config)
    sound = torch.randn(2, 1, 24)

    def compute(model: nn.Module) -> Tensor:
        # Without the quantisation in between, which has no gradients.
        return model.decoder(model.encoder(sound.to(model.dtype)))

    return Subject(model, ["encoder.layers.7.lstm", "decoder.layers.1.lstm"], compute)


FRAMES = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
WORDS = torch.tensor([[8, 1, 2, 3, 4], [8, 6, 5, 0, 1]])  # beginning with the token for a blank


def parakeet() -> Subject:
    """transformers' Parakeet, speech recognition: a transducer whose prediction network is an LSTM of two layers."""
    import transformers

    encoder = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_kernel_size": 3,
        "subsampling_factor": 4,
        "subsampling_conv_channels": 4,
        "num_mel_bins": 16,
    }
    config = transformers.ParakeetTDTConfig(
        vocab_size=9,
        blank_token_id=8,
        pad_token_id=7,
        decoder_start_token_id=8,
        decoder_hidden_size=6,
        num_decoder_layers=2,
        durations=[0, 1, 2],
        encoder_config=encoder,
        max_symbols_per_step=3,
    )
    torch.manual_seed(0)
    model = transformers.ParakeetForTDT(config).eval()

    def compute(model: nn.Module) -> Tensor:
        return model(input_features=FRAMES.to(model.dtype), decoder_input_ids=WORDS).logits

    return Subject(model, ["decoder.lstm"], compute)


def recurrent_ppo(seed: int = 0) -> Any:
    """sb3-contrib's RecurrentPPO, which balances a pole: an LSTM for the actor, and one for the critic."""
    import sb3_contrib

    return sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy",
        "CartPole-v1",
        n_steps=16,
        batch_size=8,
        n_epochs=2,
        seed=seed,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": 5, "net_arch": [8]},
    )


def policy() -> Subject:
    model = recurrent_ppo().policy
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(6, 4, generator=generator)
    starts = torch.tensor([1.0, 0, 0, 1.0, 0, 0])  # in the middle of a sequence: the policy goes step by step then
    states = torch.randn(2, 1, 2, 5, generator=generator)

    def compute(model: nn.Module) -> Tensor:
        # What its evaluate_actions does, which would convert the observations to float32.
        dtype = next(model.parameters()).dtype
        hx = (states[0].to(dtype), states[1].to(dtype))
        latent = [
            model._process_sequence(observations.to(dtype), hx, starts.to(dtype), lstm)[0]
            for lstm in (model.lstm_actor, model.lstm_critic)
        ]
        scores = model.action_net(model.mlp_extractor.forward_actor(latent[0]))
        return torch.cat([scores, model.value_net(model.mlp_extractor.forward_critic(latent[1]))], dim=1)

    return Subject(model, ["lstm_actor", "lstm_critic"], compute)


SUBJECTS = [encodec, parakeet, policy]


@contextmanager
def changed(model: nn.Module, way: str) -> Iterator[Any]:
    """A model with our LSTMs instead of PyTorch's; afterwards it is what it was."""
    if way == "accelerate":
        with lstm_triton.accelerate() as acceleration:
            yield acceleration
    else:
        replacement = lstm_triton.replace_lstm(model)
        lstms = [module for module in model.modules() if isinstance(module, nn.LSTM)]
        assert lstms
        assert all(isinstance(module, lstm_triton.LSTM) for module in lstms)
        try:
            yield replacement
        finally:
            replacement.undo()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", SUBJECTS)
def test_without_a_gpu_all_is_the_same(make: Callable[[], Subject], way: str) -> None:
    subject = make()
    expected = subject.results(subject.model)
    names = list(subject.model.state_dict())
    with changed(subject.model, way) as report:
        print(report)
        if way == "replace_lstm":
            assert [entry.names for entry in report.replaced] == [(name,) for name in subject.lstms]
            assert not report.left
        assert_same(subject.results(subject.model), expected)
        assert list(subject.model.state_dict()) == names
    assert_same(subject.results(subject.model), expected)


@pytest.mark.interpreted
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", SUBJECTS)
def test_in_the_kernels_within_the_criterion(make: Callable[[], Subject], way: str) -> None:
    subject = make()
    pristine = copy.deepcopy(subject.model)  # a policy that has been run cannot be copied
    with changed(subject.model, way) as report, interpret(), lstm_triton.backend("triton"):
        actual = subject.results(subject.model)
    if way == "accelerate":
        assert report.taken_over >= len(subject.lstms)

    def in_float64(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        model = copy.deepcopy(pristine).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(change(parameter))
        return subject.results(model)

    stock, reference = subject.results(subject.model), in_float64(lambda tensor: tensor)
    sensitive = in_float64(lambda tensor: nudged(tensor, torch.float32))
    assert actual.keys() == stock.keys()
    largest = max(tensor.norm() for tensor in reference.values())
    for name, tensor in actual.items():
        if reference[name].norm() < torch.finfo(torch.float64).eps * largest:
            # Exactly 0: EnCodec normalises weights of one element. Rounding errors are all that is left, and by luck.
            assert tensor.norm() < 4 * torch.finfo(torch.float32).eps * largest, name
            continue
        floor = floor_of(sensitive[name], reference[name], torch.float32)
        assert_as_accurate(tensor, reference[name], stock[name], floor=floor, name=name)


@pytest.mark.parametrize("way", WAYS)
def test_encodec_codes_and_sound(way: str) -> None:
    model = encodec().model.eval()
    sound = torch.randn(1, 1, 40)
    with torch.no_grad():
        expected = model(sound)
        with changed(model, way):
            actual = model(sound)
    assert_same(actual.audio_codes, expected.audio_codes)
    assert_same(actual.audio_values, expected.audio_values)


@pytest.mark.interpreted
@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_parakeet_hears_the_same(way: str, interpreted: bool) -> None:
    """Greedy decoding: one step of the LSTM for each word, its states kept by the model."""
    model = parakeet().model
    expected = model.generate(input_features=FRAMES)
    assert expected.sequences.shape[1] > 3
    with changed(model, way), interpret() if interpreted else nullcontext():
        actual = model.generate(input_features=FRAMES)
    assert_same(actual.sequences, expected.sequences)


def test_parakeet_learns_the_same() -> None:
    """Its own loss, over some steps of training."""
    losses = []
    for way in (None, *WAYS):
        model = parakeet().model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        with changed(model, way) if way else nullcontext():
            for _ in range(3):
                loss = model(
                    input_features=FRAMES,
                    attention_mask=torch.ones(2, 40, dtype=torch.bool),
                    decoder_input_ids=WORDS,
                    labels=WORDS[:, 1:],
                ).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert losses[:3] == losses[3:6] == losses[6:]
    assert losses[2] != losses[0]


@pytest.mark.parametrize("way", WAYS)
def test_recurrent_ppo_learns_the_same(way: str) -> None:
    """Rollouts and updates, from the same seed: the same actions and the same weights, bit by bit."""
    stock = recurrent_ppo().learn(32)
    ours = recurrent_ppo()
    with changed(ours.policy, way) as report:
        ours.learn(32)
    if way == "accelerate":
        assert sum(report.left.values()) > 64  # the actor and the critic at every step, and in training
    assert_same(ours.rollout_buffer.actions, stock.rollout_buffer.actions)
    assert_same(dict(ours.policy.state_dict()), dict(stock.policy.state_dict()))
    assert not torch.equal(stock.policy.lstm_actor.weight_hh_l0, recurrent_ppo().policy.lstm_actor.weight_hh_l0)


@pytest.mark.interpreted
def test_recurrent_ppo_learns_in_the_kernels() -> None:
    stock = recurrent_ppo().learn(16)
    ours = recurrent_ppo()
    with changed(ours.policy, "replace_lstm"), interpret(), lstm_triton.backend("triton"):
        ours.learn(16)
    assert_same(ours.rollout_buffer.actions, stock.rollout_buffer.actions)
    torch.testing.assert_close(dict(ours.policy.state_dict()), dict(stock.policy.state_dict()))

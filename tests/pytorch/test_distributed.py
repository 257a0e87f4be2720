"""Two processes on a CPU against one: DistributedDataParallel, FSDP2, checkpoints, gradient accumulation.

Starting processes takes seconds: the two are started once, make all checks (`check_*`) in turn, and a test for each
tells how it went.
"""

import datetime
import os
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lstm_triton
from lstm_triton.interpreter import interpret
from tests.support.comparing import assert_as_accurate, assert_same, error

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")

WORLD_SIZE = 2
STEPS = 3


class Tagger(nn.Module):
    """An LSTM between two other layers, and one more that is not always used."""

    def __init__(self, lstm_class: type[nn.RNNBase] = lstm_triton.LSTM) -> None:
        super().__init__()
        self.features = nn.Linear(3, 4)
        self.lstm = lstm_class(4, 5, num_layers=2, bidirectional=True)
        self.scores = nn.Linear(10, 2)
        self.spare = lstm_class(4, 5)
        self.use_spare = False
        self.recompute: bool | None = None  # activation checkpointing, and whether the reentrant kind

    def forward(self, input: Tensor) -> Tensor:
        features = self.features(input)
        if self.recompute is None:
            output, _ = self.lstm(features)
        else:
            output, _ = checkpoint(self.lstm, features, use_reentrant=self.recompute)
        if self.use_spare:
            output = output + self.spare(features)[0].repeat(1, 1, 2)
        return self.scores(output)


def tagger(dtype: torch.dtype = torch.float64, lstm_class: type[nn.RNNBase] = lstm_triton.LSTM) -> Tagger:
    torch.manual_seed(0)
    return Tagger(lstm_class).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(T, B, I): all of it for one process, half of the sequences for one of two."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 4, 3, generator=generator, dtype=torch.float64).to(dtype)


def share(input: Tensor) -> Tensor:
    return input.chunk(WORLD_SIZE, dim=1)[dist.get_rank()]


def gradients(model: nn.Module, steps: int = 1, inputs: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
    """Of the last of some steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(batch(step, dtype))).square().mean().backward()
        if step + 1 < steps:
            optimizer.step()
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected)


# --- What the two processes do ---


def check_ddp(folder: Path) -> None:
    expected = gradients(tagger(lstm_class=nn.LSTM), STEPS)
    for options in ({"static_graph": True}, {"find_unused_parameters": True, "gradient_as_bucket_view": True}):
        model = DistributedDataParallel(tagger(), **options)
        assert_close({n: g for n, g in gradients(model, STEPS, share).items() if "spare" not in n}, expected)
    single = tagger()
    single.use_spare = True
    model = tagger()
    model.use_spare = True
    assert_close(gradients(DistributedDataParallel(model), STEPS, share), gradients(single, STEPS))


def check_ddp_complains_of_unused_weights(folder: Path) -> None:
    """As it does of nn.LSTM's: a layer that is not used is not reported as used."""
    model = DistributedDataParallel(tagger())
    model(share(batch(0))).sum().backward()
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
        model(share(batch(0)))


def check_ddp_accumulating_gradients(folder: Path) -> None:
    """Two halves of a share one after the other, the first without talking to the other process."""
    single = tagger()
    single(batch(0)).square().mean().backward()
    model = DistributedDataParallel(tagger(), find_unused_parameters=True)
    first, second = share(batch(0)).chunk(2, dim=1)
    with model.no_sync():
        (model(first).square().mean() / 2).backward()
    (model(second).square().mean() / 2).backward()
    for name, parameter in single.named_parameters():
        if "spare" not in name:
            torch.testing.assert_close(model.module.get_parameter(name).grad, parameter.grad)


def check_ddp_in_the_kernels(folder: Path) -> None:
    reference = gradients(tagger(torch.float64, nn.LSTM), 2)
    stock = gradients(tagger(torch.float32, nn.LSTM), 2)
    model = DistributedDataParallel(tagger(torch.float32), static_graph=True)
    with interpret(seed=dist.get_rank()), lstm_triton.backend("triton"):
        actual = gradients(model, 2, share)
    for name, tensor in reference.items():
        assert_as_accurate(actual[name], tensor, stock[name], floor=1e-6, name=name)


def check_activation_checkpointing(folder: Path) -> None:
    expected = gradients(tagger(), STEPS)
    for reentrant in (False, True):
        for kernels in (False, True):
            model = tagger(torch.float32 if kernels else torch.float64)
            model.recompute = reentrant
            model = DistributedDataParallel(model, static_graph=True)
            with interpret() if kernels else nullcontext():
                actual = gradients(model, STEPS, share)
            torch.testing.assert_close(actual, {n: t.to(actual[n].dtype) for n, t in expected.items()})


def sharded(dtype: torch.dtype = torch.float64, **options: Any) -> Tagger:
    model = tagger(dtype)
    fully_shard(model.lstm, **options)
    fully_shard(model, **options)
    return model


def check_fsdp(folder: Path) -> None:
    expected = gradients(tagger(lstm_class=nn.LSTM), STEPS)
    for options in ({}, {"reshard_after_forward": False}):
        model = sharded(**options)
        assert isinstance(model.lstm.weight_hh_l0, DTensor)
        assert model.lstm.weight_hh_l0.to_local().shape == (20 // WORLD_SIZE, 5)
        assert_close(gradients(model, STEPS, share), expected)
    model = sharded()
    model.recompute = False
    assert_close(gradients(model, STEPS, share), expected)


def check_fsdp_accumulating_gradients(folder: Path) -> None:
    expected = gradients(tagger())
    model = sharded()
    first, second = share(batch(0)).chunk(2, dim=1)
    model.set_requires_gradient_sync(False)
    (model(first).square().mean() / 2).backward()
    model.set_requires_gradient_sync(True)
    (model(second).square().mean() / 2).backward()
    assert_close({n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}, expected)


def check_fsdp_mixed_precision(folder: Path) -> None:
    """Weights and sums in float32, the layers in bfloat16: as accurate as one process that has all in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    reference = gradients(tagger(lstm_class=nn.LSTM))
    stock = gradients(tagger(torch.bfloat16, nn.LSTM))
    for kernels in (False, True):
        model = sharded(torch.float32, mp_policy=policy)
        with interpret() if kernels else nullcontext():
            actual = gradients(model, 1, share)
        assert actual.keys() == reference.keys()
        for name, gradient in actual.items():
            assert gradient.dtype == torch.float32
            allowed = max(2 * error(stock[name], reference[name]), 4 * torch.finfo(torch.bfloat16).eps)
            assert error(gradient, reference[name]) <= allowed, name


def check_fsdp_in_the_kernels(folder: Path) -> None:
    reference = gradients(tagger(torch.float64, nn.LSTM), 2)
    stock = gradients(tagger(torch.float32, nn.LSTM), 2)
    with interpret(seed=dist.get_rank()), lstm_triton.backend("triton"):
        actual = gradients(sharded(torch.float32), 2, share)
    for name, tensor in reference.items():
        assert_as_accurate(actual[name], tensor, stock[name], floor=1e-6, name=name)


def check_replace_lstm_and_accelerate(folder: Path) -> None:
    expected = gradients(tagger(lstm_class=nn.LSTM))
    model = tagger(lstm_class=nn.LSTM)
    assert len(lstm_triton.replace_lstm(model).replaced) == 2
    fully_shard(model.lstm)
    fully_shard(model)
    assert_close(gradients(model, 1, share), expected)

    model = tagger(lstm_class=nn.LSTM)  # a layer that is a part of what is sharded may be replaced afterwards
    fully_shard(model)
    assert len(lstm_triton.replace_lstm(model).replaced) == 2
    assert_close(gradients(model, 1, share), expected)

    model = tagger(lstm_class=nn.LSTM)
    fully_shard(model.lstm)
    [left] = lstm_triton.replace_lstm(model).left
    assert left.names == ("lstm",)
    assert left.reason == "it is sharded by fully_shard: replace it before"
    fully_shard(model)
    assert isinstance(model, FSDPModule)
    with lstm_triton.accelerate() as acceleration:
        assert_close(gradients(model, 1, share), expected)
    assert sum(acceleration.left.values()) == 1

    model = tagger(lstm_class=nn.LSTM)
    wrapped = DistributedDataParallel(model, static_graph=True)
    lstm_triton.replace_lstm(wrapped)
    assert isinstance(model.lstm, lstm_triton.LSTM)
    assert_close(gradients(wrapped, 1, share), expected)


def trained(model: Tagger, inputs: Callable[[Tensor], Tensor]) -> torch.optim.Optimizer:
    """Two steps; whoever goes on from here does `next_step`."""
    model.use_spare = True  # a checkpoint has no state of an optimizer for weights that were never used
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(2):
        next_step(model, optimizer, inputs(batch(step)))
    return optimizer


def next_step(model: nn.Module, optimizer: torch.optim.Optimizer, input: Tensor) -> None:
    optimizer.zero_grad()
    model(input).square().mean().backward()
    optimizer.step()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, **options: Any) -> None:
    weights, others = states.get_state_dict(model, optimizer)
    distributed_checkpoint.save({"model": weights, "optimizer": others}, checkpoint_id=folder, **options)


def load(model: Tagger, folder: Path, **options: Any) -> torch.optim.Optimizer:
    model.use_spare = True
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    weights, others = states.get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": others}
    distributed_checkpoint.load(loaded, checkpoint_id=folder, **options)
    states.set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    return optimizer


def check_checkpoint_of_one_process(folder: Path) -> None:
    """Saved by one process without FSDP, loaded by two with it."""
    single = tagger()
    next_step(single, trained(single, lambda x: x), batch(2))
    model = sharded()
    optimizer = load(model, folder / "of one process")
    next_step(model, optimizer, share(batch(2)))
    assert_close({name: whole(p) for name, p in model.state_dict().items()}, dict(single.state_dict()))


def check_checkpoint_of_two_processes(folder: Path) -> None:
    """Loaded again by two here, and by one in a test."""
    model = sharded()
    optimizer = trained(model, share)
    save(model, optimizer, folder / "of two processes")
    other = sharded()
    other_optimizer = load(other, folder / "of two processes")
    for each in ((model, optimizer), (other, other_optimizer)):
        next_step(*each, share(batch(2)))
    assert_same(
        {n: whole(p) for n, p in other.state_dict().items()}, {n: whole(p) for n, p in model.state_dict().items()}
    )


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def process(rank: int, folder: Path) -> None:
    """Makes all checks; writes how each went into a file of its name."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=60),
    )
    for name, check in CHECKS.items():
        outcome = "passed"
        try:
            check(folder)
        except BaseException:
            outcome = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(outcome)
        if outcome != "passed":
            os._exit(1)  # the other one waits for this one: it is ended by whoever started both
    dist.barrier()
    os._exit(0)  # at once: threads of PyTorch that are late for the end of the interpreter abort the process


# --- The tests ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes have been."""
    folder = tmp_path_factory.mktemp("distributed")
    single = tagger()
    save(single, trained(single, lambda x: x), folder / "of one process", no_dist=True)
    try:
        torch.multiprocessing.spawn(process, (folder,), nprocs=WORLD_SIZE)
    except torch.multiprocessing.ProcessExitedException:
        assert any(path.read_text() != "passed" for path in folder.glob("*.[01]")), "a process ended without a word"
    return folder


@pytest.mark.interpreted
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(folder: Path, name: str) -> None:
    for rank in range(WORLD_SIZE):
        outcome = folder / f"{name}.{rank}"
        assert outcome.exists(), f"process {rank} did not come to it: an earlier check failed"
        assert outcome.read_text() == "passed", f"process {rank}:\n{outcome.read_text()}"


@pytest.mark.interpreted
@pytest.mark.parametrize("lstm_class", [lstm_triton.LSTM, nn.LSTM])
def test_one_process_loads_the_checkpoint_of_two(folder: Path, lstm_class: type[nn.RNNBase]) -> None:
    expected = tagger()
    next_step(expected, trained(expected, lambda x: x), batch(2))
    model = tagger(lstm_class=lstm_class)
    optimizer = load(model, folder / "of two processes", no_dist=True)
    next_step(model, optimizer, batch(2))
    assert_close(dict(model.state_dict()), dict(expected.state_dict()))

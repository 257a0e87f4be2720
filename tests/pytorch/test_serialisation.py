"""Files, copies and other processes: what is not already said of `nn.LSTM`'s helpers in test_module.py."""

import copy
import io
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton import interpreter
from tests.support.comparing import assert_same, run, twins

PATHS = [
    pytest.param(nullcontext, id="fallback"),
    pytest.param(interpreter.interpret, id="kernels", marks=pytest.mark.interpreted),
]
OPTIONS = {"num_layers": 2, "bidirectional": True, "batch_first": True}


class Tagger(nn.Module):
    """A model as users have it, with a layer inside."""

    def __init__(self, cls: type[nn.RNNBase] = lstm_triton.LSTM) -> None:
        super().__init__()
        self.lstm = cls(3, 4, **OPTIONS)
        self.head = nn.Linear(8, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.lstm(input)[0])


def through_a_file(thing: Any, **options: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


@pytest.mark.parametrize("path", PATHS)
def test_after_a_call(path: Any) -> None:
    """A call leaves nothing in the module that cannot be copied; the copy has weights of its own."""
    module, input = Tagger(), torch.randn(2, 5, 3)
    with path():
        module(input).sum().backward()
        expected = module(input)
        for twin in (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            through_a_file(module, weights_only=False),
        ):
            assert_same(twin(input), expected)
            with torch.no_grad():
                twin.lstm.weight_hh_l0.zero_()
            assert_same(module(input), expected)


def test_state_dict_is_loaded_safely() -> None:
    module, stock = Tagger(), Tagger(nn.LSTM)
    for source, target in ((stock, module), (module, stock)):
        with torch.no_grad():
            source.lstm.weight_hh_l0.add_(1)
        target.load_state_dict(through_a_file(source.state_dict(), weights_only=True))
        assert_same(target.state_dict(), source.state_dict())


def test_whole_module_is_loaded_safely_once_its_class_is_trusted() -> None:
    module = lstm_triton.LSTM(3, 4)
    with pytest.raises(pickle.UnpicklingError, match=r"lstm_triton\.module\.LSTM"):
        through_a_file(module, weights_only=True)
    with torch.serialization.safe_globals([lstm_triton.LSTM]):
        loaded = through_a_file(module, weights_only=True)
    input = torch.randn(5, 2, 3)
    assert_same(run(loaded, input), run(module, input))


@pytest.mark.parametrize("mmap", [False, True])
def test_checkpoint_file_of_nn_lstm(mmap: bool, tmp_path: Any) -> None:
    """Also mapped into memory, and taken over without a copy."""
    ours, stock = twins(3, 4, **OPTIONS)
    with torch.no_grad():
        stock.weight_hh_l1.add_(1)
    torch.save(stock.state_dict(), tmp_path / "checkpoint.pt")
    ours.load_state_dict(torch.load(tmp_path / "checkpoint.pt", mmap=mmap), assign=True)
    input = torch.randn(2, 5, 3)
    assert_same(run(ours, input), run(stock, input))


def test_checkpoint_of_the_oldest_format() -> None:
    """Of before PyTorch 1.6: not a zip archive."""
    ours, stock = twins(3, 4)
    buffer = io.BytesIO()
    torch.save(stock.state_dict(), buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    with torch.no_grad():
        ours.weight_hh_l0.zero_()
    ours.load_state_dict(torch.load(buffer))
    assert_same(dict(ours.named_parameters()), dict(stock.named_parameters()))


def test_optimizer_state_goes_on() -> None:
    ours, stock = twins(3, 4)
    input = torch.randn(5, 2, 3)

    def step(module: nn.RNNBase, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(input)[0].square().sum().backward()
        optimizer.step()

    optimizers = [torch.optim.Adam(module.parameters()) for module in (ours, stock)]
    step(stock, optimizers[1])
    ours.load_state_dict(through_a_file(stock.state_dict()))
    optimizers[0].load_state_dict(through_a_file(optimizers[1].state_dict()))
    for module, optimizer in zip((ours, stock), optimizers, strict=True):
        step(module, optimizer)
    assert_same(dict(ours.named_parameters()), dict(stock.named_parameters()))


def _work(module: nn.Module, input: Tensor, results: Any) -> None:
    """In another process: shows the gradient it gets, and changes the shared weights."""
    output, _ = module(input)
    output.sum().backward()
    results.put((output.detach().numpy(), module.weight_hh_l0.grad.numpy()))
    with torch.no_grad():
        module.weight_hh_l0.add_(1)


def test_shared_with_another_process() -> None:
    module = lstm_triton.LSTM(3, 4, num_layers=2).share_memory()
    input = torch.randn(5, 2, 3)
    output, _ = module(input)
    (gradient,) = torch.autograd.grad(output.sum(), module.weight_hh_l0)
    before = module.weight_hh_l0.detach().clone()
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    worker = context.Process(target=_work, args=(module, input, results))
    worker.start()
    found = [torch.from_numpy(array) for array in results.get()]
    worker.join()
    assert worker.exitcode == 0
    torch.testing.assert_close(found, [output.detach(), gradient])
    assert_same(module.weight_hh_l0.detach(), before + 1)


# --- Files of earlier versions ---


class AsBefore:
    """Pickles a module with an earlier version's attributes: `torch.save` of it looks like a file of that version."""

    def __init__(self, module: nn.Module, state: dict[str, Any]) -> None:
        self.module, self.state = module, state

    def __reduce__(self) -> Any:
        return _empty, (type(self.module),), self.state


def _empty(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


# Attributes that earlier versions of nn.LSTM did not have.
LATER = {
    "names only": ("_flat_weights", "_flat_weights_names", "proj_size"),
    "no projections": ("proj_size",),
    "no list of weights": ("_flat_weights",),
}


@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_module_of_an_earlier_pytorch(bias: bool, later: tuple[str, ...], path: Any) -> None:
    """A whole model in a file, with the class of this library in place of nn.LSTM."""
    ours, stock = twins(3, 4, num_layers=2, bidirectional=True, bias=bias)
    state = {name: value for name, value in ours.__getstate__().items() if name not in later}
    assert "_lstm_triton_memory" in state
    del state["_lstm_triton_memory"], state["memory"]
    loaded = through_a_file(AsBefore(ours, state), weights_only=False)
    input = torch.randn(5, 2, 3)
    with path():
        torch.testing.assert_close(run(loaded, input), run(stock, input))
    assert repr(loaded) == repr(stock)
    assert_same(run(loaded.to_torch_lstm(), input), run(stock, input))
    assert_same(dict(loaded.double().float().state_dict()), dict(stock.state_dict()))


@pytest.mark.parametrize("memory", ["full", "low"])
def test_module_of_an_earlier_version_of_this_library(memory: Any) -> None:
    """`memory` was an attribute and nothing else."""
    ours = lstm_triton.LSTM(3, 4, memory=memory)
    state = ours.__getstate__()
    del state["_lstm_triton_memory"]
    loaded = through_a_file(AsBefore(ours, state), weights_only=False)
    assert repr(loaded) == repr(ours)
    assert loaded.memory == memory


@pytest.mark.parametrize("path", PATHS)
def test_replaced_after_loading(path: Any) -> None:
    """nn.LSTMs of a file, of PyTorch 1.7 say, become ours."""
    _, stock = twins(3, 4)
    state = stock.__getstate__()
    del state["proj_size"]
    loaded = through_a_file(AsBefore(stock, state), weights_only=False)
    lstm_triton.replace_lstm(loaded)
    input = torch.randn(5, 2, 3)
    with path():
        torch.testing.assert_close(run(loaded, input), run(stock, input))

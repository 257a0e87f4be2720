"""Modules that `replace_lstm` has replaced, while the model runs: for isinstance, in files, compiled, and cells."""

import copy
import io
import pickle
import warnings
from abc import ABC
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lstm_triton
from lstm_triton.interpreter import interpret
from tests.support.comparing import assert_same, run, twins

PATHS = [
    pytest.param(nullcontext, id="fallback"),
    pytest.param(interpret, id="kernels", marks=pytest.mark.interpreted),
]
T = TypeVar("T")


class OwnConstructor(nn.LSTM):
    def __init__(self, size: int = 4) -> None:
        super().__init__(3, size, batch_first=True)


class OwnCell(nn.LSTMCell):
    def __init__(self) -> None:
        super().__init__(3, 4)


class Abstract(nn.LSTM, Generic[T], ABC):
    """Python puts names of its own into such a class."""

    pad: int


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    kinds = {"plain": nn.LSTM(3, 4), "own": OwnConstructor(), "cell": nn.LSTMCell(3, 4), "own_cell": OwnCell()}
    return nn.ModuleDict(kinds | {"abstract": Abstract(3, 4)})


def input_of(module: nn.Module) -> Tensor:
    return torch.randn(*((2, 3) if isinstance(module, nn.LSTMCell) else (5, 2, 3)))


@pytest.mark.parametrize("path", PATHS)
def test_every_module_stays_what_it_was(path: Callable[[], AbstractContextManager[Any]]) -> None:
    changed, stock = model(), model()
    replacement = lstm_triton.replace_lstm(changed)
    assert not replacement.left
    assert len(replacement.replaced) == 5
    for name, module in changed.items():
        assert isinstance(module, (lstm_triton.LSTM, lstm_triton.LSTMCell))
        assert isinstance(module, type(stock[name]))
        assert isinstance(module, (nn.LSTM, nn.LSTMCell))
        assert type(module).__name__ == type(stock[name]).__name__
        assert repr(module) == repr(stock[name])
        input = input_of(module)
        with path():
            torch.testing.assert_close(module(input), stock[name](input))
    replacement.undo()
    assert [type(module) for module in changed.values()] == [type(module) for module in stock.values()]
    replacement.undo()


class Asks(nn.Module):
    """A model that asks what its recurrent layer is, as PFRL's, ESPnet's and rsl-rl's do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.layer, nn.LSTM):
            output, (h, _) = self.layer(input)
            return output + h
        if isinstance(self.layer, nn.LSTMCell):
            h, c = self.layer(input)
            return h + c
        raise AssertionError("not a recurrent layer")


@pytest.mark.parametrize("layer", [nn.LSTM, nn.LSTMCell])
@pytest.mark.parametrize("path", PATHS)
def test_a_model_that_asks(path: Callable[[], AbstractContextManager[Any]], layer: type[nn.Module]) -> None:
    asks = Asks(layer(3, 4))
    input = input_of(asks.layer)
    expected = asks(input)
    lstm_triton.replace_lstm(asks)
    with path():
        torch.testing.assert_close(asks(input), expected)


def test_a_replaced_layer_can_be_made_anew() -> None:
    """Some models make further layers of the class that a layer has."""
    changed = model()
    lstm_triton.replace_lstm(changed)
    again = type(changed["plain"])(3, 4, num_layers=2)
    assert_same(run(again, torch.ones(5, 2, 3)), run(again.to_torch_lstm(), torch.ones(5, 2, 3)))
    assert type(changed["own"])(6).hidden_size == 6
    assert type(changed["own_cell"])().hidden_size == 4


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_files(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    changed = model()
    lstm_triton.replace_lstm(changed)
    for module in changed.values():
        twin = duplicate(module)
        assert type(twin) is type(module)
        input = input_of(module)
        assert_same(twin(input), module(input))


def test_parametrized() -> None:
    changed, stock = model(), model()
    for each in (changed, stock):
        for name in ("own", "cell"):
            parametrizations.weight_norm(each[name], "weight_hh" if name == "cell" else "weight_hh_l0")
    inputs = {name: input_of(module) for name, module in changed.items()}
    expected = {name: stock[name](input) for name, input in inputs.items()}
    replacement = lstm_triton.replace_lstm(changed)
    assert isinstance(changed["own"], OwnConstructor)
    assert isinstance(changed["cell"], lstm_triton.LSTMCell)
    for each in (changed, copy.deepcopy(changed)):
        assert_same({name: each[name](input) for name, input in inputs.items()}, expected)
    replacement.undo()
    assert_same({name: changed[name](input) for name, input in inputs.items()}, expected)


def test_a_replaced_layer_is_no_stock_layer() -> None:
    changed = model()
    lstm_triton.replace_lstm(changed)
    assert not lstm_triton.replace_lstm(changed).replaced
    with pytest.raises(TypeError, match=r"module must be a torch.nn.LSTM, got LSTM"):
        lstm_triton.LSTM.from_torch_lstm(changed["plain"])


class Method:
    def extra(self) -> int:
        return 3


class Mixed(nn.LSTM, Method):
    pass


def test_what_a_class_adds_is_told_by_name() -> None:
    """Of a class after nn.LSTM, too; names that Python itself puts into every class are none."""
    for cls, added in ((Mixed, "extra"), (type("Own", (Abstract,), {"b": 1, "a": 2}), "a, b")):
        replacement = lstm_triton.replace_lstm(cls(3, 4))
        assert [entry.reason for entry in replacement.left] == [f"its class defines {added}"]


# --- torch.compile ---


@pytest.mark.parametrize("path", PATHS)
def test_compiled_as_one_graph_where_pytorch_allows_it(path: Callable[[], AbstractContextManager[Any]]) -> None:
    """What the report says."""
    asks = Asks(nn.LSTM(3, 4))
    replacement = lstm_triton.replace_lstm(asks)
    assert "torch._dynamo.config.allow_rnn = True" in str(replacement)
    input = torch.randn(5, 2, 3)
    expected = asks(input)
    with path(), torch.no_grad():
        torch.testing.assert_close(torch.compile(asks, backend="eager")(input), expected)
        torch.compiler.reset()
        with torch._dynamo.config.patch(allow_rnn=True):
            torch.testing.assert_close(torch.compile(asks, backend="eager", fullgraph=True)(input), expected)
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(asks, backend="eager", fullgraph=True)(input)


# --- torch.jit.script ---

quiet = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_triton.LSTM(3, 4, num_layers=2)
        self.cell = lstm_triton.LSTMCell(4, 5)

    def forward(self, input: Tensor) -> Tensor:
        output, _ = self.lstm(input)
        h, c = self.cell(output[-1])
        return h + c


@quiet
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("replace", [False, True], ids=["made", "replaced"])
def test_scripted_as_the_modules_of_torch_nn(replace: bool, path: Callable[[], AbstractContextManager[Any]]) -> None:
    holder = Holder().eval()
    if replace:
        holder.lstm, holder.cell = nn.LSTM(3, 4, num_layers=2), nn.LSTMCell(4, 5)
        lstm_triton.replace_lstm(holder)
    kept = copy.deepcopy(holder)
    input = torch.randn(5, 2, 3)
    with path():
        expected = holder(input)
        with pytest.warns(UserWarning, match=r"script copy.deepcopy\(model\)"):
            scripted = torch.jit.script(holder)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(input), expected)
    # What the warning says: PyTorch puts these modules into the model. They share the parameters.
    assert type(holder.lstm) is nn.LSTM
    assert type(holder.cell) is nn.LSTMCell
    assert_same(dict(holder.state_dict()), dict(kept.state_dict()))
    torch.testing.assert_close(holder(input), expected)


@quiet
@pytest.mark.filterwarnings("ignore:torch.jit.script compiles a torch.nn.LSTMCell:UserWarning")
def test_a_cell_is_scripted_by_itself() -> None:
    cell = lstm_triton.LSTMCell(3, 4, bias=False)
    input = torch.randn(2, 3)
    assert_same(torch.jit.script(cell)(input), cell(input))


@quiet
def test_what_cannot_be_scripted_says_why() -> None:
    holder = Holder()
    parametrizations.weight_norm(holder.lstm, "weight_hh_l0")
    with pytest.raises(ValueError, match=r"whose weight_hh_l0 is computed from other tensors\. First remove"):
        torch.jit.script(holder)


class Constant(lstm_triton.LSTM):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return input + 1


@quiet
def test_a_forward_of_a_subclass_is_what_is_scripted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scripted = torch.jit.script(nn.Sequential(Constant(3, 4)))
    assert_same(scripted(torch.ones(2)), torch.ones(2) + 1)


# --- Names ---


class Names(nn.Module):
    """Attributes of users whose names this library once had in its modules."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = deque([1, 2], maxlen=2)
        self._weights = [3]
        self._options = {"a": 1}

    def use(self) -> tuple[Any, ...]:
        return self.memory[0], self._weights[0], self._options["a"]


class OursWithNames(Names, lstm_triton.LSTM):
    pass


class OursWithABuffer(lstm_triton.LSTM):
    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("memory", torch.ones(1))
        self.register_module("_weights", nn.Linear(1, 1))
        self.register_parameter("_options", None)


class OursWithAModule(lstm_triton.LSTM):
    def __init__(self) -> None:
        super().__init__(3, 4)
        self.memory = nn.Linear(1, 1)
        self._weights = nn.Parameter(torch.ones(1))


class OursWithMethods(lstm_triton.LSTM):
    def memory(self) -> int:
        return 7

    @property
    def _weights(self) -> int:
        return 8

    def _options(self) -> int:
        return 9


@pytest.mark.parametrize("path", PATHS)
def test_names_of_a_subclass_are_its_own(path: Callable[[], AbstractContextManager[Any]]) -> None:
    _, stock = twins(3, 4)
    input = torch.randn(5, 2, 3)
    named, buffered, moduled, methods = OursWithNames(3, 4), OursWithABuffer(), OursWithAModule(), OursWithMethods(3, 4)
    for module in (named, buffered, moduled, methods):
        module.load_state_dict(stock.state_dict(), strict=False)
        with path():
            for each in (module, copy.deepcopy(module)):
                torch.testing.assert_close(each(input), stock(input))
                torch.testing.assert_close(each.with_cells(input)[0], stock(input)[0])
            torch.testing.assert_close(lstm_triton.trace(module, input).output, stock(input)[0].detach())
            lstm_triton.explain(module, input)
    assert named.use() == (1, 3, 1)
    assert buffered.memory.item() == 1
    assert isinstance(moduled.memory, nn.Linear)
    assert (methods.memory(), methods._weights, methods._options()) == (7, 8, 9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "value", [deque(), "low", torch.ones(3), nn.Linear(1, 1), nn.Parameter(torch.ones(2))], ids=str
)
def test_names_of_a_module_that_is_replaced_are_its_own(
    value: Any, path: Callable[[], AbstractContextManager[Any]]
) -> None:
    changed = model()
    for module in changed.values():
        for name in ("memory", "_weights", "_options"):
            setattr(module, name, value)
    inputs = {name: input_of(module) for name, module in changed.items()}
    expected = {name: changed[name](input) for name, input in inputs.items()}
    explained = lstm_triton.explain(changed["plain"], inputs["plain"])
    assert explained.layers
    replacement = lstm_triton.replace_lstm(changed)
    with path():
        torch.testing.assert_close({name: changed[name](input) for name, input in inputs.items()}, expected)
    assert repr(changed["cell"]) == repr(model()["cell"]) or isinstance(value, nn.Module)
    for module in changed.values():
        assert module.memory is module._weights is module._options is value
    replacement.undo()
    assert changed["plain"].memory is value


def test_memory_of_a_subclass_that_asks_for_less() -> None:
    class Ours(lstm_triton.LSTM):
        def __init__(self) -> None:
            super().__init__(3, 4, memory="low")
            self.memory = deque()

    assert "memory='low'" in repr(Ours())
    assert "memory='low'" in repr(copy.deepcopy(Ours()))


@pytest.mark.parametrize("value", ["lower", None, True])
def test_a_wrong_word_for_memory_is_refused_at_once(value: Any) -> None:
    module = lstm_triton.LSTM(3, 4)
    with pytest.raises(ValueError, match=f"memory must be one of 'full', 'low', got {value!r}"):
        module.memory = value
    assert module.memory == "full"

"""Arguments, weights and attributes that people get wrong: what nn.LSTM and nn.LSTMCell refuse is refused here.

The class of the exception is that of PyTorch. `test_module.py` and `test_cell.py` compare the words, too, where those
of PyTorch are clear. What PyTorch takes although it computes garbage, or crashes on, is refused as well.
"""

from collections import UserList, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_triton
from lstm_triton import functional, interpreter
from lstm_triton.target import recorded_launches
from tests.support.cells import cell_arguments, cell_twins, run_cell
from tests.support.comparing import assert_same, twins

Z = torch.zeros
Change = Callable[[Any], object]


def outcome(function: Callable[..., Any], *args: Any) -> str:
    """The class of the exception that a call ends in, or "computed"."""
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__
    return "computed"


@contextmanager
def kernels() -> Iterator[None]:
    """CPU tensors take the kernels, which must not be launched."""
    with interpreter.interpret(), recorded_launches() as launches:
        yield
    assert not launches


PATHS = [nullcontext, pytest.param(kernels, marks=pytest.mark.interpreted)]
X, PACKED = Z(3, 2, 5), PackedSequence(Z(3, 5), torch.tensor([2, 1]))
UNSORTED = PackedSequence(Z(3, 5), torch.tensor([2, 1]), torch.tensor([1, 0]))
H = Z(1, 2, 7)

# --- States ---

STATES: dict[str, Callable[[], Any]] = {
    "dict": lambda: {0: H, 1: H},
    "dict by name": lambda: {"h": H, "c": H},
    "defaultdict": lambda: defaultdict(lambda: H),
    "deque": lambda: deque((H, H)),
    "UserList": lambda: UserList((H, H)),
    "ParameterList": lambda: nn.ParameterList((H, H)),
    "set": lambda: {H},
    "string": lambda: "hc",
    "bytes": lambda: b"hc",
    "generator": lambda: (state for state in (H, H)),
    "namespace": lambda: SimpleNamespace(h=H, c=H),
    "range": lambda: range(2),
    "number": lambda: 0,
    "one Tensor": lambda: torch.stack((H, H)),
    "nested": lambda: ((H, H), (H, H)),
    "lists": lambda: ([[[0.0]]], [[[0.0]]]),
    "arrays": lambda: (H.numpy(), H.numpy()),
    "strings": lambda: ("h", "c"),
    "None inside": lambda: (None, None),
    "no h": lambda: (None, H),
    "no c": lambda: (H, None),
    "none": lambda: (),
    "one": lambda: (H,),
    "one in another": lambda: ((H, H),),
    "one letter": lambda: "h",
    "one array": lambda: H.numpy(),
    "three": lambda: (H, H, H),
    "packed": lambda: PACKED,
    "meta": lambda: (H.to("meta"), H.to("meta")),
    "c on meta": lambda: (H, H.to("meta")),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("input", [X, PACKED, UNSORTED], ids=["dense", "packed", "packed in another order"])
@pytest.mark.parametrize("name", STATES)
def test_states(name: str, input: Any, path: Any) -> None:
    ours, stock = twins(5, 7)
    expected = outcome(stock, input, STATES[name]())
    if expected == "computed":  # nn.LSTM takes the first two of anything to bring them into another order
        assert input is UNSORTED
        expected = "RuntimeError" if name == "three" else "TypeError"
    if name == "packed" and input is UNSORTED:
        expected = "TypeError"  # instead of an IndexError about dimensions
    with path():
        assert outcome(ours, input, STATES[name]()) == expected
        assert outcome(lstm_triton.explain, ours, input, STATES[name]()) == expected
        assert outcome(lstm_triton.trace, stock, input, STATES[name]()) == expected


MIXED = {"h": (H.double(), H), "c": (H, H.double()), "both": (H.half(), H.half())}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("input", [X, X.transpose(0, 1), PACKED], ids=["dense", "batch first", "packed"])
@pytest.mark.parametrize("hx", MIXED.values(), ids=MIXED)
def test_explain_refuses_dtypes_that_the_call_refuses(hx: Any, input: Any, path: Any) -> None:
    ours, stock = twins(5, 7, batch_first=isinstance(input, Tensor) and input.shape[0] == 2)
    expected = outcome(stock, input, hx)
    assert expected == "RuntimeError"
    with path():
        assert outcome(lstm_triton.explain, ours, input, hx) == outcome(ours, input, hx) == expected


def test_explain_takes_dtypes_that_the_call_takes() -> None:
    """oneDNN converts a bias."""
    module = lstm_triton.LSTM(5, 7)
    module.bias_ih_l0 = nn.Parameter(module.bias_ih_l0.detach().bfloat16())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert outcome(lstm_triton.explain, module, X) == outcome(module, X)
    assert torch.equal(before, torch.get_rng_state())


# --- Inputs ---

INPUTS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "list": lambda: X.tolist(),
    "array": lambda: X.numpy(),
    "tuple": lambda: (X,),
    "number": lambda: 1.0,
    "0-D": lambda: torch.tensor(1.0),
    "4-D": lambda: X[None],
    "integers": lambda: X.long(),
    "complex": lambda: X.to(torch.complex64),
    "sparse": lambda: X.to_sparse(),
    "sparse rows": lambda: X[0].to_sparse_csr(),
    "oneDNN's": lambda: X.to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([Z(3, 5), Z(2, 5)]),
    "meta": lambda: X.to("meta"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name: str, path: Any) -> None:
    ours, stock = twins(5, 7)
    expected = outcome(stock, INPUTS[name]())
    assert expected != "computed"
    with path():
        assert outcome(ours, INPUTS[name]()) == expected
        assert outcome(functional.lstm, INPUTS[name](), None, list(ours.parameters())) == expected


@pytest.mark.interpreted
def test_negated_views() -> None:
    """Their values are not those in memory: the imaginary part of a conjugate, and gradients that flow into one."""
    ours, cell = lstm_triton.LSTM(5, 7), lstm_triton.LSTMCell(5, 7)
    input, grad = torch.randn(3, 2, 5), torch.randn(3, 2, 7)
    with interpreter.interpret(), lstm_triton.backend("triton"):
        found = []
        for x, g in ((input, grad), (torch._neg_view(-input), torch._neg_view(-grad))):
            ours.zero_grad()
            output, _ = ours(x)
            output.backward(g)
            found.append((output, ours.weight_ih_l0.grad, ours.weight_hh_l0.grad, cell(x[0])[0]))
        assert_same(*found)


# --- Weights ---


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda module: setattr(module, name, nn.Parameter(change(getattr(module, name).detach()), False))


def to_plain(name: str, value: Any) -> Change:
    """Put what is no Tensor in the place of a weight."""

    def change(module: nn.Module) -> None:
        delattr(module, name)
        setattr(module, name, value)

    return change


WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("input", [X, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [None, 3.0, "w", [1.0]], ids=str)
def test_weights_that_are_no_tensors(value: Any, name: str, input: Any, path: Any) -> None:
    ours, stock = twins(5, 7)
    for module in (ours, stock):
        to_plain(name, value)(module)
    with path():
        assert outcome(ours, input) == outcome(stock, input) != "computed"


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "one row more": lambda w: torch.cat((w, w[:1])),
    "one row less": lambda w: w[:-1],
    "one row": lambda w: w[:1],
    "twice": lambda w: torch.cat((w, w)),
    "one column more": lambda w: torch.cat((w, w[..., :1]), -1),
    "a dimension more": lambda w: w[None],
    "flat": lambda w: w.flatten() if w.dim() == 2 else w[:, None],
    "meta": lambda w: w.to("meta"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("input", [X, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_nn_lstm_reads_past_the_end_of(name: str, input: Any, path: Any) -> None:
    for change in WRONG.values():
        module = lstm_triton.LSTM(5, 7)
        replaced(name, change)(module)
        with path(), pytest.raises(RuntimeError, match=r"^Expected weight|^Input and parameter tensors are not at the"):
            module(input)


def test_attributes_that_the_weights_contradict() -> None:
    """nn.LSTM refuses an input of another size than its attribute, and computes garbage for another hidden size."""
    for name, value in (("input_size", 4), ("input_size", 6), ("hidden_size", 6), ("hidden_size", 8)):
        module = lstm_triton.LSTM(5, 7)
        setattr(module, name, value)
        with pytest.raises(RuntimeError, match=r"^Expected weight_ih_l0 size \(4 \* hidden_size, input_size\) = "):
            module(X)
        with pytest.raises(RuntimeError, match=r"^Expected weight_ih_l0 size"):
            lstm_triton.explain(module, X)


# --- Options ---

ATTRIBUTES: dict[str, list[Any]] = {
    "num_layers": [0, -1, 4, "2", 2.0, True, None, [2]],
    "bias": [1, 0, None, "yes"],
    "batch_first": [1, None, "yes"],
    "bidirectional": [1, 0, None, "yes"],
    "training": [1, None],
    "dropout": [-0.1, 1.5, float("nan"), float("inf"), 2, 1 + 1e-9, torch.tensor(1.5), "0.5", None, [0.5], 1j],
    "proj_size": [1.0, None, "1"],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ATTRIBUTES.items() for value in values])
def test_attributes(name: str, value: Any, path: Any) -> None:
    """Changed after the constructor, or loaded so."""
    ours, stock = twins(5, 7, num_layers=3, dropout=0.5)
    for module in (ours, stock):
        setattr(module, name, value)
    expected = outcome(stock, X)
    assert expected != "computed"
    with path():
        assert outcome(ours, X) == expected
        assert outcome(lstm_triton.explain, ours, X) == expected


def test_functional_names_the_option() -> None:
    weights = [parameter.detach() for parameter in nn.LSTM(5, 7).parameters()]
    for options, error, message in (
        ({"num_layers": "2"}, TypeError, "num_layers must be an int, got str '2'"),
        ({"num_layers": 1.0}, TypeError, "num_layers must be an int, got float 1.0"),
        ({"proj_size": None}, TypeError, "proj_size must be an int, got NoneType"),
        ({"bias": 1}, TypeError, "bias must be a bool, got int 1"),
        ({"bidirectional": None}, TypeError, "bidirectional must be a bool, got NoneType"),
        ({"dropout": "0.5"}, TypeError, "dropout must be a number, got str '0.5'"),
        ({"weights": None}, TypeError, "weights must be a list or a tuple of tensors, got NoneType"),
        ({"weights": weights[0]}, TypeError, "weights must be a list or a tuple of tensors, got Tensor"),
        ({"weights": [*weights[:3], None]}, TypeError, r"Expected weights\[3\] to be a Tensor, got NoneType"),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            functional.lstm(X, None, **{"weights": weights, **options})  # type: ignore[arg-type]
    functional.lstm(X, None, iter(weights))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["aten", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_dropout_of_every_number_that_nn_lstm_takes(path: str) -> None:
    """Without a layer to drop, and in evaluation, nn.LSTM does not look at the probability."""
    whole = nn.LSTM(5, 7, num_layers=2)
    weights = [parameter.detach() for parameter in whole.parameters()]

    def run(dropout: Any, training: bool = True, layers: int = 2) -> Any:
        used, options = weights[: 4 * layers], {"num_layers": layers, "dropout": dropout, "training": training}
        return functional.lstm(X, None, used, backend=path, **options)  # type: ignore[call-overload]

    with interpreter.interpret() if path == "triton" else nullcontext():
        of_zeros, _ = functional.lstm(Z(3, 2, 7), None, weights[4:], backend=path)
        for dropout in (1, True, torch.tensor(1.0)):
            output, (h_n, _) = run(dropout)
            assert_same(output, of_zeros)
            assert h_n[0].count_nonzero() > 0
        for dropout in (1.5, float("nan"), -1):
            run(dropout, training=False)
            run(dropout, layers=1)
            with pytest.raises(RuntimeError, match=f"^dropout probability .* between 0 and 1, but got {dropout}$"):
                run(dropout)


@pytest.mark.parametrize("path", [nullcontext, pytest.param(interpreter.interpret, marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bidirectional": True}], ids=str)
def test_lowered_num_layers_runs_the_first_layers(options: dict[str, Any], path: Any) -> None:
    ours, stock = twins(5, 7, num_layers=3, **options)
    shallow = nn.LSTM(5, 7, num_layers=1, **options)
    shallow.load_state_dict(ours.state_dict(), strict=False)
    ours.num_layers = stock.num_layers = 1
    input = torch.randn(3, 2, 5)
    with path():
        found = ours(input)
        explained = lstm_triton.explain(ours, input)
    assert len(explained.layers) == (2 if options.get("bidirectional") else 1)
    for expected in (stock(input), shallow(input)):
        torch.testing.assert_close(found, expected)


# --- Cells ---

CELL_STATES: dict[str, Callable[[], Any]] = {
    name: STATES[name] for name in ("string", "bytes", "namespace", "range", "number", "nested", "lists", "arrays")
} | {
    "deque": lambda: deque((H[0], H[0])),
    "UserList": lambda: UserList((H[0], H[0])),
    "ParameterList": lambda: nn.ParameterList((H[0], H[0])),
    "set": lambda: {H[0], H[0] + 1},
    "generator": lambda: (state for state in (H[0], H[0])),
    "values": lambda: {0: H[0], 1: H[0]}.values(),
    "dict": lambda: {0: H[0], 1: H[0]},
    "None inside": lambda: (None, H[0]),
    "none": lambda: (),
    "three": lambda: (H[0], H[0], H[0]),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CELL_STATES)
def test_states_of_cells(name: str, path: Any) -> None:
    ours, stock = cell_twins(5, 7)
    expected = outcome(stock, Z(2, 5), CELL_STATES[name]())
    assert expected != "computed"
    with path():
        assert outcome(ours, Z(2, 5), CELL_STATES[name]()) == expected
        assert outcome(lstm_triton.explain, ours, Z(2, 5), CELL_STATES[name]()) == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hidden_size", [1, 2, 7])
def test_states_of_another_rank_than_the_input_of_a_cell(hidden_size: int, path: Any) -> None:
    """nn.LSTMCell crashes on states of sizes (H, 1), or computes garbage from (H, n), beside a 1-D input."""
    cell = lstm_triton.LSTMCell(5, hidden_size)
    right, sizes = Z(hidden_size), [(1, 1), (2, 1), (2, hidden_size), (hidden_size, 1), (hidden_size, 7), (1, 2, 7), ()]
    with path():
        for size in sizes:
            for states in ((Z(size), Z(size)), (Z(size), right), (right, Z(size))):
                assert outcome(cell, Z(5), states) in ("RuntimeError", "ValueError")
        for size in ((hidden_size,), (1,), ()):
            right = Z(2, hidden_size)
            for states in ((Z(size), Z(size)), (Z(size), right), (right, Z(size))):
                assert outcome(cell, Z(2, 5), states) in ("IndexError", "ValueError", "RuntimeError")
    with pytest.raises(
        RuntimeError, match=r"^For unbatched 1-D input, hx\[0\] should also be 1-D but got a 2-D tensor$"
    ):
        cell(Z(5), (Z(hidden_size, 1), Z(hidden_size, 1)))


CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CELL_WEIGHTS)
def test_weights_of_cells(name: str, path: Any) -> None:
    """nn.LSTMCell broadcasts some biases, and ours do. It computes garbage from some weights, which ours refuse."""
    for change in WRONG.values():
        ours, stock = cell_twins(5, 7)
        for cell in (ours, stock):
            replaced(name, change)(cell)
        allowed = {outcome(stock, Z(2, 5)), "RuntimeError"} - ({"computed"} if "weight" in name else set())
        with path():
            assert outcome(ours, Z(2, 5)) in allowed
    for value in (None, 3.0):
        ours, stock = cell_twins(5, 7)
        for cell in (ours, stock):
            to_plain(name, value)(cell)
        with path() if value is not None or "weight" in name else nullcontext():
            assert outcome(ours, Z(2, 5)) == outcome(stock, Z(2, 5))


@pytest.mark.parametrize("path", [nullcontext, pytest.param(interpreter.interpret, marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("missing", [("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh")])
def test_biases_taken_away_from_a_cell(missing: tuple[str, ...], path: Any) -> None:
    ours, stock = cell_twins(5, 7)
    for cell in (ours, stock):
        for name in missing:
            setattr(cell, name, None)
    tensors = cell_arguments(2, 5, 7)
    with path():
        found = run_cell(ours, *tensors)
        lstm_triton.explain(ours, tensors[0])
    torch.testing.assert_close(found, run_cell(stock, *tensors))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 28), (2, 28)])
def test_biases_of_cells_that_broadcast(shape: tuple[int, ...], path: Any) -> None:
    ours, stock = cell_twins(5, 7)
    bias = torch.randn(shape)
    for cell in (ours, stock):
        cell.bias_ih = nn.Parameter(bias)
    input = torch.randn(2, 5)
    with path():
        assert torch.equal(ours(input)[0], stock(input)[0])

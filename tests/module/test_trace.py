"""Looking inside: what is shown is what the call computed, on either path and for every kind of batch."""

import copy
import dataclasses
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton.interpreter import interpret
from lstm_triton.tracing import LayerTrace, Trace, trace
from tests.support.comparing import CallCase, assert_same, call_cases, twins
from tests.support.lanes import DTYPES
from tests.support.traces import GATES, VALUES, assert_trace_as_accurate, traced, values_of

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

PATHS = ["aten", pytest.param("triton", marks=pytest.mark.interpreted)]


def assert_formula(
    module: nn.RNNBase,
    inside: Trace[Any],
    input: Tensor,
    hx: Any = None,
    resets: Tensor | None = None,
    reset_state: Any = None,
) -> None:
    """Each layer's gates, c_t and h_t follow from its input (T, B, I), sequence by sequence, step by step."""
    shape = (len(inside.layers), input.shape[1])
    zeros = [input.new_zeros(*shape, size) for size in (module.proj_size or module.hidden_size, module.hidden_size)]
    hx, reset_state = hx or zeros, reset_state or zeros
    directions = 2 if module.bidirectional else 1
    for index, (weights, layer) in enumerate(zip(module.all_weights, inside.layers, strict=True)):
        assert (layer.layer, layer.direction) == (index // directions, ("forward", "reverse")[index % directions])
        weight_ih, weight_hh, *others = weights
        biases = others[:2] if module.bias else (None, None)
        for b, steps in enumerate(inside.lengths.tolist()):
            h, c = hx[0][index, b], hx[1][index, b]
            times = range(steps)
            for t in reversed(times) if layer.direction == "reverse" else times:
                boundary = t if layer.direction == "forward" else t + 1
                if resets is not None and (boundary < steps and resets[boundary, b]):
                    h, c = reset_state[0][index, b], reset_state[1][index, b]
                preact = F.linear(input[t, b], weight_ih, biases[0]) + F.linear(h, weight_hh, biases[1])
                i, f, g, o = preact.chunk(4)
                expected = dict(zip(GATES, (i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()), strict=True))
                c = expected["forget_gate"] * c + expected["input_gate"] * expected["candidate"]
                h = expected["output_gate"] * c.tanh()
                h = h if module.proj_size == 0 else others[-1] @ h
                for name, value in (expected | {"cell_state": c, "hidden_state": h}).items():
                    torch.testing.assert_close(getattr(layer, name)[t, b], value)
            for name in VALUES:
                assert getattr(layer, name)[steps:, b].isnan().all()
            torch.testing.assert_close((inside_state(inside.h_n)[index, b], inside_state(inside.c_n)[index, b]), (h, c))
        if index % directions == directions - 1:
            below = inside.layers[index + 1 - directions : index + 1]
            input = torch.cat([layer.hidden_state for layer in below], dim=2)


def inside_state(state: Tensor) -> Tensor:
    """With a batch even if the input had none."""
    return state.unsqueeze(1) if state.dim() == 2 else state


def padded(input: Any, batch_first: bool) -> Tensor:
    """(T, B, I) of any layout."""
    if isinstance(input, PackedSequence):
        return pad_packed_sequence(input)[0]
    if input.dim() == 2:
        return input.unsqueeze(1)
    return input.transpose(0, 1) if batch_first else input


@given(call_cases(dtypes=[torch.float64]))
def test_formula(case: CallCase) -> None:
    ours, stock = case.twins()
    for module in (ours, stock):
        inside = trace(module, case.input, case.hx)
        hx = None if case.hx is None else [inside_state(state.detach()) for state in case.hx]
        with torch.no_grad():
            assert_formula(module, inside, padded(case.input, module.batch_first), hx)
        assert module.training == case.training
        expected = copy.deepcopy(module).eval()(case.input, case.hx)
        actual = (inside.output, (inside.h_n, inside.c_n))
        assert type(actual[0]) is type(expected[0])
        torch.testing.assert_close(actual, expected)
        assert not any(tensor.requires_grad for tensor in values_of(inside).values())


# --- Batches of every kind, on both paths ---


def ragged(kind: str, dtype: torch.dtype, batch_first: bool = False) -> dict[str, Any]:
    """What to call the module of `small` with: T = 4, B = 3."""
    generator = torch.Generator().manual_seed(3)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    input = random(4, 3, 3)
    arguments: dict[str, Any] = {"hx": (random(4, 3, 5), random(4, 3, 5))}
    if kind == "packed":
        return arguments | {"input": pack_padded_sequence(input, torch.tensor([1, 4, 2]), enforce_sorted=False)}
    if kind in ("lengths", "both"):
        arguments["lengths"] = torch.tensor([2, 4, 0])
    if kind in ("resets", "both"):
        resets = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1]]).bool()
        arguments["resets"] = resets.t() if batch_first else resets
        arguments["reset_state"] = (random(4, 3, 5), random(4, 3, 5))
    return arguments | {"input": input.transpose(0, 1) if batch_first else input}


def small(dtype: torch.dtype, **options: Any) -> lstm_triton.LSTM:
    return twins(3, 5, num_layers=2, bidirectional=True, dtype=dtype, **options)[0]


KINDS = ("dense", "packed", "lengths", "resets", "both")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_formula_of_ragged_batches(kind: str, batch_first: bool) -> None:
    module, arguments = small(torch.float64, batch_first=batch_first), ragged(kind, torch.float64, batch_first)
    inside = traced(module, "aten", **arguments)
    resets = arguments.get("resets")
    resets = resets.t() if resets is not None and batch_first else resets
    input = padded(arguments["input"], batch_first)
    with torch.no_grad():
        assert_formula(module, inside, input, arguments["hx"], resets, arguments.get("reset_state"))
    assert inside.lengths.tolist() == {"lengths": [2, 4, 0], "both": [2, 4, 0], "packed": [1, 4, 2]}.get(kind, [4] * 3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_modules(kind: str, path: str) -> None:
    """Bit by bit: what is shown has been computed on the path that the call takes."""
    module, arguments = small(torch.float32), ragged(kind, torch.float32)
    with torch.no_grad(), interpret() if path == "triton" else nullcontext(), lstm_triton.backend(path):
        expected = module(**arguments)
        inside = trace(module, **arguments)
    assert inside.path == path
    # PyTorch's function takes packed sequences through all layers at once, and rounds differently.
    tolerance = {} if (path, kind) == ("aten", "packed") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close((inside.output, (inside.h_n, inside.c_n)), expected, **tolerance)
    last = torch.cat([layer.hidden_state for layer in inside.layers[2:]], dim=2).nan_to_num(0)
    assert_same(last, padded(inside.output, False))
    if kind == "dense":
        cells = torch.stack([layer.cell_state for layer in inside.layers])
        tolerance = {} if path == "aten" else tolerance  # by the formula there
        torch.testing.assert_close((cells[0::2, -1], cells[1::2, 0]), (inside.c_n[0::2], inside.c_n[1::2]), **tolerance)


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_show_what_they_computed(dtype: torch.dtype, kind: str) -> None:
    module, arguments = small(dtype), ragged(kind, dtype)
    assert_trace_as_accurate(traced(module, "triton", seed=KINDS.index(kind), **arguments), module, arguments)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_autocast(path: str, packed: bool) -> None:
    module, arguments = small(torch.float32), ragged("packed" if packed else "dense", torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with interpret() if path == "triton" else nullcontext(), lstm_triton.backend(path):
            expected = module(**arguments)
        inside = traced(module, path, **arguments)
    actual = (inside.output, (inside.h_n, inside.c_n))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    values = values_of(inside)
    assert {tensor.dtype for tensor in values.values()} == {expected[1][0].dtype}
    exact = values_of(traced(module, "aten", **arguments))
    torch.testing.assert_close(values, exact, rtol=0.05, atol=0.05, equal_nan=True, check_dtype=False)


def test_dropout_is_off_and_the_module_left_alone() -> None:
    module = twins(3, 4, num_layers=2, dropout=0.9)[0].train()
    input = torch.randn(5, 2, 3, requires_grad=True)
    inside = trace(module, input)
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    torch.testing.assert_close(inside.output, module.eval()(input)[0].detach())


def test_no_sequences() -> None:
    inside = trace(lstm_triton.LSTM(3, 4), torch.zeros(5, 0, 3))
    assert inside.layers[0].forget_gate.shape == (5, 0, 4)


def test_a_nan_of_the_input_is_no_missing_step() -> None:
    input = torch.randn(3, 2, 3)
    input[1, 0] = torch.nan
    inside = trace(lstm_triton.LSTM(3, 4), input)
    assert inside.lengths.tolist() == [3, 3]
    assert inside.layers[0].forget_gate[1:, 0].isnan().all()
    assert not inside.layers[0].forget_gate[:, 1].isnan().any()


def test_frozen() -> None:
    inside = trace(lstm_triton.LSTM(3, 4), torch.zeros(5, 2, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        inside.layers = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        inside.layers[0].layer = 1  # type: ignore[misc]
    layer = "LayerTrace(layer=0, direction='forward')"
    assert repr(inside) == f"Trace(path='aten', layers=({layer},))"


@pytest.mark.parametrize(
    ("module", "arguments", "error", "message"),
    [
        (nn.GRU(3, 4), {}, TypeError, "trace takes an lstm_triton.LSTM or a torch.nn.LSTM, got GRU"),
        (nn.Linear(3, 4), {}, TypeError, "trace takes an lstm_triton.LSTM or a torch.nn.LSTM, got Linear"),
        (nn.LSTMCell(3, 4), {}, TypeError, "trace takes an lstm_triton.LSTM or a torch.nn.LSTM, got LSTMCell"),
        (lstm_triton.LSTMCell(3, 4), {}, TypeError, "trace takes an lstm_triton.LSTM or a torch.nn.LSTM, got LSTMCell"),
        (nn.LSTM(4, 4), {}, RuntimeError, "input.size.* must be equal to input_size. Expected 4, got 3"),
        (nn.LSTM(3, 4), {"hx": (torch.zeros(1, 1, 4),) * 2}, RuntimeError, r"Expected hidden\[0\] size \(1, 2, 4\)"),
        (nn.LSTM(3, 4), {"lengths": torch.tensor([6, 0])}, ValueError, "lengths must be from 0 to 5"),
        (nn.LSTM(3, 4), {"resets": torch.zeros(5, 2)}, TypeError, "resets must be a tensor of torch.bool"),
        (nn.LSTM(3, 4), {"reset_state": (torch.zeros(1, 2, 4),) * 2}, ValueError, "reset_state is given without"),
    ],
)
def test_bad_arguments(module: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trace(module, torch.zeros(5, 2, 3), **arguments)


def test_the_kernels_are_not_silently_replaced() -> None:
    with lstm_triton.backend("triton"), pytest.raises(RuntimeError, match='the backend "triton" was asked for'):
        trace(lstm_triton.LSTM(3, 4, dtype=torch.float64), torch.zeros(5, 2, 3, dtype=torch.float64))


# --- Pictures ---


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_title() or axes.lines]


@pytest.mark.parametrize(("hidden_size", "time_steps"), [(1, 1), (1, 4), (4, 100)])
def test_lines(hidden_size: int, time_steps: int) -> None:
    inside = trace(lstm_triton.LSTM(3, hidden_size), torch.randn(time_steps, 2, 3))
    figure = inside.plot(sequence=1)
    gates, memories = panels(figure)[:hidden_size], panels(figure)[hidden_size:]
    assert len(gates) == len(memories) == hidden_size
    layer = inside.layer()
    for unit in range(hidden_size):
        drawn = {
            line.get_label().split(":")[0]: line.get_ydata() for line in (*gates[unit].lines, *memories[unit].lines)
        }
        for label, values in (
            ("forget gate", layer.forget_gate),
            ("input gate", layer.input_gate),
            ("output gate", layer.output_gate),
            ("potential memory", layer.candidate),
            ("long-term memory", layer.cell_state),
            ("short-term memory", layer.hidden_state),
        ):
            torch.testing.assert_close(torch.tensor(drawn[label]), values[:, 1, unit].double())
    assert [label.get_text() for label in gates[0].get_yticklabels()][-1].endswith("%")


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}])
def test_heat_maps(options: dict[str, int]) -> None:
    module = lstm_triton.LSTM(3, 7, num_layers=2, bidirectional=True, **options)
    inside = trace(module, torch.randn(9, 2, 3), lengths=torch.tensor([9, 6]))
    figure = inside.plot(layer=1, direction="reverse", sequence=1, title="What is inside")
    assert figure.get_suptitle() == "What is inside"
    layer = inside.layers[3]
    images = {axes.get_title().split(":")[0]: axes.images[0] for axes in figure.axes if axes.get_title()}
    assert len(images) == 6
    for label, values in (("forget gate", layer.forget_gate), ("short-term memory", layer.hidden_state)):
        torch.testing.assert_close(torch.tensor(images[label].get_array().data), values[:6, 1].t().double())
    assert images["forget gate"].get_clim() == (0, 1)
    for label in ("potential memory", "long-term memory", "short-term memory"):
        low, high = images[label].get_clim()
        assert low == -high < 0


def test_chosen_units() -> None:
    inside = trace(lstm_triton.LSTM(3, 7), torch.randn(9, 2, 3))
    titles = [axes.get_title() for axes in panels(inside.plot(units=[6, 2]))]
    assert titles == ["unit 6", "unit 2"] * 2


def test_a_picture_is_written(tmp_path: Any) -> None:
    inside = trace(lstm_triton.LSTM(3, 1), torch.randn(4, 2, 3))
    inside.plot().savefig(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 1}, r"layer and direction must be one of \(0, 'forward'\), got \(1, 'forward'\)"),
        ({"direction": "reverse"}, r"got \(0, 'reverse'\)"),
        ({"sequence": 2}, "sequence must be from 0 to 1, got 2"),
        ({"sequence": -1}, "sequence must be from 0 to 1, got -1"),
        ({"units": [0, 4]}, r"units must be some of 0 to 3, got \[0, 4\]"),
        ({"units": []}, r"units must be some of 0 to 3, got \[\]"),
        ({"sequence": 1}, "sequence 1 has no steps to draw"),
    ],
)
def test_bad_arguments_of_plot(arguments: dict[str, Any], message: str) -> None:
    inside = trace(lstm_triton.LSTM(3, 4), torch.zeros(5, 2, 3), lengths=torch.tensor([5, 0]))
    with pytest.raises(ValueError, match=message):
        inside.plot(**arguments)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = trace(lstm_triton.LSTM(3, 4), torch.zeros(5, 2, 3))
    monkeypatch.delitem(sys.modules, "lstm_triton.pictures", raising=False)
    monkeypatch.delattr(lstm_triton, "pictures", raising=False)
    for name in ("matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"plot needs matplotlib.*pip install 'lstm-triton\[demo\]'"):
        inside.plot()


def test_public_names() -> None:
    assert lstm_triton.trace is trace
    assert isinstance(trace(lstm_triton.LSTM(3, 4), torch.zeros(5, 3)).layers[0], LayerTrace)

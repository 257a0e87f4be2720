"""torch.jit.trace and ONNX's older exporter: the program is right for other sizes and values than the example's."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton.aten import native

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1:UserWarning"),
]

SIZES = [(4, 2), (6, 5), (1, 1)]  # T and B; the first ones are the example's
GIVEN = [
    (),
    ("lengths",),
    ("resets",),
    ("packed lengths",),
    ("packed lengths", "h_0", "c_0"),
    ("lengths", "resets", "h_0", "c_0", "h_reset", "c_reset"),
]
SEVERAL: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True}
CASES: list[tuple[dict[str, Any], tuple[str, ...], bool]] = [
    *(({"bias": False}, given, False) for given in GIVEN),
    *(({}, given, True) for given in GIVEN[:3]),
    *((SEVERAL, given, given == GIVEN[-2]) for given in GIVEN[-2:]),
]


class Called(nn.Module):
    """A module with positional tensors as arguments, as exporters want it."""

    def __init__(self, lstm: lstm_triton.LSTM, given: tuple[str, ...], cells: bool = False) -> None:
        super().__init__()
        self.lstm, self.given, self.cells = lstm, given, cells

    def forward(self, input: Any, *others: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(self.given, others, strict=True))
        options: dict[str, Any] = {name: found[name] for name in ("lengths", "resets") if name in found}
        if "h_0" in found:
            options["hx"] = found["h_0"], found["c_0"]
        if "h_reset" in found:
            options["reset_state"] = found["h_reset"], found["c_reset"]
        packed = "packed lengths" in found
        if packed:
            input = pack_padded_sequence(input, found["packed lengths"], self.lstm.batch_first, enforce_sorted=False)
        output, states, *cells = (self.lstm.with_cells if self.cells else self.lstm)(input, **options)
        if packed:
            output, _ = pad_packed_sequence(output, self.lstm.batch_first)
        return output, *states, *cells

    def arguments(self, time_steps: int, batch_size: int) -> tuple[Tensor, ...]:
        lstm = self.lstm
        lanes, output_size = lstm.num_layers * (2 if lstm.bidirectional else 1), lstm.proj_size or lstm.hidden_size
        made = {
            "input": torch.randn(time_steps, batch_size, lstm.input_size),
            "resets": torch.rand(time_steps, batch_size) < 0.4,
            "lengths": torch.randint(time_steps + 1, (batch_size,)),
            # The longest has all steps, as `pad_packed_sequence` pads to the longest.
            "packed lengths": torch.cat(
                [torch.tensor([time_steps]), torch.randint(1, time_steps + 1, (batch_size - 1,))]
            ),
            "h_0": torch.randn(lanes, batch_size, output_size),
            "h_reset": torch.randn(lanes, batch_size, output_size),
            "c_0": torch.randn(lanes, batch_size, lstm.hidden_size),
            "c_reset": torch.randn(lanes, batch_size, lstm.hidden_size),
        }
        if lstm.batch_first:
            made = {name: made[name].transpose(0, 1) for name in ("input", "resets")} | {
                name: tensor for name, tensor in made.items() if name not in ("input", "resets")
            }
        return made["input"], *(made[name] for name in self.given)


@pytest.mark.parametrize(("options", "given", "cells"), CASES, ids=str)
def test_traced_for_other_sizes_and_values(options: dict[str, Any], given: tuple[str, ...], cells: bool) -> None:
    """Results and gradients."""
    module = Called(lstm_triton.LSTM(2, 3, **options), given, cells)
    traced = torch.jit.trace(module, module.arguments(*SIZES[0]), check_trace=False)
    for sizes in SIZES[1:]:
        arguments = module.arguments(*sizes)
        with torch.jit.optimized_execution(False):  # optimising takes longer than running
            actual, expected = traced(*arguments), module(*arguments)
        torch.testing.assert_close(actual, expected)
        gradients = [
            torch.autograd.grad(sum(each.square().sum() for each in results), list(module.parameters()))
            for results in (actual, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_traced_without_a_batch_and_saved() -> None:
    module = Called(lstm_triton.LSTM(2, 3), ("lengths", "resets"))
    traced = torch.jit.trace(module, (torch.randn(4, 2), torch.tensor(3), torch.zeros(4, dtype=torch.bool)))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    arguments = torch.randn(6, 2), torch.tensor(5), torch.tensor([0, 1, 0, 0, 1, 1]).bool()
    torch.testing.assert_close(torch.jit.load(file)(*arguments), module(*arguments))


def test_traced_cell() -> None:
    cell = lstm_triton.LSTMCell(2, 3)
    for states in ((), ((torch.randn(2, 3), torch.randn(2, 3)),)):
        traced = torch.jit.trace(cell, (torch.randn(2, 2), *states))
        others = tuple((torch.randn(5, 3), torch.randn(5, 3)) for _ in states)
        input = torch.randn(5, 2)
        torch.testing.assert_close(traced(input, *others), cell(input, *others))


@pytest.mark.interpreted
def test_the_kernels_are_not_recorded() -> None:
    """Nor baked into the program, where they could run."""
    from lstm_triton.interpreter import interpret

    module = Called(lstm_triton.LSTM(2, 3), ("resets",))
    with interpret():
        traced = torch.jit.trace(module, module.arguments(4, 2))
        with lstm_triton.backend("triton"), pytest.raises(RuntimeError, match=r"torch\.jit\.trace does not record"):
            torch.jit.trace(module, module.arguments(4, 2))
    arguments = module.arguments(6, 5)
    torch.testing.assert_close(traced(*arguments), module(*arguments))


def test_wrong_lengths_of_the_example() -> None:
    module = Called(lstm_triton.LSTM(2, 3), ("lengths",))
    with pytest.raises(ValueError, match=r"lengths must be from 0 to 4, the number of time steps, got \[9, 0\]"):
        torch.jit.trace(module, (torch.randn(4, 2, 2), torch.tensor([9, 0])))


def test_what_would_be_fixed_to_the_example_is_refused() -> None:
    """The formula is a loop of Python."""
    module = lstm_triton.LSTM(2, 3).requires_grad_(False)

    def tangent(input: Tensor) -> Tensor:
        with forward_ad.dual_level():
            output, _ = module(forward_ad.make_dual(input, torch.ones_like(input)))
            return forward_ad.unpack_dual(output).tangent

    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would fix the number of time steps"):
        torch.jit.trace(tangent, (torch.randn(4, 2, 2),))


def test_the_first_call_may_be_traced() -> None:
    """What this process finds out once is not recorded: torch.jit.trace cannot record operators that return a bool."""
    traced = torch.jit.trace(lambda tensor: (native._without_onednns_layers(), tensor + 1)[1], torch.zeros(1))
    assert traced(torch.ones(1)) == 2


@pytest.mark.parametrize("given", GIVEN, ids=" and ".join)
def test_onnx_for_other_sizes_and_values(given: tuple[str, ...]) -> None:
    """The older exporter. The newer one is torch.export's."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    module = Called(lstm_triton.LSTM(2, 3, bidirectional=True), given).eval()
    names, file = ["input", *given], io.BytesIO()
    batch_axes = {"lengths": 0, "packed lengths": 0}
    torch.onnx.export(
        module,
        module.arguments(*SIZES[0]),
        file,
        dynamo=False,
        input_names=names,
        dynamic_axes={
            name: {0: "T", 1: "B"} if name in ("input", "resets") else {batch_axes.get(name, 1): "B"} for name in names
        },
    )
    session = runtime.InferenceSession(file.getvalue())
    for sizes in SIZES[1:]:
        arguments = module.arguments(*sizes)
        feed = {name: tensor.numpy() for name, tensor in zip(names, arguments, strict=True)}
        expected = [result.detach().numpy() for result in module(*arguments)]
        for actual, each in zip(session.run(None, feed), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(actual), torch.from_numpy(each), rtol=1e-4, atol=1e-5)


def test_a_state_without_steps_reaches_no_gradient() -> None:
    """Not even if it is NaN."""
    module = Called(lstm_triton.LSTM(2, 3), ("lengths", "h_0", "c_0"))
    input, _, h_0, c_0 = module.arguments(3, 2)
    traced = torch.jit.trace(module, (input, torch.tensor([1, 2]), h_0, c_0), check_trace=False)
    states = torch.stack((h_0, c_0)).index_fill(2, torch.tensor([0]), torch.nan)
    with torch.jit.optimized_execution(False):
        output, *_ = traced(input, torch.tensor([0, 3]), *states)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), list(module.parameters())))

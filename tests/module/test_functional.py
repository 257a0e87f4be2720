"""The function behind the module: explicit weights, the stack of layers, and bad weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from lstm_triton import functional, prepared_call, routing, scan
from lstm_triton.stack import LaneResults, LaneWeights, Start, formula_lane, layers_of
from tests.support.comparing import CallCase, assert_same, call_cases, run, stock_in_autocast, twins

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


@contextmanager
def reference_layers() -> Iterator[list[tuple[Any, ...]]]:
    """The path to the kernels, with the reference layer at its end; the arguments of every lane are kept."""
    calls: list[tuple[Any, ...]] = []

    def lane(input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, **options: Any) -> LaneResults:
        calls.append((input, start.h, start.c, *weights, reverse))
        return formula_lane(input, start, weights, reverse=reverse, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(routing, "_obstacle", lambda call: None)
        monkeypatch.setattr(prepared_call, "key_of", lambda *arguments: None)
        monkeypatch.setattr(scan, "scan_layers", layers_of(lane))
        yield calls


@given(call_cases())
def test_weights_as_an_argument(case: CallCase) -> None:
    ours, stock = case.twins()
    options = {
        name: value for name, value in case.options.items() if name not in ("input_size", "hidden_size", "dtype")
    }
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        expected = stock(case.input, case.hx)
        for weights in (list(ours.parameters()), tuple(ours.parameters())):
            torch.manual_seed(0)
            actual = functional.lstm(case.input, case.hx, weights, training=case.training, **options)
            assert_same(actual, expected)


@given(call_cases(dtypes=[torch.float64], layouts=["batched", "unbatched"], projections=False, empty_batches=False))
def test_stack_of_layers(case: CallCase) -> None:
    """Order of layers, directions, states and weights, and the very same dropout."""
    ours, stock = case.twins()
    with reference_layers() as calls:
        actual = run(ours, case.input, case.hx)
    assert len(calls) == ours.num_layers * (2 if ours.bidirectional else 1)
    torch.testing.assert_close(actual, run(stock, case.input, case.hx))


def test_batch_first_output_is_a_transposed_view() -> None:
    ours, _ = twins(3, 4, batch_first=True)
    with reference_layers():
        output, _ = ours(torch.randn(2, 5, 3))
    assert output.shape == (2, 5, 4)
    assert output.transpose(0, 1).is_contiguous()


def test_states_of_one_layer_can_be_detached_in_place() -> None:
    ours, _ = twins(3, 4)
    with reference_layers():
        _, states = ours(torch.randn(5, 2, 3))
    for state in states:
        state.detach_()


@pytest.mark.parametrize("with_states", [False, True])
def test_autocast_before_the_kernels(with_states: bool) -> None:
    ours, stock = twins(3, 4, num_layers=2)
    input = torch.randn(5, 2, 3)
    hx = (torch.randn(2, 2, 4), torch.randn(2, 2, 4)) if with_states else None
    with reference_layers() as calls, torch.autocast("cpu", torch.bfloat16):
        results = run(ours, input, hx)
    assert {a.dtype for call in calls for a in call if isinstance(a, Tensor)} == {torch.bfloat16}
    expected = stock_in_autocast(stock, input, hx)
    assert {name: tensor.dtype for name, tensor in results.items()} == {n: t.dtype for n, t in expected.items()}
    torch.testing.assert_close(results, expected, rtol=0.05, atol=0.05)


def test_autocast_leaves_float64_alone() -> None:
    ours, _ = twins(3, 4, dtype=torch.float64)
    with reference_layers() as calls, torch.autocast("cpu", torch.bfloat16):
        output, _ = ours(torch.randn(5, 2, 3, dtype=torch.float64))
    assert output.dtype == calls[0][0].dtype == torch.float64


# --- Bad arguments ---


def weights_of(**options: Any) -> list[Tensor]:
    return [parameter.detach() for parameter in nn.LSTM(3, 4, **options).parameters()]


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"proj_size": 2}], ids=str
)
def test_weights_of_a_wrong_size(options: dict[str, Any]) -> None:
    """Each in turn, in either dimension; oneDNN would read past the end of some."""
    input, weights = torch.zeros(5, 2, 3), weights_of(**options)
    functional.lstm(input, None, weights, **options)
    for index in range(len(weights)):
        for dim in range(weights[index].dim()):
            for size in (weights[index].shape[dim] - 1, weights[index].shape[dim] + 1, 1):
                wrong = list(weights[index].shape)
                wrong[dim] = size
                bad = [*weights[:index], torch.zeros(wrong), *weights[index + 1 :]]
                message = "|".join(
                    (
                        r"Expected weights\[\d+\] size \(.*\), got \[.*\]",
                        r"input.size\(-1\) must be equal to input_size",  # which the first weight tells
                        "proj_size has to be smaller than hidden_size",  # and the hidden size as well
                    )
                )
                with pytest.raises((RuntimeError, ValueError), match=message):
                    functional.lstm(input, None, bad, **options)


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        (weights_of()[:3], {}, RuntimeError, "Expected 4 weights, got 3"),
        (weights_of() * 2, {}, RuntimeError, "Expected 4 weights, got 8"),
        (weights_of(bias=False), {}, RuntimeError, "Expected 4 weights, got 2"),
        (weights_of(), {"bidirectional": True}, RuntimeError, "Expected 8 weights, got 4"),
        (weights_of(), {"proj_size": 2}, RuntimeError, "Expected 5 weights, got 4"),
        ([], {}, RuntimeError, "Expected 4 weights, got 0"),
        ([torch.zeros(16)] * 4, {}, RuntimeError, r"Expected weights\[0\] to be 2-D, got 1-D"),
        (weights_of(), {"num_layers": 0}, ValueError, "num_layers must be greater than zero"),
        (weights_of(), {"proj_size": -1}, ValueError, "proj_size should be a positive integer or zero"),
        (weights_of(proj_size=2), {"proj_size": 4}, ValueError, "proj_size has to be smaller than hidden_size"),
        (weights_of(), {"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'aten', got 'cuda'"),
    ],
)
def test_bad_arguments(weights: list[Tensor], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.lstm(torch.zeros(5, 2, 3), None, weights, **options)


@pytest.mark.parametrize("path", ["aten", "triton"])
def test_input_is_checked_on_either_path(path: str) -> None:
    """Not by PyTorch's function: a kernel given wrong sizes would read what is not there."""
    with reference_layers() as calls:
        for input, hx in (
            (torch.zeros(0, 2, 3), None),
            (torch.zeros(5, 2, 4), None),
            (torch.zeros(5, 2, 3, dtype=torch.float64), None),
            (torch.zeros(5, 2, 3), (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))),
            (torch.zeros(5, 2, 3), (torch.zeros(1, 2, 4),) * 3),
        ):
            with pytest.raises((RuntimeError, ValueError)):
                functional.lstm(input, hx, weights_of(), backend=path)
    assert not calls

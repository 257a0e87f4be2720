"""The calls whose cost overhead.py tells: what they are, how long they take, and how long nn.LSTM's take.

Times are processor time of the calling thread, in microseconds, the least of many calls.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import lstm_triton

SIZE = 32  # I and H: small products, but more than one program


@dataclass(frozen=True)
class CallCase:
    """A call of the module whose cost is counted."""

    name: str
    time_steps: int
    batch_size: int
    trains: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of the module
    states: bool = False  # whether initial states are given

    def row(self) -> dict[str, Any]:
        """What a row of results says of the call."""
        described = asdict(self)
        return {"call": described.pop("name"), **described}


TWO_LAYERS_BOTH_DIRECTIONS = {"num_layers": 2, "bidirectional": True}
FOUR_LAYERS_BOTH_DIRECTIONS = {"num_layers": 4, "bidirectional": True}
CALLS = (
    CallCase("one step", 1, 1),
    CallCase("one step, with states", 1, 1, states=True),
    CallCase("one step, 2 layers, both directions", 1, 1, options=TWO_LAYERS_BOTH_DIRECTIONS),
    CallCase("one step, training", 1, 1, trains=True),
    CallCase("inference", 16, 16),
    CallCase("inference, with states", 16, 16, states=True),
    CallCase("training", 16, 16, trains=True),
    CallCase("inference, 2 layers, both directions", 16, 16, options=TWO_LAYERS_BOTH_DIRECTIONS),
    CallCase("training, 2 layers, both directions", 16, 16, trains=True, options=TWO_LAYERS_BOTH_DIRECTIONS),
    CallCase("training, 4 layers, both directions", 16, 16, trains=True, options=FOUR_LAYERS_BOTH_DIRECTIONS),
)
FALLBACK_CALLS = tuple(
    case for case in CALLS if case.name in ("one step", "one step, with states", "inference", "training")
)


def call_of(case: CallCase, module_type: Callable[..., nn.RNNBase], dtype: torch.dtype) -> Callable[[], None]:
    module = module_type(SIZE, SIZE, dtype=dtype, **case.options)
    input = torch.randn(case.time_steps, case.batch_size, SIZE, dtype=dtype)
    lanes = module.num_layers * (2 if module.bidirectional else 1)
    hx = torch.zeros(2, lanes, case.batch_size, SIZE, dtype=dtype).unbind() if case.states else None
    if not case.trains:
        module.eval()

        def infer() -> None:
            with torch.no_grad():
                module(input, hx)

        return infer
    grad = torch.ones(case.time_steps, case.batch_size, SIZE * lanes // module.num_layers, dtype=dtype)

    def train() -> None:
        output, _ = module(input, hx)
        output.backward(grad)
        module.zero_grad()

    return train


def least_microseconds(
    calls: Sequence[Callable[[], None]], seconds: float, between: Callable[[], None] | None = None
) -> list[float]:
    """Of each call, in turns, so that all of them meet the same machine.

    Args:
        seconds: how long each is timed, on average.
        between: what is done after each call, untimed.
    """
    least = [float("inf")] * len(calls)
    until = time.perf_counter() + seconds * len(calls)
    while True:
        for index, call in enumerate(calls):
            start = time.thread_time()
            call()
            least[index] = min(least[index], time.thread_time() - start)
            if between:
                between()
        if time.perf_counter() >= until:
            return [round(1e6 * each, 1) for each in least]


class Ready(torch.autograd.Function):
    """Results and gradients that are there already."""

    @staticmethod
    def forward(context: Any, results: tuple[Tensor, ...], gradients: list[Tensor], *weights: Tensor) -> Any:
        context.gradients = gradients
        return results

    @staticmethod
    def backward(context: Any, *grads: Any) -> Any:
        # A tensor that is held elsewhere would be copied into .grad, which costs more than this view.
        return None, None, *[gradient.detach() for gradient in context.gradients]


def stock_microseconds(case: CallCase, dtype: torch.dtype, seconds: float) -> dict[str, float | None]:
    """nn.LSTM without `torch._VF.lstm`, whose results are ready; where it trains, Ready stands for it.

    In a call that trains, `empty_backward_us` is what Ready costs alone: applying it, and going backward through it to
    the weights.
    """
    results: Any = None
    weights: list[Tensor] = []
    gradients: list[Tensor] = []
    trains, function = case.trains, torch._VF.lstm

    def computed(*arguments: Any) -> Any:
        nonlocal results, weights, gradients
        weights = arguments[2]
        gradients = [torch.zeros_like(weight) for weight in weights]
        with torch.no_grad():
            results = function(*arguments)
        return skipped(*arguments)

    def skipped(*arguments: Any) -> Any:
        return Ready.apply(results, gradients, *arguments[2]) if trains else results  # type: ignore[no-untyped-call]

    call = call_of(case, nn.LSTM, dtype)
    with mock.patch.object(torch._VF, "lstm", computed):
        call()
    grad = torch.ones_like(results[0])

    def alone() -> None:
        Ready.apply(results, gradients, *weights)[0].backward(grad)  # type: ignore[no-untyped-call]

    def forget() -> None:
        for weight in weights:
            weight.grad = None

    with mock.patch.object(torch._VF, "lstm", skipped):
        if not trains:
            return {"nn_lstm_us": least_microseconds([call], seconds)[0], "empty_backward_us": None}
        stock, empty = least_microseconds([call, alone], seconds, between=forget)
        return {"nn_lstm_us": stock, "empty_backward_us": empty}


def fallback_row(case: CallCase, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Whole calls on the CPU, where no kernel runs. Both modules compute."""
    calls = [call_of(case, module_type, dtype) for module_type in (lstm_triton.LSTM, nn.LSTM)]
    for call in calls:
        call()  # the first one imports
    ours, stock = least_microseconds(calls, seconds)
    return {**case.row(), "us": ours, "nn_lstm_us": stock}

"""`python -m bench.overhead`: what a call costs the host, without a GPU.

The calls have next to nothing to compute, so that all is overhead. For each call it tells:

    operators     PyTorch's operators that launch something on a GPU
    launches      launches of this library's kernels
    functions     calls of functions of Python and C
    microseconds  processor time of Python, of PyTorch's operators on tiny CPU tensors and of Triton's launches; the
                  least of many calls
    nn.LSTM       microseconds of such a call of nn.LSTM, without `torch._VF.lstm`

This needs no GPU, as one is pretended: CPU tensors take the kernels' path with the plans of a GPU of sm_90. Nothing is
compiled, and the driver, which would launch, is left out. With `--compilations H` it tells instead how many kernels a
layer would compile for all batch sizes up to 256.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lstm_triton
from lstm_triton.command_line import Parser, above_zero, whole
from lstm_triton.ending import program
from lstm_triton.scan import backward, cell, forward
from lstm_triton.target import Device, Gpus, KernelLaunch, recorded_launches, running_on, watched_launches

from .resources import DEVICES, DTYPES

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


TWO_LAYERS_BOTH_DIRECTIONS = {"num_layers": 2, "bidirectional": True}
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
)


class Compilations:
    """Replaces Triton's compiler: counts the kernels, and returns kernels that do nothing."""

    def __init__(self) -> None:
        self.of_kernels: Counter[str] = Counter()

    def __call__(self, source: Any, target: Any = None, options: Any = None, **others: Any) -> Any:
        self.of_kernels[source.fn.fn.__name__] += 1
        return SimpleNamespace(
            run=lambda *arguments: None,
            launch_metadata=lambda *arguments: None,
            function=None,
            packed_metadata=None,
        )


class Driver:
    """Replaces Triton's driver of a GPU."""

    def __init__(self, arch: str = "sm_90") -> None:
        self.capability = DEVICES[arch].capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def pretended_gpu(arch: str = "sm_90", compilations: Compilations | None = None) -> Iterator[Compilations]:
    """Let CPU tensors take the kernels' path up to the driver, with kernels that do nothing."""
    import triton.compiler
    from triton.runtime import driver

    from lstm_triton.kernels.backward import backward_scan
    from lstm_triton.kernels.cell import cell_backward, cell_forward
    from lstm_triton.kernels.forward import forward_scan
    from lstm_triton.kernels.lanes import dropout_scales
    from lstm_triton.kernels.recompute import recompute_gates

    compilations = compilations or Compilations()

    class PretendedGpu(Gpus):
        def takes(self, device: torch.device) -> bool:
            return device.type == "cpu"

        def describe(self, device: torch.device) -> Device:
            return DEVICES[arch]

        def may_take_tf32(self, tensor: Tensor) -> bool:
            return tensor.dtype == torch.float32

        def run(self, launch: KernelLaunch) -> None:
            self.run_on_gpu(launch, 0)

    with ExitStack() as stack:

        def patch(target: object, name: str, replacement: object) -> None:
            stack.enter_context(mock.patch.object(target, name, replacement))

        stack.enter_context(running_on(PretendedGpu()))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getDevice", create=True, return_value=0))
        patch(triton.compiler, "compile", compilations)
        for kernel in (forward_scan, backward_scan, cell_forward, cell_backward, recompute_gates, dropout_scales):
            kernel.device_caches.clear()
        patch(driver, "_active", Driver(arch))
        yield compilations


class Operators(TorchDispatchMode):
    """Counts the operators that would launch something on a GPU, also inside of this library's operators."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        own = (forward.scan_forward, backward.scan_backward, cell.single_step, cell.cell_forward, cell.cell_backward)
        self.own = {operator._qualname: operator._init_fn for operator in own}
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = operator.name().split(".")[0]
        if name in self.own:
            with self:
                return self.own[name](*arguments, **(keywords or {}))
        results = operator(*arguments, **(keywords or {}))
        first = results[0] if isinstance(results, (tuple, list)) else results
        launches = isinstance(first, Tensor) and first.numel() > 0 and not operator.is_view
        if launches and not any(part in name for part in ("empty", "detach", "_unsafe_view", "alias")):
            self.counted[name.removeprefix("aten::").removeprefix("lstm_triton::")] += 1
        return results


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


def least_microseconds(call: Callable[[], None], seconds: float) -> float:
    least, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.thread_time()
        call()
        least = min(least, time.thread_time() - start)
    return round(1e6 * least, 1)


def functions(call: Callable[[], None]) -> int:
    """How many functions of Python and C are called in this thread."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def stock_microseconds(case: CallCase, dtype: torch.dtype, seconds: float) -> float | None:
    """Microseconds of nn.LSTM without `torch._VF.lstm`. None for training, which needs this function's results."""
    if case.trains:
        return None
    results: Any = None
    function = torch._VF.lstm

    def once(*arguments: Any) -> Any:
        nonlocal results
        results = function(*arguments)
        return results

    def skipped(*arguments: Any) -> Any:
        return results

    call = call_of(case, nn.LSTM, dtype)
    with mock.patch.object(torch._VF, "lstm", once):
        call()
    with mock.patch.object(torch._VF, "lstm", skipped):
        return least_microseconds(call, seconds)


def row_of(case: CallCase, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    with pretended_gpu():
        call = call_of(case, lstm_triton.LSTM, dtype)
        for _ in range(3):
            call()
        with recorded_launches() as launches, Operators() as operators:
            call()
        return {
            **asdict(case),
            "operators": dict(operators.counted),
            "launches": dict(Counter(each.name for each in launches)),
            "functions": functions(call),
            "microseconds": least_microseconds(call, seconds),
            "nn.LSTM": stock_microseconds(case, dtype, seconds),
        }


def compilations(hidden: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """How many kernels a layer compiles for many inputs, and how many sets of constants its plans have.

    The inputs have all batch sizes up to 256. For some batch sizes there are inputs with several numbers of steps and
    many layouts in memory. The layer runs in training, in inference and step by step.
    """
    module = lstm_triton.LSTM(hidden, hidden, dtype=dtype)
    constants: dict[str, set[str]] = {}
    with pretended_gpu() as found:

        def collect(launched: KernelLaunch) -> None:
            parameters = launched.kernel.params
            chosen = [launched.arguments[each.name] for each in parameters if each.is_constexpr]
            constants.setdefault(launched.name, set()).add(str((chosen, launched.options)))

        with watched_launches(after=collect):
            for batch_size in range(1, 257):
                some = batch_size in (1, 2, 3, 15, 16, 17, 64, 130)
                for input in _inputs(hidden, batch_size, dtype) if some else [torch.empty(2, batch_size, hidden)]:
                    input = input.to(dtype) if input.dtype != dtype else input
                    output, states = module(input)
                    output.backward(torch.empty_like(output))
                    with torch.no_grad():
                        module(input, states)
                        module(input[-1:], states)
    return {name: {"compiled": found.of_kernels[name], "constants": len(sets)} for name, sets in constants.items()}


def _inputs(size: int, batch_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs of one batch size, with several numbers of steps, strides and places in memory."""
    stream = torch.empty(12, batch_size, size + 8, dtype=dtype)
    whole = stream[..., :size].contiguous()
    return [
        *(whole[:steps] for steps in (1, 2, 3, 12)),
        *(whole[start:] for start in (1, 5)),
        whole[::2],
        whole.transpose(0, 1).contiguous().transpose(0, 1),
        *(stream[..., start : start + size] for start in (0, 1, 8)),
        stream.new_empty(1, batch_size, size).expand(3, -1, -1),
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'call':<40} {'operators':>9} {'launches':>8} {'functions':>9} {'us':>8} {'nn.LSTM':>8}"]
    for row in rows:
        counts = (sum(row[name].values()) for name in ("operators", "launches"))
        stock = "-" if row["nn.LSTM"] is None else row["nn.LSTM"]
        lines.append("{:<40} {:>9} {:>8} {:>9} {:>8} {:>8}".format(
            row["name"], *counts, row["functions"], row["microseconds"], stock,
        ))  # fmt: skip
        lines.append("    " + ", ".join(f"{count} {name}" for name, count in sorted(row["operators"].items())))
    return "\n".join(lines)


@program("python -m bench.overhead", extra="bench")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--seconds", type=above_zero, default=1.0, help="how long to time each call")
    parser.add_argument("--compilations", nargs="+", type=whole(), metavar="H", help="count compiled kernels instead")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels are launched in another way")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # kernels that do nothing leave any numbers in memory
    dtype, _ = DTYPES[chosen.dtype]
    if chosen.compilations:
        found = {hidden: compilations(hidden, dtype) for hidden in chosen.compilations}
        print(json.dumps(found) if chosen.json else "\n".join(f"H = {hidden}: {found[hidden]}" for hidden in found))
        return 0
    rows = [row_of(case, dtype, chosen.seconds) for case in CALLS]
    print(json.dumps(rows, indent=1) if chosen.json else _table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.overhead`: what a call costs the host, without a GPU.

The calls (calls.py) have next to nothing to compute, so that all is overhead. For each call it tells:

    operators   PyTorch's operators that launch something on a GPU
    launches    launches of this library's kernels
    functions   calls of functions of Python and C
    us          microseconds of processor time: Python, PyTorch's operators on tiny CPU tensors and Triton's launches;
                the least of many calls
    nn.LSTM     microseconds of such a call of nn.LSTM, without `torch._VF.lstm`
    empty       microseconds of what stands for `torch._VF.lstm` in training: a torch.autograd.Function that computes
                nothing. The column nn.LSTM contains them.

No column has `torch._VF.lstm` itself: all in C++, it checks arguments, allocates, launches and builds a node of the
graph. So in inference nn.LSTM costs more than its column says. In training *empty* is there in its place. A part of it
is nn.LSTM's, too: going backward through a node, down to the gradients of the weights.

This needs no GPU, as one is pretended: CPU tensors take the kernels' path with the plans of a GPU of sm_90. Nothing is
compiled, and the driver, which would launch, is left out. With `--compilations H` it tells instead how many kernels a
layer would compile for all batch sizes up to 256. With `--fallback` nothing is pretended: it times whole calls on the
CPU, this library's path without kernels and nn.LSTM in turns, and both compute.

With `--json` it prints {"rows": [...]}. There the columns nn.LSTM and empty are `nn_lstm_us` and `empty_backward_us`
(null where a call does not train), and operators and launches are counted by name.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lstm_triton
from lstm_triton.command_line import Parser, above_zero, whole
from lstm_triton.ending import program
from lstm_triton.scan import backward, cell, forward
from lstm_triton.target import Device, Gpus, KernelLaunch, recorded_launches, running_on, watched_launches

from .calls import CALLS, FALLBACK_CALLS, CallCase, call_of, fallback_row, least_microseconds, stock_microseconds
from .resources import DEVICES, DTYPES


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


def _first_gpu() -> int:
    return 0


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
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getDevice", _first_gpu, create=True))
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


def row_of(case: CallCase, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    with pretended_gpu():
        call = call_of(case, lstm_triton.LSTM, dtype)
        for _ in range(3):
            call()
        with recorded_launches() as launches, Operators() as operators:
            call()
        return {
            **case.row(),
            "operators": dict(operators.counted),
            "launches": dict(Counter(each.name for each in launches)),
            "functions": functions(call),
            "us": least_microseconds([call], seconds)[0],
            **stock_microseconds(case, dtype, seconds),
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
    form = "{:<40} {:>9} {:>8} {:>9} {:>8} {:>8} {:>8}"
    lines = [form.format("call", "operators", "launches", "functions", "us", "nn.LSTM", "empty")]
    for row in rows:
        counts = (sum(row[name].values()) for name in ("operators", "launches"))
        empty = "-" if row["empty_backward_us"] is None else row["empty_backward_us"]
        lines.append(form.format(row["call"], *counts, row["functions"], row["us"], row["nn_lstm_us"], empty))
        lines.append("    " + ", ".join(f"{count} {name}" for name, count in sorted(row["operators"].items())))
    return "\n".join(lines)


def _fallback_table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'call':<40} {'us':>8} {'nn.LSTM':>8} {'difference':>10}"]
    for row in rows:
        us, stock = row["us"], row["nn_lstm_us"]
        lines.append(f"{row['call']:<40} {us:>8} {stock:>8} {us - stock:>10.1f}")
    return "\n".join(lines)


@program("python -m bench.overhead", extra="bench")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--seconds", type=above_zero, default=1.0, help="how long to time each call")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--compilations", nargs="+", type=whole(), metavar="H", help="count compiled kernels instead")
    instead.add_argument("--fallback", action="store_true", help="time the path without kernels instead, on the CPU")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
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
    row, cases, table = (fallback_row, FALLBACK_CALLS, _fallback_table) if chosen.fallback else (row_of, CALLS, _table)
    rows = [row(case, dtype, chosen.seconds) for case in cases]
    print(json.dumps({"rows": rows}, indent=1) if chosen.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

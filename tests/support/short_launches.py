"""Launches by the short way (lstm_triton/prepared_kernel.py) beside Triton's own way, on a pretended GPU.

It prints what it found. It needs a process in which Triton does not interpret: see `output_of_python`.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import lstm_triton
from bench.overhead import Compilations, pretended_gpu
from lstm_triton import prepared_kernel
from lstm_triton.prepared_kernel import PreparedKernel


class Numbered(Compilations):
    """Kernels that write down their number where they are launched."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled = 0
        self.launched: list[int] = []

    def __call__(self, source: Any, target: Any = None, options: Any = None, **others: Any) -> Any:
        self.compiled += 1
        number = self.compiled
        found: SimpleNamespace = super().__call__(source, target, options, **others)
        found.run = lambda *arguments: self.launched.append(number)
        return found


class Ways:
    """Counts how kernels were launched."""

    def __init__(self) -> None:
        self.short = self.own = self.different = 0


@contextmanager
def compared(kernels: Numbered) -> Iterator[Ways]:
    """Launch each kernel a second time, by Triton's own way."""
    from triton.runtime.jit import JITFunction

    ways, run_on_gpu, run = Ways(), PreparedKernel.run_on_gpu, JITFunction.run
    calls = 0

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(self, *arguments, **options)

    def both(self: PreparedKernel, device: int, values: Sequence[Any]) -> None:
        before = calls
        run_on_gpu(self, device, values)
        if calls == before:
            ways.short += 1
        else:
            ways.own += 1
        self.kernel[self.grid](*values, **self.options)
        second, first = kernels.launched.pop(), kernels.launched.pop()
        ways.different += first != second

    with mock.patch.object(PreparedKernel, "run_on_gpu", both), mock.patch.object(JITFunction, "run", counted):
        yield ways


def misaligned(tensor: Tensor) -> Tensor:
    """A copy whose address is no multiple of 16."""
    return torch.cat([tensor.new_zeros(1), tensor.detach().flatten()])[1:].view(tensor.shape)


def call(module: lstm_triton.LSTM, chance: random.Random, time_steps: int, batch_size: int, dtype: torch.dtype) -> None:
    input = torch.zeros(time_steps, batch_size, module.input_size, dtype=dtype)
    input = misaligned(input) if chance.random() < 0.3 else input
    lanes = module.num_layers * (2 if module.bidirectional else 1)
    state = torch.zeros(lanes, batch_size, module.hidden_size, dtype=dtype)
    states = chance.choice([None, (state, state.clone()), (misaligned(state), state)])
    if chance.random() < 0.5:
        output, _ = module(input, states)
        output.sum().backward()
    else:
        with torch.no_grad():
            module(input, states)


def random_calls(count: int) -> Ways:
    chance, kernels = random.Random(0), Numbered()
    with pretended_gpu(compilations=kernels), compared(kernels) as ways:
        for _ in range(count):
            dtype = chance.choice([torch.float32, torch.float16, torch.bfloat16])
            sizes = chance.choice([1, 8, 16, 24, 33, 64]), chance.choice([1, 8, 16, 24, 33, 64])
            module = lstm_triton.LSTM(
                *sizes, chance.choice([1, 2]), chance.random() < 0.7, bidirectional=chance.random() < 0.3, dtype=dtype
            )
            for weight in module.parameters():
                if chance.random() < 0.1:
                    weight.data = misaligned(weight)
            for _ in range(4):
                call(module, chance, chance.choice([1, 1, 2, 5]), chance.choice([1, 3, 16]), dtype)
    return ways


def in_a_case(case: str) -> Ways:
    """Five calls of one layer, before the last two of which something changes."""
    from triton import knobs

    from lstm_triton.kernels.cell import cell_forward

    kernels, module = Numbered(), lstm_triton.LSTM(16, 16)

    def hook(*_: object) -> None:
        pass

    def nothing(**_: object) -> bool:
        kernels.launched += [0]  # `compared` counts launches
        return True

    with pretended_gpu(compilations=kernels), torch.no_grad(), compared(kernels) as ways:
        known = case != "another Triton"
        with mock.patch.object(prepared_kernel, "_launcher_is_known", return_value=known):
            for number in range(5):
                if number == 3 and case == "hook":
                    knobs.runtime.launch_enter_hook.add(hook)
                if number == 3 and case == "hook of another kind":
                    knobs.runtime.launch_enter_hook = hook
                if number == 3 and case == "knob":
                    knobs.runtime.debug = True
                if number == 3 and case == "hook that launches nothing":
                    knobs.runtime.jit_cache_hook = nothing
                    cell_forward.device_caches.clear()
                if number == 3 and case == "caches":
                    cell_forward.device_caches.clear()
                module(torch.zeros(1, 2, 16))
    knobs.runtime.launch_enter_hook = type(knobs.runtime.launch_exit_hook)()
    knobs.runtime.debug, knobs.runtime.jit_cache_hook = False, None
    return ways


def main() -> int:
    torch.manual_seed(0)
    cases = (
        "nothing",
        "knob",
        "hook",
        "hook of another kind",
        "hook that launches nothing",
        "caches",
        "another Triton",
    )
    found = {"random": vars(random_calls(60)), **{case: vars(in_a_case(case)) for case in cases}}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

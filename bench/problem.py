"""A case with its weights (Problem), and one way to compute it (Runner).

Adapters of systems make runners, and measure.py times them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import BenchCase
from .devices import Cpu

TORCH_DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

Outputs = tuple[Tensor, Tensor, Tensor]  # output (T, B, D * P), or its packed rows; h_n; c_n


class Problem:
    """A case with its weights. Every system gets a problem to compute."""

    def __init__(self, case: BenchCase, device: Cpu, seed: int = 0) -> None:
        self.case = case
        self.device = device
        self.dtype = TORCH_DTYPES[case.dtype]
        self.generator = torch.Generator(device.torch_device).manual_seed(seed)
        torch.manual_seed(seed)
        self.module = nn.LSTM(**self.constructor_arguments(), device=device.torch_device, dtype=self.dtype)
        self.packing: PackedSequence | None = None
        if case.layout == "packed":
            padded = torch.zeros(case.T, case.B, 1, device=device.torch_device)
            self.packing = pack_padded_sequence(padded, torch.tensor(case.lengths), enforce_sorted=False)
        self.lengths: Tensor | None = None  # (B,), on the device, like the batch of a data loader
        if case.layout == "lengths":
            self.lengths = torch.tensor(case.lengths, device=device.torch_device)
        self.resets: Tensor | None = None  # (T, B)
        if case.layout == "resets":
            shape = (case.T, case.B)
            chance = torch.rand(shape, generator=self.generator, device=device.torch_device)
            self.resets = chance < min(0.5, 4 / case.T)  # about four episodes a row

    def constructor_arguments(self) -> dict[str, Any]:
        return {
            "input_size": self.case.I,
            "hidden_size": self.case.H,
            "num_layers": self.case.layers,
            "bidirectional": self.case.bidirectional,
            "proj_size": self.case.proj_size,
        }

    def new_leaf(self) -> Tensor:
        """A new random input: (T, B, I), or the rows of a packed sequence."""
        rows = (self.case.T, self.case.B) if self.packing is None else self.packing.data.shape[:1]
        return torch.randn(
            *rows, self.case.I, generator=self.generator, device=self.device.torch_device, dtype=self.dtype
        )

    def shape_input(self, leaf: Tensor) -> Tensor | PackedSequence:
        """An input as a module takes it."""
        return leaf if self.packing is None else self.packing._replace(data=leaf)


@dataclass
class Runner:
    """One way in which one system computes one problem.

    Attributes:
        call: computes the outputs from an adapted input.
        parameters: the weights, in nn.LSTM's order and layout.
        adapt: gives an input the layout and the dtype of the system. This is not timed.
        label: names the variant, or tells what is worth knowing about it. It goes into the row's message.
        modules: are put in training or evaluation mode.
        checked: False where there are no results to compare with nn.LSTM's.
        compared: False for a variant with other results. Only the message has its time.
    """

    call: Callable[[Tensor], Outputs]
    parameters: Sequence[Tensor]
    adapt: Callable[[Tensor], Tensor] = lambda leaf: leaf
    label: str = ""
    modules: list[nn.Module] = field(default_factory=list)
    checked: bool = True
    compared: bool = True


def module_runner(
    problem: Problem, module: Callable[..., Any], parameters: Sequence[Tensor], label: str = ""
) -> Runner:
    """The runner of a module, or of a function that is called like nn.LSTM."""

    def call(leaf: Tensor) -> Outputs:
        output, (h_n, c_n) = module(problem.shape_input(leaf))
        return (output.data if isinstance(output, PackedSequence) else output), h_n, c_n

    return Runner(call, parameters, label=label, modules=[module] if isinstance(module, nn.Module) else [])

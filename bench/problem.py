"""A case made real: its weights and inputs (Problem), and one way to compute it (Runner).

Systems, the floor and the measuring all speak of these.
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
    """A case with its weights: what every system is given."""

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
        self.lengths: Tensor | None = None  # (B,), on the device, as a data loader's batch is
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
        """A fresh random input: (T, B, I), or the rows of a packed one."""
        rows = (self.case.T, self.case.B) if self.packing is None else self.packing.data.shape[:1]
        return torch.randn(
            *rows, self.case.I, generator=self.generator, device=self.device.torch_device, dtype=self.dtype
        )

    def shape_input(self, leaf: Tensor) -> Tensor | PackedSequence:
        """What a module takes."""
        return leaf if self.packing is None else self.packing._replace(data=leaf)


@dataclass
class Runner:
    """One way to run one system on one problem."""

    call: Callable[[Tensor], Outputs]  # takes what `adapt` gives
    parameters: Sequence[Tensor]  # in nn.LSTM's order and layout
    adapt: Callable[[Tensor], Tensor] = lambda leaf: leaf  # to the system's own layout and dtype
    label: str = ""  # which variant it is, or what is worth knowing about it: goes into the row's message
    modules: list[nn.Module] = field(default_factory=list)  # put in training or evaluation mode
    checked: bool = True  # False: it computes nothing that could be compared
    compared: bool = True  # False: it computes something else, whose time goes into the message only


def module_runner(
    problem: Problem, module: Callable[..., Any], parameters: Sequence[Tensor], label: str = ""
) -> Runner:
    """A runner for anything that is called like nn.LSTM."""

    def call(leaf: Tensor) -> Outputs:
        output, (h_n, c_n) = module(problem.shape_input(leaf))
        return (output.data if isinstance(output, PackedSequence) else output), h_n, c_n

    return Runner(call, parameters, label=label, modules=[module] if isinstance(module, nn.Module) else [])

"""Whole stacks of layers, through the kernels and through nn.LSTM: what kernel tests compare, over which cases."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton import interpreter
from lstm_triton.scan import dropout, planner
from lstm_triton.scan.plan import Kind, Plan, ScanShape
from lstm_triton.target import Device
from tests.support.comparing import LoopLSTM, assert_results_as_accurate, run
from tests.support.lanes import DTYPES, interpretable

BOTH: tuple[Kind, Kind] = ("forward", "backward")
LAYOUTS = ("dense", "packed", "resets")  # the last one with lengths, too
LENGTHS = (2, 0, 3, 1, 3)


@dataclass
class StackCase:
    """A stack of layers, an input for it, and the plans that its scans are to run with (else: the planner's own).

    With "lengths", "packed" and "resets", sequences differ in length, and the input holds NaN past their ends.
    """

    num_layers: int = 1
    bidirectional: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "dense"
    hidden_size: int = 11
    input_size: int = 3
    time_steps: int = 3
    batch_size: int = 5
    proj_size: int = 0
    bias: bool = True
    states: bool = True
    cells: bool = False  # every c is asked for; not of packed sequences
    dropout: float = 0.0
    plans: dict[Kind, Plan] = field(default_factory=dict)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def steps(self) -> int:
        """Of the longest sequence of a packed batch, of all others T."""
        return int(self.lengths.max()) if self.layout == "packed" else self.time_steps

    @property
    def lengths(self) -> Tensor:
        repeated = (LENGTHS * self.batch_size)[: self.batch_size]
        shortest = 1 if self.layout == "packed" else 0
        return torch.tensor(repeated).clamp(shortest, self.time_steps)

    def ours(self) -> lstm_triton.LSTM:
        module = lstm_triton.LSTM(**self.options(), dropout=self.dropout)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * self.hidden_size**-0.5)
        return module

    def options(self) -> dict[str, Any]:
        names = ("input_size", "hidden_size", "num_layers", "bidirectional", "bias", "proj_size", "dtype")
        return {name: getattr(self, name) for name in names}

    def stock(self) -> nn.LSTM:
        """nn.LSTM with the same weights, step by step where it has no other way."""
        plain = self.layout in ("dense", "packed") and not self.cells and not self.dropout
        module = (nn.LSTM if plain else LoopLSTM)(**self.options())
        module.load_state_dict(self.ours().state_dict())
        if self.dropout:
            module.masks = [self.mask(lane) for lane in range((self.num_layers - 1) * self.directions)]
        return module

    def mask(self, lane: int) -> Tensor:
        """(steps, B, H) float64, 0 or 1 / (1 - dropout): what `run` makes the scan multiply a lane's output with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            seed = torch.randint(2**63 - 1, (1,))
        shape = (self.steps, self.batch_size)
        rows = int(self.lengths.sum()) if self.layout == "packed" else self.steps * self.batch_size
        with interpreter.interpret():
            kept = dropout.dropout_scale(seed, lane, self.dropout, torch.empty(rows, self.hidden_size)) > 0
        if self.layout == "packed":
            kept, _ = pad_packed_sequence(self.packed(torch.zeros(*shape, 1))._replace(data=kept))
        return kept.view(*shape, -1).double() / (1 - self.dropout)

    def packed(self, padded: Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, self.lengths, enforce_sorted=False)

    def arguments(self) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor] | None, dict[str, Any]]:
        """Input, states, and what else `run` takes."""
        generator = torch.Generator().manual_seed(1)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(self.dtype)

        def states() -> tuple[Tensor, Tensor]:
            sizes = (self.num_layers * self.directions, self.batch_size)
            return random(*sizes, self.proj_size or self.hidden_size), random(*sizes, self.hidden_size)

        input = random(self.time_steps, self.batch_size, self.input_size)
        hx = states() if self.states else None
        extra: dict[str, Any] = {"cells": self.cells}
        if self.layout != "dense":
            is_step = torch.arange(self.time_steps).unsqueeze(1) < self.lengths
            input = torch.where(is_step.unsqueeze(2), input, torch.nan)
        if self.layout == "packed":
            return self.packed(input), hx, extra
        if self.layout != "dense":
            extra["lengths"] = self.lengths
        if self.layout == "resets":
            extra["resets"] = torch.rand(self.time_steps, self.batch_size, generator=generator) < 1 / 3
            extra |= {"reset_state": states()} if self.states else {}
        return input, hx, extra

    @contextmanager
    def kernels(self, seed: int = 0) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(interpreter.interpret(seed))
            stack.enter_context(lstm_triton.backend("triton"))
            for kind, plan in self.plans.items():
                stack.enter_context(planner.forced(plan, kind))
            yield

    def run(self, seed: int = 0) -> dict[str, Tensor]:
        """Results and gradients by name."""
        input, hx, extra = self.arguments()
        with self.kernels(seed):
            return run(self.ours(), input, hx, **extra)

    def infer(self, seed: int = 0) -> dict[str, Tensor]:
        """Results alone, where no gradient is asked for."""
        input, hx, extra = self.arguments()
        module = self.ours()
        call: Any = module.with_cells if extra.pop("cells") else module
        with self.kernels(seed), torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output, (h_n, c_n), *cells = call(input, hx, **extra)
        found = {"output": output.data if isinstance(output, PackedSequence) else output, "h_n": h_n, "c_n": c_n}
        return found | dict(zip(("cells",), cells, strict=False))

    def check(self, seed: int = 0) -> None:
        """As accurate as nn.LSTM, in every result and gradient."""
        print(self)
        input, hx, extra = self.arguments()
        assert_results_as_accurate(self.run(seed), self.stock(), input, hx, **extra)

    def candidates(
        self, kind: Kind, lanes: int, multiprocessors: int = 16, shared_bytes: int = 64 * 1024
    ) -> list[Plan]:
        """Every plan for launches of so many lanes on such a device."""
        shape = ScanShape(
            kind,
            batch_size=self.batch_size,
            input_size=max(self.input_size, self.directions * (self.proj_size or self.hidden_size)),
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            device=Device("small", "interpreter", multiprocessors, shared_bytes),
            allow_tf32=False,
            lanes=lanes,
            chained=lanes > 1 and not self.bidirectional,
        )
        return [interpretable(each) for each in planner.candidates(shape)]

    def launched(self, lanes: int, several_tiles: bool = False, kinds: tuple[Kind, ...] = BOTH) -> "StackCase":
        """The same with so many lanes in every launch; `several_tiles`: one program takes all batch tiles of a lane."""
        plans = {}
        for kind in kinds:
            found = self.candidates(kind, lanes)
            if several_tiles:
                found = [replace(each, groups=1) for each in found if each.batch_tiles > 1]
            plans[kind] = next(each for each in found if not each.fuse_input and each.slices > 1)
        return replace(self, plans=plans)


@st.composite
def stack_cases(draw: st.DrawFn, projections: bool = False, dropouts: bool = False) -> StackCase:
    """Any stack with any plans that fit a small device: chained, in groups or not, one batch tile or several."""
    bidirectional = draw(st.booleans())
    num_layers = draw(st.integers(1, 2 if bidirectional else 4))
    # Of fewer numbers, a gradient that cancels has no typical error.
    hidden_size = draw(st.integers(6, 24))
    layout = draw(st.sampled_from((*LAYOUTS, "lengths")))
    stack = StackCase(
        num_layers,
        bidirectional,
        dtype=draw(st.sampled_from(DTYPES)),
        layout=layout,
        hidden_size=hidden_size,
        input_size=draw(st.integers(4, 20)),
        time_steps=draw(st.integers(1, 4)),
        batch_size=draw(st.integers(4, 18)),
        proj_size=draw(st.integers(2, hidden_size - 1)) if projections else 0,
        bias=draw(st.booleans()),
        states=draw(st.booleans()),
        cells=layout != "packed" and draw(st.booleans()),
        dropout=draw(st.sampled_from((0.2, 0.5))) if dropouts and num_layers > 1 else 0.0,
    )
    for kind in BOTH:
        lanes = draw(st.integers(1, 2 if bidirectional else 1 if projections else num_layers))
        device = {
            "multiprocessors": lanes * draw(st.integers(1, 6)),
            "shared_bytes": draw(st.sampled_from((32, 64, 200))) * 1024,
        }
        if found := stack.candidates(kind, lanes, **device):
            stack.plans[kind] = draw(st.sampled_from(found))
    return stack

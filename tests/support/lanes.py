"""One layer in one direction, through the kernels and through nn.LSTM: what kernel tests compare, over which cases."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lstm_triton import interpreter
from lstm_triton.ragged import Ragged, dense, packed
from lstm_triton.reference import lstm_layer
from lstm_triton.scan import layers, planner
from lstm_triton.scan.plan import Kind, Plan, ScanShape
from lstm_triton.stack import Lane, LaneResults, LaneWeights, Options, Stack, Start
from lstm_triton.target import Device
from tests.support.comparing import assert_as_accurate, floor_of, loop_layer, nudged

NAMES = ("output", "h_n", "c_n", "cells")
ARGUMENTS = ("input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "h_reset", "c_reset")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def as_layer(lane: Lane) -> Callable[..., LaneResults]:
    """A lane with the parameters of `lstm_triton.reference.lstm_layer`."""

    def layer(
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor | None,
        reverse: bool = False,
        h_reset: Tensor | None = None,
        c_reset: Tensor | None = None,
        ragged: Ragged | None = None,
        return_cells: bool = False,
    ) -> LaneResults:
        start, own = Start(h_0, c_0, h_reset, c_reset), LaneWeights(*weights)  # type: ignore[arg-type]
        return lane(input, start, own, reverse=reverse, ragged=ragged, return_cells=return_cells)

    return layer


def scan_lane(
    input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None, return_cells: bool
) -> LaneResults:
    """A lane through the kernels, by itself."""
    stack, starts = Stack((weights,), reverse=reverse), start.map(lambda state: state.unsqueeze(0))
    output, *others = layers.scan_layers(input, starts, stack, Options(ragged, return_cells=return_cells))
    return output, *(other.squeeze(0) for other in others)


scan_layer = as_layer(scan_lane)


@dataclass
class LaneCase:
    """A layer's sizes and options, and the plans its scans are to run with (None: the planner's own).

    It is ragged with `lengths` (of each sequence), `packed` (as the rows of a PackedSequence; lengths from 1 on, the
    longest first) or `resets` (some steps start anew). The input holds NaN where there is no step.
    """

    seq_len: int
    batch_size: int
    input_size: int
    hidden_size: int
    dtype: torch.dtype = torch.float32
    reverse: bool = False
    states: bool = True
    bias: bool = True
    device: str = "cpu"
    forward: Plan | None = None
    backward: Plan | None = None
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    resets: bool = False
    cells: bool = False  # every c is asked for

    @property
    def ragged(self) -> bool:
        return self.lengths is not None or self.packed or self.resets

    def steps_of_sequences(self) -> Tensor:
        return torch.tensor(self.lengths if self.lengths is not None else [self.seq_len] * self.batch_size)

    def starts(self) -> Tensor | None:
        """(T, B) where steps start anew: a third of them, some first ones and some past the end among them."""
        if not self.resets:
            return None
        generator = torch.Generator().manual_seed(self.batch_size)
        return (torch.rand(self.seq_len, self.batch_size, generator=generator) < 1 / 3).to(self.device)

    def packing(self) -> PackedSequence:
        """The numbers t * B + b of the steps, packed."""
        numbers = torch.arange(self.seq_len * self.batch_size).view(self.seq_len, self.batch_size, 1)
        return pack_padded_sequence(numbers, self.steps_of_sequences())

    def tables(self) -> Ragged | None:
        if self.packed:
            return packed(self.packing().batch_sizes, torch.device(self.device))
        if not self.ragged:
            return None
        lengths = None if self.lengths is None else self.steps_of_sequences().to(self.device)
        return dense(lengths, self.starts(), self.seq_len, self.batch_size, torch.device(self.device))

    def reset_tensors(self) -> list[Tensor | None]:
        """The arguments h_reset and c_reset of scan_layer."""
        if not (self.resets and self.states):
            return [None, None]
        generator = torch.Generator().manual_seed(self.hidden_size + 1)
        sizes = (2, self.batch_size, self.hidden_size)
        return list((2 * torch.rand(sizes, generator=generator) - 1).to(self.dtype).to(self.device))

    def tensors(self) -> list[Tensor | None]:
        """The arguments of scan_layer in its order, as far as they are positional."""
        generator = torch.Generator().manual_seed(self.hidden_size)

        def uniform(*sizes: int) -> Tensor:
            return (2 * torch.rand(sizes, generator=generator) - 1).to(self.dtype).to(self.device)

        gates, scale = 4 * self.hidden_size, self.hidden_size**-0.5
        input = 2 * uniform(self.seq_len, self.batch_size, self.input_size)
        if self.ragged:
            is_step = torch.arange(self.seq_len).unsqueeze(1) < self.steps_of_sequences()
            input = torch.where(is_step.unsqueeze(2).to(self.device), input, torch.nan).flatten(0, 1)
            input = input[self.packing().data.squeeze(1).to(self.device)] if self.packed else input
        return [
            input,
            uniform(self.batch_size, self.hidden_size) if self.states else None,
            uniform(self.batch_size, self.hidden_size) if self.states else None,
            uniform(gates, self.input_size) * self.input_size**-0.5,
            uniform(gates, self.hidden_size) * scale,
            uniform(gates) * scale if self.bias else None,
            uniform(gates) * scale if self.bias else None,
        ]

    def run(
        self, function: object, change: Callable[[Tensor], Tensor] = lambda tensor: tensor, seed: int = 0
    ) -> dict[str, Tensor]:
        """Results and gradients by name; `function` has scan_layer's parameters, `change` makes its arguments."""
        tensors = [*self.tensors(), *self.reset_tensors()]
        arguments = [tensor if tensor is None else change(tensor).detach().requires_grad_() for tensor in tensors]
        options: dict[str, Any] = {"reverse": self.reverse}
        if self.ragged or self.cells:
            options |= {"h_reset": arguments[7], "c_reset": arguments[8], "ragged": self.tables()}
            options["return_cells"] = self.cells
        with ExitStack() as stack:
            if function is scan_layer and self.device == "cpu":
                stack.enter_context(interpreter.interpret(seed))
            kinds: tuple[tuple[Kind, Plan | None], ...] = (("forward", self.forward), ("backward", self.backward))
            for kind, plan in kinds:
                if plan is not None:
                    stack.enter_context(planner.forced(plan, kind))
            results = function(*arguments[:7], **options)  # type: ignore[operator]
            generator = torch.Generator().manual_seed(1)
            grads = [torch.randn(r.shape, generator=generator).bfloat16().to(r.device, r.dtype) for r in results]
            torch.autograd.backward(results, grads)
        found = dict(zip(NAMES, results, strict=False))
        found |= {f"gradient of {n}": t.grad for n, t in zip(ARGUMENTS, arguments, strict=True) if t is not None}
        return {name: tensor.detach() for name, tensor in found.items()}

    def stock(self, *arguments: Tensor | None, reverse: bool, **options: Any) -> tuple[Tensor, ...]:
        """nn.LSTM as a function with scan_layer's parameters."""
        input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh = arguments
        assert input is not None
        if options:
            return self.stock_loop(*arguments, reverse=reverse, **options)
        module = nn.LSTM(self.input_size, self.hidden_size, bias=self.bias, dtype=input.dtype, device=self.device)
        weights = {"weight_ih_l0": weight_ih, "weight_hh_l0": weight_hh, "bias_ih_l0": bias_ih, "bias_hh_l0": bias_hh}
        hx = None if h_0 is None or c_0 is None else (h_0.unsqueeze(0), c_0.unsqueeze(0))
        output, (h_n, c_n) = torch.func.functional_call(
            module,
            {name: weight for name, weight in weights.items() if weight is not None},
            (input.flip(0) if reverse else input, hx),
        )
        return output.flip(0) if reverse else output, h_n[0], c_n[0]

    def stock_loop(
        self,
        input: Tensor,
        *arguments: Tensor | None,
        reverse: bool,
        h_reset: Tensor | None,
        c_reset: Tensor | None,
        ragged: Ragged | None,
        return_cells: bool,
    ) -> tuple[Tensor, ...]:
        """nn.LSTM step by step, without the tables."""
        lengths = self.steps_of_sequences().to(self.device)
        if self.packed:
            packing = self.packing()
            input, _ = pad_packed_sequence(packing._replace(data=input), total_length=self.seq_len)
        elif self.ragged:
            input = input.unflatten(0, (self.seq_len, self.batch_size))
        output, h_n, c_n, cells = loop_layer(
            input, *arguments, reverse=reverse, lengths=lengths, resets=self.starts(), h_reset=h_reset, c_reset=c_reset
        )
        if self.ragged:
            output, cells = output.flatten(0, 1), cells.flatten(0, 1)
        if self.packed:
            rows = packing.data.squeeze(1).to(self.device)
            output, cells = output[rows], cells[rows]
        return (output, h_n, c_n, cells) if return_cells else (output, h_n, c_n)

    def check(self, seed: int = 0) -> None:
        """The kernels are as accurate as nn.LSTM, in every result and gradient."""
        print(self)
        actual = self.run(scan_layer, seed=seed)
        # The formula reads the same tables as the kernels do: for ragged layers it is no judge of them.
        yardstick = self.stock if self.ragged else lstm_layer
        reference, stock = self.run(yardstick, torch.Tensor.double), self.run(self.stock)
        sensitive = self.run(yardstick, lambda tensor: nudged(tensor.double(), self.dtype))
        for name, tensor in actual.items():
            floor = floor_of(sensitive[name], reference[name], self.dtype)
            assert_as_accurate(tensor, reference[name], stock[name], floor=floor, name=name)


@st.composite
def lane_cases(draw: st.DrawFn, largest_hidden: int = 50, ragged: bool = False) -> LaneCase:
    """Any layer with any plan that fits a small device: one program or many, one tile or several, streamed or not."""
    sizes = {
        "batch_size": draw(st.integers(1, 20)),
        "input_size": draw(st.integers(1, 40)),
        "hidden_size": draw(st.integers(1, largest_hidden)),
        "dtype": draw(st.sampled_from(DTYPES)),
    }
    plans = {}
    for kind in ("forward", "backward"):
        device = Device(
            "small",
            arch=draw(st.sampled_from(("interpreter", "sm_90"))),
            multiprocessors=draw(st.integers(1, 12)),
            shared_bytes=draw(st.sampled_from((16, 32, 64, 200))) * 1024,
        )
        found = planner.candidates(ScanShape(kind, **sizes, device=device, allow_tf32=False))
        if found:
            plan = draw(st.sampled_from(found))
            if plan.split_k > 1 and draw(st.booleans()):
                smaller = streamed(plan, sizes["hidden_size"] * (1 if kind == "forward" else 4))
                plan = smaller if smaller.chunks > 1 else plan
            plans[kind] = interpretable(plan)
    seq_len = draw(st.integers(1, 4))
    options: dict[str, Any] = {}
    if ragged:
        as_rows = draw(st.booleans())
        batch = {"min_size": sizes["batch_size"], "max_size": sizes["batch_size"]}
        lengths = draw(st.lists(st.integers(1 if as_rows else 0, seq_len), **batch))
        lengths = [seq_len, *sorted(lengths[1:], reverse=True)] if as_rows else lengths
        options = {"lengths": tuple(lengths), "packed": as_rows, "resets": not as_rows and draw(st.booleans())}
        options["cells"] = draw(st.booleans())
    return LaneCase(
        seq_len=seq_len,
        **sizes,
        **options,
        reverse=draw(st.booleans()),
        states=draw(st.booleans()),
        bias=draw(st.booleans()),
        **plans,
    )


def interpretable(plan: Plan) -> Plan:
    """The plan without what only a GPU can do: the interpreter has no inline assembly."""
    return replace(plan, thread_elements=0, packed=False, dot_precision="ieee", tf32_rounding="", hold=0)


def streamed(plan: Plan, depth: int) -> Plan:
    """The plan with chunks of which one stays in registers and the last one of the product's `depth` is streamed.

    Registers alone would hold all weights of a layer that is small enough for tests.
    """
    parts = plan.split_k if plan.chunks > 2 else 2
    block_k = plan.block_k // plan.split_k * parts
    chunks = -(-depth // block_k)
    return replace(
        plan, block_k=block_k, split_k=parts, num_warps=parts, chunks=chunks, resident_chunks=chunks - 1,
        register_chunks=1, group_chunks=1, fuse_input=False,
    )  # fmt: skip

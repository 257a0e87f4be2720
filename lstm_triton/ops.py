"""The two scans of a stack of layers as PyTorch operators: they ask the planner, allocate buffers and launch kernels.

A *lane* is one direction of one layer; a stack has layer after layer, in each the forward and then the reverse
direction. Every buffer has a block for each lane. The rows of a block are state rows where `Layout` says so.
"""

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import planner, transforms
from .planner import MIN_DOT_DEPTH, Device, Kind, Launch, Plan, state_stride
from .ragged import Ragged

PREACTIVATION_BYTES = 2**30  # of input projections at a time, where they are not kept
LOW_MEMORY_WINDOWS = 16  # with low_memory, forward and backward take the steps in as many windows at the most,
LOW_MEMORY_STEPS = 32  # of as many steps at the least

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Layout(NamedTuple):
    """State rows (kernels/forward.py): B initial states, the rows of the steps, B initial states of the reverse
    direction; of a ragged batch, B states to start anew from besides. A row has `state_stride(H)` elements, those past
    H are padding.
    """

    rows: int  # of the steps: T * B, or as many as a ragged batch has
    batch_size: int
    hidden_size: int
    ragged: bool

    @staticmethod
    def of(steps: Tensor, hidden_size: int, tables: Sequence[Tensor]) -> "Layout":
        """For steps (T, B, ...), or of a ragged batch (rows, ...)."""
        if tables:
            return Layout(steps.shape[0], Ragged(*tables).batch_size, hidden_size, True)
        return Layout(steps.shape[0] * steps.shape[1], steps.shape[1], hidden_size, False)

    @property
    def stride(self) -> int:
        return state_stride(self.hidden_size)

    @property
    def state_rows(self) -> int:
        return self.rows + (3 if self.ragged else 2) * self.batch_size

    @property
    def steps(self) -> slice:
        return slice(self.batch_size, self.batch_size + self.rows)

    @property
    def anew(self) -> slice:
        """The states to start anew from, of a ragged batch."""
        return slice(self.rows + 2 * self.batch_size, None)

    def initial(self, reverse: bool) -> slice:
        """The initial states, or, for the other direction, the rows after the last steps."""
        first = self.rows + self.batch_size if reverse else 0
        return slice(first, first + self.batch_size)

    def previous(self, reverse: bool) -> slice:
        """What the steps start from, in the order of `steps`; not of a ragged batch."""
        first = 2 * self.batch_size if reverse else 0
        return slice(first, first + self.rows)

    def last(self, reverse: bool) -> slice:
        """The last steps of the sequences; not of a ragged batch."""
        first = self.batch_size if reverse else self.rows
        return slice(first, first + self.batch_size)


class Stack(NamedTuple):
    """The weights of a stack of layers.

    Attributes:
        weights: of each lane weight_ih, weight_hh, and with `bias` bias_ih and bias_hh.
        directions: 1 or 2.
        reverse: whether the first direction walks from the last step to the first.
    """

    weights: Sequence[Tensor]
    directions: int
    bias: bool
    reverse: bool

    @property
    def weights_per_lane(self) -> int:
        return 4 if self.bias else 2

    @property
    def lanes(self) -> int:
        return len(self.weights) // self.weights_per_lane

    @property
    def num_layers(self) -> int:
        return self.lanes // self.directions

    @property
    def hidden_size(self) -> int:
        return self.weights[1].shape[1]

    def named(self, name: str) -> Sequence[Tensor]:
        """One weight of every lane."""
        return self.weights[WEIGHTS.index(name) :: self.weights_per_lane]

    def is_reverse(self, lane: int) -> bool:
        return self.reverse != (lane % self.directions == 1)

    def layer(self, number: int) -> slice:
        """The lanes of a layer."""
        return slice(number * self.directions, (number + 1) * self.directions)

    def by_direction(self) -> list[tuple[slice, bool]]:
        """The lanes of each direction, and whether it walks from the last step to the first."""
        return [
            (slice(first, None, self.directions), self.is_reverse(first))
            for first in range(min(self.directions, self.lanes))
        ]

    def of(self, lanes: slice) -> "Stack":
        """Some of the lanes."""
        size = self.weights_per_lane
        weights = self.weights[size * lanes.start : size * lanes.stop]
        return Stack(weights, self.directions, self.bias, self.is_reverse(lanes.start))


def allows_tf32() -> bool:
    """Whether cuDNN would be let compute a float32 LSTM in TF32."""
    # torch.backends.cudnn.rnn.fp32_precision, which some versions of PyTorch hide behind a module of that name.
    return bool(torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32")


def launches_of(
    kind: Kind,
    *,
    num_layers: int,
    directions: int,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    fuse_input: bool = True,
) -> tuple[Launch, ...]:
    """The launches of one scan over a stack, in the order of its layers.

    Unless `fuse_input`, all input projections are computed beforehand.
    """
    found = planner.launches(
        kind,
        num_layers=num_layers,
        directions=directions,
        batch_size=batch_size,
        input_size=input_size,
        hidden_size=hidden_size,
        dtype=dtype,
        device=Device.of(device),
        allow_tf32=allows_tf32(),
    )
    if fuse_input:
        return found
    return tuple(replace(launch, plan=replace(launch.plan, fuse_input=False)) for launch in found)


def _launches(kind: Kind, stack: Stack, steps: Tensor, batch_size: int, fuse_input: bool = True) -> tuple[Launch, ...]:
    return launches_of(
        kind,
        num_layers=stack.num_layers,
        directions=stack.directions,
        batch_size=batch_size,
        input_size=stack.weights[0].shape[1],
        hidden_size=stack.hidden_size,
        dtype=steps.dtype,
        device=steps.device,
        fuse_input=fuse_input,
    )


@torch.library.custom_op("lstm_triton::scan_forward", mutates_args=())
def scan_forward(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    bias: bool,
    reverse: bool,
    keep_cells: bool,
    keep_gates: bool,
    tables: Sequence[Tensor],
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    preact_0: Tensor | None = None,
    preact_reset: Tensor | None = None,
    low_memory: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps of a stack of layers.

    Args:
        input: (T, B, I), or of a ragged batch (rows, I).
        h_0, c_0: (lanes, B, H), or None for zeros.
        weights, directions, bias, reverse: see `Stack`.
        keep_cells, keep_gates: what to keep; `scan_backward` needs both.
        tables: the fields of `Ragged`, empty if the batch is not ragged.
        h_reset, c_reset: (lanes, B, H), where sequences start anew from, or None for zeros.
        dropout: the probability of dropout on the output of all layers but the last.
        seed: (1,) int64 on the input's device, of dropout; needed where there is any.
        preact_0, preact_reset: (lanes, B, 4H), or None: added to the pre-activations of steps that start from the
            initial state, or anew: the share of states that are no h of this stack. For a single layer.
        low_memory: keep, instead of cells and gates, what `low_memory.gradients` needs.

    Returns:
        hidden: (lanes, state rows, state_stride(H)) h in the input's dtype; of a ragged batch, zeros where there is no
            step. Unless `keep_cells` or `low_memory`, of the last layer's lanes only.
        passed: `hidden` after dropout, of all layers but the last, if `keep_cells` and there is any.
        cell: float32 c, shaped as `hidden`, if `keep_cells`; with `low_memory` (lanes, LOW_MEMORY_WINDOWS, B,
            state_stride(H)), the c from which each window starts.
        gates: (lanes, rows, 4H) activated gates in the input's dtype, if `keep_gates`.
        h_n, c_n: (lanes, B, H) the final states.

        What is not kept is empty.
    """
    stack = Stack(weights, directions, bias, reverse)
    layout = Layout.of(input, stack.hidden_size, tables)
    ragged = Ragged(*tables) if tables else None
    rows_of_cells = layout.state_rows if keep_cells else (2 if layout.ragged else 1) * layout.batch_size

    def new_buffers(lanes: int, drop: bool, hidden: Tensor | None = None) -> _Buffers:
        hidden = sentinels((lanes, layout.state_rows, layout.stride), input) if hidden is None else hidden
        passed = sentinels((lanes if drop else 0, layout.state_rows, layout.stride), input)
        cell = input.new_empty((lanes, rows_of_cells, layout.stride), dtype=torch.float32)
        gates = input.new_empty((lanes if keep_gates else 0, layout.rows, 4 * stack.hidden_size))
        return _Buffers(hidden, passed, cell, gates)

    kept = new_buffers(stack.lanes if keep_cells or low_memory else 0, dropout > 0 and not low_memory)
    if low_memory:
        kept = kept._replace(cell=cell_starts_of(input, layout, stack.lanes))
    h_n, c_n = (input.new_empty(stack.lanes, layout.batch_size, stack.hidden_size) for _ in range(2))
    below = input if ragged is None else input.contiguous()
    outputs: list[Tensor] = []  # (rows, H) of the lanes of a layer
    last_hidden: list[Tensor] = []
    # The shares of states are added to input projections that are in memory.
    fuse_input = preact_0 is None and preact_reset is None
    for launch in _launches("forward", stack, input, layout.batch_size, fuse_input):
        lanes = slice(launch.lanes.start, launch.lanes.stop)
        part = stack.of(lanes)
        dropped = _dropped_lanes(launch, stack, dropout)
        if keep_cells:
            buffers = kept.of(lanes)
        else:
            buffers = new_buffers(launch.plan.lanes, dropped > 0, kept.hidden[lanes] if low_memory else None)
        cell_starts = kept.cell[lanes] if low_memory else None
        starts = [None if each is None else each[lanes] for each in (h_0, c_0, h_reset, c_reset)]
        _start(buffers, layout, ragged, part, starts)
        preacts = [None if each is None else each[lanes] for each in (preact_0, preact_reset)]
        _run_forward(
            launch, part, buffers, layout, ragged, below, preacts, keep_cells, cell_starts, dropped, dropout, seed
        )
        for own, reverse in part.by_direction():
            last = layout.last(reverse) if ragged is None else ragged.ends(reverse)
            h_n[lanes][own] = buffers.hidden[own, last, : stack.hidden_size]
            if keep_cells:
                c_n[lanes][own] = buffers.cell[own, last, : stack.hidden_size]
        if not keep_cells:
            c_n[lanes] = buffers.cell[:, : layout.batch_size, : stack.hidden_size]
        for at in range(launch.plan.lanes):
            last_hidden = [*last_hidden, buffers.hidden[at]][-directions:]
            if len(outputs) == directions:
                outputs = []
            source = buffers.passed if at < dropped else buffers.hidden
            outputs.append(source[at, layout.steps, : stack.hidden_size])
        if len(outputs) == directions and launch.lanes.stop < stack.lanes:
            below = (outputs[0] if directions == 1 else torch.cat(outputs, dim=1)).view(*input.shape[:-1], -1)
    if keep_cells or low_memory:
        return *kept, h_n, c_n
    hidden, passed, cell, gates = kept
    # A copy of the last layer, where it has no buffer of its own: a view would keep the layers below in memory.
    hidden = buffers.hidden if launch.plan.lanes == directions else torch.stack(last_hidden)
    return hidden, passed, cell, gates, h_n, c_n


@scan_forward.register_fake
def _(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    bias: bool,
    reverse: bool,
    keep_cells: bool,
    keep_gates: bool,
    tables: Sequence[Tensor],
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    preact_0: Tensor | None = None,
    preact_reset: Tensor | None = None,
    low_memory: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    stack = Stack(weights, directions, bias, reverse)
    layout = Layout.of(input, stack.hidden_size, tables)
    h_n, c_n = (input.new_empty(stack.lanes, layout.batch_size, stack.hidden_size) for _ in range(2))
    gates = input.new_empty(stack.lanes if keep_gates else 0, layout.rows, 4 * stack.hidden_size)
    if low_memory:
        hidden = input.new_empty(stack.lanes, layout.state_rows, layout.stride)
        passed = input.new_empty(0, layout.state_rows, layout.stride)
        return hidden, passed, cell_starts_of(input, layout, stack.lanes), gates, h_n, c_n
    kept = stack.lanes if keep_cells else 0
    hidden = input.new_empty(kept or directions, layout.state_rows, layout.stride)
    passed = input.new_empty(kept if dropout > 0 else 0, layout.state_rows, layout.stride)
    rows_of_cells = layout.state_rows if keep_cells else (2 if layout.ragged else 1) * layout.batch_size
    cell = input.new_empty(kept, rows_of_cells, layout.stride, dtype=torch.float32)
    return hidden, passed, cell, gates, h_n, c_n


class _Buffers(NamedTuple):
    """What the forward scan writes; a block for each lane."""

    hidden: Tensor
    passed: Tensor
    cell: Tensor
    gates: Tensor

    def of(self, lanes: slice) -> "_Buffers":
        return _Buffers(*(buffer[lanes] for buffer in self))


class Window(NamedTuple):
    """Steps that one launch takes, and their rows."""

    steps: slice
    rows: slice


def _run_forward(
    launch: Launch,
    stack: Stack,
    buffers: _Buffers,
    layout: Layout,
    ragged: Ragged | None,
    below: Tensor,
    preacts: list[Tensor | None],
    keep_cells: bool,
    cell_starts: Tensor | None,
    dropped: int,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """The scan of a launch's lanes, whose weights `stack` are: at once, or window after window of steps.

    Whatever c a window starts from is written to `cell_starts`, if there are any.
    """
    from .kernels.forward import forward_scan

    plan = launch.plan
    keep_gates = len(buffers.gates) > 0
    time_steps = below.shape[0] if ragged is None else ragged.offsets.shape[0] - 1
    kept_steps = time_steps if cell_starts is None else low_memory_steps(time_steps)
    steps = time_steps if keep_gates else steps_at_once(plan, stack.hidden_size, layout.batch_size, below.itemsize)
    windows = windows_of(layout, ragged, time_steps, kept_steps, steps)
    below_rows = below if plan.fuse_input else below.reshape(layout.rows, -1)
    aligned_input, stride_unit = with_aligned_rows(below) if plan.fuse_input else (None, 1)
    # Directions meet different windows: then each has launches of its own.
    whole = plan.chained or len(windows) == 1
    parts = [slice(0, plan.lanes)] if whole else [slice(at, at + 1) for at in range(plan.lanes)]
    for part in parts:
        part_plan = plan if whole else replace(plan, lanes=1)
        part_stack, hidden = stack if whole else stack.of(part), buffers.hidden[part]
        input = hidden if aligned_input is None else aligned_input
        weights_ih = _aligned(part_stack.named("weight_ih"), layout.stride if part_plan.chained else 0)
        weights_hh = _aligned(part_stack.named("weight_hh"), layout.stride)
        for window in reversed(windows) if part_stack.reverse else windows:
            begins = window.steps.stop if part_stack.reverse else window.steps.start
            if cell_starts is not None and (begins % kept_steps == 0 or begins == time_steps):
                number = window.steps.start // kept_steps
                cell_starts[part, number] = buffers.cell[part, : layout.batch_size]
            first, last = window.rows.start, window.rows.stop
            gates = buffers.gates[part]
            if not plan.fuse_input:
                projected = 1 if plan.chained else part_plan.lanes
                if not keep_gates:
                    gates = below.new_empty((projected, last - first, 4 * stack.hidden_size))
                rows = below_rows[window.rows]
                for at in range(projected):
                    project(rows, part_stack.named("weight_ih")[at], gates[at])
                    own = [None if each is None else each[part][at] for each in preacts]
                    add_starts(gates[at], own, window, layout, ragged, part_stack.is_reverse(at))
            _launch(
                forward_scan,
                part_plan,
                input.device,
                gates_ptr=gates if len(gates) > 0 else hidden,
                input_ptr=input,
                input_stride_step=input.stride(0) // stride_unit,
                input_stride_batch=input.stride(-2) // stride_unit,
                weight_ih_ptrs=weights_ih,
                weight_hh_ptrs=weights_hh,
                bias_ih_ptrs=_contiguous(part_stack.named("bias_ih" if stack.bias else "weight_hh")),
                bias_hh_ptrs=_contiguous(part_stack.named("bias_hh" if stack.bias else "weight_hh")),
                hidden_ptr=hidden,
                hidden_dropped_ptr=buffers.passed[part] if dropped else hidden,
                cell_ptr=buffers.cell[part],
                before_ptr=hidden if ragged is None else ragged.before,
                after_ptr=hidden if ragged is None else ragged.after,
                **_lookups(ragged, part_plan, window, hidden),
                seed_ptr=seed if dropped else hidden,
                dropout=dropout,
                dropped_lanes=dropped - part.start,
                first_lane=launch.first + part.start,
                row_count=layout.rows,
                state_rows=layout.state_rows,
                gate_rows=last - first,
                first_step=window.steps.start,
                batch_size=layout.batch_size,
                batch_tiles=plan.batch_tiles,
                reverse=int(part_stack.reverse),
                HIDDEN=stack.hidden_size,
                STATE_STRIDE=layout.stride,
                HAS_BIAS=stack.bias,
                KEEP_CELLS=keep_cells,
                KEEP_GATES=keep_gates,
                DROPOUT=dropped > 0,
                **input_constants_of(plan, input.shape[-1], stride_unit),
            )


def steps_at_once(plan: Plan, hidden_size: int, batch_size: int, itemsize: int) -> int:
    """The steps whose input projections, where they are not kept, take PREACTIVATION_BYTES at most."""
    if plan.fuse_input:
        return 2**62
    projected_lanes = 1 if plan.chained else plan.lanes
    return max(1, PREACTIVATION_BYTES // (projected_lanes * 4 * hidden_size * itemsize * batch_size))


def low_memory_steps(time_steps: int) -> int:
    """The steps of a window, with low_memory."""
    return max(-(-time_steps // LOW_MEMORY_WINDOWS), LOW_MEMORY_STEPS)


def cell_starts_of(input: Tensor, layout: Layout, lanes: int) -> Tensor:
    """Memory for the c from which windows start."""
    return input.new_empty(lanes, LOW_MEMORY_WINDOWS, layout.batch_size, layout.stride, dtype=torch.float32)


def windows_of(
    layout: Layout, ragged: Ragged | None, time_steps: int, steps: int, at_once: int | None = None
) -> list[Window]:
    """All steps, in windows of so many, each of which is cut into windows of `at_once` again."""
    bounds = window_bounds(time_steps, steps, at_once or steps)
    if len(bounds) == 2:
        return [Window(slice(0, time_steps), slice(0, layout.rows))]
    if layout.rows == time_steps * layout.batch_size:
        rows = [step * layout.batch_size for step in bounds]
    else:  # packed: the only place where the host waits for the device
        assert ragged is not None
        rows = ragged.offsets[torch.tensor(bounds, device=ragged.offsets.device)].tolist()
    return [Window(slice(*at), slice(*of)) for at, of in zip(_neighbours(bounds), _neighbours(rows), strict=True)]


def window_bounds(time_steps: int, steps: int, at_once: int) -> list[int]:
    """Where the windows of `windows_of` begin, and where the last one ends."""
    bounds: list[int] = []
    for first in range(0, time_steps, steps):
        bounds += range(first, min(first + steps, time_steps), min(at_once, steps))
    return [*bounds, time_steps]


def _neighbours(values: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(values))


def _start(buffers: _Buffers, layout: Layout, ragged: Ragged | None, stack: Stack, states: list[Tensor | None]) -> None:
    """Write what the steps start from, and what is known beforehand."""
    for lanes, reverse in stack.by_direction():
        h_0, c_0, h_reset, c_reset = (None if state is None else state[lanes] for state in states)
        hidden, cell = buffers.hidden[lanes], buffers.cell[lanes]
        initial = layout.initial(reverse) if cell.shape[1] == layout.state_rows else slice(layout.batch_size)
        _fill(cell[:, initial], c_0)
        if ragged is None:
            _fill(hidden[:, layout.initial(reverse)], h_0)
            continue
        # NaNs as all NaNs are: here too nobody must mistake one for a sentinel.
        _fill(hidden[:, layout.initial(reverse)], h_0, canonical=True)
        _fill(hidden[:, layout.initial(not reverse)], None)
        _fill(hidden[:, layout.anew], h_reset, canonical=True)
        _fill(cell[:, -layout.batch_size :], c_reset)
    if ragged is not None:
        no_step = ~ragged.is_step().unsqueeze(1)
        buffers.hidden[:, layout.steps].masked_fill_(no_step, 0)
        buffers.passed[:, layout.steps].masked_fill_(no_step, 0)
        buffers.passed[:, : layout.batch_size].zero_()


def add_starts(
    projected: Tensor,
    preacts: list[Tensor | None],
    window: Window,
    layout: Layout,
    ragged: Ragged | None,
    reverse: bool,
) -> None:
    """Add the shares of states to what the steps that start from them get from the input."""
    preact_0, preact_reset = preacts
    if preact_0 is not None:
        if ragged is None:
            rows = torch.arange(layout.batch_size, device=projected.device) + layout.last(not reverse).start
            begun = torch.ones_like(rows, dtype=torch.bool)
        else:
            rows, begun = ragged.firsts(reverse), ragged.starts_from_initial(reverse)
        rows = rows - layout.batch_size - window.rows.start
        here = begun & (rows >= 0) & (rows < len(projected))
        projected.index_add_(0, rows.clamp(0, len(projected) - 1), torch.where(here.unsqueeze(1), preact_0, 0))
    if preact_reset is not None and ragged is not None:
        anew = ragged.starts_anew(reverse)[window.rows].view(-1, layout.batch_size, 1)
        projected.view(*anew.shape[:2], -1).add_(torch.where(anew, preact_reset, 0))


def _dropped_lanes(launch: Launch, stack: Stack, dropout: float) -> int:
    """How many lanes of a launch, the first ones, have dropout: those of all layers but the last."""
    if dropout == 0:
        return 0
    return max(0, min(launch.plan.lanes, stack.lanes - stack.directions - launch.first))


@torch.library.custom_op("lstm_triton::scan_backward", mutates_args=())
def scan_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    bias: bool,
    reverse: bool,
    cell: Tensor,
    gates: Tensor,
    tables: Sequence[Tensor],
    batch_size: int,
    grad_cells: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From the gradients of a stack's results to those of its gates' pre-activations.

    Args:
        grad_output: (T, B, directions * H), of a ragged batch (rows, ...), or None for zeros.
        grad_h_n, grad_c_n: (lanes, B, H), or None for zeros.
        weights, directions, bias, reverse, tables, dropout, seed: as `scan_forward` had them.
        cell, gates: as `scan_forward` returned them.
        batch_size: B.
        grad_cells: (lanes, T, B, H), ragged (lanes, rows, H), gradients of every c, or None for zeros.

    Returns:
        grad_gates: (lanes, state rows, 4 * state_stride(H)), gate-minor: column 4 * unit + gate, padded past 4H; rows
            that are none of a step hold zeros where they are read.
        grad_cell: (lanes, B, state_stride(H)) float32, the gradient of c_0; ragged (lanes, 2B, ...), then that of
            c_reset.
    """
    from .kernels.backward import backward_scan

    stack = Stack(weights, directions, bias, reverse)
    hidden_size = stack.hidden_size
    layout = Layout(gates.shape[1], batch_size, hidden_size, len(tables) > 0)
    ragged = Ragged(*tables) if tables else None
    time_steps = layout.rows // batch_size if ragged is None else ragged.offsets.shape[0] - 1
    window = Window(slice(0, time_steps), slice(0, layout.rows))
    shape = (time_steps, batch_size) if ragged is None else (layout.rows,)

    grad_gates = sentinels((stack.lanes, layout.state_rows, 4 * layout.stride), gates)
    if ragged is None:
        for own, reverse_in_time in stack.by_direction():  # nothing comes after the last step
            grad_gates[own, layout.initial(not reverse_in_time)].zero_()
    else:
        grad_gates[:, : layout.batch_size].zero_()
        grad_gates[:, layout.steps.stop :].zero_()
        grad_gates[:, layout.steps].masked_fill_(~ragged.is_step().unsqueeze(1), 0)
    grad_cell = cell.new_zeros((stack.lanes, (2 if layout.ragged else 1) * batch_size, layout.stride))
    if grad_c_n is not None:
        grad_cell[:, :batch_size, :hidden_size] = grad_c_n
    grad_h_n = gates.new_zeros((stack.lanes, batch_size, hidden_size)) if grad_h_n is None else grad_h_n.contiguous()
    grad_cells = None if grad_cells is None else grad_cells.contiguous()

    for launch in reversed(_launches("backward", stack, gates, batch_size)):
        plan, lanes = launch.plan, slice(launch.lanes.start, launch.lanes.stop)
        part = stack.of(lanes)
        layer = (launch.lanes.stop - 1) // directions
        if layer < stack.num_layers - 1:
            above = stack.layer(layer + 1)
            grad_output = input_gradient(grad_gates[above], stack.named("weight_ih")[above], layout).view(*shape, -1)
        elif grad_output is None:
            grad_output = gates.new_zeros(directions * hidden_size).expand(*shape, -1)
        elif grad_output.stride(-1) != 1:
            grad_output = grad_output.contiguous()
        dropped = _dropped_lanes(launch, stack, dropout)
        first_output = launch.first % directions * hidden_size if not plan.chained else 0
        weights_hh = _transposed(part.named("weight_hh"), layout)
        weights_ih = weights_hh
        if plan.chained:  # the first of them has nobody below in this launch
            weights_ih = (*weights_hh[:1], *_transposed(part.named("weight_ih")[1:], layout))
        _launch(
            backward_scan,
            plan,
            gates.device,
            grad_output_ptr=grad_output[..., first_output:],
            grad_output_stride_step=grad_output.stride(0),
            grad_output_stride_batch=grad_output.stride(-2),
            grad_output_stride_lane=hidden_size,
            grad_hidden_ptr=grad_h_n[lanes],
            grad_cells_ptr=grad_h_n if grad_cells is None else grad_cells[lanes],
            grad_cell_ptr=grad_cell[lanes],
            gates_ptr=gates[lanes],
            cell_ptr=cell[lanes],
            weight_ih_ptrs=weights_ih,
            weight_hh_ptrs=weights_hh,
            grad_gates_ptr=grad_gates[lanes],
            before_ptr=gates if ragged is None else ragged.before,
            after_ptr=gates if ragged is None else ragged.after,
            before_successors_ptr=gates if ragged is None else ragged.successors(reverse=True),
            **_lookups(ragged, plan, window, gates),
            seed_ptr=seed if dropped else gates,
            dropout=dropout,
            dropped_lanes=dropped,
            first_lane=launch.first,
            row_count=layout.rows,
            batch_size=batch_size,
            batch_tiles=plan.batch_tiles,
            reverse=int(part.reverse),
            HIDDEN=hidden_size,
            STATE_STRIDE=layout.stride,
            GRAD_CELLS=grad_cells is not None,
            DROPOUT=dropped > 0,
        )
    return grad_gates, grad_cell


@scan_backward.register_fake
def _(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    bias: bool,
    reverse: bool,
    cell: Tensor,
    gates: Tensor,
    tables: Sequence[Tensor],
    batch_size: int,
    grad_cells: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lanes, rows, stride = cell.shape
    return gates.new_empty(lanes, rows, 4 * stride), cell.new_empty(lanes, (2 if tables else 1) * batch_size, stride)


@torch.library.custom_op("lstm_triton::dropout_scale", mutates_args=())
def dropout_scale(seed: Tensor, lane: int, dropout: float, like: Tensor, first_row: int = 0) -> Tensor:
    """What the scans multiply a lane's outputs (T, B, H) or (rows, H) with, from a row on: 0 or 1 / (1 - dropout).

    In float32, as they do it.
    """
    from .kernels.lanes import dropout_scales

    scale = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    arguments = {
        "seed_ptr": seed,
        "lane": lane,
        "probability": dropout,
        "scale_ptr": scale,
        "elements": scale.numel(),
        "first_element": first_row * like.shape[-1],
    }
    grid = (-(-scale.numel() // planner.DROPOUT_BLOCK),)
    launch(dropout_scales, grid, like.device, arguments, {"BLOCK": planner.DROPOUT_BLOCK}, {})
    return scale


@dropout_scale.register_fake
def _(seed: Tensor, lane: int, dropout: float, like: Tensor, first_row: int = 0) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.float32)


def gates_again(gates: Tensor, cell: Tensor, stack: Stack, tables: Sequence[Tensor], batch_size: int) -> None:
    """Complete what `scan_backward` needs of a single lane, in place.

    Args:
        gates: (1, rows, 4H), pre-activations without biases on entry, activated gates on return.
        cell: (1, state rows, state_stride(H)), c of the states that sequences start from on entry, of all on return.
    """
    from .kernels.recompute import recompute_gates as kernel

    ragged = Ragged(*tables) if tables else None
    block_batch, block_hidden = planner.AGAIN_BLOCK
    grid = (-(-batch_size // block_batch), -(-stack.hidden_size // block_hidden))
    bias_ih, bias_hh = [*stack.named("bias_ih"), *stack.named("bias_hh")] if stack.bias else [gates, gates]
    arguments = {
        "gates_ptr": gates,
        "bias_ih_ptr": bias_ih.contiguous(),
        "bias_hh_ptr": bias_hh.contiguous(),
        "cell_ptr": cell,
        "before_ptr": gates if ragged is None else ragged.before,
        "after_ptr": gates if ragged is None else ragged.after,
        "offsets_ptr": gates if ragged is None else ragged.offsets,
        "seq_len": gates.shape[1] // batch_size if ragged is None else ragged.offsets.shape[0] - 1,
        "batch_size": batch_size,
        "reverse": int(stack.reverse),
    }
    constants = {
        "HIDDEN": stack.hidden_size,
        "STATE_STRIDE": cell.shape[2],
        "HAS_BIAS": stack.bias,
        "RAGGED": ragged is not None,
        "BLOCK_BATCH": block_batch,
        "BLOCK_HIDDEN": block_hidden,
    }
    launch(kernel, grid, gates.device, arguments, constants, {"num_warps": planner.AGAIN_WARPS})


def hidden_before(
    hidden: Tensor, layout: Layout, ragged: Ragged | None, reverse: bool, rows: slice = slice(None)
) -> Tensor:
    """(rows, H) the h that steps, or some of their rows, start from, out of a lane's state rows."""
    if ragged is None:
        return hidden[layout.previous(reverse), : layout.hidden_size][rows]
    sources = ragged.sources(reverse)
    sources = torch.where(sources >= 0, sources, ragged.own_rows())[rows]
    return hidden.index_select(0, sources)[:, : layout.hidden_size]


def begun_gates(grad_gates: Tensor, layout: Layout, ragged: Ragged | None, reverse: bool) -> Tensor:
    """(B, 4H) of a lane's grad_gates, those of the steps that start from initial states; zeros where none does."""
    columns = slice(4 * layout.hidden_size)
    if ragged is None:
        return grad_gates[layout.last(not reverse), columns]
    first_rows = grad_gates.index_select(0, ragged.firsts(reverse))[:, columns]
    return torch.where(ragged.starts_from_initial(reverse).unsqueeze(1), first_rows, 0)


def input_gradient(grad_gates: Tensor, weights_ih: Sequence[Tensor], layout: Layout) -> Tensor:
    """(rows, K) from a layer's grad_gates and its lanes' weights (4H, K)."""
    products = [
        matmul(lane[layout.steps, : 4 * layout.hidden_size], gate_minor(weight))
        for lane, weight in zip(grad_gates, weights_ih, strict=True)
    ]
    return products[0] if len(products) == 1 else products[0] + products[1]


def gate_minor(weight: Tensor) -> Tensor:
    """(4H, K) with gates one after the other -> (4H, K) with the gates of a unit side by side."""
    return _regrouped(weight, (4, -1))


def gate_major(weight: Tensor) -> Tensor:
    """The inverse of gate_minor."""
    return _regrouped(weight, (-1, 4))


def _regrouped(weight: Tensor, groups: tuple[int, int]) -> Tensor:
    result: Tensor = weight.unflatten(0, groups).transpose(0, 1).flatten(0, 1)
    return result


def _fill(rows: Tensor, state: Tensor | None, canonical: bool = False) -> None:
    """Write states (lanes, B, H) into their state rows."""
    if state is None:
        rows.zero_()
        return
    hidden_size = state.shape[2]
    rows[..., :hidden_size] = torch.where(state.isnan(), torch.nan, state) if canonical else state
    rows[..., hidden_size:] = 0


def _contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _aligned(weights: Sequence[Tensor], stride: int) -> tuple[Tensor, ...]:
    """Contiguous weights whose rows are padded to `stride` elements and aligned: copies, where they are not already.

    Loads are then as wide as those of states, without which weights would not stay in registers (kernels/fragments.py).
    """
    found = []
    for weight in weights:
        if weight.shape[1] < stride:
            weight = torch.nn.functional.pad(weight, (0, stride - weight.shape[1]))
        found.append(_at_aligned_address(weight.contiguous()))
    return tuple(found)


def _transposed(weights: Sequence[Tensor], layout: Layout) -> tuple[Tensor, ...]:
    """Weights (4H, H) as rows of units whose columns are gate-minor, padded: (stride, 4 * stride) copies.

    The backward scan multiplies with columns of a weight. Read as rows, they come in pieces of 16 bytes, from shared
    memory too: as columns they took up to eight times as long from there.
    """
    found = []
    missing = layout.stride - layout.hidden_size
    for weight in weights:
        rows = weight.unflatten(0, (4, -1)).permute(2, 1, 0).flatten(1)
        if missing > 0:
            rows = torch.nn.functional.pad(rows, (0, 4 * missing, 0, missing))
        found.append(_at_aligned_address(rows.contiguous()))
    return tuple(found)


def _lookups(ragged: Ragged | None, plan: Plan, window: Window, unused: Tensor) -> dict[str, object]:
    """What both kernels need to find the rows of a window's steps."""
    time_steps = window.steps.stop - window.steps.start
    if ragged is None:
        return {"offsets_ptr": unused, "tile_steps_ptr": unused, "seq_len": time_steps, "RAGGED": False}
    tile_steps = ragged.tile_steps(plan.block_batch, plan.batch_tiles)
    return {
        "offsets_ptr": ragged.offsets[window.steps.start :],
        "tile_steps_ptr": (tile_steps - window.steps.start).clamp(0, time_steps),
        "seq_len": time_steps,
        "RAGGED": True,
    }


def matmul(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    """left @ right, in TF32 where cuDNN would use it for an LSTM: torch.matmul's own setting is off at first.

    exact: never in TF32, as a single step's product, which takes no time worth mentioning, need not be.
    """
    if may_take_tf32(left):
        product: Tensor = transforms.call(_cuda_matmul, left, right, exact)
        return product
    return left @ right


@torch.library.custom_op("lstm_triton::matmul", mutates_args=())
def _cuda_matmul(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    # An operator, because torch.compile cannot change the setting within a graph.
    return batched_matmul(left, right, exact)


@_cuda_matmul.register_fake
def _(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


def project(rows: Tensor, weight: Tensor, projected: Tensor, add: bool = False) -> None:
    """Write, or add, rows @ weight^T."""
    setting: AbstractContextManager[None] = contextlib.nullcontext()
    if may_take_tf32(rows):
        setting = _matmul_precision("tf32" if allows_tf32() else "ieee")
    with transforms.without_autocast(rows.device), setting:
        torch.addmm(projected, rows, weight.t(), beta=int(add), out=projected)


def batched_matmul(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    """`matmul` on a GPU, of any batch of matrices."""
    with _matmul_precision("tf32" if allows_tf32() and not exact else "ieee"):
        return left @ right


_matmul_precision_lock = threading.Lock()


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    # The setting is the whole process's, and backward runs in a thread for each device.
    with _matmul_precision_lock:
        previous = settings.fp32_precision
        if previous == precision or {previous, precision} <= {"none", "ieee"}:
            yield
            return
        settings.fp32_precision = precision
        try:
            yield
        finally:
            settings.fp32_precision = "none"  # inherited from torch.backends.fp32_precision, as it may have been
            if settings.fp32_precision != previous:
                settings.fp32_precision = previous


def sentinels(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An exchange buffer in which nothing has been published (kernels/exchange.py)."""
    buffer = like.new_empty(shape)
    if buffer.numel() > 0:
        buffer.view(torch.int32 if like.dtype.itemsize == 4 else torch.int16).fill_(-1)
    return buffer


def with_aligned_rows(input: Tensor) -> tuple[Tensor, int]:
    """An input whose rows are contiguous, aligned if their length allows it; and the unit of its strides."""
    unit = 16 if input.shape[-1] % 16 == 0 else 1
    *strides, last = input.stride()
    if last != 1 or any(stride % unit for stride in strides):
        input = input.contiguous()
    if unit > 1:  # columns of a wider tensor are not worth a compilation of their own
        input = _at_aligned_address(input)
    return input, unit


def _at_aligned_address(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def constants_of(plan: Plan) -> dict[str, object]:
    """A plan as the compile-time arguments that both kernels share."""
    return {
        "LANES": plan.lanes,
        "CHAINED": plan.chained,
        "SEVERAL_TILES": plan.batch_tiles > plan.groups,
        "BLOCK_BATCH": plan.block_batch,
        "BLOCK_HIDDEN": plan.block_hidden,
        "BLOCK_K": plan.block_k,
        "SPLIT_K": plan.split_k,
        "RESIDENT_CHUNKS": plan.resident_chunks,
        "REGISTER_CHUNKS": plan.register_chunks,
        "GROUP_CHUNKS": plan.group_chunks,
        "ACCUMULATORS": plan.accumulators,
        "DOT_PRECISION": plan.dot_precision,
        "TF32_ROUNDING": plan.tf32_rounding,
        "THREAD_ELEMENTS": plan.thread_elements,
        "PACKED": plan.packed,
        "HOLDS": plan.hold > 0,
    }


def input_constants_of(plan: Plan, input_size: int, stride_unit: int) -> dict[str, object]:
    """The compile-time arguments of the forward kernel for its input: without fusion all inputs share one kernel."""
    fused = plan.fuse_input
    return {
        "FUSE_INPUT": fused,
        "INPUT": input_size if fused else 1,
        "BLOCK_INPUT": plan.block_input if fused else MIN_DOT_DEPTH,
        "INPUT_STRIDE_UNIT": stride_unit if fused else 1,
    }


def compiler_options(plan: Plan, is_nvidia: bool) -> dict[str, object]:
    """A plan as options of Triton's compiler."""
    options: dict[str, object] = {"num_warps": plan.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if is_nvidia:
        options["maxnreg"] = 255  # a multiprocessor runs one program: nothing is gained by using fewer registers
    return options


def launch_options(plan: Plan) -> dict[str, object]:
    """A plan as options of a launch on a GPU."""
    options = compiler_options(plan, is_nvidia=torch.version.hip is None)
    # Slices of a batch tile wait for each other, and so do layers: all run at the same time, or the driver refuses.
    return {**options, "launch_cooperative_grid": plan.slices > 1 or plan.chained}


def _launch(kernel: Any, plan: Plan, device: torch.device, **arguments: object) -> None:
    launch(kernel, (plan.programs,), device, {**arguments, "hold": plan.hold}, constants_of(plan), launch_options(plan))


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: Mapping[str, object],
    constants: Mapping[str, object],
    options: Mapping[str, object],
) -> None:
    """Launch a kernel: every one of this library goes through here."""
    named = {**arguments, **constants}
    values = [named[name] for name in kernel.arg_names]  # Triton takes longer to find arguments by their names
    if device.type == "cpu":  # interpreted
        kernel[grid](*values)
        return
    with torch.cuda.device(device):
        kernel[grid](*values, **options)


def may_take_tf32(tensor: Tensor) -> bool:
    """Whether matrix products of a tensor depend on a setting."""
    return tensor.dtype == torch.float32 and tensor.is_cuda

"""The forward scan of a stack of layers as a PyTorch operator: it asks the planner, allocates buffers and launches."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..ragged import Ragged
from ..stack import Stack
from . import products
from .buffers import Buffers, Layout, add_starts, aligned, contiguous, with_aligned_rows, write_start
from .dropout import Dropout, dropped_lanes
from .launch import input_constants_of, launch_scan, lookups, shape_of
from .schedule import Schedule, forward_schedules
from .windows import cell_starts_of, low_memory_steps, windows_of


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
    new_buffers = partial(Buffers.new, layout, input, keep_cells, keep_gates)
    kept = new_buffers(stack.lanes if keep_cells or low_memory else 0, dropout > 0 and not low_memory)
    if low_memory:
        kept = kept._replace(cell=cell_starts_of(input, layout, stack.lanes))
    h_n, c_n = (input.new_empty(stack.lanes, layout.batch_size, stack.hidden_size) for _ in range(2))
    below = input if ragged is None else input.contiguous()
    outputs: list[Tensor] = []  # (rows, H) of the lanes of a layer
    last_hidden: list[Tensor] = []
    # The shares of states are added to input projections that are in memory.
    fuse_input = preact_0 is None and preact_reset is None
    time_steps = below.shape[0] if ragged is None else ragged.offsets.shape[0] - 1
    schedules = forward_schedules(
        shape_of("forward", stack, input, layout.batch_size), stack.num_layers, directions, time_steps,
        keep_gates=keep_gates, low_memory=low_memory, fuse_input=fuse_input,
    )  # fmt: skip
    for schedule in schedules:
        planned, lanes = schedule.planned, schedule.lanes
        part = stack.of(lanes)
        dropped = dropped_lanes(planned, stack, dropout)
        if keep_cells:
            buffers = kept.of(lanes)
        else:
            buffers = new_buffers(planned.plan.lanes, dropped > 0, kept.hidden[lanes] if low_memory else None)
        cell_starts = kept.cell[lanes] if low_memory else None
        starts = [None if each is None else each[lanes] for each in (h_0, c_0, h_reset, c_reset)]
        write_start(buffers, layout, ragged, part, starts)
        preacts = [None if each is None else each[lanes] for each in (preact_0, preact_reset)]
        of_launch = Dropout(dropped, dropout, seed)
        _run_forward(schedule, part, buffers, layout, ragged, below, preacts, keep_cells, cell_starts, of_launch)
        for own, reverse in part.by_direction():
            last = layout.last(reverse) if ragged is None else ragged.ends(reverse)
            h_n[lanes][own] = buffers.hidden[own, last, : stack.hidden_size]
            if keep_cells:
                c_n[lanes][own] = buffers.cell[own, last, : stack.hidden_size]
        if not keep_cells:
            c_n[lanes] = buffers.cell[:, : layout.batch_size, : stack.hidden_size]
        for at in range(planned.plan.lanes):
            last_hidden = [*last_hidden, buffers.hidden[at]][-directions:]
            if len(outputs) == directions:
                outputs = []
            source = buffers.passed if at < dropped else buffers.hidden
            outputs.append(source[at, layout.steps, : stack.hidden_size])
        if len(outputs) == directions and lanes.stop < stack.lanes:
            below = (outputs[0] if directions == 1 else torch.cat(outputs, dim=1)).view(*input.shape[:-1], -1)
    if keep_cells or low_memory:
        return *kept, h_n, c_n
    hidden, passed, cell, gates = kept
    # A copy of the last layer, where it has no buffer of its own: a view would keep the layers below in memory.
    hidden = buffers.hidden if planned.plan.lanes == directions else torch.stack(last_hidden)
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


def _run_forward(
    schedule: Schedule,
    stack: Stack,
    buffers: Buffers,
    layout: Layout,
    ragged: Ragged | None,
    below: Tensor,
    preacts: list[Tensor | None],
    keep_cells: bool,
    cell_starts: Tensor | None,
    dropout: Dropout,
) -> None:
    """The scan of a schedule's lanes, whose weights `stack` are: at once, or window after window of steps.

    Whatever c a window starts from is written to `cell_starts`, if there are any.
    """
    from ..kernels.forward import forward_scan

    plan = schedule.planned.plan
    keep_gates = len(buffers.gates) > 0
    windows, time_steps = windows_of(layout, ragged, schedule.bounds), schedule.bounds[-1]
    kept_steps = low_memory_steps(time_steps)
    below_rows = below if plan.fuse_input else below.reshape(layout.rows, -1)
    aligned_input, stride_unit = with_aligned_rows(below) if plan.fuse_input else (None, 1)
    for launch in schedule.parts:
        part_plan, first_lane = launch.plan, launch.first - schedule.planned.first
        part = slice(first_lane, first_lane + part_plan.lanes)
        part_stack, hidden = stack.of(part), buffers.hidden[part]
        input = hidden if aligned_input is None else aligned_input
        weights_ih = aligned(part_stack.named("weight_ih"), layout.stride if part_plan.chained else 0)
        weights_hh = aligned(part_stack.named("weight_hh"), layout.stride)
        for window in reversed(windows) if part_stack.reverse else windows:
            begins = window.steps.stop if part_stack.reverse else window.steps.start
            if cell_starts is not None and (begins % kept_steps == 0 or begins == time_steps):
                number = window.steps.start // kept_steps
                cell_starts[part, number] = buffers.cell[part, : layout.batch_size]
            first, last = window.rows.start, window.rows.stop
            gates = buffers.gates[part]
            if not plan.fuse_input:
                if not keep_gates:
                    gates = below.new_empty((part_plan.projected_lanes, last - first, 4 * stack.hidden_size))
                rows = below_rows[window.rows]
                for at in range(part_plan.projected_lanes):
                    products.project(rows, part_stack.named("weight_ih")[at], gates[at])
                    own = [None if each is None else each[part][at] for each in preacts]
                    add_starts(gates[at], own, window, layout, ragged, part_stack.is_reverse(at))
            launch_scan(
                forward_scan,
                part_plan,
                input.device,
                gates_ptr=gates if len(gates) > 0 else hidden,
                input_ptr=input,
                input_stride_step=input.stride(0) // stride_unit,
                input_stride_batch=input.stride(-2) // stride_unit,
                weight_ih_ptrs=weights_ih,
                weight_hh_ptrs=weights_hh,
                bias_ih_ptrs=contiguous(part_stack.named("bias_ih" if stack.bias else "weight_hh")),
                bias_hh_ptrs=contiguous(part_stack.named("bias_hh" if stack.bias else "weight_hh")),
                hidden_ptr=hidden,
                passed_ptr=buffers.passed[part] if dropout.lanes else hidden,
                cell_ptr=buffers.cell[part],
                before_ptr=hidden if ragged is None else ragged.before,
                after_ptr=hidden if ragged is None else ragged.after,
                **lookups(ragged, part_plan, window, hidden),
                seed_ptr=dropout.seed if dropout.lanes else hidden,
                dropout=dropout.probability,
                dropped_lanes=dropout.lanes - part.start,
                first_lane=launch.first,
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
                DROPOUT=dropout.lanes > 0,
                **input_constants_of(plan, input.shape[-1], stride_unit),
            )

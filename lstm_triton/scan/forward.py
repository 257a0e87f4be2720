"""The forward scan of a stack of layers as a PyTorch operator: it asks the planner, makes buffers and launches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import flops, target
from ..ragged import Ragged
from ..stack import Stack, Start
from . import products
from .alignment import aligned, contiguous, with_aligned_rows
from .buffers import Buffers, fill, read
from .dispatch import named
from .launch import lookups, run
from .layout import Layout
from .prepared import Ends, Forward, PreparedSchedule, Sizes, forward_scan_of
from .windows import low_memory_steps, window_cells, windows_of


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
        input: (T, B, I), ragged (rows, I).
        h_0, c_0: (lanes, B, H), or None for zeros.
        weights, directions, bias, reverse: see `Stack`.
        keep_cells, keep_gates: what to keep; `scan_backward` needs both.
        tables: the fields of `Ragged`, empty if the batch is not ragged.
        h_reset, c_reset: (lanes, B, H), the reset states, or None for zeros.
        dropout: the probability of dropout on the output of all layers but the last.
        seed: (1,) int64 on the input's device, the seed of dropout; needed if there is dropout.
        preact_0, preact_reset: (lanes, B, 4H), or None: see `Start`. For a single layer.
        low_memory: keep, instead of cells and gates, what `low_memory_gradients` needs.

    Returns:
        hidden: (lanes, state rows, state_stride(H)) h in the input's dtype. Ragged: zeros where there is no step.
            Without `keep_cells` and `low_memory`: the last layer's lanes only.
        hidden_dropped: `hidden` after dropout, of all layers but the last, if `keep_cells` and if there is dropout.
        cell: float32 c, shaped as `hidden`, if `keep_cells`; with `low_memory` (lanes, LOW_MEMORY_WINDOWS, B,
            state_stride(H)), the c from which each window starts.
        gates: (lanes, rows, 4H) activated gates in the input's dtype, if `keep_gates`.
        h_n, c_n: (lanes, B, H) the final states.

        A tensor that is not kept is empty.
    """
    ragged, hidden_size = Ragged.of(tables), weights[0].shape[0] // 4
    time_steps, batch_size = input.shape[:2] if ragged is None else (ragged.time_steps(), ragged.batch_size())
    size = 4 if bias else 2  # weights of a lane
    lanes = len(weights) // size
    sizes = Sizes(
        *(time_steps, batch_size, input.shape[-1], hidden_size, lanes, directions),
        *(bias, reverse, ragged is not None, input.dtype, input.device),
    )
    # `preact` can be added only to input projections in memory.
    fuse_input = preact_0 is None and preact_reset is None
    prepared = forward_scan_of(sizes, Forward(keep_cells, keep_gates, low_memory, fuse_input, dropout > 0))
    layout = prepared.layout or Layout.of(input, hidden_size, ragged)
    start = Start(h_0, c_0, h_reset, c_reset, preact_0, preact_reset)
    are_kept = keep_cells or low_memory  # if not, each launch has buffers of its own
    if are_kept:
        kept = Buffers.new(layout, input, keep_cells, keep_gates, lanes, dropout > 0 and not low_memory)
        if low_memory:
            kept = kept._replace(cell=window_cells(input, layout, lanes))
    of_states = (lanes, batch_size, hidden_size)
    h_n, c_n = input.new_empty(of_states), input.new_empty(of_states)
    below = input if ragged is None else input.contiguous()
    if are_kept and prepared.ends is not None:
        _begin(kept, prepared.ends, start, of_h=True, of_c=keep_cells)
    outputs: list[Tensor] = []  # (rows, H) of the lanes of a layer
    last_hidden: list[Tensor] = []  # of the last layer, (state rows, stride)
    for schedule in prepared.schedules:
        own, plan, dropped = schedule.lanes, schedule.plan, schedule.dropped
        if keep_cells:
            buffers = kept if schedule.is_whole else kept.of(own)
        else:
            shared = kept.hidden[own] if low_memory else None
            buffers = Buffers.new(layout, input, False, keep_gates, plan.lanes, dropped > 0, shared)
        own_start = start if schedule.is_whole else start.of(own)
        if schedule.ends is None:
            buffers.write_ragged(own_start, layout, min(directions, plan.lanes), schedule.reverse)
        elif not keep_cells:
            _begin(buffers, schedule.ends, own_start, of_h=not low_memory, of_c=True)
        _run(
            schedule,
            weights if schedule.is_whole else weights[own.start * size : own.stop * size],
            sizes,
            buffers,
            layout,
            below,
            own_start,
            (dropout, seed),
            prepared.on,
            kept.cell[own] if low_memory else None,
        )
        states = (h_n, c_n) if schedule.is_whole else (h_n[own], c_n[own])
        if schedule.ends is None:
            buffers.read_ragged_ends(*states, layout, min(directions, plan.lanes), schedule.reverse)
        elif not keep_cells:
            _end(buffers, schedule.ends, *states, of_h=not low_memory, of_c=True)
        if not are_kept:
            last_hidden = [*last_hidden, *buffers.hidden.unbind()][-directions:]
        if own.stop == lanes:
            break
        for at in range(plan.lanes):
            if len(outputs) == directions:
                outputs = []
            source = buffers.hidden_dropped if at < dropped else buffers.hidden
            outputs.append(source[at, layout.steps(), :hidden_size])
        if len(outputs) == directions:
            below = (outputs[0] if directions == 1 else torch.cat(outputs, dim=1)).view(*input.shape[:-1], -1)
    if are_kept:
        if prepared.ends is not None:
            _end(kept, prepared.ends, h_n, c_n, of_h=True, of_c=keep_cells)
        return *kept, h_n, c_n
    # If the last layer shares a buffer with layers below, it is copied: a view would keep these layers in memory.
    hidden = buffers.hidden if plan.lanes == directions else torch.stack(last_hidden)
    cell = input.new_empty((0, layout.start_rows, layout.stride), dtype=torch.float32)
    hidden_dropped = buffers.hidden_dropped if dropped == 0 else input.new_empty((0, *hidden.shape[1:]))
    return hidden, hidden_dropped, cell, buffers.gates, h_n, c_n


@scan_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    given = named(scan_forward, arguments)
    input, stack = given.input, Stack.of(given.weights, given.directions, given.bias)
    layout = Layout.of(input, stack.hidden_size(), Ragged.of(given.tables))
    kept = stack.lanes() if given.keep_cells or given.low_memory else 0
    dropped = kept if given.dropout > 0 and not given.low_memory else 0
    gates = input.new_empty(stack.lanes() if given.keep_gates else 0, layout.rows, 4 * stack.hidden_size())
    if given.low_memory:
        cell = window_cells(input, layout, stack.lanes())
    else:
        rows_of_cells = layout.state_rows if given.keep_cells else layout.start_rows
        cell = input.new_empty(kept, rows_of_cells, layout.stride, dtype=torch.float32)
    return (
        input.new_empty(kept or stack.directions, layout.state_rows, layout.stride),
        input.new_empty(dropped, layout.state_rows, layout.stride),
        cell,
        gates,
        input.new_empty(stack.lanes(), layout.batch_size, stack.hidden_size()),
        input.new_empty(stack.lanes(), layout.batch_size, stack.hidden_size()),
    )


@flops.counts("lstm_triton::scan_forward")
def _(*arguments: Any) -> int:
    given = named(scan_forward, arguments)
    stack = Stack.of(given.weights, given.directions, given.bias)
    layout = Layout.of(given.input, stack.hidden_size(), Ragged.of(given.tables))
    steps, _ = flops.steps(layout.rows, layout.batch_size, layout.ragged)
    return flops.products(steps, given.weights)


def _begin(buffers: Buffers, ends: Ends, start: Start, of_h: bool, of_c: bool) -> None:
    """Write the states that the sequences of a dense batch start from."""
    if of_h:
        fill(buffers.hidden.as_strided(*ends.initial), start.h)
    if of_c:
        every_cell = buffers.cell.shape == buffers.hidden.shape
        fill(buffers.cell.as_strided(*ends.initial) if every_cell else buffers.cell, start.c)


def _end(buffers: Buffers, ends: Ends, h_n: Tensor, c_n: Tensor, of_h: bool, of_c: bool) -> None:
    """Write the final states of a dense batch into h_n and c_n (lanes, B, H)."""
    if of_h:
        read(buffers.hidden.as_strided(*ends.last), h_n)
    if of_c:
        every_cell = buffers.cell.shape == buffers.hidden.shape
        read(buffers.cell.as_strided(*ends.last) if every_cell else buffers.cell, c_n)


def _run(
    schedule: PreparedSchedule,
    weights: Sequence[Tensor],
    sizes: Sizes,
    buffers: Buffers,
    layout: Layout,
    below: Tensor,
    start: Start,
    dropout: tuple[float, Tensor | None],
    on: target.Target,
    cell_starts: Tensor | None,
) -> None:
    """Run the scan of a schedule's lanes, window after window of time.

    Args:
        weights: of these lanes, as in `scan_forward`.
        below: what the first lane reads, (T, B, I) or (rows, I).
        start: the states that these lanes start from.
        dropout: probability and seed.
        cell_starts: (lanes, LOW_MEMORY_WINDOWS, B, state_stride(H)); the c at the start of each window is written here.
            None: it is not needed.
    """
    plan, dropped, size = schedule.plan, schedule.dropped, 4 if sizes.bias else 2
    keep_gates = buffers.gates.shape[0] > 0
    windows = schedule.windows or windows_of(layout, schedule.bounds)
    below_rows = below if plan.fuse_input else below.reshape(layout.rows, -1)
    aligned_input, strides = with_aligned_rows(below) if plan.fuse_input else (None, below.stride())
    weights = contiguous(weights)
    for part in schedule.parts:
        is_only, of_part = len(schedule.parts) == 1, part.lanes
        hidden = buffers.hidden if is_only else buffers.hidden[of_part]
        cell = buffers.cell if is_only else buffers.cell[of_part]
        own = weights if is_only else weights[of_part.start * size : of_part.stop * size]
        input = hidden if aligned_input is None else aligned_input
        weights_ih = aligned(own[::size], layout.stride if plan.chained else 0)
        weights_hh = aligned(own[1::size], layout.stride)
        biases_ih, biases_hh = (own[2::4], own[3::4]) if size == 4 else (weights_hh, weights_hh)
        for window in reversed(windows) if part.reverse else windows:
            begins = window.steps.stop if part.reverse else window.steps.start
            if cell_starts is not None:
                kept_steps = low_memory_steps(layout.time_steps)
                if begins % kept_steps == 0 or begins == layout.time_steps:
                    cell_starts[of_part, window.steps.start // kept_steps] = cell[:, : layout.batch_size]
            rows = window.rows.stop - window.rows.start
            gates = buffers.gates if is_only else buffers.gates[of_part]
            if not plan.fuse_input:
                if not keep_gates:
                    gates = below.new_empty((part.plan.projected_lanes, rows, 4 * sizes.hidden_size))
                for at in range(part.plan.projected_lanes):
                    products.project(below_rows[window.rows], own[at * size], gates[at])
                    lane, reverse = of_part.start + at, sizes.is_reverse(part.first + at)
                    layout.add_preacts(gates[at], start.of(lane), window, reverse)
            arguments = {
                "gates_ptr": gates if gates.shape[0] > 0 else hidden,
                "input_ptr": input,
                "input_stride_step": strides[0],  # not read, if the input is not fused
                "input_stride_batch": strides[-1],
                "weight_ih_ptrs": weights_ih,
                "weight_hh_ptrs": weights_hh,
                "bias_ih_ptrs": biases_ih,
                "bias_hh_ptrs": biases_hh,
                "hidden_ptr": hidden,
                "hidden_dropped_ptr": buffers.hidden_dropped[of_part] if dropped else hidden,
                "cell_ptr": cell,
                **lookups(layout, part.plan, window, hidden),
                "seed_ptr": dropout[1] if dropped else hidden,
                "dropout": dropout[0],
                "dropped_lanes": dropped - of_part.start,
                "first_lane": part.first,
                "state_rows": layout.state_rows,
                "gate_rows": rows,
                "first_step": window.steps.start,
                "reverse": int(part.reverse),
                "hold": part.plan.hold,
            }
            run(part.kernel, input.device, arguments, on)

"""The forward scan of a stack of layers as a PyTorch operator: it asks the planner, makes buffers and launches."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import flops
from ..ragged import Ragged
from ..stack import Stack, Start
from . import products
from .alignment import aligned, with_aligned_rows
from .buffers import Buffers
from .dispatch import named
from .dropout import Dropout
from .launch import input_constants_of, lookups, prepared_scan, run, shape_of
from .layout import Layout
from .schedule import Schedule, forward_schedules
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
    stack, drop = Stack.of(weights, directions, bias, reverse), Dropout(dropout, seed)
    start = Start(h_0, c_0, h_reset, c_reset, preact_0, preact_reset)
    lanes, hidden_size = stack.lanes(), stack.hidden_size()
    layout = Layout.of(input, hidden_size, Ragged.of(tables))
    new_buffers = partial(Buffers.new, layout, input, keep_cells, keep_gates)
    kept = new_buffers(lanes if keep_cells or low_memory else 0, dropout > 0 and not low_memory)
    if low_memory:
        kept = kept._replace(cell=window_cells(input, layout, lanes))
    sizes = (lanes, layout.batch_size, hidden_size)
    h_n, c_n = input.new_empty(sizes), input.new_empty(sizes)
    below = input if layout.ragged is None else input.contiguous()
    outputs: list[Tensor] = []  # (rows, H) of the lanes of a layer
    last_hidden: list[Tensor] = []  # of the last layer, (state rows, stride)
    schedules = forward_schedules(
        shape_of("forward", stack, input, layout.batch_size),
        stack.num_layers(),
        directions,
        layout.time_steps,
        keep_gates=keep_gates,
        low_memory=low_memory,
        # `preact` can be added only to input projections in memory.
        fuse_input=start.preact is None and start.preact_reset is None,
    )
    for schedule in schedules:
        launch, own_lanes = schedule.planned, schedule.lanes
        is_whole = launch.plan.lanes == lanes
        part, own = (stack, start) if is_whole else (stack.part(own_lanes), start.of(own_lanes))
        dropped = drop.lanes(launch, stack)
        if keep_cells:
            buffers = kept if is_whole else kept.of(own_lanes)
        else:
            buffers = new_buffers(launch.plan.lanes, dropped > 0, kept.hidden[own_lanes] if low_memory else None)
        buffers.write(own, layout, part)
        _run(schedule, part, buffers, layout, below, own, drop, dropped, kept.cell[own_lanes] if low_memory else None)
        buffers.read_ends(*((h_n, c_n) if is_whole else (h_n[own_lanes], c_n[own_lanes])), layout, part)
        if not (keep_cells or low_memory):
            last_hidden = [*last_hidden, *buffers.hidden.unbind()][-directions:]
        if launch.lanes.stop == lanes:
            break
        for at in range(launch.plan.lanes):
            if len(outputs) == directions:
                outputs = []
            source = buffers.hidden_dropped if at < dropped else buffers.hidden
            outputs.append(source[at, layout.steps(), :hidden_size])
        if len(outputs) == directions:
            below = (outputs[0] if directions == 1 else torch.cat(outputs, dim=1)).view(*input.shape[:-1], -1)
    if keep_cells or low_memory:
        return *kept, h_n, c_n
    # If the last layer shares a buffer with layers below, it is copied: a view would keep these layers in memory.
    hidden = buffers.hidden if launch.plan.lanes == directions else torch.stack(last_hidden)
    return hidden, kept.hidden_dropped, kept.cell, kept.gates, h_n, c_n


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


def _run(
    schedule: Schedule,
    stack: Stack,
    buffers: Buffers,
    layout: Layout,
    below: Tensor,
    start: Start,
    dropout: Dropout,
    dropped: int,
    cell_starts: Tensor | None,
) -> None:
    """Run the scan of a schedule's lanes, window after window of time. `stack` has the weights of these lanes.

    Args:
        below: what the first lane reads, (T, B, I) or (rows, I).
        start: the states that these lanes start from.
        dropped: how many of the lanes have dropout. They come first.
        cell_starts: (lanes, LOW_MEMORY_WINDOWS, B, state_stride(H)); the c at the start of each window is written here.
            None: it is not needed.
    """
    from ..kernels.forward import forward_scan

    plan = schedule.planned.plan
    keep_gates = buffers.gates.shape[0] > 0
    windows, kept_steps = windows_of(layout, schedule.bounds), low_memory_steps(layout.time_steps)
    below_rows = below if plan.fuse_input else below.reshape(layout.rows, -1)
    aligned_input, stride_unit, strides = with_aligned_rows(below) if plan.fuse_input else (None, 1, below.stride())
    for launch in schedule.parts:
        part_plan, first = launch.plan, launch.first - schedule.planned.first
        part = slice(first, first + part_plan.lanes)
        is_whole = part_plan.lanes == stack.lanes()
        part_stack, hidden = (stack, buffers.hidden) if is_whole else (stack.part(part), buffers.hidden[part])
        input = hidden if aligned_input is None else aligned_input
        weights = part_stack.weights
        weights_ih = aligned([each.ih for each in weights], layout.stride if part_plan.chained else 0)
        weights_hh = aligned([each.hh for each in weights], layout.stride)
        biases_ih, biases_hh = part_stack.biases()
        prepared = prepared_scan(
            forward_scan,
            part_plan,
            HIDDEN=stack.hidden_size(),
            STATE_STRIDE=layout.stride,
            HAS_BIAS=stack.bias(),
            KEEP_CELLS=buffers.cell.shape[1] == layout.state_rows,
            KEEP_GATES=keep_gates,
            DROPOUT=dropped > 0,
            RAGGED=layout.ragged is not None,
            **input_constants_of(plan, input.shape[-1], stride_unit),
        )
        for window in reversed(windows) if part_stack.reverse else windows:
            begins = window.steps.stop if part_stack.reverse else window.steps.start
            if cell_starts is not None and (begins % kept_steps == 0 or begins == layout.time_steps):
                number = window.steps.start // kept_steps
                cell_starts[part, number] = buffers.cell[part, : layout.batch_size]
            rows = window.rows.stop - window.rows.start
            gates = buffers.gates if is_whole else buffers.gates[part]
            if not plan.fuse_input:
                if not keep_gates:
                    gates = below.new_empty((part_plan.projected_lanes, rows, 4 * stack.hidden_size()))
                for at in range(part_plan.projected_lanes):
                    products.project(below_rows[window.rows], weights[at].ih, gates[at])
                    layout.add_preacts(gates[at], start.of(part.start + at), window, part_stack.is_reverse(at))
            arguments = {
                "gates_ptr": gates if gates.shape[0] > 0 else hidden,
                "input_ptr": input,
                "input_stride_step": strides[0],  # not read, if the input is not fused
                "input_stride_batch": strides[-1],
                "weight_ih_ptrs": weights_ih,
                "weight_hh_ptrs": weights_hh,
                "bias_ih_ptrs": biases_ih or weights_hh,
                "bias_hh_ptrs": biases_hh or weights_hh,
                "hidden_ptr": hidden,
                "hidden_dropped_ptr": buffers.hidden_dropped[part] if dropped else hidden,
                "cell_ptr": buffers.cell if is_whole else buffers.cell[part],
                **lookups(layout, part_plan, window, hidden),
                "seed_ptr": dropout.seed if dropped else hidden,
                "dropout": dropout.probability,
                "dropped_lanes": dropped - part.start,
                "first_lane": launch.first,
                "state_rows": layout.state_rows,
                "gate_rows": rows,
                "first_step": window.steps.start,
                "reverse": int(part_stack.reverse),
                "hold": part_plan.hold,
            }
            run(prepared, input.device, arguments)

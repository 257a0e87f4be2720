"""Backward for memory="low", window of time by window of time.

Forward kept every h_t, and the c_t at the start of each window. Backward takes the windows from the last one on:

1. the pre-activations of the window's steps, by two matrix products over its inputs and the known h;
2. the gates and c_t from them (recompute.py);
3. the backward scan of the window;
4. the matrix products over what the scan leaves (gradients.py).

The gradients of the state at the start of a window are the gradients of the final state of the window before.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import flops
from ..ragged import Ragged, tables_of
from ..stack import LaneWeights, Stack, Start
from . import products
from .backward import scan_backward
from .dispatch import invoke, named
from .dropout import Dropout
from .gradients import add_absent_steps, of_lane, stacked
from .layout import Layout
from .recompute import recompute_gates
from .saved import Grads, Inputs, Saved
from .windows import low_memory_bounds, windows_of


def of_stack(saved: Saved, needed: Inputs, grads: Grads) -> Inputs:
    """The gradients that are `needed`, if forward kept little."""
    start = saved.inputs.start
    found = low_memory_gradients(
        grads.output,
        grads.h_n,
        grads.c_n,
        saved.inputs.input,
        start.c_reset,
        start.preact,
        start.preact_reset,
        *saved.stack().arguments(),
        saved.buffers.hidden,
        saved.buffers.cell,
        saved.fixed.tables(),
        saved.static.dropout,
        saved.fixed.seed,
        needed.input,
    )
    return Inputs.of([grad if need else None for grad, need in zip(found, needed.flat(), strict=True)])


@torch.library.custom_op("lstm_triton::low_memory_gradients", mutates_args=())
def low_memory_gradients(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    c_reset: Tensor | None,
    preact_0: Tensor | None,
    preact_reset: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    bias: bool,
    reverse: bool,
    hidden: Tensor,
    cell_starts: Tensor,
    tables: Sequence[Tensor],
    dropout: float,
    seed: Tensor | None,
    of_input: bool,
) -> list[Tensor]:
    """All gradients of a stack, in the order input, h_0, c_0, h_reset, c_reset, preact_0, preact_reset, weights.

    Args:
        grad_output, grad_h_n, grad_c_n: as `scan_backward` takes them.
        hidden, cell_starts: what `scan_forward` returned as hidden and cell, with low_memory.
        of_input: whether the gradient of the input is needed; otherwise it is empty.
        others: as `scan_forward` had them.
    """
    stack, drop = Stack.of(weights, directions, bias, reverse), Dropout(dropout, seed)
    start = Start(c_reset=c_reset, preact=preact_0, preact_reset=preact_reset)
    layout = Layout.of(input, stack.hidden_size(), Ragged.of(tables))
    grads = Grads(grad_output, grad_h_n, grad_c_n, None)
    read = _Read(input, hidden, stack, layout, drop)
    grad_rows = None if grads.output is None else grads.output.reshape(layout.rows, -1)
    grad_starts: dict[int, Start] = {}
    grad_weights: dict[int, LaneWeights] = {}
    for layer in reversed(range(stack.num_layers())):
        lanes = range(stack.lanes())[stack.layer(layer)]
        grad_below = None
        if layer > 0 or of_input:
            grad_below = input.new_zeros(layout.rows, stack.weights[lanes.start].ih.shape[1])
        for lane in lanes:
            own_grads = Grads(
                _output_of(grad_rows, lane % directions, stack.hidden_size()),
                None if grads.h_n is None else grads.h_n[lane : lane + 1],
                None if grads.c_n is None else grads.c_n[lane : lane + 1],
                None,
            )
            if own_grads.output is not None and dropout > 0 and not stack.is_last(lane):
                own_grads = own_grads._replace(output=drop.applied(lane, own_grads.output))
            sums = _of_lane(lane, read, start.of(lane), cell_starts[lane], own_grads, grad_below)
            grad_weights[lane], grad_starts[lane] = sums
        grad_rows = grad_below
    grad_input = input.new_empty(0) if grad_rows is None else grad_rows.view(input.shape)
    grad_start = stacked([grad_starts[lane] for lane in range(stack.lanes())])  # every state has a gradient here
    found: list[Any] = [
        *grad_start,
        *(weight for lane in range(stack.lanes()) for weight in grad_weights[lane].given()),
    ]
    return [grad_input, *(total.to(input.dtype) for total in found)]


@low_memory_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:
    given = named(low_memory_gradients, arguments)
    stack = Stack.of(given.weights, given.directions, given.bias)
    hidden_size = stack.hidden_size()
    batch_size = Layout.of(given.input, hidden_size, Ragged.of(given.tables)).batch_size
    sizes = [hidden_size] * 4 + [4 * hidden_size] * 2  # h, c, h_reset, c_reset; preact, preact_reset
    return [
        given.input.new_empty(given.input.shape if given.of_input else 0),
        *(given.input.new_empty(stack.lanes(), batch_size, size) for size in sizes),
        *(weight.new_empty(weight.shape) for weight in given.weights),
    ]


@flops.counts("lstm_triton::low_memory_gradients")
def _(*arguments: Any) -> int:
    given = named(low_memory_gradients, arguments)
    stack = Stack.of(given.weights, given.directions, given.bias)
    layout = Layout.of(given.input, stack.hidden_size(), Ragged.of(given.tables))
    steps, _ = flops.steps(layout.rows, layout.batch_size, layout.ragged)
    # The pre-activations once more, the gradients of the weights, those of all h, and those of what each layer reads.
    through_input = stack.weights if given.of_input else stack.weights[stack.directions :]
    through = [*(lane.hh for lane in stack.weights), *(lane.ih for lane in through_input)]
    return 2 * flops.products(steps, given.weights) + flops.products(steps, through)


class _Read:
    """What the steps of a lane read, found again in what forward kept."""

    def __init__(self, input: Tensor, hidden: Tensor, stack: Stack, layout: Layout, dropout: Dropout) -> None:
        self.hidden, self.stack, self.layout, self.dropout = hidden, stack, layout, dropout
        self.input = layout.input_rows(input)

    def inputs(self, lane: int, rows: slice) -> Tensor:
        """(rows, K) the output of the layer below after dropout; for the first layer, the input."""
        layer = lane // self.stack.directions
        if layer == 0:
            return self.input[rows]
        layout, lanes = self.layout, range(self.stack.lanes())[self.stack.layer(layer - 1)]
        outputs = [self.hidden[below, layout.steps(), : layout.hidden_size][rows] for below in lanes]
        if self.dropout.probability > 0:
            outputs = [
                self.dropout.applied(below, each, rows.start) for below, each in zip(lanes, outputs, strict=True)
            ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def hidden_before(self, lane: int, rows: slice) -> Tensor:
        """(rows, H) the h that the steps start from."""
        return self.layout.hidden_before(self.hidden[lane], self.stack.is_reverse(lane), rows)


def _output_of(rows: Tensor | None, direction: int, hidden_size: int) -> Tensor | None:
    """(rows, H) the columns of one direction."""
    return None if rows is None else rows[:, direction * hidden_size : (direction + 1) * hidden_size]


def _of_lane(
    lane: int, read: _Read, start: Start, cell_starts: Tensor, grads: Grads, grad_below: Tensor | None
) -> tuple[LaneWeights, Start]:
    """The gradients of a lane, in float32, since every window adds to them.

    Args:
        start: the states that the lane starts from; h and c are not needed.
        cell_starts: (LOW_MEMORY_WINDOWS, B, state_stride(H)) the c at the start of each window.
        grads: gradients of the lane's results: output (rows, H), h_n and c_n (1, B, H).
        grad_below: (rows, K); the gradient of what the lane reads is added here. None: it is not needed.
    """
    stack, layout = read.stack, read.layout
    weights, reverse = stack.weights[lane], stack.is_reverse(lane)
    alone = Stack((weights,), 1, reverse)
    batch_size, hidden_size = layout.batch_size, layout.hidden_size
    every_weight = LaneWeights(*(weight is not None for weight in weights))  # type: ignore[arg-type]
    every_start = Start(h=True, h_reset=True, preact=True, preact_reset=True)  # type: ignore[arg-type]
    sums = LaneWeights(*(None if each is None else torch.zeros_like(each, dtype=torch.float32) for each in weights))  # type: ignore[arg-type]
    shape = cell_starts.new_zeros(batch_size, hidden_size)
    preacts = cell_starts.new_zeros(batch_size, 4 * hidden_size)
    total = Start(None, None, shape, torch.zeros_like(shape), preacts, torch.zeros_like(preacts))
    grad_h, grad_c = grads.h_n, grads.c_n
    windows = list(enumerate(windows_of(layout, low_memory_bounds(layout.time_steps))))
    for number, window in windows[:: 1 if reverse else -1]:
        own = layout.window(window)
        rows, hidden_before = read.inputs(lane, window.rows), read.hidden_before(lane, window.rows)
        gates = rows.new_empty(1, own.rows, 4 * hidden_size)
        products.project(rows, weights.ih, gates[0])
        layout.add_preacts(gates[0], start, window, reverse)
        products.project(hidden_before, weights.hh, gates[0], add=True)
        cell = cell_starts.new_empty(1, own.state_rows, own.stride)
        cell[0, own.initial(reverse)] = cell_starts[number]
        if own.ragged is not None:
            cell[0, own.resets(), :hidden_size] = 0 if start.c_reset is None else start.c_reset
        recompute_gates(gates, cell, alone, own)

        output = None if grads.output is None else grads.output[window.rows]
        if output is not None and own.ragged is None:
            output = output.unflatten(0, (-1, batch_size))
        grad_gates, grad_cell = invoke(
            scan_backward, output, grad_h, grad_c, *alone.arguments(), cell, gates, tables_of(own.ragged), batch_size
        )
        found, found_start = of_lane(
            grad_gates[0], own, reverse, weights, [rows], hidden_before, every_weight, every_start
        )
        for sum_, each in zip(sums.given(), weights.of_given(found), strict=True):
            sum_ += each.reshape(sum_.shape)
        if grad_below is not None:
            rows_gates = grad_gates[0, own.steps(), : 4 * hidden_size]
            grad_below[window.rows] += own.of_steps(products.matmul(rows_gates, products.gate_minor(weights.ih)))

        # Gradients of the states that the window starts from. They flow into the window before.
        _add(total.h_reset, found_start.h_reset)
        _add(total.preact_reset, found_start.preact_reset)
        if own.ragged is not None:
            _add(total.c_reset, grad_cell[0, batch_size:, :hidden_size])
        _add(total.preact, found_start.preact, _begins(layout, window.steps, reverse))
        assert found_start.h is not None
        grad_h = add_absent_steps(found_start.h, None if grad_h is None else grad_h[0], own).unsqueeze(0)
        grad_c = grad_cell[:, :batch_size, :hidden_size]
    assert grad_h is not None
    assert grad_c is not None
    return sums, total._replace(h=grad_h[0].float(), c=grad_c[0].float())


def _begins(layout: Layout, steps: slice, reverse: bool) -> Tensor | bool:
    """(B, 1) bool: which sequences start from their initial state in a window; True or False: all or none."""
    if not reverse:
        return bool(steps.start == 0)
    if layout.ragged is None:
        return bool(steps.stop == layout.time_steps)
    begins: Tensor = (layout.ragged.lengths <= steps.stop).unsqueeze(1)
    return begins


def _add(total: Tensor | None, found: Tensor | None, where: Tensor | bool = True) -> None:
    if total is not None and found is not None and where is not False:
        total += found if where is True else torch.where(where, found, 0)

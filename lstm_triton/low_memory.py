"""The backward pass of a stack of which little was kept: every h, and the c from which windows of time start.

Window after window, from the last one on: the pre-activations of its steps again, by two large matrix products over
inputs and known h; gates and c from them (kernels/recompute.py); the backward scan; and the products over what that
leaves. What flows from one window into the one before it is handed on like the gradients of final states.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, transforms
from .ops import Layout, Stack, gate_major, gate_minor
from .ragged import Ragged


@torch.library.custom_op("lstm_triton::low_memory_gradients", mutates_args=())
def gradients(
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
        grad_output, grad_h_n, grad_c_n: as `ops.scan_backward` takes them.
        hidden, cell_starts: what `ops.scan_forward` returned as hidden and cell, with low_memory.
        of_input: whether the gradient of the input is needed; otherwise it is empty.
        others: as `ops.scan_forward` had them.
    """
    stack = Stack(weights, directions, bias, reverse)
    layout = Layout.of(input, stack.hidden_size, tables)
    batch_size, hidden_size = layout.batch_size, layout.hidden_size
    ragged = Ragged(*tables) if tables else None
    time_steps = input.shape[0] if ragged is None else ragged.offsets.shape[0] - 1
    windows = ops.windows_of(layout, ragged, time_steps, ops.low_memory_steps(time_steps))
    shape = (stack.lanes, batch_size, hidden_size)
    # In float32, since every window adds to them.
    of_h_0, of_c_0, of_h_reset, of_c_reset = (input.new_zeros(shape, dtype=torch.float32) for _ in range(4))
    preacts_shape = (*shape[:2], 4 * hidden_size)
    of_preact_0, of_preact_reset = (input.new_zeros(preacts_shape, dtype=torch.float32) for _ in range(2))
    of_weights = [weight.new_zeros(weight.shape, dtype=torch.float32) for weight in weights]
    input_rows = input.reshape(layout.rows, -1)
    if ragged is not None:
        input_rows = torch.where(ragged.is_step().unsqueeze(1), input_rows, 0)  # there may be anything where no step is

    def is_dropped(lane: int) -> bool:
        return dropout > 0 and lane < stack.lanes - directions

    def dropped(lane: int, rows: Tensor, first_row: int) -> Tensor:
        """A lane's outputs after its dropout, or their gradients before it; rounded once, as the scans do."""
        assert seed is not None
        scaled: Tensor = rows.float() * ops.dropout_scale(seed, lane, dropout, rows, first_row)
        return scaled.to(rows.dtype)

    def read_by(layer: int, rows: slice) -> Tensor:
        """What a layer has read."""
        if layer == 0:
            return input_rows[rows]
        lanes = range(stack.layer(layer - 1).start, stack.layer(layer - 1).stop)
        outputs = [hidden[lane, layout.steps, :hidden_size][rows] for lane in lanes]
        if is_dropped(lanes[0]):
            outputs = [dropped(lane, each, rows.start) for lane, each in zip(lanes, outputs, strict=True)]
        return outputs[0] if directions == 1 else torch.cat(outputs, dim=1)

    def gradients_of_lane(lane: int, grad_output: Tensor | None, grad_below: Tensor | None) -> None:
        """Add to grad_below what flows into the layer below, given what flows into the lane's outputs (rows, H)."""
        own = stack.of(slice(lane, lane + 1))
        weight_ih, weight_hh = (own.named(name)[0] for name in ops.WEIGHTS[:2])
        sums = of_weights[stack.weights_per_lane * lane : stack.weights_per_lane * (lane + 1)]
        grad_h, grad_c = (None if grad is None else grad[lane : lane + 1] for grad in (grad_h_n, grad_c_n))
        for number in range(len(windows))[:: 1 if own.reverse else -1]:
            window = windows[number]
            part = layout._replace(rows=window.rows.stop - window.rows.start)
            of_part = None if ragged is None else ragged.window(window.steps, window.rows)
            part_tables = () if of_part is None else tuple(of_part)

            rows = read_by(lane // directions, window.rows)
            hidden_prev = ops.hidden_before(hidden[lane], layout, ragged, own.reverse, window.rows)
            gates = input.new_empty(1, part.rows, 4 * hidden_size)
            ops.project(rows, weight_ih, gates[0])
            preacts = [None if each is None else each[lane] for each in (preact_0, preact_reset)]
            ops.add_starts(gates[0], preacts, window, layout, ragged, own.reverse)
            ops.project(hidden_prev, weight_hh, gates[0], add=True)
            cell = cell_starts.new_empty(1, part.state_rows, part.stride)
            cell[0, part.initial(own.reverse)] = cell_starts[lane, number]
            if ragged is not None:
                cell[0, part.anew, :hidden_size] = 0 if c_reset is None else c_reset[lane]
            ops.gates_again(gates, cell, own, part_tables, batch_size)

            outside = None if grad_output is None else grad_output[window.rows]
            if outside is not None and ragged is None:
                outside = outside.unflatten(0, (-1, batch_size))
            grad_gates, grad_cell = transforms.call(
                ops.scan_backward, outside, grad_h, grad_c, own.weights, 1, bias, own.reverse, cell, gates,
                part_tables, batch_size,
            )  # fmt: skip
            of_gates = grad_gates[0, part.steps, : 4 * hidden_size]
            sums[0] += gate_major(ops.matmul(of_gates.t(), rows))
            sums[1] += gate_major(ops.matmul(of_gates.t(), hidden_prev))
            if bias:
                of_bias = gate_major(of_gates.sum(0, dtype=torch.float32).unsqueeze(1)).squeeze(1)
                sums[2] += of_bias
                sums[3] += of_bias
            if grad_below is not None:
                grad_below[window.rows] += ops.matmul(of_gates, gate_minor(weight_ih))

            # Into the states that the window starts from, and so into the window before it.
            begun = ops.begun_gates(grad_gates[0], part, of_part, own.reverse)
            if of_part is None:
                begins: Tensor | bool = window.steps.stop == time_steps if own.reverse else window.steps.start == 0
            else:
                assert ragged is not None
                begins = (ragged.lengths <= window.steps.stop).unsqueeze(1) if own.reverse else window.steps.start == 0
                if part.rows % batch_size == 0:  # otherwise packed, where nothing starts anew
                    anew = of_part.starts_anew(own.reverse).unsqueeze(1)
                    of_anew = torch.where(anew, of_gates, 0).unflatten(0, (-1, batch_size)).sum(0)
                    of_preact_reset[lane] += gate_major(of_anew.t()).t()
                    of_h_reset[lane] += ops.matmul(of_anew, gate_minor(weight_hh), exact=True)
                of_c_reset[lane] += grad_cell[0, batch_size:, :hidden_size]
            of_preact_0[lane] += gate_major((begun if begins is True else begun * begins).t()).t()
            through = ops.matmul(begun, gate_minor(weight_hh), exact=True)
            if of_part is not None and grad_h is not None:  # sequences without steps here end where they begin
                through = through + torch.where(of_part.lengths.unsqueeze(1) > 0, 0, grad_h[0])
            grad_h, grad_c = through.unsqueeze(0), grad_cell[:, :batch_size, :hidden_size]
        assert grad_h is not None
        assert grad_c is not None
        of_h_0[lane], of_c_0[lane] = grad_h[0], grad_c[0]

    grad_rows = None if grad_output is None else grad_output.reshape(layout.rows, -1)
    for layer in reversed(range(stack.num_layers)):
        lanes = range(stack.layer(layer).start, stack.layer(layer).stop)
        grad_below = None
        if layer > 0 or of_input:
            grad_below = input.new_zeros(layout.rows, stack.named("weight_ih")[lanes.start].shape[1])
        for at, lane in enumerate(lanes):
            of_lane = None if grad_rows is None else grad_rows[:, at * hidden_size : (at + 1) * hidden_size]
            if of_lane is not None and is_dropped(lane):
                of_lane = dropped(lane, of_lane, 0)
            gradients_of_lane(lane, of_lane, grad_below)
        grad_rows = grad_below
    of_inputs = input.new_empty(0) if grad_rows is None else grad_rows.view(input.shape)
    of_states = (of_h_0, of_c_0, of_h_reset, of_c_reset, of_preact_0, of_preact_reset)
    found = [of_inputs, *(total.to(input.dtype) for total in of_states)]
    return [*found, *(total.to(weight.dtype) for total, weight in zip(of_weights, weights, strict=True))]


@gradients.register_fake
def _(
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
    stack = Stack(weights, directions, bias, reverse)
    shape = (stack.lanes, Layout.of(input, stack.hidden_size, tables).batch_size, stack.hidden_size)
    states = [input.new_empty(shape) for _ in range(4)]
    preacts = [input.new_empty((*shape[:2], 4 * shape[2])) for _ in range(2)]
    return [
        input.new_empty(input.shape if of_input else 0),
        *states,
        *preacts,
        *(weight.new_empty(weight.shape) for weight in weights),
    ]

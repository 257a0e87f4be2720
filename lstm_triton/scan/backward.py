"""The backward scan of a stack of layers as a PyTorch operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import flops
from ..ragged import Ragged
from ..stack import Stack
from . import buffers, products
from .alignment import transposed
from .dispatch import named
from .launch import lookups, run
from .layout import Layout, Window
from .prepared import Sizes, backward_scan_of


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
    """The gradients of a stack's pre-activations and initial c, from the gradients of its results.

    Args:
        grad_output: (T, B, directions * H), ragged (rows, directions * H), or None for zeros.
        grad_h_n, grad_c_n: (lanes, B, H), or None for zeros.
        weights, directions, bias, reverse, tables, dropout, seed: as `scan_forward` had them.
        cell, gates: as `scan_forward` returned them.
        batch_size: B.
        grad_cells: (lanes, T, B, H), ragged (lanes, rows, H), gradients of every c, or None for zeros.

    Returns:
        grad_gates: (lanes, state rows, 4 * state_stride(H)), gate-minor: column 4 * unit + gate, padded past 4H. Rows
            that belong to no step hold zeros if they are read.
        grad_cell: (lanes, B, state_stride(H)) float32, the gradient of c_0. Ragged: (lanes, 2B, state_stride(H)), the
            gradients of c_0 and of c_reset.
    """
    ragged, hidden_size = Ragged.of(tables), weights[0].shape[0] // 4
    size = 4 if bias else 2  # weights of a lane
    lanes, rows = len(weights) // size, gates.shape[1]
    time_steps = rows // batch_size if ragged is None else ragged.time_steps()
    sizes = Sizes(
        *(time_steps, batch_size, weights[0].shape[1], hidden_size, lanes, directions),
        *(bias, reverse, ragged is not None, gates.dtype, gates.device),
    )
    prepared = backward_scan_of(sizes, dropout > 0, grad_cells is not None)
    layout = prepared.layout or Layout.sized(time_steps, rows, batch_size, hidden_size, ragged)
    window = Window(slice(0, time_steps), slice(0, rows))
    shape = (time_steps, batch_size) if ragged is None else (rows,)

    grad_gates = buffers.sentinels((lanes, layout.state_rows, 4 * layout.stride), gates)
    if prepared.ends is not None:
        # No gradient comes from behind the last step.
        grad_gates.as_strided(*prepared.ends.behind).zero_()
    elif ragged is not None:
        grad_gates[:, :batch_size].zero_()
        grad_gates[:, layout.steps().stop :].zero_()
        grad_gates[:, layout.steps()].masked_fill_(~ragged.is_step().unsqueeze(1), 0)
    grad_cell, no_grad_h_n = _zeros(cell, gates, layout, lanes)
    if grad_c_n is not None:
        grad_cell[:, :batch_size, :hidden_size] = grad_c_n
    grad_h_n = no_grad_h_n if grad_h_n is None else grad_h_n.contiguous()
    grad_cells = None if grad_cells is None else grad_cells.contiguous()

    for schedule in prepared.schedules:
        plan, own, dropped = schedule.plan, schedule.lanes, schedule.dropped
        above = (own.stop - 1) // directions + 1  # the layer that reads what these lanes compute
        if above < lanes // directions:
            of_layer = slice(above * directions, (above + 1) * directions)
            through = weights[of_layer.start * size : of_layer.stop * size : size]
            grad_output = products.input_gradient(grad_gates[of_layer], through, layout).view(*shape, -1)
        elif grad_output is None:
            grad_output = gates.new_zeros(directions * hidden_size).expand(*shape, -1)
        elif grad_output.stride(-1) != 1:
            grad_output = grad_output.contiguous()
        strides = grad_output.stride()
        first_output = own.start % directions * hidden_size if not plan.chained else 0
        of_lanes = weights[own.start * size : own.stop * size]
        weights_hh = transposed(of_lanes[1::size], layout.stride)
        weights_ih = weights_hh
        if plan.chained:  # the first lane has no lane below in this launch, so its weight is not read
            weights_ih = (*weights_hh[:1], *transposed(of_lanes[size::size], layout.stride))
        of_launch = (grad_h_n, grad_cell, gates, cell, grad_gates)
        if not schedule.is_whole:
            of_launch = tuple([tensor[own] for tensor in of_launch])  # type: ignore[assignment]
        own_grad_h_n, own_grad_cell, own_gates, own_cell, own_grad_gates = of_launch
        arguments = {
            "grad_output_ptr": grad_output[..., first_output:] if first_output else grad_output,
            "grad_output_stride_step": strides[0],
            "grad_output_stride_batch": strides[-2],
            "grad_output_stride_lane": hidden_size,
            "grad_hidden_ptr": own_grad_h_n,
            "grad_cell_ptr": own_grad_cell,
            "gates_ptr": own_gates,
            "cell_ptr": own_cell,
            "grad_gates_ptr": own_grad_gates,
            "grad_cells_ptr": grad_h_n if grad_cells is None else grad_cells[own],
            "weight_ih_ptrs": weights_ih,
            "weight_hh_ptrs": weights_hh,
            "before_successors_ptr": gates if ragged is None else ragged.successors(reverse=True),
            **lookups(layout, plan, window, gates),
            "seed_ptr": seed if dropped else gates,
            "dropout": dropout,
            "dropped_lanes": dropped,
            "first_lane": own.start,
            "reverse": int(schedule.reverse),
            "hold": plan.hold,
        }
        run(schedule.parts[0].kernel, gates.device, arguments, prepared.on)
    return grad_gates, grad_cell


def _zeros(cell: Tensor, gates: Tensor, layout: Layout, lanes: int) -> tuple[Tensor, Tensor]:
    """Zeros in one memory: (lanes, start rows, stride) like c, and (lanes, B, H) in the dtype of the gates."""
    first, second = lanes * layout.start_rows * layout.stride, lanes * layout.batch_size * layout.stride
    zeros = cell.new_zeros(first + second)
    row = (layout.stride, 1)
    of_cell = zeros.as_strided((lanes, layout.start_rows, layout.stride), (layout.start_rows * layout.stride, *row), 0)
    others = zeros if gates.dtype == zeros.dtype else zeros.view(gates.dtype)
    sizes = (lanes, layout.batch_size, layout.hidden_size)
    strides = (layout.batch_size * layout.hidden_size, layout.hidden_size, 1)
    return of_cell, others.as_strided(sizes, strides, first * zeros.itemsize // others.itemsize)


@scan_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = named(scan_backward, arguments)
    lanes, rows, stride = given.cell.shape
    start_rows = (2 if given.tables else 1) * given.batch_size
    return given.gates.new_empty(lanes, rows, 4 * stride), given.cell.new_empty(lanes, start_rows, stride)


@flops.counts("lstm_triton::scan_backward")
def _(*arguments: Any) -> int:
    given = named(scan_backward, arguments)
    stack = Stack.of(given.weights, given.directions, given.bias)
    steps, starts = flops.steps(given.gates.shape[1], given.batch_size, Ragged.of(given.tables))
    # A sequence's first step sends no gradient to a step before. Layers above the first send it to the layer below.
    recurrent = flops.products(steps - starts, [lane.hh for lane in stack.weights])
    return recurrent + flops.products(steps, [lane.ih for lane in stack.weights[stack.directions :]])

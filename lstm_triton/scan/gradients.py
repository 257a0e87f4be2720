"""The gradients of a stack: the backward scan, and matrix products over its result, the gate gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..stack import NO_STATES, LaneWeights, Start
from . import products
from .backward import scan_backward
from .dispatch import invoke
from .layout import Layout
from .saved import Grads, Inputs, Saved


def of_lane(
    grad_gates: Tensor,
    layout: Layout,
    reverse: bool,
    weights: LaneWeights,
    inputs: Sequence[Tensor],
    hidden_before: Tensor | None,
    needed_weights: LaneWeights,
    needed_start: Start,
) -> tuple[LaneWeights, Start]:
    """The gradients of one lane that are needed, over all its steps or over the steps of a window.

    Args:
        grad_gates: (state rows, 4 * state_stride(H)), the lane's part of what `scan_backward` returns.
        layout: the layout of these steps.
        inputs: what the steps read: (rows, K) tensors, whose columns stand side by side.
        hidden_before: (rows, H) the h that the steps start from.
        needed_weights, needed_start: true where a gradient is needed.

    Returns:
        Gradients of the weights, and of the states that sequences start from: `h`, `h_reset`, `preact`,
        `preact_reset`. Those of the biases are one tensor, (4, H) in float32.
    """
    rows = grad_gates[layout.steps(), : 4 * layout.hidden_size]
    weight_ih = weight_hh = bias = None
    if needed_weights.ih:
        parts = [products.matmul(rows.t(), each) for each in inputs]
        weight_ih = products.gate_major(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    if needed_weights.hh:
        assert hidden_before is not None
        weight_hh = products.gate_major(products.matmul(rows.t(), hidden_before))
    if needed_weights.bias_ih or needed_weights.bias_hh:
        bias = rows.sum(0, dtype=torch.float32).view(-1, 4).t()
    # Selected among the sequences behind the products: 0 times a weight that is not finite would be a NaN.
    start = NO_STATES
    if needed_start.h or needed_start.preact:
        gates = layout.first_step_gates(grad_gates, reverse)
        if needed_start.h:
            start = start._replace(h=layout.of_initial(_through_recurrent_weights(gates, weights), reverse))
        if needed_start.preact:
            start = start._replace(preact=layout.of_initial(products.gate_major(gates.t()).t(), reverse))
    if needed_start.h_reset or needed_start.preact_reset:
        reset = layout.reset_gates(rows, reverse)
        if reset is not None and needed_start.h_reset:
            start = start._replace(h_reset=layout.of_resets(_through_recurrent_weights(reset, weights), reverse))
        if reset is not None and needed_start.preact_reset:
            start = start._replace(preact_reset=products.gate_major(reset.t()).t())
    found = LaneWeights(
        weight_ih,  # type: ignore[arg-type]
        weight_hh,  # type: ignore[arg-type]
        bias if needed_weights.bias_ih else None,
        bias if needed_weights.bias_hh else None,
    )
    return found, start


def _through_recurrent_weights(gates: Tensor, weights: LaneWeights) -> Tensor:
    return products.matmul(gates, products.gate_minor(weights.hh), exact=True)


def add_absent_steps(grad_h_0: Tensor, grad_h_n: Tensor | None, layout: Layout) -> Tensor:
    """Add the gradient of h_n to the gradient of h_0 for sequences without steps: their h_n is h_0."""
    if layout.ragged is None or grad_h_n is None:
        return grad_h_0
    return grad_h_0 + torch.where(layout.ragged.lengths.unsqueeze(1) > 0, 0, grad_h_n)


def of_stack(saved: Saved, needed: Inputs, grads: Grads) -> Inputs:
    """The gradients that are `needed`, if forward kept all cells and gates."""
    static, (input, _, weights) = saved.static, saved.inputs
    layout = Layout.of(input, weights[0].shape[0] // 4, saved.fixed.ragged())
    grad_gates, grad_cell = invoke(
        scan_backward,
        grads.output,
        grads.h_n,
        grads.c_n,
        weights,
        static.directions,
        static.bias,
        static.reverse,
        saved.buffers.cell,
        saved.buffers.gates,
        saved.fixed.tables(),
        layout.batch_size,
        grads.cells,
        static.dropout,
        saved.fixed.seed,
    )
    with products.precision_for(input):
        grad_input, grad_weights, grad_start = _from_gates(grad_gates, layout, saved, needed)
    if grad_start.h is not None:
        grad_start = grad_start._replace(h=add_absent_steps(grad_start.h, grads.h_n, layout))
    if needed.start.c or needed.start.c_reset:
        grad_cell = grad_cell[..., : layout.hidden_size].to(input.dtype)
        grad_start = grad_start._replace(
            c=grad_cell[:, : layout.batch_size] if needed.start.c else None,
            c_reset=grad_cell[:, layout.batch_size :] if needed.start.c_reset else None,
        )
    return Inputs(grad_input, grad_start, grad_weights)


def _from_gates(
    grad_gates: Tensor, layout: Layout, saved: Saved, needed: Inputs
) -> tuple[Tensor | None, list[Tensor | None], Start]:
    """What follows from the gate gradients by matrix products: the gradients of the input, the weights and the h."""
    static, (input, _, weights) = saved.static, saved.inputs
    directions, size = static.directions, 4 if static.bias else 2
    grad_input = None
    if needed.input:
        grad_input = products.input_gradient(grad_gates, weights[: directions * size : size], layout)
        grad_input = layout.of_steps(grad_input).view(input.shape)
    grad_weights: list[Tensor | None] = []
    starts: list[Start] = []
    for lane, gates_of_lane in enumerate(grad_gates.unbind()):
        reverse = static.reverse != (lane % directions == 1)
        needed_of_lane = LaneWeights(*needed.weights[lane * size : (lane + 1) * size])
        found, start = of_lane(
            gates_of_lane,
            layout,
            reverse,
            LaneWeights(*weights[lane * size : (lane + 1) * size]),
            _read_by(lane // directions, saved, layout) if needed_of_lane.ih else (),
            layout.hidden_before(saved.buffers.hidden[lane], reverse) if needed_of_lane.hh else None,
            needed_of_lane,
            needed.start,
        )
        grad_weights += found.ih, found.hh
        if static.bias:
            grad_weights += _of_biases(found, input.dtype)
        starts += (start,)
    return grad_input, grad_weights, stacked(starts) if True in needed.start else NO_STATES


def _of_biases(found: LaneWeights, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The gradients (4H,) of both biases, where they are needed. They are equal but share no memory."""
    grad = found.bias_hh if found.bias_ih is None else found.bias_ih  # (4, H)
    if grad is None:
        return None, None
    whole = grad.new_empty(grad.shape, dtype=dtype).copy_(grad).view(-1)
    if found.bias_hh is None:
        return whole, None
    return (None if found.bias_ih is None else whole.clone()), whole


def stacked(starts: Sequence[Start]) -> Start:
    """One `Start` of all lanes, from the `Start` of each lane."""
    return Start(*(None if states[0] is None else torch.stack(states) for states in zip(*starts, strict=True)))


def _read_by(layer: int, saved: Saved, layout: Layout) -> Sequence[Tensor]:
    """What a layer read: (rows, K) tensors, whose columns stand side by side."""
    if layer > 0:
        buffer = saved.buffers.hidden_dropped if saved.static.dropout > 0 else saved.buffers.hidden
        directions = saved.static.directions
        lanes = slice((layer - 1) * directions, layer * directions)
        return buffer[lanes, layout.steps(), : layout.hidden_size].unbind()
    return (layout.input_rows(saved.inputs.input),)

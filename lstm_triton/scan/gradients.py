"""The gradients of a stack: the backward scan, and matrix products over what it leaves."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ragged import Ragged
from ..stack import Stack
from . import products
from .backward import scan_backward
from .buffers import Layout, begun_gates, hidden_before
from .dispatch import invoke
from .low_memory import low_memory_gradients

STATES = 7  # of Scan's arguments, those before the tables and weights that gradients reach


class Options(NamedTuple):
    """The arguments of Scan that are no tensors."""

    directions: int
    bias: bool
    reverse: bool
    dropout: float
    low_memory: bool
    return_cells: bool
    table_count: int


class Saved(NamedTuple):
    """What backward has of forward."""

    options: Options
    states: Sequence[Tensor | None]  # the first arguments of Scan
    seed: Tensor | None
    hidden: Tensor
    passed: Tensor
    cell: Tensor
    gates: Tensor
    tables: Sequence[Tensor]
    weights: Sequence[Tensor]

    @staticmethod
    def of(options: Options, tensors: Sequence[Any]) -> "Saved":
        states, buffers = tensors[:STATES], tensors[STATES : STATES + 5]
        tables_and_weights, count = tensors[STATES + 5 :], options.table_count
        return Saved(options, states, *buffers, tables_and_weights[:count], tables_and_weights[count:])  # type: ignore[call-arg]

    def tensors(self) -> list[Tensor | None]:
        buffers = (self.seed, self.hidden, self.passed, self.cell, self.gates)
        return [*self.states, *buffers, *self.tables, *self.weights]

    @property
    def stack(self) -> Stack:
        return Stack(self.weights, self.options.directions, self.options.bias, self.options.reverse)

    @property
    def ragged(self) -> Ragged | None:
        return Ragged(*self.tables) if self.tables else None

    @property
    def input(self) -> Tensor:
        input = self.states[0]
        assert input is not None
        return input


def gradients_of_stack(saved: Saved, needed: Sequence[bool], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients of states and weights, as far as needed: the backward scan, and products over what it leaves."""
    input, stack, ragged, dropout, tables = saved.input, saved.stack, saved.ragged, saved.options.dropout, saved.tables
    if saved.options.low_memory:
        _, _, _, _, c_reset, preact_0, preact_reset = saved.states
        every = low_memory_gradients(
            *grads[:3], input, c_reset, preact_0, preact_reset, *stack, saved.hidden, saved.cell, tables, dropout,
            saved.seed, needed[0],
        )  # fmt: skip
        return [grad if need else None for grad, need in zip(every, needed, strict=True)]
    layout = Layout.of(input, stack.hidden_size, tables)
    hidden_size, batch_size = stack.hidden_size, layout.batch_size
    grad_output, grad_h_n, grad_c_n, grad_cells = grads
    grad_gates, grad_cell = invoke(
        scan_backward, grad_output, grad_h_n, grad_c_n, *stack, saved.cell, saved.gates, tables, batch_size,
        grad_cells, dropout, saved.seed,
    )  # fmt: skip
    grad_cell = grad_cell[..., :hidden_size].to(input.dtype)

    found: list[Tensor | None] = [None] * len(needed)
    if needed[0]:
        first = stack.layer(0)
        found[0] = products.input_gradient(grad_gates[first], stack.named("weight_ih")[first], layout).view(input.shape)
    begun, anew = [], []  # of every lane, the gradients of the states' shares in the pre-activations, gate-minor
    of_weights: list[Tensor | None] = []
    weight_needed = iter(needed[STATES:])
    for lane in range(stack.lanes):
        reverse = stack.is_reverse(lane)
        rows = grad_gates[lane, layout.steps, : 4 * hidden_size]
        if needed[1] or needed[5]:
            begun.append(begun_gates(grad_gates[lane], layout, ragged, reverse))
        if ragged is not None and (needed[3] or needed[6]):
            # Sequences start anew in padded batches only: their rows are those of T steps.
            is_anew = ragged.starts_anew(reverse).unsqueeze(1)
            anew.append(torch.where(is_anew, rows, 0).unflatten(0, (-1, batch_size)).sum(0))
        of_weight_ih = of_weight_hh = None
        if next(weight_needed):
            inputs = _inputs(saved, lane // stack.directions, layout)
            of_inputs = [products.matmul(rows.t(), each) for each in inputs]
            of_weight_ih = products.gate_major(of_inputs[0] if len(of_inputs) == 1 else torch.cat(of_inputs, dim=1))
        if next(weight_needed):
            hidden_prev = hidden_before(saved.hidden[lane], layout, ragged, reverse)
            of_weight_hh = products.gate_major(products.matmul(rows.t(), hidden_prev))
        of_weights += [of_weight_ih, of_weight_hh]
        if stack.bias:
            of_ih, of_hh = next(weight_needed), next(weight_needed)
            grad_bias = products.gate_major(rows.sum(0).unsqueeze(1)).squeeze(1) if of_ih or of_hh else None
            own_bias = grad_bias.clone() if grad_bias is not None and of_ih and of_hh else grad_bias
            of_weights += [grad_bias if of_ih else None, own_bias if of_hh else None]
    found[STATES:] = of_weights

    def through_recurrent_weights(of_preacts: list[Tensor]) -> Tensor:
        weights = stack.named("weight_hh")
        return torch.stack(
            [
                products.matmul(each, products.gate_minor(weight), exact=True)
                for each, weight in zip(of_preacts, weights, strict=True)
            ]
        )

    if needed[1]:
        grad_h_0 = through_recurrent_weights(begun)
        if ragged is not None and grad_h_n is not None:  # sequences without steps end where they begin
            grad_h_0 = grad_h_0 + torch.where(ragged.lengths.unsqueeze(1) > 0, 0, grad_h_n)
        found[1] = grad_h_0
    if needed[2]:
        found[2] = grad_cell[:, :batch_size]
    if needed[3] and anew:
        found[3] = through_recurrent_weights(anew)
    if needed[4]:
        found[4] = grad_cell[:, batch_size:]
    for place, of_preacts in ((5, begun), (6, anew)):
        if needed[place] and of_preacts:
            found[place] = torch.stack([products.gate_major(each.t()).t() for each in of_preacts])
    return found


def _inputs(saved: Saved, layer: int, layout: Layout) -> list[Tensor]:
    """What a layer has read: (rows, K) tensors, side by side."""
    if layer > 0:
        buffer = saved.passed if saved.options.dropout > 0 else saved.hidden
        below = buffer[saved.stack.layer(layer - 1), layout.steps, : layout.hidden_size]
        return list(below.unbind())
    rows = saved.input.reshape(layout.rows, -1)
    # There may be anything where no step is.
    return [rows if saved.ragged is None else torch.where(saved.ragged.is_step().unsqueeze(1), rows, 0)]

"""The scans of a stack of layers as a `torch.autograd.Function`."""

from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..ragged import Ragged
from ..stack import Stack
from .buffers import cells_of, output_of
from .dispatch import invoke
from .formula import gradients_by_formula
from .forward import scan_forward
from .gradients import STATES, Options, Saved, gradients_of_stack


class Scan(torch.autograd.Function):
    """The states first, then the seed, the options, the tables of a ragged batch, and the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        (input, h_0, c_0, h_reset, c_reset, preact_0, preact_reset), seed, options, tables, weights = _sorted(arguments)
        keep = not options.low_memory
        stack = Stack(weights, options.directions, options.bias, options.reverse)
        hidden, passed, cell, gates, h_n, c_n = invoke(
            scan_forward, input, h_0, c_0, *stack, keep, keep, tables, h_reset, c_reset, options.dropout, seed,
            preact_0, preact_reset, options.low_memory,
        )  # fmt: skip
        ragged = Ragged(*tables) if tables else None
        cells = cells_of(cell, stack, input, ragged) if options.return_cells else hidden.new_empty(0)
        return output_of(hidden, stack, input, ragged), h_n, c_n, cells, hidden, passed, cell, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        states, seed, options, tables, weights = _sorted(inputs)
        buffers = output[4:]
        ctx.options = tuple(options)
        ctx.mark_non_differentiable(*(buffers if options.return_cells else output[3:]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*states, seed, *buffers, *tables, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = Saved.of(Options(*ctx.options), ctx.saved_tensors)
        if not saved.options.return_cells:
            grads = (*grads[:3], None)
        others = len(Options._fields) + 1 + len(saved.tables)
        needed = (*ctx.needs_input_grad[:STATES], *ctx.needs_input_grad[STATES + others :])
        # Autocast that is on where backward is called was not asked for by the layer.
        with without_autocast(saved.input.device):
            if torch.is_grad_enabled():
                found = _Gradients.apply(  # type: ignore[no-untyped-call]
                    needed, ctx.options, *grads[:4], *saved.tensors()
                )
            else:
                found = gradients_of_stack(saved, needed, grads[:4])
        return *found[:STATES], *(None for _ in range(others)), *found[STATES:]


def _sorted(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """_Scan's arguments: states, seed, options, tables and weights."""
    last_option = STATES + 1 + len(Options._fields)
    options = Options(*arguments[STATES + 1 : last_option])
    others = arguments[last_option:]
    return arguments[:STATES], arguments[STATES], options, others[: options.table_count], others[options.table_count :]


class _Gradients(torch.autograd.Function):
    """`gradients_of_stack`, to be differentiated again: through the step-by-step formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        needed: tuple[bool, ...], options: tuple[Any, ...], *grads_and_saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = Saved.of(Options(*options), grads_and_saved[4:])
        return tuple(gradients_of_stack(saved, needed, grads_and_saved[:4]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.needed, ctx.options, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        every = ctx.saved_tensors
        saved = Saved.of(Options(*ctx.options), every[4:])
        first_weight = len(every) - len(saved.weights)
        # The gradients of the results, the states and the weights, as far as there are any.
        places = [*range(4 + STATES), *range(first_weight, len(every))]
        places = [place for place in places if every[place] is not None]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            renewed = list(every)
            for place, tensor in zip(places, tensors, strict=True):
                renewed[place] = tensor
            return gradients_by_formula(Saved.of(saved.options, renewed[4:]), ctx.needed, renewed[:4])

        with without_autocast(saved.input.device):
            results, pull_back = torch.func.vjp(gradients, *(every[place] for place in places))[:2]
            present = [grad for grad, need in zip(grads, ctx.needed, strict=True) if need]
            cotangents = (
                torch.zeros_like(result) if grad is None else grad
                for result, grad in zip(results, present, strict=True)
            )
            found = dict(zip(places, pull_back(tuple(cotangents)), strict=True))
        return None, None, *(found.get(place) for place in range(len(every)))

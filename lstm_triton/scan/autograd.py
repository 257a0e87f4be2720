"""The scans of a stack of layers as a `torch.autograd.Function`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..refusal import LaunchRefused
from ..stack import Start
from . import gradients, low_memory
from .batched import mapped
from .buffers import Buffers
from .dispatch import invoke
from .formula import fall_back_to_formula, gradients_by_formula, second_gradients, stack_by_formula
from .forward import scan_forward
from .layout import Layout, output_of
from .saved import BUFFERS, FIRST_WEIGHT, FIXED, Fixed, Grads, Inputs, Saved, Static

RESULTS = len(Grads._fields)  # output, h_n, c_n, cells; the buffers come after them
RETURN_CELLS = Static._fields.index("return_cells")
FIRST_FIXED = len(Static._fields)  # where `Fixed` begins among the arguments of `LSTMScan`
FIRST_INPUT = FIRST_FIXED + len(Fixed._fields)  # where `Inputs` begins


class LSTMScan(torch.autograd.Function):
    """Arguments: `Static`, `Fixed`, `Inputs`, as one flat list. Results: output, h_n, c_n, cells, then `Buffers`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        static, fixed = Static(*arguments[:FIRST_FIXED]), Fixed(*arguments[FIRST_FIXED:FIRST_INPUT])
        input, weights = arguments[FIRST_INPUT], arguments[FIRST_INPUT + FIRST_WEIGHT :]
        start = Start(*arguments[FIRST_INPUT + 1 : FIRST_INPUT + FIRST_WEIGHT])
        keep = not static.low_memory
        *kept, h_n, c_n = invoke(
            scan_forward,
            input,
            start.h,
            start.c,
            weights,
            static.directions,
            static.bias,
            static.reverse,
            keep,
            keep,
            fixed.tables(),
            start.h_reset,
            start.c_reset,
            static.dropout,
            fixed.seed,
            start.preact,
            start.preact_reset,
            static.low_memory,
        )
        buffers, shape = Buffers(*kept), input.shape[:-1]
        output = output_of(buffers.hidden, h_n, static.directions, shape, static.shared_output)
        cells = buffers.hidden.new_empty(0)
        if static.return_cells:
            cells = Layout.of(input, h_n.shape[-1], fixed.ragged()).cells(buffers.cell, input.dtype, shape)
        return output, h_n, c_n, cells, *buffers

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.static, buffers = inputs[:FIRST_FIXED], output[RESULTS:]
        ctx.mark_non_differentiable(*(buffers if inputs[RETURN_CELLS] else output[RESULTS - 1 :]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[FIRST_FIXED:], *buffers)  # `Saved`

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = Saved.of(ctx.static, ctx.saved_tensors)
        output, h_n, c_n, cells, *_ = grads
        results = (output, h_n, c_n, cells if saved.static.return_cells else None)
        # Autocast may be on where backward is called. The layer did not ask for it.
        with without_autocast(saved.inputs.input.device):
            found = mapped(partial(_backward, saved, ctx.needs_input_grad[FIRST_INPUT:]), *results)
        return *(None,) * FIRST_INPUT, *found


def _gradients(saved: Saved, needed: Inputs, grads: Grads) -> Inputs:
    of_stack = low_memory.of_stack if saved.static.low_memory else gradients.of_stack
    try:
        return of_stack(saved, needed, grads)
    except LaunchRefused as error:  # though the kernels of the forward pass ran
        inputs = saved.inputs
        fall_back_to_formula(error, inputs.input, saved.stack().hidden_size())
        wanted = needed.flat()
        found = iter(gradients_by_formula(partial(_formula, saved), inputs.flat(), wanted, grads))
        return Inputs.of([next(found) if need else None for need in wanted])


def _backward(saved: Saved, needed: tuple[bool, ...], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        arguments = (needed, tuple(saved.static), *grads, *saved.tensors())
        return LSTMScanGradients.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return _gradients(saved, Inputs.of(needed), Grads(*grads)).flat()


class LSTMScanGradients(torch.autograd.Function):
    """`_gradients`, made differentiable. Arguments: `needed`, `Static`, then `Grads` and `Saved` as one flat list."""

    generate_vmap_rule = True

    @staticmethod
    def forward(needed: tuple[bool, ...], static: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Any, ...]:
        saved = Saved.of(static, tensors[RESULTS:])
        return _gradients(saved, Inputs.of(needed), Grads(*tensors[:RESULTS])).flat()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.needed, ctx.static, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads_of_gradients: Tensor | None) -> tuple[Any, ...]:
        grads, saved = ctx.saved_tensors[:RESULTS], Saved.of(ctx.static, ctx.saved_tensors[RESULTS:])
        arguments = saved.inputs.flat()
        with without_autocast(saved.inputs.input.device):
            found = mapped(
                partial(second_gradients, partial(_formula, saved), arguments, ctx.needed, grads), *grads_of_gradients
            )
        return None, None, *found[:RESULTS], *(None,) * FIXED, *found[RESULTS:], *(None,) * BUFFERS


def _formula(saved: Saved, *arguments: Any) -> tuple[Tensor, ...]:
    return stack_by_formula(Inputs.of(arguments), saved.static, saved.fixed)

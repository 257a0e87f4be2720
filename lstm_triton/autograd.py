"""One layer in one direction, differentiable: the two scans, and the matrix products around the backward one."""

from typing import Any

import torch
from torch import Tensor

from . import ops, transforms, vmap  # noqa: F401 (vmap: its rules)
from .ragged import Ragged
from .reference import lstm_layer

TENSORS = 9  # of scan_layer's arguments, those that gradients reach


def scan_layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reverse: bool,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """All steps of one layer in one direction, through the Triton kernels.

    Args:
        input: (T, B, I), of any strides; of a ragged batch (rows, I).
        h_0, c_0: (B, H), or both None for zeros.
        weight_ih, weight_hh: (4H, I) and (4H, H), gates in the order i, f, g, o.
        bias_ih, bias_hh: (4H,), or both None.
        reverse: walk from the last step to the first.
        h_reset, c_reset: (B, H), where sequences start anew from, or both None for zeros.
        ragged: which step follows on which; None: all steps of all sequences in turn.
        return_cells: whether every c_t is asked for.

    Returns:
        output (T, B, H), h_n (B, H), c_n (B, H), and with `return_cells` cells (T, B, H); of a ragged batch, output
        and cells are (rows, H), zeros where there is no step. The states may be views of buffers: copy what you keep.

    All tensors have one dtype (float32, float16 or bfloat16) and one device: a GPU, or the CPU while
    lstm_triton.interpreter.interpret() is on. The caller has checked the arguments. Every tensor gets gradients, of any
    order: those above the first, and forward-mode ones, come from the step-by-step formula (reference.py), in the same
    dtype.
    """
    arguments = (input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, h_reset, c_reset)
    tables = () if ragged is None else tuple(ragged)
    if transforms.in_forward_mode():
        return lstm_layer(
            *arguments[:7], reverse=reverse, h_reset=h_reset, c_reset=c_reset, ragged=ragged, return_cells=return_cells
        )
    needs_gradients = any(tensor is not None and tensor.requires_grad for tensor in arguments)
    if torch.is_grad_enabled() and (needs_gradients or transforms.active()):
        results = _Scan.apply(*arguments, reverse, return_cells, *tables)  # type: ignore[no-untyped-call]
        return tuple(results[: 4 if return_cells else 3])
    hidden, cell, _ = ops.scan_forward(*arguments[:7], reverse, return_cells, False, tables, h_reset, c_reset)
    return _results(hidden, cell, reverse, weight_hh.shape[1], ragged, return_cells)


def _results(
    hidden: Tensor, cell: Tensor, reverse: bool, hidden_size: int, ragged: Ragged | None, return_cells: bool
) -> tuple[Tensor, ...]:
    """What `scan_layer` returns, out of the buffers."""
    every_cell = hidden.shape == cell.shape
    if ragged is None:
        output = hidden[ops.STEPS, :, :hidden_size].contiguous()  # a copy only where rows are padded
        final = ops.final_block(reverse)
        h_n = hidden[final, :, :hidden_size]
        c_n = cell[final if every_cell else 0, :, :hidden_size].to(hidden.dtype)
        if not return_cells:
            return output, h_n, c_n
        return output, h_n, c_n, cell[ops.STEPS, :, :hidden_size].to(hidden.dtype)
    steps = slice(ragged.batch_size, ragged.batch_size + ragged.rows)
    output = hidden[steps, :hidden_size].contiguous()
    ends = ragged.ends(reverse)
    h_n = hidden.index_select(0, ends)[:, :hidden_size]
    c_n = cell.index_select(0, ends) if every_cell else cell[: ragged.batch_size]
    c_n = c_n[:, :hidden_size].to(hidden.dtype)
    if not return_cells:
        return output, h_n, c_n
    cells = torch.where(ragged.is_step().unsqueeze(1), cell[steps, :hidden_size].to(hidden.dtype), 0)
    return output, h_n, c_n, cells


class _Scan(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        h_reset: Tensor | None,
        c_reset: Tensor | None,
        reverse: bool,
        return_cells: bool,
        *tables: Tensor,
    ) -> tuple[Tensor | None, ...]:
        hidden, cell, gates = ops.scan_forward(
            input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, reverse, True, True, tables, h_reset, c_reset
        )
        ragged = Ragged(*tables) if tables else None
        results = _results(hidden, cell, reverse, weight_hh.shape[1], ragged, return_cells)
        return *results, *(() if return_cells else (None,)), hidden, cell, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.reverse, ctx.return_cells, *tables = inputs[TENSORS:]
        buffers = output[4:]
        ctx.mark_non_differentiable(*buffers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *buffers, *tables)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        tables = saved[TENSORS + 3 :]
        ragged = Ragged(*tables) if tables else None
        needed = ctx.needs_input_grad[:TENSORS]
        # Autocast that is on where backward is called was not asked for by the layer.
        with torch.autocast(saved[0].device.type, enabled=False):
            if torch.is_grad_enabled():
                found = _Gradients.apply(  # type: ignore[no-untyped-call]
                    needed, ctx.reverse, *saved[: TENSORS + 3], *grads[:4], *tables
                )
            else:
                found = _gradients(saved[: TENSORS + 3], needed, ctx.reverse, ragged, grads[:4])
        return *found, None, None, *(None for _ in tables)


class _Gradients(torch.autograd.Function):
    """`_gradients`, to be differentiated again: through the step-by-step formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(needed: tuple[bool, ...], reverse: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, grads, tables = tensors[: TENSORS + 3], tensors[TENSORS + 3 : TENSORS + 7], tensors[TENSORS + 7 :]
        ragged = Ragged(*tables) if tables else None  # type: ignore[arg-type]
        return tuple(_gradients(saved, needed, reverse, ragged, grads))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.needed, ctx.reverse, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:TENSORS], *tensors[TENSORS + 3 :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        tables = saved[TENSORS + 4 :]
        given = {at: tensor for at, tensor in enumerate(saved[: TENSORS + 4]) if tensor is not None}

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            every: dict[int, Tensor] = dict(zip(given, tensors, strict=True))
            arguments = [every.get(at) for at in range(TENSORS)]
            results_grads = [every.get(at) for at in range(TENSORS, TENSORS + 4)]
            return _gradients_by_formula(
                arguments, results_grads, ctx.needed, ctx.reverse, Ragged(*tables) if tables else None
            )

        with torch.autocast(saved[0].device.type, enabled=False):
            results, pull_back = torch.func.vjp(gradients, *given.values())[:2]
            present = [grad for grad, need in zip(grads, ctx.needed, strict=True) if need]
            cotangents = (
                torch.zeros_like(result) if grad is None else grad
                for result, grad in zip(results, present, strict=True)
            )
            found = dict(zip(given, pull_back(tuple(cotangents)), strict=True))
        arguments = (found.get(at) for at in range(TENSORS))
        results_grads = (found.get(at) for at in range(TENSORS, TENSORS + 4))
        return None, None, *arguments, None, None, None, *results_grads, *(None for _ in tables)


def _gradients(
    saved: tuple[Any, ...],
    needed: tuple[bool, ...],
    reverse: bool,
    ragged: Ragged | None,
    grads: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """The gradients of scan_layer's tensors, as far as needed: the backward scan, and products over what it leaves."""
    *arguments, hidden, cell, gates = saved
    input, _, _, weight_ih, weight_hh, *_ = arguments
    hidden_size = weight_hh.shape[1]
    tables = () if ragged is None else tuple(ragged)
    grad_gates, grad_cell = ops.scan_backward(*grads[:3], weight_hh, cell, gates, reverse, tables, grads[3])
    grad_cell = grad_cell[:, :hidden_size].to(input.dtype)
    columns = slice(4 * hidden_size)
    if ragged is None:
        grad_rows = grad_gates[ops.STEPS, :, columns].flatten(0, 1)
        grad_first = grad_gates[ops.final_block(not reverse), :, columns]
        input_rows = input.reshape(-1, input.shape[2])
    else:
        batch_size, rows = ragged.batch_size, ragged.rows
        grad_rows = grad_gates[batch_size : batch_size + rows, columns]
        firsts, anew = ragged.firsts(reverse), ragged.starts_anew(reverse).unsqueeze(1)
        grad_first = grad_gates.index_select(0, firsts)[:, columns]
        grad_first = torch.where(anew[(firsts - batch_size).clamp(0, rows - 1)], 0, grad_first)
        input_rows = torch.where(ragged.is_step().unsqueeze(1), input, 0)  # there may be anything where no step is

    found: list[Tensor | None] = [None] * TENSORS
    if needed[0]:
        found[0] = ops.matmul(grad_rows, _gate_minor(weight_ih)).view(input.shape)
    if needed[1]:
        grad_h_0 = ops.matmul(grad_first, _gate_minor(weight_hh))
        if ragged is not None and grads[1] is not None:  # sequences without steps end where they begin
            grad_h_0 = grad_h_0 + torch.where(ragged.lengths.unsqueeze(1) > 0, 0, grads[1])
        found[1] = grad_h_0
    if needed[2]:
        found[2] = grad_cell[: grad_first.shape[0]]
    if needed[3]:
        found[3] = _gate_major(ops.matmul(grad_rows.t(), input_rows))
    if needed[4]:
        if ragged is None:
            hidden_prev = hidden[ops.previous_blocks(reverse), :, :hidden_size].flatten(0, 1)
        else:
            sources = ragged.sources(reverse)
            sources = torch.where(sources >= 0, sources, ragged.own_rows())
            hidden_prev = hidden.index_select(0, sources)[:, :hidden_size]
        found[4] = _gate_major(ops.matmul(grad_rows.t(), hidden_prev))
    if needed[5] or needed[6]:
        grad_bias = _gate_major(grad_rows.sum(0).unsqueeze(1)).squeeze(1)
        found[5] = grad_bias if needed[5] else None
        found[6] = grad_bias.clone() if needed[5] and needed[6] else grad_bias if needed[6] else None
    if needed[7] and ragged is not None:
        # Sequences start anew in padded batches only: their rows are those of T steps.
        grad_anew = torch.where(anew, grad_rows, 0).unflatten(0, (-1, batch_size)).sum(0)
        found[7] = ops.matmul(grad_anew, _gate_minor(weight_hh))
    if needed[8]:
        found[8] = grad_cell[grad_first.shape[0] :]
    return found


def _gate_minor(weight: Tensor) -> Tensor:
    """(4H, K) with gates one after the other -> (4H, K) with the gates of a unit side by side."""
    return _regrouped(weight, (4, -1))


def _gate_major(weight: Tensor) -> Tensor:
    """The inverse of _gate_minor."""
    return _regrouped(weight, (-1, 4))


def _regrouped(weight: Tensor, groups: tuple[int, int]) -> Tensor:
    result: Tensor = weight.unflatten(0, groups).transpose(0, 1).flatten(0, 1)
    return result


def _gradients_by_formula(
    arguments: list[Tensor | None],
    grads: list[Tensor | None],
    needed: tuple[bool, ...],
    reverse: bool,
    ragged: Ragged | None,
) -> tuple[Tensor, ...]:
    """The needed ones of scan_layer's gradients, in operations that can be differentiated again."""
    wanted = [at for at, need in enumerate(needed) if need]

    def layer(*tensors: Tensor) -> list[Tensor]:
        every = list(arguments)
        for at, tensor in zip(wanted, tensors, strict=True):
            every[at] = tensor
        *layer_arguments, h_reset, c_reset = every
        results = lstm_layer(
            *layer_arguments,  # type: ignore[arg-type]
            reverse=reverse,
            h_reset=h_reset,
            c_reset=c_reset,
            ragged=ragged,
            return_cells=True,
        )
        return [result for result, grad in zip(results, grads, strict=True) if grad is not None]

    pull_back = torch.func.vjp(layer, *(arguments[at] for at in wanted))[1]
    found: tuple[Tensor, ...] = pull_back([grad for grad in grads if grad is not None])
    return found

"""One layer in one direction, differentiable: the two scans, and the matrix products around the backward one."""

from typing import Any

import torch
from torch import Tensor

from . import ops
from .reference import lstm_layer


def scan_layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one layer in one direction, through the Triton kernels.

    Args:
        input: (T, B, I), of any strides.
        h_0, c_0: (B, H), or both None for zeros.
        weight_ih, weight_hh: (4H, I) and (4H, H), gates in the order i, f, g, o.
        bias_ih, bias_hh: (4H,), or both None.
        reverse: walk from the last step to the first.

    Returns:
        output (T, B, H), h_n (B, H) and c_n (B, H). The states may be views of buffers: copy what you keep.

    All tensors have one dtype (float32, float16 or bfloat16) and one device: a GPU, or the CPU while
    lstm_triton.interpreter.interpret() is on. The caller has checked the arguments. Every tensor gets gradients, of any
    order: those above the first come from the step-by-step formula (reference.py), in the same dtype.
    """
    arguments = (input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments):
        output, h_n, c_n, *_ = _Scan.apply(*arguments, reverse)  # type: ignore[no-untyped-call]
        return output, h_n, c_n
    hidden, cell, _ = ops.scan_forward(*arguments, reverse, False)
    return _results(hidden, cell, reverse, weight_hh.shape[1])


def _results(hidden: Tensor, cell: Tensor, reverse: bool, hidden_size: int) -> tuple[Tensor, Tensor, Tensor]:
    output = hidden[ops.STEPS, :, :hidden_size].contiguous()  # a copy only where rows are padded
    final = ops.final_block(reverse)
    h_n = hidden[final, :, :hidden_size]
    c_n = cell[final if cell.shape[0] > 1 else 0, :, :hidden_size].to(hidden.dtype)
    return output, h_n, c_n


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, ...]:
        hidden, cell, gates = ops.scan_forward(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, reverse, True)
        return *_results(hidden, cell, reverse, weight_hh.shape[1]), hidden, cell, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reverse = inputs
        hidden, cell, gates = output[3:]
        ctx.mark_non_differentiable(hidden, cell, gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, hidden, cell, gates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # Autocast that is on where backward is called was not asked for by the layer.
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
            return *gradients(ctx.saved_tensors, ctx.needs_input_grad[:7], ctx.reverse, grads[:3]), None


def _gradients(
    saved: tuple[Any, ...], needed: tuple[bool, ...], reverse: bool, grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients of scan_layer's tensors, as far as needed: the backward scan, and products over what it leaves."""
    *arguments, hidden, cell, gates = saved
    input, _, _, weight_ih, weight_hh, _, _ = arguments
    seq_len, batch_size, input_size = input.shape
    hidden_size = weight_hh.shape[1]
    grad_gates, grad_cell = ops.scan_backward(*grads, weight_hh, cell, gates, reverse)
    grad_steps = grad_gates[ops.STEPS, :, : 4 * hidden_size]
    grad_rows = grad_steps.flatten(0, 1)

    found: list[Tensor | None] = [None] * len(arguments)
    if needed[0]:
        found[0] = ops.matmul(grad_rows, _gate_minor(weight_ih)).view(seq_len, batch_size, input_size)
    if needed[1]:
        found[1] = ops.matmul(grad_steps[-1 if reverse else 0], _gate_minor(weight_hh))
    if needed[2]:
        found[2] = grad_cell[:, :hidden_size].to(input.dtype)
    if needed[3]:
        found[3] = _gate_major(ops.matmul(grad_rows.t(), input.reshape(-1, input_size)))
    if needed[4]:
        hidden_prev = hidden[ops.previous_blocks(reverse), :, :hidden_size].flatten(0, 1)
        found[4] = _gate_major(ops.matmul(grad_rows.t(), hidden_prev))
    if needed[5] or needed[6]:
        grad_bias = _gate_major(grad_rows.sum(0).unsqueeze(1)).squeeze(1)
        found[5] = grad_bias if needed[5] else None
        found[6] = grad_bias.clone() if needed[5] and needed[6] else grad_bias if needed[6] else None
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


def _differentiable_gradients(
    saved: tuple[Any, ...], needed: tuple[bool, ...], reverse: bool, grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients as functions that can be differentiated again: through the step-by-step formula."""
    # Under new names: where one argument depends on another, that path is the engine's business, not this formula's.
    arguments: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in saved[:7]]
    wanted = [tensor for tensor, need in zip(arguments, needed, strict=True) if need and tensor is not None]
    results = lstm_layer(*arguments, reverse=reverse)
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in used],
            wanted,
            [grad for _, grad in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [
        next(found) if need and tensor is not None else None for tensor, need in zip(arguments, needed, strict=True)
    ]

"""`native`: PyTorch's own LSTM function, with derivatives of any order."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import flops, transforms
from ..autocast import autocast_dtype, without_autocast
from ..onednn import without_onednn
from ..stack import LaneResults


def native(
    data: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    bias: bool,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> LaneResults:
    """`torch._VF.lstm`, with second derivatives and with gradients in evaluation mode, also on GPUs.

    On a GPU `torch._VF.lstm` calls cuDNN, which refuses both. Here cuDNN still computes results and first derivatives.
    For second derivatives, PyTorch's function without cuDNN computes the layers again. Autocast works on every CPU.

    Raises:
        RuntimeError: when a second derivative is taken through cuDNN's dropout, whose mask is not known.
    """

    def lstm(*tensors: Tensor, training: bool = training, dropout: float = dropout) -> LaneResults:
        data, h_0, c_0, *weights = tensors
        options = (bias, num_layers, dropout, training, bidirectional)
        results: LaneResults
        if batch_sizes is None and (dtype := _dtype_to_convert_to(tensors)) is not None:
            with without_autocast(data.device):
                return lstm(*(tensor.to(dtype) for tensor in tensors), training=training, dropout=dropout)
        # `torch.lstm`, since `lstm_triton.accelerate` replaces `torch._VF.lstm`.
        if batch_sizes is None:
            results = torch.lstm(data, (h_0, c_0), weights, *options, batch_first)
        else:
            results = torch.lstm(data, batch_sizes, (h_0, c_0), weights, *options)
        return results

    tensors = (data, *states, *weights)
    if flops.counted():  # no counter looks into the layers of cuDNN and oneDNN
        with torch.backends.cudnn.flags(enabled=False), without_onednn():
            return lstm(*tensors)
    if not _is_cudnns(data):
        return lstm(*tensors)
    if transforms.active():
        with torch.backends.cudnn.flags(enabled=False):
            return lstm(*tensors)
    needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if not needs_gradients or traced:  # a traced program contains the function itself
        return lstm(*tensors)
    dropout = dropout if training else 0.0
    # Only in training mode does cuDNN keep what backward needs.
    differentiable = partial(lstm, training=True, dropout=dropout)
    results: LaneResults = LSTMNative.apply(differentiable, dropout > 0, *tensors)  # type: ignore[no-untyped-call]
    return results


def _without_onednns_layers() -> set[torch.dtype]:
    """The dtypes in which oneDNN has no LSTM for this processor."""
    if not torch.backends.mkldnn.is_available():
        return set()
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    with transforms.unrecorded():  # this file may be imported by the first call, inside torch.jit.trace
        return {dtype for dtype, is_supported in supported.items() if not is_supported()}


_WITHOUT_ONEDNNS_LAYERS = _without_onednns_layers()


def _is_onednns(dtype: torch.dtype) -> bool:
    """Whether PyTorch takes oneDNN for a layer in this dtype, and oneDNN has such a layer.

    In float16 oneDNN has layers for inference only. PyTorch knows this, and asks whether gradients are recorded.
    """
    return dtype not in _WITHOUT_ONEDNNS_LAYERS and not (dtype == torch.float16 and torch.is_grad_enabled())


def _dtype_to_convert_to(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype that autocast gives to a batch on a CPU, if oneDNN has no LSTM in this dtype; otherwise None.

    PyTorch chooses oneDNN before it casts. oneDNN then fails: "could not create a primitive descriptor". PyTorch does
    not choose oneDNN for projected layers, for empty inputs, and for inputs in a dtype that oneDNN lacks.
    """
    data, h_0, c_0, *_ = tensors
    if not data.is_cpu or not torch.backends.mkldnn.enabled or h_0.shape[-1] < c_0.shape[-1] or data.numel() == 0:
        return None
    dtype = autocast_dtype(tensors)
    return dtype if dtype is not None and not _is_onednns(dtype) and _is_onednns(data.dtype) else None


def is_differentiable_alone(data: Tensor) -> bool:
    """Whether `torch.lstm` has all derivatives by itself, in evaluation mode, too."""
    return not _is_cudnns(data)


def _is_cudnns(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.backends.cudnn.enabled


class LSTMNative(torch.autograd.Function):
    """First derivatives through cuDNN's own graph, second derivatives through another graph without cuDNN."""

    @staticmethod
    def forward(ctx: Any, lstm: Callable[..., LaneResults], masked: bool, *tensors: Tensor) -> LaneResults:
        ctx.lstm, ctx.masked = lstm, masked
        device = tensors[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            ctx.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
            ctx.results = lstm(*ctx.leaves)
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors, results, again = ctx.leaves, ctx.results, torch.is_grad_enabled()
        if again:
            if ctx.masked:
                raise RuntimeError(
                    "second derivatives cannot be taken through the dropout of cuDNN's LSTM: make an LSTM of each "
                    "layer with nn.Dropout between them, or turn cuDNN off by torch.backends.cudnn.flags(enabled=False)"
                )
            # Views, at which `grad` below stops: if an argument depends on another one, the engine follows that path.
            tensors = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            with torch.backends.cudnn.flags(enabled=False), torch.autocast(*ctx.autocast):
                results = ctx.lstm(*tensors)
        wanted = [tensor for tensor, need in zip(tensors, ctx.needs_input_grad[2:], strict=True) if need]
        used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in used],
                wanted,
                [grad for _, grad in used],
                retain_graph=again or torch._C._autograd._get_current_graph_task_keep_graph(),
                create_graph=again,
                allow_unused=True,
            )
        )
        return None, None, *(next(found) if need else None for need in ctx.needs_input_grad[2:])

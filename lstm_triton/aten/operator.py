"""`native_lane` as one operator, for torch.compile.

Left to itself, torch.compile unrolls PyTorch's own function over the time steps, compiles it again for every length,
and on the CPU fails where the weights need a gradient and the input does not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ragged import Ragged
from ..stack import LaneResults
from .lane import native_lane

_NO_TABLES = (None,) * len(Ragged._fields)


def operator_lane(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    reverse: bool,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    return_cells: bool = False,
) -> LaneResults:
    """`layer`, as one operator."""
    tables = _NO_TABLES if ragged is None else ragged
    arguments = (h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h_reset, c_reset, *tables)
    results: LaneResults = torch.ops.lstm_triton.aten_layer(input, *arguments, reverse, return_cells)
    return results if return_cells else results[:3]


def _layer(input: Tensor, *arguments: Any) -> LaneResults:
    *tensors, h_reset, c_reset = arguments[:9]
    *_, reverse, return_cells = arguments
    results = native_lane(
        input,
        *tensors,
        reverse=reverse,
        h_reset=h_reset,
        c_reset=c_reset,
        ragged=_tables_among(arguments),
        return_cells=return_cells,
    )
    return (*results, input.new_empty(0))[:4]


def _tables_among(arguments: tuple[Any, ...]) -> Ragged | None:
    tables = arguments[-6:-2]
    return None if tables[0] is None else Ragged(*tables)


def _has_gradient(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _layer_backward(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    """The gradients of all tensors among the arguments. The lane is computed again, for PyTorch's own derivative."""
    with torch.enable_grad():
        arguments = tuple(a.detach().requires_grad_() if _has_gradient(a) else a for a in arguments)
        results = _layer(*arguments)
    leaves = [argument for argument in arguments if _has_gradient(argument)]
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
    found = torch.autograd.grad(
        [result for result, _ in used],
        leaves,
        [grad for _, grad in used],
        allow_unused=True,
        materialize_grads=True,
    )
    return [grad.contiguous() for grad in found]


def _layer_sizes(input: Tensor, h_0: Tensor | None, c_0: Tensor | None, *others: Any) -> LaneResults:
    weight_ih, weight_hh, *_, return_cells = others
    ragged = _tables_among(others)
    batch_size = input.shape[1] if ragged is None else ragged.batch_size
    sizes = weight_hh.shape[1], weight_ih.shape[0] // 4
    return (
        input.new_empty(*input.shape[:-1], sizes[0]),
        input.new_empty(batch_size, sizes[0]),
        input.new_empty(batch_size, sizes[1]),
        input.new_empty((*input.shape[:-1], sizes[1]) if return_cells else 0),
    )


def _layer_backward_sizes(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [argument.new_empty(argument.shape) for argument in arguments if _has_gradient(argument)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: LaneResults) -> None:
    *tensors, ctx.reverse, ctx.return_cells = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable
def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = iter(torch.ops.lstm_triton.aten_layer_backward(grads, *tensors, ctx.reverse, ctx.return_cells))
    return *(next(found) if _has_gradient(tensor) else None for tensor in tensors), None, None


_ARGUMENTS = (
    "Tensor input, Tensor? h_0, Tensor? c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "Tensor? weight_hr, Tensor? h_reset, Tensor? c_reset, Tensor? before, Tensor? after, Tensor? offsets, "
    "Tensor? lengths, bool reverse, bool return_cells"
)
_FORWARD, _BACKWARD = "lstm_triton::aten_layer", "lstm_triton::aten_layer_backward"
torch.library.define(_FORWARD, f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(_FORWARD, "default", _layer)
torch.library.register_fake(_FORWARD, _layer_sizes)
torch.library.register_autograd(_FORWARD, _backward, setup_context=_save_for_backward)
# No autograd rule: with one, derivatives would be switched off inside. Nobody differentiates it, see `_backward`.
torch.library.define(_BACKWARD, f"(Tensor[] grads, {_ARGUMENTS}) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(_BACKWARD, "default", _layer_backward)
torch.library.register_fake(_BACKWARD, _layer_backward_sizes)

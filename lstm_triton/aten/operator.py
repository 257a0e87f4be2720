"""`native_lane` as one operator, for torch.compile.

Without this operator, torch.compile unrolls PyTorch's own function over the time steps and compiles it again for every
length. On the CPU it even fails if the weights need a gradient and the input does not.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ragged import Ragged
from ..stack import LaneResults, LaneWeights, Start
from .lane import native_lane


class _Arguments(NamedTuple):
    """The operator's arguments; its schema has the same names in the same order."""

    input: Tensor
    h_0: Tensor | None
    c_0: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    h_reset: Tensor | None
    c_reset: Tensor | None
    before: Tensor | None
    after: Tensor | None
    offsets: Tensor | None
    lengths: Tensor | None
    reverse: bool
    return_cells: bool

    @property
    def start(self) -> Start:
        return Start(self.h_0, self.c_0, self.h_reset, self.c_reset)

    @property
    def weights(self) -> LaneWeights:
        return LaneWeights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.weight_hr)

    @property
    def ragged(self) -> Ragged | None:
        if self.before is None or self.after is None or self.offsets is None or self.lengths is None:
            return None
        return Ragged(self.before, self.after, self.offsets, self.lengths)


def operator_lane(
    input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None, return_cells: bool
) -> LaneResults:
    """`native_lane` as one operator."""
    tables = (None, None, None, None) if ragged is None else ragged
    arguments = (input, start.h, start.c, *weights, start.h_reset, start.c_reset, *tables, reverse, return_cells)
    results: LaneResults = torch.ops.lstm_triton.aten_layer(*arguments)
    return results if return_cells else results[:3]


def _layer(*arguments: Any) -> LaneResults:
    given = _Arguments(*arguments)
    results = native_lane(
        given.input,
        given.start,
        given.weights,
        reverse=given.reverse,
        ragged=given.ragged,
        return_cells=given.return_cells,
    )
    # An operator's result is no view, for the caller may change it in place. With projections PyTorch's output is one.
    output = results[0].clone() if results[0]._is_view() else results[0]
    return (output, *results[1:], given.input.new_empty(0))[:4]


def _has_gradient(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _layer_backward(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    """The gradients of all floating-point arguments. The lane is computed again, and PyTorch differentiates it."""
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


def _layer_sizes(*arguments: Any) -> LaneResults:
    given = _Arguments(*arguments)
    input, ragged = given.input, given.ragged
    batch_size = input.shape[1] if ragged is None else ragged.batch_size()
    hidden_size, output_size = given.weight_ih.shape[0] // 4, given.weight_hh.shape[1]
    return (
        input.new_empty(*input.shape[:-1], output_size),
        input.new_empty(batch_size, output_size),
        input.new_empty(batch_size, hidden_size),
        input.new_empty((*input.shape[:-1], hidden_size) if given.return_cells else 0),
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
# No autograd rule: a rule would switch derivatives off inside the operator. `_backward` allows no second derivatives.
torch.library.define(_BACKWARD, f"(Tensor[] grads, {_ARGUMENTS}) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(_BACKWARD, "default", _layer_backward)
torch.library.register_fake(_BACKWARD, _layer_backward_sizes)

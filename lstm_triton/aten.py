"""One layer by PyTorch's own LSTM function, as one operator that torch.compile does not take apart.

Left to itself, torch.compile unrolls that function over the time steps, compiles it again for every length, and on the
CPU fails where the weights need a gradient and the input does not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Results = tuple[Tensor, Tensor, Tensor]  # output, h_n, c_n


def scan_layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None = None,
    *,
    reverse: bool,
) -> Results:
    """What `lstm_triton.autograd.scan_layer` computes, by PyTorch's own function; also in float64, and projected."""
    if h_0 is None or c_0 is None:
        h_0 = input.new_zeros(input.shape[1], weight_hh.shape[1])
        c_0 = input.new_zeros(input.shape[1], weight_ih.shape[0] // 4)
    results: Results = torch.ops.lstm_triton.aten_layer(
        input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, reverse
    )
    return results


def _layer(*arguments: Any, training: bool = False) -> Results:
    input, h_0, c_0, *weights, reverse = arguments
    input = input.flip(0) if reverse else input
    has_biases = weights[2] is not None
    weights = [weight for weight in weights if weight is not None]
    states = (h_0.unsqueeze(0), c_0.unsqueeze(0))
    output, h_n, c_n = torch._VF.lstm(input, states, weights, has_biases, 1, 0.0, training, False, False)
    return output.flip(0) if reverse else output.contiguous(), h_n.squeeze(0), c_n.squeeze(0)


def _layer_backward(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    """The gradients of all tensors among the arguments. The layer is computed again, for PyTorch's own derivative."""
    with torch.enable_grad():
        arguments = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in arguments)
        results = _layer(*arguments, training=True)
    leaves = [argument for argument in arguments if isinstance(argument, Tensor)]
    return [grad.contiguous() for grad in torch.autograd.grad(results, leaves, grads)]


def _layer_sizes(input: Tensor, h_0: Tensor, c_0: Tensor, *_: Any) -> Results:
    return input.new_empty(*input.shape[:2], h_0.shape[1]), h_0.new_empty(h_0.shape), c_0.new_empty(c_0.shape)


def _layer_backward_sizes(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [argument.new_empty(argument.shape) for argument in arguments if isinstance(argument, Tensor)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable
def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = iter(torch.ops.lstm_triton.aten_layer_backward(grads, *tensors, ctx.reverse))
    return *(None if tensor is None else next(found) for tensor in tensors), None


_ARGUMENTS = (
    "Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, bool reverse"
)
_FORWARD, _BACKWARD = "lstm_triton::aten_layer", "lstm_triton::aten_layer_backward"

torch.library.define(_FORWARD, f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(_FORWARD, "default", _layer)
torch.library.register_fake(_FORWARD, _layer_sizes)
torch.library.register_autograd(_FORWARD, _backward, setup_context=_save_for_backward)

# No autograd rule: with one, derivatives would be switched off inside. Nobody differentiates it, see `_backward`.
torch.library.define(_BACKWARD, f"(Tensor[] grads, {_ARGUMENTS}) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(_BACKWARD, "default", _layer_backward)
torch.library.register_fake(_BACKWARD, _layer_backward_sizes)

"""One differentiable step of an LSTM layer: `LSTMCell` on the path through the kernels."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..autocast import without_autocast
from ..reference import lstm_cell
from ..refusal import LaunchRefused
from ..stack import States
from .batched import mapped
from .cell import cell_backward, cell_forward
from .dispatch import apply, invoke
from .formula import fall_back_to_formula, gradients_by_formula, second_gradients


def step(input: Tensor, h_0: Tensor | None, c_0: Tensor | None, *weights: Tensor) -> States:
    """One step of one layer, through the Triton kernel.

    Args:
        input: (B, I), of any strides.
        h_0, c_0: (B, H), or both None for zeros.
        weights: weight_ih (4H, I) and weight_hh (4H, H); with biases also bias_ih and bias_hh (4H,). The gates are in
            the order i, f, g, o.

    Returns:
        h_1, c_1: (B, H).

    All tensors have one dtype (float32, float16 or bfloat16) and one device, on which kernels run (target.py). The
    caller has checked the arguments. Every tensor gets gradients of any order. A kernel computes first derivatives.
    Higher derivatives and forward-mode derivatives come from the formula (reference.py), in the dtype of the tensors.
    """
    biases = () if len(weights) == 4 else (None, None)
    arguments = (input, h_0, c_0, *weights, *biases)
    if transforms.in_forward_mode():
        return lstm_cell(*arguments)
    needs_gradients = any(tensor is not None and tensor.requires_grad for tensor in arguments)
    if torch.is_grad_enabled() and (needs_gradients or transforms.active()):
        h_1, c_1, _ = apply(LSTMStep, *arguments)
    else:
        h_1, c_1, _ = invoke(cell_forward, *arguments, False, "matmul")
    return h_1, c_1


class Inputs(NamedTuple):
    """The arguments of a step. Also used for their gradients, and for bools: whether each gradient is needed."""

    input: Any
    h_0: Any
    c_0: Any
    weight_ih: Any
    weight_hh: Any
    bias_ih: Any
    bias_hh: Any


class LSTMStep(torch.autograd.Function):
    """Arguments: `Inputs`, as one flat list. Results: h_1, c_1 and the gates."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        h_1, c_1, gates = invoke(cell_forward, *arguments, True, "matmul")
        return h_1, c_1, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, c_1, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(c_1, gates, *inputs)

    @staticmethod
    def backward(ctx: Any, grad_h_1: Tensor, grad_c_1: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Autocast may be on where backward is called. The cell did not ask for it.
        with without_autocast(grad_h_1.device):
            return mapped(partial(_backward, ctx.needs_input_grad, ctx.saved_tensors), grad_h_1, grad_c_1)


def _backward(
    needed: tuple[bool, ...], saved: Sequence[Any], grad_h_1: Tensor, grad_c_1: Tensor
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        return LSTMStepGradients.apply(needed, grad_h_1, grad_c_1, *saved)  # type: ignore[no-untyped-call, no-any-return]
    return _gradients(needed, grad_h_1, grad_c_1, *saved)


class LSTMStepGradients(torch.autograd.Function):
    """`_gradients`, made differentiable by the formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.needed, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads_of_gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_1, grad_c_1, _, _, *arguments = ctx.saved_tensors  # the formula computes c_1 and the gates itself
        grads = (grad_h_1, grad_c_1)
        with without_autocast(grad_h_1.device):
            second = partial(second_gradients, lstm_cell, arguments, ctx.needed, grads)
            of_h_1, of_c_1, *found = mapped(second, *grads_of_gradients)
        return None, of_h_1, of_c_1, None, None, *found


def _gradients(
    needs: tuple[bool, ...], grad_h_1: Tensor, grad_c_1: Tensor, c_1: Tensor, gates: Tensor, *arguments: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of a step's arguments; None where a gradient is not needed."""
    needed, inputs = Inputs(*needs), Inputs(*arguments)
    try:
        grad_gates, grad_c_0 = invoke(cell_backward, grad_h_1, grad_c_1, inputs.c_0, c_1, gates)
    except LaunchRefused as error:  # though the kernel of the forward pass ran
        fall_back_to_formula(error, inputs.input, c_1.shape[1])
        found = iter(gradients_by_formula(lstm_cell, arguments, needs, (grad_h_1, grad_c_1)))
        return tuple(next(found) if need else None for need in needs)
    grad_bias = grad_gates.sum(0) if needed.bias_ih or needed.bias_hh else None
    grad_weight_hh = None
    if needed.weight_hh:  # without h_0 the state is zeros, so the gradient is zeros
        given = inputs.h_0 is not None
        grad_weight_hh = grad_gates.t() @ inputs.h_0 if given else torch.zeros_like(inputs.weight_hh)
    grads = Inputs(
        input=grad_gates @ inputs.weight_ih if needed.input else None,
        h_0=grad_gates @ inputs.weight_hh if needed.h_0 else None,
        c_0=grad_c_0 if needed.c_0 else None,
        weight_ih=grad_gates.t() @ inputs.input if needed.weight_ih else None,
        weight_hh=grad_weight_hh,
        bias_ih=grad_bias if needed.bias_ih else None,
        bias_hh=grad_bias.clone() if grad_bias is not None and needed.bias_hh else None,
    )
    return tuple(grads)  # torch.vmap wants a plain tuple

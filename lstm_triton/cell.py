"""A single step of an LSTM layer: `LSTMCell`, in place of `torch.nn.LSTMCell`, and its derivatives."""

from typing import Any

import torch
from torch import Tensor, nn

from .backend import autocast_dtype, choose
from .functional import Call, States
from .reference import lstm_layer


class LSTMCell(nn.LSTMCell):
    r"""`torch.nn.LSTMCell`, computed by one Triton kernel where it can run, and by PyTorch's own function elsewhere.

    .. math::
        \begin{array}{ll}
            i = \sigma(W_{ii} x + b_{ii} + W_{hi} h + b_{hi}) \\
            f = \sigma(W_{if} x + b_{if} + W_{hf} h + b_{hf}) \\
            g = \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
            o = \sigma(W_{io} x + b_{io} + W_{ho} h + b_{ho}) \\
            c' = f \odot c + i \odot g \\
            h' = o \odot \tanh(c')
        \end{array}

    (Hochreiter & Schmidhuber, 1997; forget gate: Gers, Schmidhuber & Cummins, 2000; notation and gate order: the
    documentation of `torch.nn.LSTMCell`.) Arguments, attributes, initialisation, `state_dict` and errors are those of
    `torch.nn.LSTMCell`. float32 is computed in TF32 where `torch.backends.cuda.matmul` allows it, as there. A whole
    sequence is better given to `lstm_triton.LSTM`, which takes all steps in one launch.

    Args:
        input_size (int): the number of features of the input, I.
        hidden_size (int): the number of features of the hidden state, H.
        bias (bool): whether the gates have biases. Default: True
        device, dtype: of the parameters.

    Inputs:
        * **input**: (B, I), or (I,) without a batch; in the dtype of the parameters unless autocast is on.
        * **hx**: (h, c), each (B, H), or (H,) without a batch. Default: zeros

    Outputs:
        * **(h', c')**: shaped like `hx`.

    Raises:
        ValueError, RuntimeError, TypeError: for an input or a state of a wrong dtype, number of dimensions or size, as
            `nn.LSTMCell` does.

    >>> import torch
    >>> cell = LSTMCell(10, 20)
    >>> h, c = cell(torch.randn(3, 10))
    >>> h, c = cell(torch.randn(3, 10), (h, c))
    >>> h.shape, c.shape
    (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """One step.

        Args:
            input: (B, I), or (I,) without a batch.
            hx: (h, c) of shapes (B, H), or (H,) without a batch; None: zeros.

        Returns:
            (h, c) after the step, shaped like `hx`.
        """
        call = call_of(self, input, hx)
        if call is None or choose(None, call).path == "aten":
            return super().forward(input, hx)  # which is also what refuses arguments
        dtype = autocast_dtype(call) or call.data.dtype
        h_0, c_0 = (None, None) if call.states is None else (state.to(dtype) for state in call.states)
        h_1, c_1 = step(call.data.to(dtype), h_0, c_0, *(weight.to(dtype) for weight in call.weights))
        return (h_1.squeeze(0), c_1.squeeze(0)) if input.dim() == 1 else (h_1, c_1)


def call_of(cell: nn.LSTMCell, input: Any, hx: Any) -> Call | None:
    """The call that a cell would make, with a batch dimension; None for what `nn.LSTMCell` is left to judge."""
    states: list[Tensor] = [] if hx is None else list(hx)
    if isinstance(hx, Tensor) or (hx is not None and len(states) != 2):
        return None
    if input.dim() == 1:
        input, *states = (tensor.unsqueeze(0) for tensor in (input, *states))
    weights = [cell.weight_ih, cell.weight_hh]
    if cell.bias_ih is not None:
        weights += [cell.bias_ih, cell.bias_hh]
    gates = 4 * cell.hidden_size
    expected = [(gates, cell.input_size), (gates, cell.hidden_size), (gates,), (gates,)]
    fits = (
        input.dim() == 2
        and input.shape[1] == cell.input_size
        and all(state.shape == (input.shape[0], cell.hidden_size) for state in states)
        and all(weight.shape == shape for weight, shape in zip(weights, expected, strict=False))
        and cell.input_size > 0
        and cell.hidden_size > 0
    )
    if not fits:
        return None
    return Call(
        data=input,
        batch_sizes=None,
        states=(states[0], states[1]) if states else None,
        weights=weights,
        num_layers=1,
        bias=len(weights) == 4,
        batch_first=False,
        dropout=0.0,
        training=cell.training,
        directions=1,
        time_steps=1,
        batch_size=input.shape[0],
        hidden_size=cell.hidden_size,
        output_size=cell.hidden_size,
        cell=True,
    )


def checked_call_of(cell: nn.LSTMCell, input: Any, hx: Any) -> Call:
    """`call_of`, with the error that the call itself would raise."""
    call = call_of(cell, input, hx)
    if call is None:
        nn.LSTMCell.forward(cell, input, hx)
        raise ValueError("the sizes of the input, the states and the weights do not fit each other")
    return call


def step(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> States:
    """One step of one layer, through the Triton kernel.

    Args:
        input: (B, I), of any strides.
        h_0, c_0: (B, H), or both None for zeros.
        weight_ih, weight_hh: (4H, I) and (4H, H), gates in the order i, f, g, o.
        bias_ih, bias_hh: (4H,), or both None.

    Returns:
        h_1, c_1: (B, H).

    All tensors have one dtype (float32, float16 or bfloat16) and one device: a GPU, or the CPU while
    lstm_triton.interpreter.interpret() is on. The caller has checked the arguments. Every tensor gets gradients, of any
    order: those above the first come from the formula (reference.py), in the same dtype.
    """
    from . import cell_ops

    arguments = (input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments):
        h_1, c_1, _ = _Step.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        h_1, c_1, _ = cell_ops.cell_forward(*arguments, False, "matmul")
    return h_1, c_1


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        from . import cell_ops

        h_1, c_1, gates = cell_ops.cell_forward(*arguments, True, "matmul")
        return h_1, c_1, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, c_1, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(*inputs, c_1, gates)

    @staticmethod
    def backward(ctx: Any, grad_h_1: Tensor, grad_c_1: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Autocast that is on where backward is called was not asked for by the cell.
        with torch.autocast(grad_h_1.device.type, enabled=False):
            gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
            return gradients(ctx.saved_tensors, ctx.needs_input_grad, (grad_h_1, grad_c_1))


def _gradients(
    saved: tuple[Any, ...], needed: tuple[bool, ...], grads: tuple[Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of a step's tensors, as far as needed."""
    from . import cell_ops

    input, h_0, c_0, weight_ih, weight_hh, _, _, c_1, gates = saved
    grad_gates, grad_c_0 = cell_ops.cell_backward(*grads, c_0, c_1, gates)
    grad_bias = grad_gates.sum(0) if needed[5] or needed[6] else None
    return (
        grad_gates @ weight_ih if needed[0] else None,
        grad_gates @ weight_hh if needed[1] else None,
        grad_c_0 if needed[2] else None,
        grad_gates.t() @ input if needed[3] else None,
        # Without a state it was zeros, and so is the gradient.
        (torch.zeros_like(weight_hh) if h_0 is None else grad_gates.t() @ h_0) if needed[4] else None,
        grad_bias if needed[5] else None,
        grad_bias.clone() if grad_bias is not None and needed[6] else None,
    )


def _differentiable_gradients(
    saved: tuple[Any, ...], needed: tuple[bool, ...], grads: tuple[Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients as functions that can be differentiated again: through the formula."""
    # Under new names: where one argument depends on another, that path is the engine's business, not this formula's.
    arguments: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in saved[:7]]
    input, *others = arguments
    _, h_1, c_1 = lstm_layer(input.unsqueeze(0), *others)
    wanted = [tensor for tensor, need in zip(arguments, needed, strict=True) if need]
    found = iter(torch.autograd.grad((h_1, c_1), wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)

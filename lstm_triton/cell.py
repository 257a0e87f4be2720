"""A single step of an LSTM layer: `LSTMCell`, in place of `torch.nn.LSTMCell`, and its derivatives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import transforms
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
        function = None if call is None else function_of(call)
        if call is None or function is None:
            return super().forward(input, hx)  # which is also what refuses arguments
        data, states, weights = call.data, call.states or (None, None), call.weights
        dtype = autocast_dtype(call)
        if dtype is not None and function is step:  # the formula's operations follow autocast themselves
            data, weights = data.to(dtype), [weight.to(dtype) for weight in weights]
            states = (None, None) if call.states is None else (call.states[0].to(dtype), call.states[1].to(dtype))
        h_1, c_1 = function(data, *states, *weights)
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


def function_of(call: Call) -> Callable[..., States] | None:
    """What computes a call; None: PyTorch's own function does."""
    if choose(None, call).path == "triton":
        return step
    tensors = [call.data, *(call.states or ()), *call.weights]
    same_dtype = all(tensor.dtype == call.data.dtype for tensor in tensors) or autocast_dtype(call) is not None
    return _formula if transforms.need_formula() and same_dtype else None


def _formula(input: Tensor, *others: Tensor | None) -> States:
    """`step` in plain operations: they can be differentiated, and mapped by torch.vmap, as often as PyTorch can."""
    _, h_1, c_1 = lstm_layer(input.unsqueeze(0), *others)  # type: ignore[arg-type]
    return h_1, c_1


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
    order: those above the first, and forward-mode ones, come from the formula (reference.py), in the same dtype.
    """
    from . import cell_ops, vmap  # noqa: F401 (vmap: its rules)

    arguments = (input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
    if transforms.in_forward_mode():
        return _formula(*arguments)
    needs_gradients = any(tensor is not None and tensor.requires_grad for tensor in arguments)
    if torch.is_grad_enabled() and (needs_gradients or transforms.active()):
        h_1, c_1, _ = _Step.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        h_1, c_1, _ = transforms.call(cell_ops.cell_forward, *arguments, False, "matmul")
    return h_1, c_1


class _Step(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        from . import cell_ops

        h_1, c_1, gates = transforms.call(cell_ops.cell_forward, *arguments, True, "matmul")
        return h_1, c_1, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, c_1, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(*inputs, c_1, gates)

    @staticmethod
    def backward(ctx: Any, grad_h_1: Tensor, grad_c_1: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Autocast that is on where backward is called was not asked for by the cell.
        with transforms.without_autocast(grad_h_1.device):
            grads, saved = (grad_h_1, grad_c_1), ctx.saved_tensors
            if torch.is_grad_enabled():
                return _Gradients.apply(ctx.needs_input_grad, *grads, *saved)  # type: ignore[no-untyped-call, no-any-return]
            return _gradients(ctx.needs_input_grad, *grads, *saved)


class _Gradients(torch.autograd.Function):
    """`_gradients`, to be differentiated again: through the formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(needed: tuple[bool, ...], *grads_and_saved: Any) -> tuple[Tensor | None, ...]:
        return _gradients(needed, *grads_and_saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.needed, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *every, _, _ = ctx.saved_tensors  # c_1 and the gates follow from the arguments
        places = [place for place, tensor in enumerate(every) if tensor is not None]
        wanted = [place for place, need in enumerate(ctx.needed) if need]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            renewed = dict(zip(places, tensors, strict=True))
            grad_h_1, grad_c_1, *arguments = (renewed.get(place) for place in range(len(every)))

            def results(*changed: Tensor) -> States:
                moved = dict(zip(wanted, changed, strict=True))
                return _formula(*(moved.get(place, tensor) for place, tensor in enumerate(arguments)))  # type: ignore[arg-type]

            pull_back = torch.func.vjp(results, *(arguments[place] for place in wanted))[1]
            found: tuple[Tensor, ...] = pull_back((grad_h_1, grad_c_1))
            return found

        with transforms.without_autocast(every[0].device):
            pull_back = torch.func.vjp(gradients, *(every[place] for place in places))[1]
            found = dict(zip(places, pull_back(tuple(grads[place] for place in wanted)), strict=True))
        return None, *(found.get(place) for place in range(len(every))), None, None


def _gradients(needed: tuple[bool, ...], grad_h_1: Tensor, grad_c_1: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """The gradients of a step's tensors, as far as needed."""
    from . import cell_ops

    input, h_0, c_0, weight_ih, weight_hh, _, _, c_1, gates = saved
    grad_gates, grad_c_0 = transforms.call(cell_ops.cell_backward, grad_h_1, grad_c_1, c_0, c_1, gates)
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

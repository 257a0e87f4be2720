"""A single step of an LSTM layer: `LSTMCell`, in place of `torch.nn.LSTMCell`."""

from collections.abc import Callable

from torch import Tensor, nn

from . import transforms
from .call import CellCall
from .checks import call_of_cell
from .leaf import Leaf
from .reference import lstm_cell
from .routing import choose
from .stack import States


class LSTMCell(Leaf, nn.LSTMCell):
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
    `torch.nn.LSTMCell`. As there, float32 is computed in TF32 if `torch.backends.cuda.matmul` allows TF32. For whole
    sequences `lstm_triton.LSTM` is better: it takes all steps in one launch.

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
        call = call_of_cell(self, input, hx)
        function = None if call is None else function_of(call)
        if call is None or function is None:
            return super().forward(input, hx)  # this also refuses wrong arguments
        data, states, weights = call.data, call.states or (None, None), call.weights
        dtype = call.autocast_dtype()
        if dtype is not None and function is not lstm_cell:  # the formula's operations follow autocast themselves
            data, weights = data.to(dtype), [weight.to(dtype) for weight in weights]
            states = (None, None) if call.states is None else (call.states[0].to(dtype), call.states[1].to(dtype))
        h_1, c_1 = function(data, *states, *weights)
        return (h_1.squeeze(0), c_1.squeeze(0)) if input.dim() == 1 else (h_1, c_1)


def function_of(call: CellCall) -> Callable[..., States] | None:
    """What computes a call; None: PyTorch's own function does."""
    if choose(None, call).path == "triton":
        from .scan.step import step

        return step
    same_dtype = all(tensor.dtype == call.data.dtype for tensor in call.tensors()) or call.autocast_dtype() is not None
    return lstm_cell if transforms.need_formula() and same_dtype else None

"""A single step of an LSTM layer: `LSTMCell`, in place of `torch.nn.LSTMCell`."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import refusal, transforms
from .call import CellCall, has_several_dtypes
from .cell_checks import call_of_cell
from .leaf import Leaf
from .reference import lstm_cell
from .refusal import LaunchRefused
from .routing import choose, fall_back, take_up
from .stack import States
from .torchscript import scriptable

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


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
        if call is None:
            return super().forward(input, hx)  # this refuses wrong arguments
        h_1, c_1 = compute_cell(call, choose(None, call).path)
        return (h_1.squeeze(0), c_1.squeeze(0)) if input.dim() == 1 else (h_1, c_1)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles: an `nn.LSTMCell` with the same parameters."""
        return scriptable(self, LSTMCell, [name for name in WEIGHTS if name not in self._parameters], _stock_of)


def _stock_of(cell: LSTMCell) -> nn.LSTMCell:
    stock = nn.LSTMCell(cell.input_size, cell.hidden_size, cell.bias, device="meta").train(cell.training)
    for name in WEIGHTS:
        setattr(stock, name, cell._parameters[name])
    return stock


def call_of_vf_lstm_cell(arguments: tuple[Any, ...]) -> CellCall | None:
    """The checked call of `torch._VF.lstm_cell`; None: the arguments are wrong, and PyTorch's function says how."""
    if len(arguments) != 2 + len(WEIGHTS):
        return None
    input, hx, *weights = arguments
    try:
        if input.dim() != 2 or hx is None:  # no call of nn.LSTMCell, which adds a batch dimension and states first
            return None
        sizes = {"input_size": weights[0].shape[1], "hidden_size": weights[1].shape[1]}
        return call_of_cell(SimpleNamespace(**sizes, **dict(zip(WEIGHTS, weights, strict=True))), input, hx)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None


def compute_cell(call: CellCall, path: str) -> States:
    """Compute a checked call on its path. The states have a batch dimension.

    If the kernels are refused on this machine, PyTorch's own function computes the call.
    """
    if path == "aten" or torch.compiler.is_dynamo_compiling():
        return _computed(call, path)
    try:
        results = _computed(call, path)
    except LaunchRefused as error:
        fall_back(error, call, None)
        return _computed(call, "aten")
    if refusal.state:
        take_up(call)
    return results


def _computed(call: CellCall, path: str) -> States:
    data, states, weights = call.data, call.states, call.weights
    if path == "triton":
        from .scan.step import step

        dtype = call.autocast_dtype()
        if dtype is not None:
            data, weights = data.to(dtype), [weight.to(dtype) for weight in weights]
            states = None if states is None else (states[0].to(dtype), states[1].to(dtype))
        return step(data, *(states or (None, None)), *weights)
    if transforms.need_formula() and not has_several_dtypes(call):
        return lstm_cell(data, *(states or (None, None)), *weights)
    if states is None:
        zeros = torch.zeros(call.batch_size, call.hidden_size, dtype=data.dtype, device=data.device)
        states = (zeros, zeros)
    return torch.lstm_cell(data, states, *weights)

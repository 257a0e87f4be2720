"""The door to PyTorch's own ways: which of them computes a stack of layers."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import transforms
from ..call import Call
from ..reference import lstm_layer
from ..stack import Results
from .lane import native_lane
from .native import native
from .operator import operator_lane


def lane_function(call: Call) -> Callable[..., tuple[Tensor, ...]] | None:
    """What computes one layer in one direction, off the Triton path."""
    dense = call.batch_sizes is None
    interrupted = call.lengths is not None or call.resets is not None
    if transforms.need_formula() or (transforms.active() and (interrupted or not dense)):
        return lstm_layer
    if transforms.exporting() and dense:
        fixed = not torch.compiler.is_dynamo_compiling() and isinstance(call.time_steps, int)
        if fixed and not interrupted and not call.return_cells:
            return None  # one call of PyTorch's own function, for this number of time steps
        from .exported import exported_lane  # importing PyTorch's scan takes time

        return exported_lane

    if torch.compiler.is_dynamo_compiling() and dense:
        return operator_lane
    return native_lane if interrupted or call.return_cells else None


def call_native(call: Call) -> Results:
    """The call that `torch.nn.LSTM` makes."""
    states = call.states
    if states is None:
        layers = call.num_layers * call.directions
        h_0 = call.data.new_zeros(layers, call.batch_size, call.output_size)
        c_0 = call.data.new_zeros(layers, call.batch_size, call.hidden_size)
        states = (h_0, c_0)
    results = native(
        call.data,
        call.batch_sizes,
        states,
        call.weights,
        bias=call.bias,
        num_layers=call.num_layers,
        dropout=call.dropout,
        training=call.training,
        bidirectional=call.directions == 2,
        batch_first=call.batch_first,
    )
    return results[0], results[1], results[2], None

"""Entry point of the path without kernels: chooses what computes a stack of layers."""

import torch

from .. import transforms
from ..call import Call
from ..stack import Lane, Results, formula_lane
from .lane import native_lane
from .native import native
from .operator import operator_lane


def lane_of(call: Call) -> Lane | None:
    """What computes a lane of a call; None: PyTorch's own function computes the whole stack."""
    packed = call.batch_sizes is not None
    interrupted = call.lengths is not None or call.resets is not None
    if transforms.tracing():
        return _traced_lane_of(call, interrupted)
    if transforms.need_formula() or (transforms.active() and (interrupted or packed)):
        return formula_lane
    if transforms.exporting() and not packed:
        fixed = not torch.compiler.is_dynamo_compiling() and isinstance(call.time_steps, int)
        if fixed and not interrupted and not call.return_cells:
            return None  # one call of PyTorch's own function, for this number of time steps
        from .exported import exported_lane  # importing PyTorch's `scan` takes time

        return exported_lane
    if torch.compiler.is_dynamo_compiling() and not packed:
        return operator_lane
    return native_lane if interrupted or call.return_cells else None


def _traced_lane_of(call: Call, interrupted: bool) -> Lane | None:
    """`lane_of` for torch.jit.trace. The whole stack is recorded as one call, which takes other sizes."""
    if transforms.need_formula() or (transforms.active() and interrupted):
        raise RuntimeError(
            "torch.jit.trace would fix the number of time steps of an LSTM inside torch.func or forward-mode "
            "differentiation: trace the call outside of them"
        )
    if not interrupted and not call.return_cells:
        return None
    from .traced import traced_lane, traced_packed_lane

    return traced_lane if call.batch_sizes is None else traced_packed_lane


def whole_stack(call: Call) -> Results:
    """The whole stack in one call of PyTorch's own function, as `torch.nn.LSTM` makes it."""
    states = call.ordered_states()
    if states is None:
        lanes = call.num_layers * call.directions
        dtype, device = call.data.dtype, call.data.device  # `new_zeros` of sparse data would be sparse
        h_0 = torch.zeros(lanes, call.batch_size, call.output_size, dtype=dtype, device=device)
        c_0 = torch.zeros(lanes, call.batch_size, call.hidden_size, dtype=dtype, device=device)
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

"""Entry point of the path without kernels: chooses what computes a stack of layers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..call import Call
from ..stack import Lane, Results, States, formula_lane
from .lane import native_lane
from .native import is_differentiable_alone, native
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
        states = _no_states(call.data, lanes, call.batch_size, call.hidden_size, call.output_size)
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


def _no_states(data: Tensor, lanes: int, batch_size: int, hidden_size: int, output_size: int) -> States:
    """Zeros in the place of h_0 and c_0."""
    dtype, device = data.dtype, data.device  # `new_zeros` of sparse data would be sparse
    h_0 = torch.zeros(lanes, batch_size, output_size, dtype=dtype, device=device)
    return h_0, torch.zeros(lanes, batch_size, hidden_size, dtype=dtype, device=device)


class PreparedStack(NamedTuple):
    """`whole_stack`, prepared for dense batches of one size, where PyTorch's own function needs no help.

    Attributes:
        sizes: lanes, B, H and P.
        options: as `torch.lstm` takes them.
    """

    sizes: tuple[int, int, int, int]
    options: tuple[Any, ...]

    @staticmethod
    def of(call: Call) -> "PreparedStack | None":
        """None: the call needs help."""
        if call.trains() and not is_differentiable_alone(call.data):
            return None
        if call.return_cells or torch._C._is_any_autocast_enabled():  # under autocast `native` may convert tensors
            return None
        lanes = call.num_layers * call.directions
        options = (call.bias, call.num_layers, call.dropout, call.training, call.directions == 2, call.batch_first)
        return PreparedStack((lanes, call.batch_size, call.hidden_size, call.output_size), options)

    def call(self, input: Tensor, hx: States | None, weights: Sequence[Tensor]) -> tuple[Tensor, States]:
        """What `functional.lstm` returns."""
        if hx is None:
            hx = _no_states(input, *self.sizes)
        # `torch.lstm`, since `lstm_triton.accelerate` replaces `torch._VF.lstm`.
        output, h_n, c_n = torch.lstm(input, hx, weights, *self.options)  # type: ignore[call-overload]
        return output, (h_n, c_n)

"""One lane as a loop of PyTorch's own operations, for torch.export. The number of time steps may be dynamic.

torch.export would unroll PyTorch's own LSTM function over the time steps if their number is not fixed. An operator of
this library cannot be used either: an exported program must run where this library is not installed.
"""

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from ..ragged import Ragged
from ..stack import LaneResults, LaneWeights, Start

# In PyTorch 2.11, `scan` passes no gradient from step to step if the initial states need no gradient. The gradients of
# the weights are then wrong, without any message. PyTorch 2.13 is right; 2.12 has not been tried.
_SCAN_NEEDS_STATES_WITH_GRADIENTS = TorchVersion(torch.__version__) < "2.13"


def _needing_gradients_like(others: list[Tensor | None], state: Tensor) -> Tensor:
    """A copy of the state that needs a gradient if any of the others does. Zero elements of each are appended to it."""
    nothing = torch.cat([other.flatten()[:0] for other in others if other is not None])
    return torch.cat((state, nothing.view(0, state.shape[1])))


def exported_lane(
    input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None, return_cells: bool
) -> LaneResults:
    """A `Lane` of any dtype, also with projections. It takes no packed sequences."""
    time_steps, batch_size = input.shape[:2] if ragged is None else (ragged.time_steps(), ragged.batch_size())
    h_0 = input.new_zeros(batch_size, weights.hh.shape[1]) if start.h is None else start.h.clone()
    c_0 = input.new_zeros(batch_size, weights.hh.shape[0] // 4) if start.c is None else start.c.clone()
    h_reset = torch.zeros_like(h_0) if start.h_reset is None else start.h_reset
    c_reset = torch.zeros_like(c_0) if start.c_reset is None else start.c_reset
    masks: list[Tensor] = []
    if ragged is not None:
        masks = [mask.view(time_steps, batch_size, 1) for mask in (ragged.is_step(), ragged.is_reset(reverse))]
        input = torch.where(ragged.is_step().unsqueeze(1), input, 0)  # without a step it may have any value
    gates = F.linear(input, weights.ih, weights.bias_ih)
    gates = gates if ragged is None else gates.unflatten(0, (time_steps, batch_size))

    def step(
        states: tuple[Tensor, Tensor], given: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        (h_before, c_before), (gates, *masks) = states, given
        h, c = h_before, c_before
        if masks:
            is_step, is_reset = masks
            # Selected before and behind the products, as in `lstm_layer` (reference.py).
            h, c = torch.where(is_step, h, 0), torch.where(is_step, c, 0)
            h, c = torch.where(is_reset, h_reset, h), torch.where(is_reset, c_reset, c)
        gates = gates + F.linear(h, weights.hh, weights.bias_hh)
        i, f, g, o = (torch.where(is_step, gates, 0) if masks else gates).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        if weights.hr is not None:
            h = F.linear(h, weights.hr)
        if not masks:
            return (h, c), (h.clone(), c.clone())  # copies: outputs of `scan` must not alias states
        shown = torch.where(is_step, h, 0), torch.where(is_step, c, 0)
        return (torch.where(is_step, h, h_before), torch.where(is_step, c, c_before)), shown

    if _SCAN_NEEDS_STATES_WITH_GRADIENTS:
        others = [gates, weights.hh, weights.bias_hh, weights.hr, h_0, c_0, h_reset, c_reset]
        h_0, c_0 = _needing_gradients_like(others, h_0), _needing_gradients_like(others, c_0)
    (h_n, c_n), (output, cells) = scan(step, (h_0, c_0), (gates, *masks), reverse=reverse)
    if ragged is not None:
        output, cells = output.flatten(0, 1), cells.flatten(0, 1)
    return (output, h_n, c_n, cells) if return_cells else (output, h_n, c_n)

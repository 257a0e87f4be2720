"""One lane as a loop of PyTorch's own operations, whose number of steps may stay open: for torch.export.

Exported by itself, PyTorch's own LSTM function is unrolled over the time steps wherever their number is not fixed. A
program must not contain an operator of this library either, to be run where it is not installed.
"""

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from ..ragged import Ragged

# In PyTorch 2.11, `scan` hands no gradient from step to step where the initial states need none: the gradients of the
# weights are then wrong, and nothing says so. PyTorch 2.13 is right; 2.12 has not been tried.
_SCAN_NEEDS_STATES_WITH_GRADIENTS = TorchVersion(torch.__version__) < "2.13"


def _needing_gradients_like(others: list[Tensor | None], state: Tensor) -> Tensor:
    """A copy of the state that needs a gradient if any of the others does: none of their elements are appended."""
    nothing = torch.cat([other.flatten()[:0] for other in others if other is not None])
    return torch.cat((state, nothing.view(0, state.shape[1])))


def exported_lane(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    reverse: bool,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """What `lstm_triton.autograd.scan_layer` computes, of any dtype, and projected; not of packed sequences."""
    shape = input.shape[:2] if ragged is None else (ragged.offsets.shape[0] - 1, ragged.batch_size)
    h_0 = input.new_zeros(shape[1], weight_hh.shape[1]) if h_0 is None else h_0.clone()
    c_0 = input.new_zeros(shape[1], weight_hh.shape[0] // 4) if c_0 is None else c_0.clone()
    h_anew = torch.zeros_like(h_0) if h_reset is None else h_reset
    c_anew = torch.zeros_like(c_0) if c_reset is None else c_reset
    masks: list[Tensor] = []
    if ragged is not None:
        masks = [mask.view(*shape, 1) for mask in (ragged.is_step(), ragged.starts_anew(reverse))]
        input = torch.where(ragged.is_step().unsqueeze(1), input, 0)  # there may be anything where no step is
    gates = F.linear(input, weight_ih, bias_ih)
    gates = gates if ragged is None else gates.unflatten(0, shape)

    def step(
        states: tuple[Tensor, Tensor], given: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        (h_before, c_before), (gates, *masks) = states, given
        h, c = h_before, c_before
        if masks:
            is_step, anew = masks
            h, c = torch.where(anew, h_anew, h), torch.where(anew, c_anew, c)
        i, f, g, o = (gates + F.linear(h, weight_hh, bias_hh)).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        if weight_hr is not None:
            h = F.linear(h, weight_hr)
        if not masks:
            return (h, c), (h.clone(), c.clone())  # what is handed on must not be what is put out
        shown = torch.where(is_step, h, 0), torch.where(is_step, c, 0)
        return (torch.where(is_step, h, h_before), torch.where(is_step, c, c_before)), shown

    if _SCAN_NEEDS_STATES_WITH_GRADIENTS:
        others = [gates, weight_hh, bias_hh, weight_hr, h_0, c_0, h_anew, c_anew]
        h_0, c_0 = _needing_gradients_like(others, h_0), _needing_gradients_like(others, c_0)
    (h_n, c_n), (output, cells) = scan(step, (h_0, c_0), (gates, *masks), reverse=reverse)
    if ragged is not None:
        output, cells = output.flatten(0, 1), cells.flatten(0, 1)
    return (output, h_n, c_n, cells) if return_cells else (output, h_n, c_n)

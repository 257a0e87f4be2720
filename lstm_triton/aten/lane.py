"""A lane through PyTorch's own function; a ragged batch is cut into pieces."""

import torch
from torch import Tensor

from ..ragged import Ragged
from ..reference import lstm_layer
from ..stack import LaneResults
from .native import native


def native_lane(
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
) -> LaneResults:
    """What `lstm_triton.autograd.scan_layer` computes, by PyTorch's own function; also in float64, and projected.

    A ragged batch is cut: where all sequences have all steps, at every step at which some of them start anew; otherwise
    into the stretches that nothing interrupts, which become the sequences of a packed batch. For that, the host waits
    for the device. With `return_cells`, which that function has not, the native_lane is computed step
    by step.
    """
    if h_0 is None or c_0 is None:
        batch_size = input.shape[1] if ragged is None else ragged.batch_size
        h_0 = input.new_zeros(batch_size, weight_hh.shape[1])
        c_0 = input.new_zeros(batch_size, weight_ih.shape[0] // 4)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    if return_cells or (ragged is not None and not ragged.is_step().any()):  # PyTorch's function takes no empty batch
        return lstm_layer(
            input, h_0, c_0, *weights, reverse=reverse, h_reset=h_reset, c_reset=c_reset, ragged=ragged,
            return_cells=return_cells,
        )  # fmt: skip
    given = [weight for weight in weights if weight is not None]
    has_bias = bias_ih is not None
    if ragged is not None and bool((ragged.lengths == ragged.offsets.shape[0] - 1).all()):
        return _segments(input, (h_0, c_0), (h_reset, c_reset), given, has_bias, ragged, reverse)
    if ragged is not None:
        return _stretches(input, (h_0, c_0), (h_reset, c_reset), given, has_bias, ragged, reverse)
    input = input.flip(0) if reverse else input
    states = (h_0.unsqueeze(0), c_0.unsqueeze(0))
    output, h_n, c_n = native(input, None, states, given, bias=has_bias)
    return output.flip(0) if reverse else output.contiguous(), h_n.squeeze(0), c_n.squeeze(0)


def _segments(
    input: Tensor,
    states: tuple[Tensor, Tensor],
    reset: tuple[Tensor | None, Tensor | None],
    weights: list[Tensor],
    bias: bool,
    ragged: Ragged,
    reverse: bool,
) -> LaneResults:
    """A lane whose sequences all have all steps, call after call from each step at which some of them start anew."""
    shape = (ragged.offsets.shape[0] - 1, ragged.batch_size)
    steps, anew = input.unflatten(0, shape), ragged.starts_anew(reverse).unflatten(0, shape)
    if reverse:
        steps, anew = steps.flip(0), anew.flip(0)
    starts = anew[1:].any(1).nonzero().flatten() + 1
    sizes = starts.diff(prepend=starts.new_zeros(1), append=starts.new_tensor([len(steps)])).tolist()
    h, c = states
    h_reset, c_reset = (0 if other is None else other for other in reset)
    outputs = []
    for first, segment in zip([0, *starts.tolist()], steps.split(sizes), strict=True):
        begins = anew[first].unsqueeze(1)
        h, c = torch.where(begins, h_reset, h), torch.where(begins, c_reset, c)
        hx = (h.unsqueeze(0), c.unsqueeze(0))
        output, h, c = native(segment, None, hx, weights, bias=bias)
        h, c = h.squeeze(0), c.squeeze(0)
        outputs.append(output)
    result = torch.cat(outputs)
    return (result.flip(0) if reverse else result).flatten(0, 1), h, c


def _stretches(
    input: Tensor,
    states: tuple[Tensor, Tensor],
    reset: tuple[Tensor | None, Tensor | None],
    weights: list[Tensor],
    bias: bool,
    ragged: Ragged,
    reverse: bool,
) -> LaneResults:
    """A ragged native_lane as one packed batch, whose sequences are the stretches between one start and the next."""
    batch_size = ragged.batch_size
    # Sequence by sequence, in the order of the scan: each step's row, and the state row it starts from.
    sources = ragged.sources(reverse).view(-1, batch_size)
    rows = torch.arange(ragged.rows, device=sources.device).view(-1, batch_size)
    sources, rows = ((t.flip(0) if reverse else t).t().flatten() for t in (sources, rows))
    steps = sources >= 0
    sources, rows = sources[steps], rows[steps]
    output = input.new_zeros(ragged.rows, states[0].shape[1])
    starts = ((sources < batch_size) | (sources >= batch_size + ragged.rows)).nonzero().squeeze(1)
    lengths = torch.cat([starts[1:], starts.new_tensor([rows.numel()])]) - starts
    sequences = rows[starts] % batch_size
    anew = (sources[starts] >= 2 * batch_size + ragged.rows).unsqueeze(1)

    longest = lengths.argsort(descending=True, stable=True)
    rank = longest.argsort()
    stretch = torch.arange(len(starts), device=rows.device).repeat_interleave(lengths)
    offset = torch.arange(rows.numel(), device=rows.device) - starts[stretch]
    order = rows[(offset * len(starts) + rank[stretch]).argsort()]
    initial = []
    for state, other in zip(states, reset, strict=True):
        begun = state[sequences]
        begun = torch.where(anew, torch.zeros_like(begun) if other is None else other[sequences], begun)
        initial.append(begun[longest].unsqueeze(0))
    found, *final = native(input[order], offset.bincount().cpu(), initial, weights, bias=bias)

    output = output.index_copy(0, order, found)
    # A sequence ends with its last stretch; without one, as it began.
    last = torch.cat([sequences[1:] != sequences[:-1], sequences.new_ones(1).bool()])
    ends = [
        state.index_copy(0, sequences[last], end.squeeze(0)[rank[last]])
        for state, end in zip(states, final, strict=True)
    ]
    return output, *ends

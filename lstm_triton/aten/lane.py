"""One lane computed by PyTorch's own function. A ragged batch is cut into pieces."""

import torch
from torch import Tensor

from ..ragged import Ragged
from ..stack import LaneResults, LaneWeights, Start, States, formula_lane
from .native import native


def native_lane(
    input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None, return_cells: bool
) -> LaneResults:
    """A `Lane` by PyTorch's own function, also in float64 and with projections.

    A ragged batch is cut, since PyTorch's own function takes no resets. If every sequence has T steps, the batch is cut
    at every step at which a sequence is reset. Otherwise each sequence is cut into stretches between resets, and the
    stretches become the sequences of a packed batch. The host waits for the device to know the cuts.

    With `return_cells` the lane is computed step by step: PyTorch's own function does not return the cells.
    """
    batch_size = input.shape[1] if ragged is None else ragged.batch_size()
    h_0 = input.new_zeros(batch_size, weights.hh.shape[1]) if start.h is None else start.h
    c_0 = input.new_zeros(batch_size, weights.ih.shape[0] // 4) if start.c is None else start.c
    start = start._replace(h=h_0, c=c_0)
    if return_cells or (ragged is not None and not ragged.is_step().any()):  # PyTorch's function takes no empty batch
        return formula_lane(input, start, weights, reverse=reverse, ragged=ragged, return_cells=return_cells)
    if ragged is not None and bool((ragged.lengths == ragged.time_steps()).all()):
        return _segments(input, (h_0, c_0), start, weights, ragged, reverse)
    if ragged is not None:
        return _stretches(input, (h_0, c_0), start, weights, ragged, reverse)
    output, h_n, c_n = _native(input.flip(0) if reverse else input, None, (h_0, c_0), weights)
    return output.flip(0) if reverse else output.contiguous(), h_n, c_n


def _native(
    input: Tensor, batch_sizes: Tensor | None, states: States, weights: LaneWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """`native` of a single lane, forward in time; the states are (B, ...)."""
    h_0, c_0 = (state.unsqueeze(0) for state in states)
    output, h_n, c_n = native(input, batch_sizes, (h_0, c_0), weights.given(), bias=weights.bias_ih is not None)
    return output, h_n.squeeze(0), c_n.squeeze(0)


def _segments(
    input: Tensor, states: States, start: Start, weights: LaneWeights, ragged: Ragged, reverse: bool
) -> LaneResults:
    """A lane whose sequences all have T steps: one call for each segment. A reset of any sequence begins a segment."""
    shape = (ragged.time_steps(), ragged.batch_size())
    steps, resets = input.unflatten(0, shape), ragged.is_reset(reverse).unflatten(0, shape)
    if reverse:
        steps, resets = steps.flip(0), resets.flip(0)
    starts = resets[1:].any(1).nonzero().flatten() + 1
    sizes = starts.diff(prepend=starts.new_zeros(1), append=starts.new_tensor([len(steps)])).tolist()
    h, c = states
    h_reset = torch.zeros_like(h) if start.h_reset is None else start.h_reset
    c_reset = torch.zeros_like(c) if start.c_reset is None else start.c_reset
    outputs = []
    for first, segment in zip([0, *starts.tolist()], steps.split(sizes), strict=True):
        begins = resets[first].unsqueeze(1)
        h, c = torch.where(begins, h_reset, h), torch.where(begins, c_reset, c)
        output, h, c = _native(segment, None, (h, c), weights)
        outputs.append(output)
    result = torch.cat(outputs)
    return (result.flip(0) if reverse else result).flatten(0, 1), h, c


def _stretches(
    input: Tensor, states: States, start: Start, weights: LaneWeights, ragged: Ragged, reverse: bool
) -> LaneResults:
    """A ragged lane as one packed batch. Its sequences are the stretches from one start or reset to the next."""
    batch_size = ragged.batch_size()
    # Sequence by sequence, in the order of the scan: each step's row, and the state row it starts from.
    sources = ragged.sources(reverse).view(-1, batch_size)
    rows = torch.arange(ragged.rows(), device=sources.device).view(-1, batch_size)
    sources, rows = ((t.flip(0) if reverse else t).t().flatten() for t in (sources, rows))
    steps = sources >= 0
    sources, rows = sources[steps], rows[steps]
    output = input.new_zeros(ragged.rows(), weights.hh.shape[1])
    starts = ((sources < batch_size) | (sources >= batch_size + ragged.rows())).nonzero().squeeze(1)
    lengths = torch.cat([starts[1:], starts.new_tensor([rows.numel()])]) - starts
    sequences = rows[starts] % batch_size
    is_reset = (sources[starts] >= 2 * batch_size + ragged.rows()).unsqueeze(1)

    longest = lengths.argsort(descending=True, stable=True)
    rank = longest.argsort()
    stretch = torch.arange(len(starts), device=rows.device).repeat_interleave(lengths)
    offset = torch.arange(rows.numel(), device=rows.device) - starts[stretch]
    order = rows[(offset * len(starts) + rank[stretch]).argsort()]
    initial = []
    for state, reset in zip(states, (start.h_reset, start.c_reset), strict=True):
        first = state[sequences]
        first = torch.where(is_reset, torch.zeros_like(first) if reset is None else reset[sequences], first)
        initial.append(first[longest])
    found, *final = _native(input[order], offset.bincount().cpu(), (initial[0], initial[1]), weights)

    output = output.index_copy(0, order, found)
    # A sequence's final state is that of its last stretch; without a stretch, its initial state.
    last = torch.cat([sequences[1:] != sequences[:-1], sequences.new_ones(1).bool()])
    ends = [state.index_copy(0, sequences[last], end[rank[last]]) for state, end in zip(states, final, strict=True)]
    return output, *ends

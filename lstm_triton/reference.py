"""One LSTM layer by the formula. Every other implementation is compared with it.

It consists of plain PyTorch operations in any floating dtype. Tests run it in float64. It has derivatives of any order.

The formula is that of Hochreiter & Schmidhuber (1997), "Long Short-Term Memory", with the forget gate of Gers,
Schmidhuber & Cummins (2000), "Learning to Forget"; projections of Sak, Senior & Beaufays (2014). Names and gate order
(i, f, g, o) are those of `torch.nn.LSTM`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ragged import Ragged


class Gates(NamedTuple):
    """The activated gates of one step or of many, each (..., H), in the order of `torch.nn.LSTM`."""

    input: Tensor  # what percentage of the potential memory to write
    forget: Tensor  # what percentage of the long-term memory to keep
    candidate: Tensor  # the potential long-term memory
    output: Tensor  # what percentage of the long-term memory to show


def activated_gates(
    input: Tensor,
    h_before: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    is_step: Tensor | None = None,
) -> Gates:
    """The gates of steps, from the steps' inputs (..., I) and the short-term memories before the steps (..., P).

    `is_step` (..., 1): the others are no steps, and no gradient flows back from their gates.
    """
    gates = input @ weight_ih.T + h_before @ weight_hh.T
    if bias_ih is not None and bias_hh is not None:
        gates = gates + bias_ih + bias_hh
    if is_step is not None:
        gates = torch.where(is_step, gates, 0)
    i, f, g, o = gates.chunk(4, dim=-1)
    return Gates(torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o))


def next_cell(gates: Gates, c_before: Tensor) -> Tensor:
    """The new long-term memory: what is kept of the old one, and what is written to it."""
    return gates.forget * c_before + gates.input * gates.candidate


def lstm_layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    reverse: bool = False,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """One layer in one direction. T time steps, B sequences, I inputs, H hidden units, P outputs (H if not projected).

    Args:
        input: (T, B, I), ragged (rows, I).
        h_0, c_0: (B, P) and (B, H), the short-term and the long-term memory to start with; None: zeros.
        weight_ih, weight_hh: (4H, I) and (4H, P), the gates i, f, g, o one above the other.
        bias_ih, bias_hh: (4H,), or None.
        weight_hr: (P, H), or None.
        reverse: read the sequence from its end.
        h_reset, c_reset: (B, P) and (B, H), the memories of a sequence after a reset; None: zeros.
        ragged: which step follows which; None: every sequence has T steps in order.
        return_cells: whether to return the long-term memory of every step.

    Returns:
        output (T, B, P), at each time step the h of that step, the final h_n (B, P) and c_n (B, H), and with
        `return_cells` cells (T, B, H). Ragged: output and cells are (rows, ...), with zeros where there is no step.

    >>> output, h_n, c_n = lstm_layer(torch.randn(5, 2, 3), None, None, torch.randn(16, 3), torch.randn(16, 4))
    >>> output.shape, torch.equal(output[-1], h_n)
    (torch.Size([5, 2, 4]), True)
    """
    if ragged is not None:
        positions = _positions(ragged)
        shape = (ragged.time_steps(), ragged.batch_size())
        input = _padded(torch.where(ragged.is_step().unsqueeze(1), input, 0), positions, shape)
        is_step = _padded(ragged.is_step(), positions, shape).unsqueeze(2)
        is_reset = _padded(ragged.is_reset(reverse), positions, shape).unsqueeze(2)
    steps, batch_size, _ = input.shape
    h = weight_hh.new_zeros(batch_size, weight_hh.shape[1]) if h_0 is None else h_0
    c = weight_hh.new_zeros(batch_size, weight_hh.shape[0] // 4) if c_0 is None else c_0
    h_reset = torch.zeros_like(h) if h_reset is None else h_reset
    c_reset = torch.zeros_like(c) if c_reset is None else c_reset
    output, cells = [h] * steps, [c] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        h_before, c_before, here = h, c, None
        if ragged is not None:
            # Selected before the step and behind the products, not only at the end: 0 times a NaN would be a gradient.
            here = is_step[t]
            h, c = (torch.where(here, state, 0) for state in (h, c))
            h, c = torch.where(is_reset[t], h_reset, h), torch.where(is_reset[t], c_reset, c)
        gates = activated_gates(input[t], h, weight_ih, weight_hh, bias_ih, bias_hh, here)
        c = next_cell(gates, c)
        h = gates.output * torch.tanh(c)
        if weight_hr is not None:
            h = h @ weight_hr.T
        output[t], cells[t] = h, c
        if ragged is not None:
            output[t], cells[t] = torch.where(is_step[t], h, 0), torch.where(is_step[t], c, 0)
            h, c = torch.where(is_step[t], h, h_before), torch.where(is_step[t], c, c_before)
    results = [torch.stack(output), torch.stack(cells)]
    if ragged is not None:
        results = [result.flatten(0, 1)[positions] for result in results]
    return (results[0], h, c, *results[1:]) if return_cells else (results[0], h, c)


def lstm_cell(input: Tensor, h_0: Tensor | None, c_0: Tensor | None, *weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of `lstm_layer`: input (B, I), h_0 and c_0 (B, H) or None for zeros -> h_1 and c_1 (B, H)."""
    _, h_1, c_1 = lstm_layer(input.unsqueeze(0), h_0, c_0, *weights)  # type: ignore[arg-type]
    return h_1, c_1


def _positions(ragged: Ragged) -> Tensor:
    """(rows,) each row's place t * B + b in a padded batch."""
    rows = torch.arange(ragged.rows(), device=ragged.offsets.device)
    times = torch.searchsorted(ragged.offsets[1:], rows, right=True)
    return times * ragged.batch_size() + rows - ragged.offsets[times]


def _padded(values: Tensor, positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """(rows, ...) -> (T, B, ...), zeros elsewhere."""
    padded = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
    result: Tensor = padded.index_copy(0, positions, values).unflatten(0, shape)
    return result

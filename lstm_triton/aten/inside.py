"""One lane computed by PyTorch's own function, with its gates and cells: for `trace`."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ragged import Ragged, dense, padded
from ..reference import Gates, activated_gates, next_cell
from ..stack import Inside, LaneWeights, Start
from .lane import native_lane


def native_lane_inside(
    input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None
) -> Inside:
    """`native_lane`, and its gates and cells. The formula computes them, in float32 at least, and rounds at the end."""
    options: dict[str, Any] = {"reverse": reverse, "return_cells": False}
    if ragged is not None and ragged.rows() < ragged.batch_size() * ragged.time_steps():
        # Packed. PyTorch's function takes no packed batch in reverse direction alone: pad again, with the same lengths.
        filled = padded(input, ragged, fill=0.0)
        tables = dense(ragged.lengths, None, filled.shape[0], filled.shape[1], input.device)
        output, h_n, c_n = native_lane(filled.flatten(0, 1), start, weights, ragged=tables, **options)
        output, tables = output[tables.is_step()], ragged
    else:
        output, h_n, c_n = native_lane(input, start, weights, ragged=ragged, **options)
        tables = ragged or dense(None, None, input.shape[0], input.shape[1], input.device)

    dtype = torch.promote_types(input.dtype, torch.float32)
    sources, own = tables.sources(reverse).clamp_min(0), tables.own_rows()
    with torch.autocast(input.device.type, enabled=False):
        rows, hidden = (tensor.flatten(0, -2).to(dtype) for tensor in (input, output))
        hidden_before = _state_rows(hidden, start.h, start.h_reset, tables)[sources]
        wide: list[Any] = [None if weight is None else weight.to(dtype) for weight in weights[:-1]]  # without hr
        gates = activated_gates(rows, hidden_before, *wide)
        cells = _state_rows(torch.zeros_like(gates.forget), start.c, start.c_reset, tables)
        steps = [slice(*ends) for ends in pairwise(tables.offsets.tolist())]
        for step in reversed(steps) if reverse else steps:
            cells[own[step]] = next_cell(Gates(*(gate[step] for gate in gates)), cells[sources[step]])
    shape = (*input.shape[:-1], cells.shape[1])
    *gates_found, cells = (values.to(input.dtype).view(shape) for values in (*gates, cells[own]))
    return (output, h_n, c_n), Gates(*gates_found), cells


def _state_rows(steps: Tensor, initial: Tensor | None, reset: Tensor | None, tables: Ragged) -> Tensor:
    """All state rows in the order of the tables: initial states, steps, initial states again, reset states."""
    zeros = steps.new_zeros(tables.batch_size(), steps.shape[1])
    start, after_reset = (zeros if state is None else state.to(steps) for state in (initial, reset))
    return torch.cat([start, steps, start, after_reset])

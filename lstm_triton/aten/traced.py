"""One lane as a loop of TorchScript, for torch.jit.trace and ONNX's older exporter.

torch.jit.trace records the operations of one call, so a loop of Python is fixed to the number of time steps, and a
branch to the values, of the example. A loop of TorchScript is recorded as a loop. The traced program then takes any
number of steps, any lengths and any resets.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, List, Tuple  # noqa: UP035

import torch
from torch import Tensor

from .. import transforms
from ..ragged import Ragged, dense, padded
from ..stack import LaneResults, LaneWeights, Start


def traced_lane(
    input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None, return_cells: bool
) -> LaneResults:
    """A `Lane` of any dtype, also with projections, for batches that are not packed."""
    tables = dense(None, None, input.shape[0], input.shape[1], input.device) if ragged is None else ragged
    shape = (input.shape[0], input.shape[1]) if ragged is None else (ragged.time_steps(), ragged.batch_size())
    is_step, is_reset = (mask.view(*shape, 1) for mask in (tables.is_step(), tables.is_reset(reverse)))
    h_0 = input.new_zeros(shape[1], weights.hh.shape[1]) if start.h is None else start.h
    c_0 = input.new_zeros(shape[1], weights.hh.shape[0] // 4) if start.c is None else start.c
    h_reset = torch.zeros_like(h_0) if start.h_reset is None else start.h_reset
    c_reset = torch.zeros_like(c_0) if start.c_reset is None else start.c_reset
    steps = torch.where(is_step, input.view(*shape, input.shape[-1]), 0)  # without a step it may have any value
    gates = torch.nn.functional.linear(steps, weights.ih, weights.bias_ih)
    if weights.bias_hh is not None:
        gates = gates + weights.bias_hh
    projected = weights.hr is not None
    # No None is passed on: ONNX Runtime does not load a loop with an optional tensor.
    hr = weights.hh if weights.hr is None else weights.hr
    states = (h_0, c_0, h_reset, c_reset)
    output, h_n, c_n, cells = _scripted_loop()(gates, is_step, is_reset, *states, weights.hh, hr, projected, reverse)
    if ragged is not None:
        output, cells = output.flatten(0, 1), cells.flatten(0, 1)
    return (output, h_n, c_n, cells) if return_cells else (output, h_n, c_n)


def traced_packed_lane(
    input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None, return_cells: bool
) -> LaneResults:
    """`traced_lane` for a packed batch: it is padded before, and packed after."""
    assert ragged is not None
    filled = padded(input, ragged, fill=0.0)
    tables = dense(ragged.lengths, None, filled.shape[0], filled.shape[1], input.device)
    output, h_n, c_n, *cells = traced_lane(
        filled.flatten(0, 1), start, weights, reverse=reverse, ragged=tables, return_cells=return_cells
    )
    is_step = tables.is_step()
    return output[is_step], h_n, c_n, *(each[is_step] for each in cells)


@cache
def _scripted_loop() -> Callable[..., Any]:
    with warnings.catch_warnings(), transforms.unrecorded():
        warnings.simplefilter("ignore")  # newer versions of PyTorch say that TorchScript is deprecated
        return torch.jit.script(_loop)


def _loop(
    gates: Tensor,
    is_step: Tensor,
    is_reset: Tensor,
    h: Tensor,
    c: Tensor,
    h_reset: Tensor,
    c_reset: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor,
    projected: bool,
    reverse: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    """All steps, from the inputs' part of the pre-activations. It is written in TorchScript's part of Python."""
    if reverse:
        gates, is_step, is_reset = gates.flip(0), is_step.flip(0), is_reset.flip(0)
    outputs: List[Tensor] = []  # noqa: UP006
    cells: List[Tensor] = []  # noqa: UP006
    for t in range(gates.shape[0]):
        # Without a step the state may have any value, too.
        h_before = torch.where(is_step[t], torch.where(is_reset[t], h_reset, h), torch.zeros_like(h))
        c_before = torch.where(is_step[t], torch.where(is_reset[t], c_reset, c), torch.zeros_like(c))
        preact = gates[t] + torch.nn.functional.linear(h_before, weight_hh)
        i, f, g, o = preact.chunk(4, dim=-1)
        c_now = torch.sigmoid(f) * c_before + torch.sigmoid(i) * torch.tanh(g)
        h_now = torch.sigmoid(o) * torch.tanh(c_now)
        if projected:
            h_now = torch.nn.functional.linear(h_now, weight_hr)
        outputs.append(torch.where(is_step[t], h_now, torch.zeros_like(h_now)))
        cells.append(torch.where(is_step[t], c_now, torch.zeros_like(c_now)))
        h, c = torch.where(is_step[t], h_now, h), torch.where(is_step[t], c_now, c)
    output, all_cells = torch.stack(outputs), torch.stack(cells)
    if reverse:
        output, all_cells = output.flip(0), all_cells.flip(0)
    return output, h, c, all_cells

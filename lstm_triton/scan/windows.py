"""Steps cut into windows of time."""

import itertools

import torch
from torch import Tensor

from ..ragged import Ragged
from .buffers import Layout, Window
from .planner import Plan

PREACTIVATION_BYTES = 2**30  # of input projections at a time, where they are not kept
LOW_MEMORY_WINDOWS = 16  # with low_memory, forward and backward take the steps in as many windows at the most,
LOW_MEMORY_STEPS = 32  # of as many steps at the least


def steps_at_once(plan: Plan, hidden_size: int, batch_size: int, itemsize: int) -> int:
    """The steps whose input projections, where they are not kept, take PREACTIVATION_BYTES at most."""
    if plan.fuse_input:
        return 2**62
    projected_lanes = 1 if plan.chained else plan.lanes
    return max(1, PREACTIVATION_BYTES // (projected_lanes * 4 * hidden_size * itemsize * batch_size))


def low_memory_steps(time_steps: int) -> int:
    """The steps of a window, with low_memory."""
    return max(-(-time_steps // LOW_MEMORY_WINDOWS), LOW_MEMORY_STEPS)


def cell_starts_of(input: Tensor, layout: Layout, lanes: int) -> Tensor:
    """Memory for the c from which windows start."""
    return input.new_empty(lanes, LOW_MEMORY_WINDOWS, layout.batch_size, layout.stride, dtype=torch.float32)


def windows_of(
    layout: Layout, ragged: Ragged | None, time_steps: int, steps: int, at_once: int | None = None
) -> list[Window]:
    """All steps, in windows of so many, each of which is cut into windows of `at_once` again."""
    bounds = window_bounds(time_steps, steps, at_once or steps)
    if len(bounds) == 2:
        return [Window(slice(0, time_steps), slice(0, layout.rows))]
    if layout.rows == time_steps * layout.batch_size:
        rows = [step * layout.batch_size for step in bounds]
    else:  # packed: the only place where the host waits for the device
        assert ragged is not None
        rows = ragged.offsets[torch.tensor(bounds, device=ragged.offsets.device)].tolist()
    return [Window(slice(*at), slice(*of)) for at, of in zip(_neighbours(bounds), _neighbours(rows), strict=True)]


def window_bounds(time_steps: int, steps: int, at_once: int) -> list[int]:
    """Where the windows of `windows_of` begin, and where the last one ends."""
    bounds: list[int] = []
    for first in range(0, time_steps, steps):
        bounds += range(first, min(first + steps, time_steps), min(at_once, steps))
    return [*bounds, time_steps]


def _neighbours(values: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(values))

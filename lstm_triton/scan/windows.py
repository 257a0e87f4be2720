"""Steps cut into windows of time."""

import itertools

import torch
from torch import Tensor

from ..ragged import Ragged
from .buffers import Layout, Window
from .plan import Plan, ScanShape, divide_up

PREACTIVATION_BYTES = 2**30  # bytes of input projections at a time, where they are not kept
# With low_memory, forward and backward take the steps in windows.
LOW_MEMORY_WINDOWS = 16  # windows at most
LOW_MEMORY_STEPS = 32  # steps of a window at least


def steps_at_once(plan: Plan, shape: ScanShape) -> int:
    """The steps whose input projections, where they are not kept, take PREACTIVATION_BYTES at most."""
    if plan.projected_lanes == 0:
        return 2**62
    bytes_of_a_step = plan.projected_lanes * 4 * shape.hidden_size * shape.itemsize * shape.batch_size
    return max(1, PREACTIVATION_BYTES // bytes_of_a_step)


def low_memory_steps(time_steps: int) -> int:
    """The steps of a window, with low_memory."""
    return max(divide_up(time_steps, LOW_MEMORY_WINDOWS), LOW_MEMORY_STEPS)


def low_memory_bounds(time_steps: int, at_once: int | None = None) -> list[int]:
    """Bounds of the windows of low_memory, each of which is cut into windows of `at_once` steps again."""
    bounds: list[int] = []
    steps = low_memory_steps(time_steps)
    for first in range(0, time_steps, steps):
        bounds += window_bounds(min(steps, time_steps - first), at_once or steps, first)[:-1]
    return [*bounds, time_steps]


def window_bounds(time_steps: int, at_once: int, first: int = 0) -> list[int]:
    """Where windows of `at_once` steps begin, the first at step `first`, and where the last window ends."""
    return [*range(first, first + time_steps, min(at_once, time_steps)), first + time_steps]


def cell_starts_of(input: Tensor, layout: Layout, lanes: int) -> Tensor:
    """Memory for the c from which windows start."""
    return input.new_empty(lanes, LOW_MEMORY_WINDOWS, layout.batch_size, layout.stride, dtype=torch.float32)


def windows_of(layout: Layout, ragged: Ragged | None, bounds: list[int]) -> list[Window]:
    """The windows with these bounds, and the rows of their steps."""
    time_steps = bounds[-1]
    if len(bounds) == 2:
        return [Window(slice(0, time_steps), slice(0, layout.rows))]
    if layout.rows == time_steps * layout.batch_size:
        rows = [step * layout.batch_size for step in bounds]
    else:  # packed: the only place where the host waits for the device
        assert ragged is not None
        rows = ragged.offsets[torch.tensor(bounds, device=ragged.offsets.device)].tolist()
    return [Window(slice(*at), slice(*of)) for at, of in zip(_neighbours(bounds), _neighbours(rows), strict=True)]


def _neighbours(values: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(values))

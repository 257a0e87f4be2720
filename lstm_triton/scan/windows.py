"""Steps cut into windows of time."""

import itertools

import torch
from torch import Tensor

from .layout import Layout, Window
from .planner import Plan

PREACTIVATION_BYTES = 2**30  # the most bytes of input projections at a time, where they are not kept
LOW_MEMORY_WINDOWS = 16  # memory="low": the most windows of time that forward and backward take the steps in
LOW_MEMORY_STEPS = 32  # memory="low": the fewest steps of a window


def steps_at_once(plan: Plan, hidden_size: int, batch_size: int, itemsize: int) -> int:
    """The steps whose input projections, where they are not kept, take PREACTIVATION_BYTES at most."""
    if plan.fuse_input:
        return 2**62
    projected_lanes = 1 if plan.chained else plan.lanes
    return max(1, PREACTIVATION_BYTES // (projected_lanes * 4 * hidden_size * itemsize * batch_size))


def low_memory_steps(time_steps: int) -> int:
    """The steps of a window, with memory="low"."""
    return max(-(-time_steps // LOW_MEMORY_WINDOWS), LOW_MEMORY_STEPS)


def window_cells(like: Tensor, layout: Layout, lanes: int) -> Tensor:
    """Memory for the c that each window starts from: (lanes, LOW_MEMORY_WINDOWS, B, state_stride(H)) float32."""
    return like.new_empty(lanes, LOW_MEMORY_WINDOWS, layout.batch_size, layout.stride, dtype=torch.float32)


def windows_of(layout: Layout, steps: int, at_once: int | None = None) -> list[Window]:
    """All steps, in windows of `steps`, each of which is cut into windows of `at_once` again."""
    bounds = window_bounds(layout.time_steps, steps, at_once or steps)
    if len(bounds) == 2:
        return [Window(slice(0, layout.time_steps), slice(0, layout.rows))]
    if layout.rows == layout.time_steps * layout.batch_size:
        rows = [step * layout.batch_size for step in bounds]
    else:  # packed: the only place where the host waits for the device
        assert layout.ragged is not None
        offsets = layout.ragged.offsets
        rows = offsets[torch.tensor(bounds, device=offsets.device)].tolist()
    pairs = zip(itertools.pairwise(bounds), itertools.pairwise(rows), strict=True)
    return [Window(slice(*of_steps), slice(*of_rows)) for of_steps, of_rows in pairs]


def window_bounds(time_steps: int, steps: int, at_once: int) -> list[int]:
    """Where the windows of `windows_of` begin, and where the last one ends."""
    bounds: list[int] = []
    for first in range(0, time_steps, steps):
        bounds += range(first, min(first + steps, time_steps), min(at_once, steps))
    return [*bounds, time_steps]

"""Windows of time: the steps of a call, cut into ranges that are launched one after the other."""

import itertools

import torch
from torch import Tensor

from .layout import Layout, Window
from .plan import Plan, ScanShape, divide_up

PREACTIVATION_BYTES = 2**30  # the most bytes of input projections in memory, if they are not kept for backward
LOW_MEMORY_WINDOWS = 16  # memory="low": the most windows
LOW_MEMORY_STEPS = 32  # memory="low": the fewest steps of a window


def steps_at_once(plan: Plan, shape: ScanShape) -> int:
    """The most steps of a window whose input projections are not kept: they take at most PREACTIVATION_BYTES."""
    if plan.projected_lanes == 0:
        return 2**62
    bytes_of_a_step = plan.projected_lanes * 4 * shape.hidden_size * shape.itemsize * shape.batch_size
    return max(1, PREACTIVATION_BYTES // bytes_of_a_step)


def low_memory_steps(time_steps: int) -> int:
    """The number of steps of a window of memory="low"."""
    return max(divide_up(time_steps, LOW_MEMORY_WINDOWS), LOW_MEMORY_STEPS)


def low_memory_bounds(time_steps: int, at_once: int | None = None) -> list[int]:
    """Bounds of the windows of memory="low". Each window is cut again into windows of `at_once` steps."""
    bounds: list[int] = []
    steps = low_memory_steps(time_steps)
    for first in range(0, time_steps, steps):
        bounds += window_bounds(min(steps, time_steps - first), at_once or steps, first)[:-1]
    return [*bounds, time_steps]


def window_bounds(time_steps: int, at_once: int, first: int = 0) -> list[int]:
    """The steps at which windows of `at_once` steps begin, from step `first` on, and the end of the last window."""
    return [*range(first, first + time_steps, min(at_once, time_steps)), first + time_steps]


def window_cells(like: Tensor, layout: Layout, lanes: int) -> Tensor:
    """Memory for the c at the start of each window: (lanes, LOW_MEMORY_WINDOWS, B, state_stride(H)) float32."""
    return like.new_empty(lanes, LOW_MEMORY_WINDOWS, layout.batch_size, layout.stride, dtype=torch.float32)


def windows_of(layout: Layout, bounds: list[int]) -> list[Window]:
    """The windows with these bounds: their steps, and the rows of these steps."""
    if len(bounds) == 2:
        return [Window(slice(0, layout.time_steps), slice(0, layout.rows))]
    if layout.rows == layout.time_steps * layout.batch_size:
        rows = [step * layout.batch_size for step in bounds]
    else:  # packed: the bounds' rows are on the device. Nowhere else does the host wait for the device
        assert layout.ragged is not None
        offsets = layout.ragged.offsets
        rows = offsets[torch.tensor(bounds, dtype=torch.int64, device=offsets.device)].tolist()
    pairs = zip(itertools.pairwise(bounds), itertools.pairwise(rows), strict=True)
    return [Window(slice(*of_steps), slice(*of_rows)) for of_steps, of_rows in pairs]

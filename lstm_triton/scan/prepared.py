"""Scans prepared for their sizes: what is launched, in which order, and by which kernels.

A scan of the same sizes is prepared once. What is prepared holds no tensor.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .. import target
from ..prepared_kernel import PreparedKernel
from . import launch, planner
from .alignment import unit_of_rows
from .layout import Layout, Place, Window
from .plan import Kind, Plan, ScanShape, state_stride
from .schedule import Schedule, backward_schedules, forward_schedules
from .windows import windows_of

PREPARED_SCANS = 1024  # as many as the planner remembers calls


class Sizes(NamedTuple):
    """The sizes of a stack and its batch."""

    time_steps: int
    batch_size: int
    input_size: int
    hidden_size: int
    lanes: int
    directions: int
    bias: bool
    reverse: bool
    is_ragged: bool
    dtype: torch.dtype
    device: torch.device

    def first_shape(self, kind: Kind, allow_tf32: bool) -> ScanShape:
        """The shape of one lane of the first layer."""
        described = target.Device.of(self.device)
        sizes = (self.batch_size, self.input_size, self.hidden_size)
        return ScanShape(kind, *sizes, self.dtype, described, allow_tf32)

    def layout(self) -> Layout | None:
        """None for a ragged batch."""
        if self.is_ragged:
            return None
        return Layout.sized(self.time_steps, self.time_steps * self.batch_size, self.batch_size, self.hidden_size)

    def is_reverse(self, lane: int) -> bool:
        return self.reverse != (lane % self.directions == 1)

    def dropped(self, lanes: range) -> int:
        """How many lanes of a launch belong to layers below the last one. They come first."""
        return max(0, min(len(lanes), self.lanes - self.directions - lanes.start))


class Part(NamedTuple):
    """What is launched for a window of time.

    Attributes:
        lanes: among the lanes of its schedule.
        first: the number of its first lane in the stack.
        reverse: whether its first lane walks from the last step to the first.
    """

    kernel: PreparedKernel
    plan: Plan
    lanes: slice
    first: int
    reverse: bool


class Ends(NamedTuple):
    """Where states are in a buffer of a dense batch, of several lanes.

    Attributes:
        initial: the states that sequences start from.
        last: the states of the last steps.
        behind: the rows behind the last steps, in a buffer of gate gradients.
    """

    initial: Place
    last: Place
    behind: Place

    @staticmethod
    def of(layout: Layout, lanes: int, directions: int, reverse: bool) -> "Ends":
        return Ends(
            layout.initial_rows(lanes, directions, reverse, layout.stride),
            layout.last_rows(lanes, directions, reverse, layout.stride),
            layout.initial_rows(lanes, directions, not reverse, 4 * layout.stride),
        )


class PreparedSchedule(NamedTuple):
    """A schedule with its kernels.

    Attributes:
        lanes: of the stack.
        is_whole: whether these are all lanes of the stack.
        reverse: whether its first lane walks from the last step to the first.
        dropped: how many of these lanes have dropout. They come first.
        bounds: of windows of time, in steps.
        windows: the same with their rows. None for a ragged batch, whose rows are not known beforehand.
        ends: in buffers of h and c that are this schedule's alone. None for a ragged batch.
    """

    plan: Plan
    lanes: slice
    is_whole: bool
    reverse: bool
    dropped: int
    bounds: list[int]
    windows: list[Window] | None
    ends: Ends | None
    parts: tuple[Part, ...]


class PreparedScan(NamedTuple):
    """A scan prepared for its sizes.

    Attributes:
        layout: None for a ragged batch, whose layout has tensors.
        ends: of all lanes of the stack. None for a ragged batch.
        on: the target.
        schedules: in the order of their launches.
    """

    layout: Layout | None
    ends: Ends | None
    on: target.Target
    schedules: tuple[PreparedSchedule, ...]


class Forward(NamedTuple):
    """What a forward scan is asked for, besides its results."""

    keep_cells: bool
    keep_gates: bool
    low_memory: bool
    fuse_input: bool
    dropout: bool


LaunchOptionsOf = Callable[[Plan], dict[str, object]]


def forward_scan_of(sizes: Sizes, asked: Forward) -> PreparedScan:
    """A forward scan. It runs from the first layer to the last."""
    on: Any = target.current()
    return _forward(sizes, asked, on, launch.allows_tf32(), planner.forced_plans["forward"], launch.launch_options)


def backward_scan_of(sizes: Sizes, dropout: bool, grad_cells: bool) -> PreparedScan:
    """A backward scan. It runs from the last layer to the first."""
    on: Any = target.current()
    forced, options = planner.forced_plans["backward"], launch.launch_options
    return _backward(sizes, dropout, grad_cells, on, launch.allows_tf32(), forced, options)


@lru_cache(maxsize=PREPARED_SCANS)
def _forward(
    sizes: Sizes, asked: Forward, on: target.Target, allow_tf32: bool, forced: Plan | None, options: LaunchOptionsOf
) -> PreparedScan:
    """`on`, `forced` and `options` are for the key. The planner and the launch find them themselves."""
    from ..kernels.forward import forward_scan

    schedules = forward_schedules(
        sizes.first_shape("forward", allow_tf32),
        sizes.lanes // sizes.directions,
        sizes.directions,
        sizes.time_steps,
        keep_gates=asked.keep_gates,
        low_memory=asked.low_memory,
        fuse_input=asked.fuse_input,
    )

    def kernel(schedule: Schedule, plan: Plan, dropped: int) -> PreparedKernel:
        is_first = schedule.planned.first < sizes.directions
        input_size = sizes.input_size if is_first else sizes.directions * sizes.hidden_size
        return launch.prepared_scan(
            forward_scan,
            plan,
            HIDDEN=sizes.hidden_size,
            STATE_STRIDE=state_stride(sizes.hidden_size),
            HAS_BIAS=sizes.bias,
            KEEP_CELLS=asked.keep_cells,
            KEEP_GATES=asked.keep_gates,
            DROPOUT=dropped > 0,
            RAGGED=sizes.is_ragged,
            **launch.input_constants_of(plan, input_size, unit_of_rows(input_size)),
        )

    return _scan(sizes, on, [_prepared(sizes, schedule, asked.dropout, kernel) for schedule in schedules])


@lru_cache(maxsize=PREPARED_SCANS)
def _backward(
    sizes: Sizes,
    dropout: bool,
    grad_cells: bool,
    on: target.Target,
    allow_tf32: bool,
    forced: Plan | None,
    options: LaunchOptionsOf,
) -> PreparedScan:
    """`on`, `forced` and `options`: as in `_forward`."""
    from ..kernels.backward import backward_scan

    first = sizes.first_shape("backward", allow_tf32)
    schedules = backward_schedules(first, sizes.lanes // sizes.directions, sizes.directions, sizes.time_steps)

    def kernel(_: Schedule, plan: Plan, dropped: int) -> PreparedKernel:
        return launch.prepared_scan(
            backward_scan,
            plan,
            HIDDEN=sizes.hidden_size,
            STATE_STRIDE=state_stride(sizes.hidden_size),
            GRAD_CELLS=grad_cells,
            DROPOUT=dropped > 0,
            RAGGED=sizes.is_ragged,
        )

    return _scan(sizes, on, [_prepared(sizes, schedule, dropout, kernel) for schedule in reversed(schedules)])


def forget() -> None:
    """Forget everything, as if no scan had been prepared."""
    _forward.cache_clear()
    _backward.cache_clear()


def _scan(sizes: Sizes, on: target.Target, schedules: list[PreparedSchedule]) -> PreparedScan:
    layout, ends = sizes.layout(), None
    if layout is not None:
        ends = Ends.of(layout, sizes.lanes, min(sizes.directions, sizes.lanes), sizes.reverse)
    return PreparedScan(layout, ends, on, tuple(schedules))


def _prepared(
    sizes: Sizes, schedule: Schedule, dropout: bool, kernel: Callable[[Schedule, Plan, int], PreparedKernel]
) -> PreparedSchedule:
    planned = schedule.planned
    count, reverse = planned.plan.lanes, sizes.is_reverse(planned.first)
    dropped = sizes.dropped(planned.lanes) if dropout else 0
    parts = []
    for each in schedule.parts:
        own = slice(each.first - planned.first, each.first - planned.first + each.plan.lanes)
        parts.append(
            Part(kernel(schedule, each.plan, dropped), each.plan, own, each.first, sizes.is_reverse(each.first))
        )
    layout, windows, ends = sizes.layout(), None, None
    if layout is not None:
        windows = windows_of(layout, schedule.bounds)
        ends = Ends.of(layout, count, min(sizes.directions, count), reverse)
    return PreparedSchedule(
        plan=planned.plan,
        lanes=schedule.lanes,
        is_whole=count == sizes.lanes,
        reverse=reverse,
        dropped=dropped,
        bounds=schedule.bounds,
        windows=windows,
        ends=ends,
        parts=tuple(parts),
    )

"""What a scan of a stack of layers launches: which lanes together, by which plan, and in which windows of time.

The scans follow a schedule. `lstm_triton.explain` prints it.
"""

from dataclasses import replace
from typing import NamedTuple

from . import planner
from .plan import Launch, ScanShape
from .windows import low_memory_bounds, steps_at_once, window_bounds


def is_single_step(time_steps: int, ragged: bool, dropout: bool, fuse_input: bool) -> bool:
    """Whether the kernel of single steps computes a stack, lane after lane. Only asked if no gradient is needed.

    Streaming calls have a single step. In a single step no program has to wait for another program.
    """
    return time_steps == 1 and fuse_input and not (ragged or dropout)


class Schedule(NamedTuple):
    """How the steps of one planned launch run.

    Attributes:
        planned: the lanes and their plan.
        bounds: the steps at which windows of time begin, and the step at which the last window ends.
    """

    planned: Launch
    bounds: list[int]

    @property
    def lanes(self) -> slice:
        """The lanes of the stack."""
        return slice(self.planned.lanes.start, self.planned.lanes.stop)

    @property
    def parts(self) -> list[Launch]:
        """What is launched for a window: all lanes together.

        With several windows, the two directions of a layer are launched one by one, since they take the windows in
        opposite order.
        """
        first, plan = self.planned.first, self.planned.plan
        if plan.chained or len(self.bounds) == 2:
            return [self.planned]
        return [Launch(first + lane, replace(plan, lanes=1)) for lane in range(plan.lanes)]

    @property
    def times(self) -> int:
        """How many launches this schedule makes."""
        return len(self.parts) * (len(self.bounds) - 1)


def forward_schedules(
    first: ScanShape,
    num_layers: int,
    directions: int,
    time_steps: int,
    *,
    keep_gates: bool,
    low_memory: bool = False,
    fuse_input: bool = True,
) -> list[Schedule]:
    """The forward scan of a stack, from the first layer to the last.

    Args:
        first: the shape of one lane of the first layer.
        keep_gates: whether the gates of all steps are kept for backward.
        low_memory: whether backward computes the gates again, window after window.
        fuse_input: whether a scan may project its input itself. If not, all input projections are computed beforehand.
    """
    found = []
    for planned in planner.launches(first, num_layers, directions):
        if not fuse_input:
            planned = replace(planned, plan=replace(planned.plan, fuse_input=False))
        at_once = time_steps if keep_gates else steps_at_once(planned.plan, first)
        bounds = low_memory_bounds(time_steps, at_once) if low_memory else window_bounds(time_steps, at_once)
        found.append(Schedule(planned, bounds))
    return found


def backward_schedules(
    first: ScanShape, num_layers: int, directions: int, time_steps: int, *, low_memory: bool = False
) -> list[Schedule]:
    """The backward scan of a stack, listed from the first layer to the last. It runs from the last to the first.

    With `low_memory`, every lane runs by itself (low_memory.py).
    """
    if not low_memory:
        return [Schedule(planned, [0, time_steps]) for planned in planner.launches(first, num_layers, directions)]
    (planned,) = planner.launches(first, num_layers=1, directions=1)
    bounds = low_memory_bounds(time_steps)
    return [Schedule(replace(planned, first=lane), bounds) for lane in range(num_layers * directions)]

"""Notices a kernel that does not end, and finds what its programs have not published.

Such a kernel keeps the multiprocessors busy, but memory can still be copied. So the exchange buffers are copied on a
second stream while the kernel runs. Where a buffer still holds the sentinel, a program has not published. This tells
the step, the rows, the units and the programs that the other programs wait for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch import Tensor

from .cases import BenchCase
from .devices import Cpu
from .results import JsonObject

if TYPE_CHECKING:
    from lstm_triton.scan.plan import Kind, Plan

HANG = 4.0  # seconds; a kernel takes milliseconds, and after this time it hangs
COPY = 3.0  # seconds; copying a buffer takes less
MOST_BYTES = 1 << 26  # so many bytes of a buffer are looked at
INTERVAL = 0.05  # seconds between two looks at the launches

Missing = JsonObject | str


class Watch:
    """Watches the kernels that are launched inside `over`.

    Attributes:
        hangs: is called with what is missing when a kernel does not end, and should not return. On a GPU it is called
            in a thread of its own, as the other threads of the process may wait for the kernel.
        patience: seconds that a kernel may take.
    """

    def __init__(self, device: Cpu, hangs: Callable[[str, list[Missing]], None], patience: float = HANG) -> None:
        self.device, self.hangs, self.patience = device, hangs, patience
        self.buffers: list[Tensor] = []
        self.launched: list[tuple[torch.cuda.Event, float]] = []
        self.over_what: tuple[str, BenchCase, dict[Kind, Plan]] | None = None
        if device.torch_device.type == "cuda":
            # Made and used now: later the driver may wait for a kernel that never ends before it makes them.
            self.host = torch.empty(MOST_BYTES, dtype=torch.uint8, pin_memory=True)
            self.stream = torch.cuda.Stream()
            with torch.cuda.stream(self.stream):
                self.host[:1].copy_(torch.zeros(1, dtype=torch.uint8, device=device.torch_device), non_blocking=True)
            self.stream.synchronize()
            threading.Thread(target=self._look, daemon=True).start()

    @contextlib.contextmanager
    def over(self, phase: str, case: BenchCase, plans: dict[Kind, Plan]) -> Iterator[None]:
        """Watch until everything that is launched inside has ended."""
        from lstm_triton import target
        from lstm_triton.interpreter import Deadlock
        from lstm_triton.scan import buffers

        self.buffers.clear()
        self.launched.clear()
        self.over_what = phase, case, plans
        sentinels = buffers.sentinels

        def recorded_buffer(shape: tuple[int, ...], like: Tensor) -> Tensor:
            self.buffers.append(sentinels(shape, like))
            return self.buffers[-1]

        def recorded_launch(launched: target.KernelLaunch) -> None:
            if self.device.torch_device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
                self.launched.append((event, time.monotonic()))

        try:
            with (
                mock.patch.object(buffers, "sentinels", recorded_buffer),
                target.watched_launches(after=recorded_launch),
            ):
                yield
            self.device.synchronize()  # raises where a kernel crashed
        except Exception as error:
            if Deadlock in (type(error), type(error.__cause__)):  # Triton's interpreter may wrap an error
                self.hangs(phase, self.missing(case, plans))
            raise
        finally:
            self.over_what = None

    def _look(self) -> None:
        """Find launches that do not end. Runs in a thread of its own."""
        while True:
            time.sleep(INTERVAL)
            over_what, launched = self.over_what, self.launched[:]
            with contextlib.suppress(RuntimeError):  # a kernel has crashed, and the other threads raise the error
                late = [event for event, since in launched if time.monotonic() - since > self.patience]
                if over_what is not None and not all(event.query() for event in late):
                    phase, case, plans = over_what
                    self.hangs(phase, self.missing(case, plans))

    def missing(self, case: BenchCase, plans: dict[Kind, Plan]) -> list[Missing]:
        """For every lane that is not complete: the step, rows, units and programs that the others wait for."""
        if not self.buffers:
            return ["no exchange buffer was made"]
        found: list[Missing] = []
        for buffer in self.buffers[-4:]:
            if buffer.numel() == 0:
                continue
            host = self.seen(buffer)
            if host is None:
                return [*found, "the copy of what was published does not end either"]
            kind: Kind = "backward" if host.shape[2] >= 4 * case.H else "forward"
            for lane, rows in enumerate(host):
                if (report := missing_of_lane(rows == -1, case, kind, lane, plans.get(kind))) is not None:
                    found.append(report)
        return found or ["everything was published"]

    def seen(self, buffer: Tensor) -> Tensor | None:
        """Copy a buffer's first lanes to the host while kernels run. None where even the copy does not end."""
        raw = buffer.view(torch.int32 if buffer.element_size() == 4 else torch.int16)
        if raw.device.type != "cuda":
            return raw.clone()
        raw = raw[: MOST_BYTES // raw[0].nbytes]
        host = self.host[: raw.nbytes].view(raw.dtype).view(raw.shape)
        with torch.cuda.stream(self.stream):
            host.copy_(raw, non_blocking=True)
        until = time.monotonic() + COPY
        while not self.stream.query():
            if time.monotonic() > until:
                return None
            time.sleep(0.001)
        return host.clone()


def missing_of_lane(empty: Tensor, case: BenchCase, kind: Kind, lane: int, plan: Plan | None) -> JsonObject | None:
    """What a lane has not published. None where nothing is missing.

    Args:
        empty: (state rows, columns) of the lane's buffer, True where the sentinel is.
    """
    width = 1 if kind == "forward" else 4  # columns of a unit
    ragged = case.layout != "dense"
    # The buffer has B rows of initial states for each direction of time; if ragged, B more for states to reset to.
    rows = empty.shape[0] - (3 if ragged else 2) * case.B
    empty = empty[case.B : case.B + rows, : width * case.H].unflatten(1, (case.H, width)).any(2)
    if not empty.any():
        return None
    report: JsonObject = {"scan": kind, "lane": lane, "rows_missing": int(empty.any(1).sum()), "of_rows": rows}
    if ragged:  # rows are not in the order of steps
        row = int(empty.any(1).nonzero()[0])
        return {**report, "first_row": row, "units": spans(empty[row])}
    steps = empty.view(case.T, case.B, case.H)
    incomplete = steps.flatten(1).any(1)
    late = incomplete.nonzero().flatten()
    # The first step that is not complete, in the order in which the scan takes steps.
    ascending = not bool(incomplete[0]) or (bool(incomplete[-1]) and kind == "forward")
    step = int(late[0] if ascending else late[-1])
    report |= {"step": step, "rows": spans(steps[step].any(1)), "units": spans(steps[step].any(0))}
    if plan is not None:
        report["programs"] = programs_of(steps[step], plan, lane)
    return report


def programs_of(empty: Tensor, plan: Plan, lane: int) -> list[int]:
    """The programs that own the missing elements (B, H) of a step, at most a dozen."""
    found = set()
    for row, unit in empty.nonzero().tolist():
        group = row // plan.block_batch % plan.groups
        found.add(((lane % plan.lanes) * plan.groups + group) * plan.slices + unit // plan.block_hidden)
    return sorted(found)[:12]


def spans(mask: Tensor) -> list[list[int]]:
    """[first, last] of the runs of True, at most a dozen."""
    found: list[list[int]] = []
    for place in mask.nonzero().flatten().tolist():
        if found and found[-1][1] == place - 1:
            found[-1][1] = place
        else:
            found.append([place, place])
    return found[:12]

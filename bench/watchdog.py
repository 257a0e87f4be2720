"""Measuring in child processes (bench.worker) that may crash, hang or lose the device and take nothing else along."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cases, results
from .cases import Row
from .results import JsonObject
from .systems import REGISTRY

MARGIN = 3.0  # seconds of the budget kept for ending children
START_TIMEOUT = 120.0  # seconds until a child has loaded what it needs


class OutOfBudget(Exception):
    """The time is up; what was under way is left for the next call."""


class CannotStart(Exception):
    """No child can be started; the message is one line."""


def describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a child and its own children; a device that hangs can keep it from going, which is not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=MARGIN)


class Child:
    """A worker and its answers.

    Args:
        module: what is run: bench.worker, or another that speaks as it does.
        under: a command that runs it, such as compute-sanitizer.
    """

    def __init__(
        self,
        device_name: str,
        plugin: str | None,
        log: Path,
        module: str = "bench.worker",
        under: Sequence[str] = (),
    ) -> None:
        command = [*under, sys.executable, "-m", module, device_name, *([plugin] if plugin else [])]
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=results.ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self.answers: queue.Queue[JsonObject | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # cut short by its end
                self.answers.put(json.loads(line))
        self.answers.put(None)

    def ask(self, **task: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then its end is the answer
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()

    def answer(self, timeout: float) -> JsonObject | None:
        """The next answer; None when the child has ended. Raises queue.Empty when it stays silent."""
        return self.answers.get(timeout=max(timeout, 0.01))


@dataclass
class Watchdog:
    """A worker at a time, replaced when it ends or stays silent."""

    device_name: str
    log: Path  # gets what the children print
    deadline: float  # time.monotonic()
    timeout: float  # seconds a child may be silent
    plugin: str | None = None
    module: str = "bench.worker"
    under: Sequence[str] = ()  # a command that runs the children
    child: Child | None = None
    origin: JsonObject | None = None  # the provenance that the first child gave, with the device's rates once measured

    def time_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfBudget
        return left

    def started(self) -> Child:
        """The running child, or a new one that is ready."""
        if self.child is not None and self.child.process.poll() is None:
            return self.child
        self.stop()
        for _ in range(2):
            child = Child(self.device_name, self.plugin, self.log, self.module, self.under)
            try:
                ready = child.answer(min(START_TIMEOUT, self.time_left()))
            except (queue.Empty, OutOfBudget):
                end(child.process)
                self.time_left()
                continue
            if ready is not None:
                self.child = child
                self.origin = self.origin or ready["ready"]
                return child
            end(child.process)
        raise CannotStart(f"no worker starts on device {self.device_name!r}; see the end of {self.log}")

    def kill(self) -> None:
        """End the child at once, if there is one."""
        if self.child is not None:
            end(self.child.process)

    def stop(self) -> str:
        """End the child, if there is one. Returns how it ended."""
        if self.child is None:
            return ""
        # A sound child ends when there is nothing more to read; one that crashed has an exit code that says why.
        assert self.child.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.child.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.process.wait(timeout=1.0)
        code = self.child.process.poll()
        end(self.child.process)
        self.child = None
        return describe_exit(code)

    def answer(self, patience: float) -> JsonObject:
        """The running child's next answer.

        {"failure": {"status", "message"}} where it stays silent or has ended: then there is no child any more.
        """
        assert self.child is not None
        try:
            answer = self.child.answer(min(patience, self.time_left()))
        except queue.Empty:
            self.time_left()  # raises if it is the budget that ended
            self.stop()
            return {"failure": {"status": "timeout", "message": f"silent for {patience:.0f} s"}}
        return {"failure": {"status": "error", "message": self.stop()}} if answer is None else answer

    def measure(
        self,
        grid_name: str,
        case: cases.BenchCase,
        names: Sequence[str],
        seconds: float,
        forced: JsonObject | None = None,
    ) -> tuple[list[Row], JsonObject | None]:
        """The rows of a case, and what went wrong where that are not all: {"status", "message", "phase", "system"}.

        forced: {"kind", "plan"}, a plan to use instead of the planner's.
        """
        doing = {"phase": "start", "system": "reference"}
        task = {"grid": grid_name, "case": cases.as_dict(case), "systems": list(names), "seconds": seconds}
        self.started().ask(measure=task, forced=forced)
        while True:
            patience = self.timeout * (REGISTRY[doing["system"]].patience if doing["system"] in REGISTRY else 1.0)
            answer = self.answer(patience)
            if "failure" in answer:
                return [], {**answer["failure"], **doing}
            if "rows" in answer:
                if answer["lost"]:
                    self.stop()
                elif self.origin is not None:
                    self.origin["rates"] = answer["rates"]
                return answer["rows"], None
            doing = answer


@contextlib.contextmanager
def ending(watchdog: Watchdog) -> Iterator[Watchdog]:
    """Its child ends with the block."""
    try:
        yield watchdog
    finally:
        watchdog.stop()


class Crew:
    """Children that compile what cases launch, side by side: one that measures then finds it in Triton's cache."""

    def __init__(self, watchdog: Watchdog, size: int) -> None:
        self.timeout = watchdog.timeout
        self.starting = {Child(watchdog.device_name, watchdog.plugin, watchdog.log) for _ in range(size)}
        self.ready: set[Child] = set()

    def compile(self, wanted: Mapping[cases.BenchCase, Sequence[str]], seconds: float) -> None:
        """Compile what systems launch in cases, for as many cases as the time allows.

        A child that ends or stays silent is not replaced.
        """
        waiting = deque(wanted.items())
        until = time.monotonic() + seconds
        busy: dict[Child, float] = dict.fromkeys(self.starting, time.monotonic() + START_TIMEOUT)
        while (waiting or busy.keys() - self.starting) and (busy or self.ready) and time.monotonic() < until:
            while waiting and self.ready:
                child = self.ready.pop()
                case, systems = waiting.popleft()
                child.ask(compile=cases.as_dict(case), systems=systems)
                busy[child] = time.monotonic() + self.timeout
            for child, patience in list(busy.items()):
                with contextlib.suppress(queue.Empty):
                    answer = child.answer(0.0)
                    self.starting.discard(child)
                    del busy[child]
                    if answer is not None:
                        self.ready.add(child)
                    else:
                        end(child.process)
                if child in busy and time.monotonic() > patience:
                    self.starting.discard(child)
                    del busy[child]
                    end(child.process)
        for child in busy.keys() - self.starting:  # in the middle of something that takes too long
            end(child.process)

    def stop(self) -> None:
        for child in self.starting | self.ready:
            end(child.process)
        self.starting, self.ready = set(), set()

"""Measuring in child processes (bench.worker), which may crash, hang or lose the device without any other loss."""

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

from lstm_triton.ending import Mistake

from . import cases, results
from .cases import Row
from .results import JsonObject
from .systems import REGISTRY

MARGIN = 3.0  # seconds of the budget that are kept for ending children
START_TIMEOUT = 120.0  # seconds until a child has loaded what it needs


class OutOfBudget(Exception):
    """The time is up. Whatever was under way is left for the next call."""


class CannotStart(Mistake):
    """No child can be started. The message is one line."""


def describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a child and its own children. A device that hangs can keep a process alive: do not wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=MARGIN)


class Child:
    """A worker process and its answers.

    Args:
        module: what the process runs: bench.worker, or a module with its questions and answers.
        under: a command that runs the process, such as compute-sanitizer.
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
        """Collect answers until the process ends. Runs in a thread of its own."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # a line cut short by the end of the process
                self.answers.put(json.loads(line))
        self.answers.put(None)

    def ask(self, **task: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended, which `answer` tells
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()

    def answer(self, timeout: float) -> JsonObject | None:
        """The next answer. None when the child has ended. Raises queue.Empty when it stays silent."""
        return self.answers.get(timeout=max(timeout, 0.01))


@dataclass
class Watchdog:
    """Has one child at a time, and replaces a child that ends or stays silent.

    Attributes:
        log: the file for everything that the children print.
        deadline: time.monotonic() at which the time is up.
        timeout: seconds for which a child may be silent.
        plugin: a module that every child imports first.
        module: what a child runs.
        under: a command that runs the children.
        child: the running child.
        origin: the provenance from the first child, with the rates of the device as soon as they are measured.
    """

    device_name: str
    log: Path
    deadline: float
    timeout: float
    plugin: str | None = None
    module: str = "bench.worker"
    under: Sequence[str] = ()
    child: Child | None = None
    origin: JsonObject | None = None

    def time_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfBudget
        return left

    def started(self) -> Child:
        """The running child, or a new child that is ready."""
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
        # A sound child ends when it has nothing more to read. After a crash the exit code tells why.
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
        """The next answer of the running child.

        {"failure": {"status", "message"}} where the child stays silent or has ended. Then there is no child any more.
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
        """The rows of a case, or none and a failure: {"status", "message", "phase", "system"}.

        Args:
            seconds: how long to time each system.
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
    """The child of the watchdog ends when the block ends."""
    try:
        yield watchdog
    finally:
        watchdog.stop()


class Crew:
    """Children that compile what cases launch, side by side. A child that measures finds it in Triton's cache."""

    def __init__(self, watchdog: Watchdog, size: int) -> None:
        self.timeout = watchdog.timeout
        self.starting = {Child(watchdog.device_name, watchdog.plugin, watchdog.log) for _ in range(size)}
        self.ready: set[Child] = set()

    def compile(self, wanted: Mapping[cases.BenchCase, Sequence[str]], seconds: float) -> None:
        """Compile what systems launch in cases, for as many cases as the time allows.

        No child replaces one that ends or stays silent.
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
        for child in busy.keys() - self.starting:  # they are busy with something that takes too long
            end(child.process)

    def stop(self) -> None:
        for child in self.starting | self.ready:
            end(child.process)
        self.starting, self.ready = set(), set()

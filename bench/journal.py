"""A journal of tests: each test has a line when it starts and a line when it is over.

A plugin of pytest writes the journal: -p bench.journal --journal FILE. So a run that was killed differs from a run that
ended, the test that hung or crashed has a name, and the next run begins after this test.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .results import JsonObject

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="append one JSON line when a test starts and one when it is over")
    parser.addoption("--journal-skip", type=Path, help="a file of test ids, one a line, that are left out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (path := config.getoption("--journal-skip")) is not None:
        done = set(path.read_text(encoding="utf-8").splitlines())
        items[:] = [item for item in items if item.nodeid not in done]


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--journal")) is not None:
        # With pytest-xdist one process writes what all workers report.
        config.pluginmanager.register(Worker() if hasattr(config, "workerinput") else Journal(path))


class Worker:
    """In a process that runs some of the tests: ends the process when it has lost the device."""

    def __init__(self) -> None:
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.failed and device_lost():
            os._exit(3)
        self.failed = False


class Journal:
    """In the process that reports: writes the journal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, tuple[str, str]] = {}

    def write(self, **entry: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcomes.pop(nodeid, None)
        self.write(test=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.skipped or report.when == "call":
            message = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            printed = f"\nIt printed:\n{report.capstdout[-1500:]}" if report.failed and report.capstdout else ""
            found = report.outcome, message[-2000:] + printed
            if self.outcomes.setdefault(report.nodeid, found)[0] != "failed":  # the first failure is the cause
                self.outcomes[report.nodeid] = found
        if str(report.when) == "???":  # pytest-xdist's: a worker has ended in this test, and nothing else will tell
            outcome, message = self.outcomes[report.nodeid]
            self.write(
                test=report.nodeid, outcome="crashed" if "crashed while" in message else outcome, message=message
            )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome, message = self.outcomes.get(nodeid, ("failed", "no report"))
        self.write(test=nodeid, outcome=outcome, message=message)
        if outcome == "failed" and device_lost():
            # Every later test of this process would fail, too.
            self.write(lost=nodeid)
            os._exit(3)


def device_lost() -> bool:
    """Whether this process has used a GPU that does not answer any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# The journal as a file


def append(path: Path, entry: JsonObject) -> None:
    """Add an entry, in a line of its own."""
    cut_short = path.exists() and not path.read_bytes().endswith(b"\n")  # a child ended while it wrote
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(entry) + "\n")


def read(path: Path) -> list[JsonObject]:
    """The entries so far. Lines that a killed process left unfinished are ignored."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def outcomes_of(entries: list[JsonObject]) -> dict[str, str]:
    """Test -> outcome, of the tests that are over."""
    return {entry["test"]: entry["outcome"] for entry in entries if entry.get("outcome", "started") != "started"}

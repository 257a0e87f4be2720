"""`python -m bench gpu`: everything that needs a GPU, most important first, within a budget. The next call goes on.

Nothing runs on the device in this process. Tests and cases run in child processes under a watchdog. If a child crashes,
hangs or loses the device, a line or a row says so, and a new child does the rest.

The folder gets results.json (bench.results), gpu-tests.jsonl (bench.journal) and gpu.log (what the children print).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import cases, devices, journal, measure, results
from .cases import Row
from .results import JsonObject
from .run import empty_kernel_caches
from .systems import REGISTRY
from .watchdog import START_TIMEOUT, Crew, OutOfBudget, Watchdog, describe_exit, end


@dataclass(frozen=True)
class Stage:
    """What is measured together.

    Attributes:
        blocks: only the first blocks of the grid; None: all of them.
        peers: whether only systems that may be missing take part, or only those of cases.MAIN; None: all.
    """

    grid: str
    blocks: int | None = None
    peers: bool | None = None

    def systems(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if self.peers is None or (name not in cases.MAIN) == self.peers)


# First comes what is worth most when only minutes are left. Peers come late, since some of them compile for minutes.
GRID_STAGES = {name: Stage(name) for name in cases.GRIDS} | {
    "headline": Stage("headline", peers=False),
    "common": Stage("full", blocks=1),
    "peers": Stage("headline", peers=True),
}
STAGES = ("headline", "common", "stacks", "accuracy", "tests", "latency", "peers", "full")
CHUNK = 24  # the kernels of so many cases are compiled before the first of these cases is measured
COMPILING = 0.3  # at most this part of the time left is for compiling ahead
PATIENCE = 3  # a test may take so many times longer than all tests together may be silent
STRIKES = 3  # after so many crashes and time-outs a peer is not run any more


def print_now(line: str) -> None:
    print(line, flush=True)


@dataclass
class Session:
    """One call of the command."""

    out: Path
    watchdog: Watchdog
    seconds: float  # for timing each system in each case
    tests: str  # what pytest -m gpu is run on
    retry: bool = False
    start: float = field(default_factory=time.monotonic)
    found: results.Results = field(default_factory=lambda: results.Results({}))
    strikes: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    compilers: int = 0  # so many children compile ahead, side by side
    test_workers: int = 1  # so many processes run tests side by side
    crew: Crew | None = None
    tell: Callable[[str], None] = print_now  # gets every line

    @property
    def results_file(self) -> Path:
        return self.out / "results.json"

    @property
    def journal(self) -> Path:
        return self.out / "gpu-tests.jsonl"

    def say(self, text: str) -> None:
        self.tell(f"[{time.monotonic() - self.start:7.1f} s] {text}")

    def stop(self) -> None:
        if self.crew is not None:
            self.crew.stop()
        self.watchdog.kill()

    def resume(self, folder: Path) -> None:
        """Copy what an earlier call left in another folder, if this call's folder has no such files."""
        if not folder.is_dir():
            raise results.ResultsError(f"cannot resume from {folder}: no such folder")
        results.require_writable(self.out)
        for name in (self.results_file.name, self.journal.name):
            if (folder / name).exists() and not (self.out / name).exists():
                shutil.copy(folder / name, self.out / name)

    def open_results(self, origin: JsonObject) -> results.Results:
        """The rows so far of these kernels and this machine. A file with other rows is moved aside, not lost."""
        if not self.results_file.exists():
            return results.Results(origin)
        found = results.Results.read(self.results_file)
        if not found.belongs_with(origin):
            move_aside(self.results_file, found.provenance["kernel_hash"])
            return results.Results(origin)
        found.provenance = origin
        if self.retry:
            found.rows = [row for row in found.rows if row["status"] in ("ok", "missing")]
        return found

    # Cases

    def save(self, rows: list[Row]) -> None:
        self.found.add(rows)
        self.found.write(self.results_file)
        self.failures += sum(row["system"] == cases.OURS and row["status"] not in ("ok", "missing") for row in rows)

    def run_grid(self, stage: Stage) -> None:
        grid_name = stage.grid
        work = cases.work_list(grid_name, rehearse=self.watchdog.device_name != "cuda", blocks=stage.blocks)
        left = [(case, todo) for case, names in work if (todo := self.todo(grid_name, case, stage.systems(names)))]
        if not left:
            return
        first_call = cases.GRIDS[grid_name].first_call
        if first_call:
            self.watchdog.stop()  # the next child finds the caches empty
        with empty_kernel_caches() if first_call else contextlib.nullcontext():
            for first in range(0, len(left), CHUNK):
                chunk = left[first : first + CHUNK]
                if not first_call:
                    self.compile(chunk)
                for case, todo in chunk:
                    self.run_case(grid_name, case, todo)
            self.watchdog.stop()  # the next stage starts with free memory

    def compile(self, work: list[tuple[cases.BenchCase, list[str]]]) -> None:
        """Compile what these cases launch, in several children side by side."""
        wanted = {case: todo for case, todo in work if cases.OURS in todo}
        if self.compilers == 0 or not wanted:
            return
        self.crew = self.crew or Crew(self.watchdog, self.compilers)
        self.crew.compile(wanted, COMPILING * self.watchdog.time_left())

    def todo(self, grid_name: str, case: cases.BenchCase, names: tuple[str, ...]) -> list[str]:
        """The systems without a row. Those of cases.MAIN are measured together, or none of them is."""
        rows = {
            row["system"]: row for row in self.found.rows if row["grid"] == grid_name and results.case_of(row) == case
        }

        def there(name: str) -> bool:
            if name not in rows:
                return False
            came = "is not installed" in rows[name]["message"] and REGISTRY[name].installed()
            return not (rows[name]["status"] == "missing" and came)

        together = not all(there(name) for name in names if name in cases.MAIN)
        return [name for name in names if (together if name in cases.MAIN else not there(name))]

    def run_case(self, grid_name: str, case: cases.BenchCase, names: list[str]) -> None:
        """Make a row for each system. A turn of the loop gets rows, or loses a system by a crash or a time-out."""
        rows: list[Row] = []

        def fail(systems: list[str], status: str, message: str) -> None:
            rows.extend(measure.new_row(grid_name, case, name, status, message) for name in systems)

        given_up = [name for name in names if self.strikes[name] >= STRIKES and name not in cases.MAIN]
        fail(given_up, "error", f"not run: it crashed or hung {STRIKES} times before")
        while todo := [name for name in names if name not in {row["system"] for row in rows}]:
            measured, failure = self.watchdog.measure(grid_name, case, todo, self.seconds)
            rows += measured
            if failure is not None:
                # Without the reference, or without nn.LSTM's error, no system of the case can be judged.
                guilty = [failure["system"]] if failure["system"] in todo else todo
                fail(guilty, failure["status"], f"{failure['message']}, in {failure['phase']} of {failure['system']}")
                self.strikes.update(guilty)
        self.save(rows)
        self.say(f"{grid_name} {case}: {summary(rows)}")

    # Tests

    def run_tests(self) -> None:
        """Run `pytest -m gpu` until it reaches its end, each time without the tests that are over."""
        self.watchdog.stop()
        header = {key: self.found.provenance[key] for key in ("kernel_hash", "gpu")}
        entries = journal.read(self.journal)
        if entries and entries[0] != header:
            move_aside(self.journal, str(entries[0].get("kernel_hash")))
            entries = []
        if self.retry:
            entries = [entry for entry in entries if entry.get("outcome") in ("passed", "skipped")]
            self.journal.unlink(missing_ok=True)
            for entry in [header, *entries] if entries else []:
                journal.append(self.journal, entry)
        if not entries:
            journal.append(self.journal, header)
        while not any("end" in entry for entry in journal.read(self.journal)):
            if not self.run_remaining_tests():
                break
        outcomes = self.test_outcomes()
        self.failures += sum(number for outcome, number in outcomes.items() if outcome not in ("passed", "skipped"))
        self.say(f"gpu tests: {', '.join(f'{number} {outcome}' for outcome, number in outcomes.items()) or 'none'}")

    def test_outcomes(self) -> Counter[str]:
        """Outcome -> number of tests, of the tests that are over."""
        return Counter(journal.outcomes_of(journal.read(self.journal)).values())

    def run_remaining_tests(self) -> bool:
        """Run the tests that are not over. False if pytest failed before its first test: it would fail again."""
        skip = self.out / ".gpu-tests-done"
        over = journal.outcomes_of(journal.read(self.journal))
        skip.write_text("\n".join(over), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", self.tests, "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        command += [f"--rootdir={results.ROOT}", f"--config-file={results.ROOT / 'pyproject.toml'}"]
        command += ["-p", "bench.journal", f"--journal={self.journal}", f"--journal-skip={skip}"]
        if self.test_workers > 1 and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(self.test_workers)]
            if importlib.util.find_spec("pytest_timeout") is not None:
                # For a test that hangs while others run. A signal would not interrupt a call of CUDA.
                command += [f"--timeout={PATIENCE * self.watchdog.timeout:.0f}", "--timeout-method=thread"]
        # Workers slow each other down if each of them takes all cores.
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.test_workers)), **os.environ}
        with self.watchdog.log.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=results.ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        size, changed = self.journal.stat().st_size, time.monotonic()
        # Before the first test workers import everything, and are silent.
        patience = max(START_TIMEOUT, self.watchdog.timeout)
        outcome = ""
        try:
            while process.poll() is None:
                time.sleep(0.1)
                self.watchdog.time_left()
                now = self.journal.stat().st_size
                if now != size:
                    size, changed, patience = now, time.monotonic(), self.watchdog.timeout
                elif time.monotonic() - changed > patience:
                    outcome = "timeout"
                    break
        finally:
            end(process)
            skip.unlink(missing_ok=True)
        entries = journal.read(self.journal)
        running = [entry["test"] for entry in entries if entry.get("outcome") == "started"]
        unfinished = [test for test in running if test not in journal.outcomes_of(entries)]
        message = f"silent for {patience:.0f} s" if outcome else describe_exit(process.returncode)
        for test in unfinished:
            journal.append(self.journal, {"test": test, "outcome": outcome or "crashed", "message": message})
            self.say(f"gpu test {test}: {outcome or 'crashed'} ({message})")
        lost = bool(entries) and "lost" in entries[-1]
        # After the loss of a worker pytest may stay although all tests are over.
        stays = outcome == "timeout" and len(journal.outcomes_of(entries)) > len(over)
        if unfinished or lost or stays:
            return True
        if process.returncode not in (0, 1, 5):  # 0: all passed, 1: some failed, 5: none left
            self.failures += 1
            self.say(f"gpu tests: pytest did not run ({message}); the end of {self.watchdog.log}:")
            for line in self.watchdog.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]:
                self.say(f"    {line}")
            return False
        journal.append(self.journal, {"end": True})
        return True


def move_aside(path: Path, kernel_hash: str) -> None:
    """Rename a file of other kernels, so that it is kept."""
    target = path.with_name(f"{path.stem}-{kernel_hash}{path.suffix}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.stem}-{kernel_hash}-{number}{path.suffix}")
    path.rename(target)


def summary(rows: list[Row]) -> str:
    parts = []
    for row in rows:
        if row["status"] != "ok":
            parts.append(f"{row['system']} {row['status']}")
        elif row["median_us"] is not None:
            parts.append(f"{row['system']} {row['median_us']:.1f} us")
        else:
            parts.append(f"{row['system']} error {row['error']:.1e}")
    return ", ".join(parts)


@contextlib.contextmanager
def ending_children(stop: Callable[[], None]) -> Iterator[None]:
    """No child outlives this process, even if the process is terminated. stop: ends the children."""

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        stop()
        signal.signal(signal.SIGTERM, before)


def require_tests(tests: str) -> None:
    """Raise UnknownName before any work is done, if there are no such tests."""
    if not (results.ROOT / tests.split("::")[0]).exists():
        raise cases.UnknownName(f"there are no tests {tests!r}: name a file or a folder of the project")


def gpu(session: Session, stages: list[str]) -> int:
    """Run the stages in order. Returns 0, or 1 if a test or a row of lstm_triton is not right."""
    devices.require(session.watchdog.device_name)
    results.require_writable(session.out)
    if session.results_file.exists():
        results.Results.read(session.results_file)
    ended = "complete"
    with ending_children(session.stop):
        try:
            session.watchdog.started()
            assert session.watchdog.origin is not None
            session.found = session.open_results(session.watchdog.origin)
            session.say(f"{session.found.provenance['gpu']}, kernels {session.found.provenance['kernel_hash']}")
            for stage in stages:
                session.watchdog.time_left()
                if stage == "tests":
                    session.run_tests()
                else:
                    session.run_grid(GRID_STAGES[stage])
                session.say(f"{stage}: done")
        except OutOfBudget:
            ended = "out of budget: call again to go on"
    session.say(f"{ended}; {session.failures} failures of lstm_triton; results in {session.out}")
    return int(session.failures > 0)

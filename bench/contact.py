"""`python -m bench contact`: the first command for any GPU. Is everything right, how fast is it, and, if not, why not?

It takes minutes. In this order it finds out:
- what the machine is;
- whether layers are right, forward and backward apart, with every error beside nn.LSTM's;
- what a fault depends on: layers that failed run once more, also with other plans;
- what the planner's estimates rest on;
- times of this library, of nn.LSTM and of the exchange alone;
- whether the tests marked gpu pass.

Nothing runs on the device in this process. Children do the work (bench.contact_worker, bench.worker). If a child
crashes or hangs, a line says so. The folder gets
- contact.jsonl, with a line for every finding as soon as it is known;
- contact.txt, with everything that is printed;
- contact.log, with everything that the children print;
- the journal of the tests.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import cases, devices, journal, measure, results
from .cases import BASELINE, FLOOR, OURS, BenchCase
from .contact_cases import CANDIDATES, CHECKS, HOST, TIMED
from .contact_report import TimeRow, is_right, time_table, verdict_of
from .gpu import COMPILING, Session, ending_children
from .hang import HANG
from .plans import SCAN_MODES
from .results import JsonObject
from .watchdog import Crew, OutOfBudget, Watchdog, ending

CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "compute_mode")
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--print-limit", "20")

REHEARSED = 7  # cases of each step in a rehearsal
COLD = 4  # after so many layers one knows whether Triton's cache has the kernels
MOST_FAILURES = 4  # after so many failed layers no more are tried: something is wrong from the ground up
EXPLAINED = 2  # so many of the layers that failed are tried with other plans
LEAST_FOR_TIMES = 0.5  # this part of the budget is left for times and tests, whatever fails
FOR_TESTS = 0.3  # this part of the budget is left for tests
LEAST_FOR_TESTS = 20.0  # seconds; in less time no test would end
SLOWER = 4  # under a sanitizer everything may be so many times slower


def asked(*command: str) -> str:
    """What a command prints. Nothing where the command is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return ""


@dataclass
class Contact:
    """One call of the command.

    Attributes:
        seconds: how long to time each system in each case.
        silent: seconds for which a child may be silent, also while it compiles.
        plugin: a module that every child imports first.
        tests: what pytest -m gpu is run on; None: no tests.
        processes: so many compile ahead where the kernel cache is empty, and so many run tests.
    """

    out: Path
    device_name: str
    start: float  # time.monotonic()
    deadline: float
    seconds: float = 0.05
    silent: float = 30.0
    plugin: str | None = None
    tests: str | None = "tests"
    processes: int = 1
    # What was found.
    right: int = 0
    failed_layers: list[BenchCase] = field(default_factory=list)
    failed: list[tuple[str, JsonObject]] = field(default_factory=list)  # what failed, and how
    times: list[TimeRow] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)  # question -> answer
    skipped: list[str] = field(default_factory=list)
    kernels: tuple[int, int] = (0, 0)  # of the layers: found in Triton's cache, and compiled

    def __post_init__(self) -> None:
        self.checking, self.timing = self.watchdog("bench.contact_worker"), self.watchdog("bench.worker")

    def watchdog(self, module: str, under: tuple[str, ...] = (), silent: float | None = None) -> Watchdog:
        log = self.out / "contact.log"
        return Watchdog(self.device_name, log, self.deadline, silent or self.silent, self.plugin, module, under)

    @property
    def on_gpu(self) -> bool:
        return self.device_name == "cuda"

    # Findings

    def write(self, step: str, **finding: object) -> None:
        journal.append(
            self.out / "contact.jsonl", {"s": round(time.monotonic() - self.start, 1), "step": step, **finding}
        )

    def tell(self, line: str) -> None:
        print(line, flush=True)
        with (self.out / "contact.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def say(self, text: str) -> None:
        self.tell(f"[{time.monotonic() - self.start:7.1f} s] {text}")

    def skip(self, what: str) -> None:
        if what not in self.skipped:
            self.skipped.append(what)

    def has_time(self, part: float, what: str) -> bool:
        """Whether more than a part of the budget is left. If not, `what` is noted as not done."""
        there = self.deadline - time.monotonic() > part * (self.deadline - self.start)
        if not there:
            self.skip(what)
        return there

    @property
    def for_tests(self) -> float:
        """The part of the budget that is kept for the tests."""
        return FOR_TESTS if self.tests is not None else 0.0

    def ask(self, watchdog: Watchdog, question: JsonObject) -> JsonObject:
        """What a child of bench.contact_worker answers: {"result"}, {"error"}, {"hang"}, {"timeout"} or {"crash"}."""
        watchdog.started().ask(**question)
        phase = "start"
        while True:
            answer = watchdog.answer(watchdog.timeout)
            if failure := answer.get("failure"):
                return {"timeout" if failure["status"] == "timeout" else "crash": failure["message"], "in": phase}
            if "phase" in answer:
                phase = answer["phase"]
                continue
            if "hang" in answer or answer.get("lost"):
                watchdog.stop()
            return {**answer, "in": phase}

    def check(self, watchdog: Watchdog, case: BenchCase, change: str | None, patience: float = HANG) -> JsonObject:
        question = {"check": cases.as_dict(case), "change": change, "patience": patience}
        outcome = self.ask(watchdog, question)
        self.write("check", case=question["check"], change=change, under=watchdog.under, **outcome)
        return outcome

    # Steps

    def environment(self) -> None:
        """What the machine is: versions from a child, clocks and compute mode from nvidia-smi."""
        self.checking.started()
        assert self.checking.origin is not None
        found = self.checking.origin
        named = ("gpu", "driver", "torch", "triton", "cudnn", "commit", "kernel_hash")
        self.say(", ".join(f"{name} {found[name]}" for name in named))
        variables = {name: value for name, value in os.environ.items() if name.startswith(("TRITON", "CUDA", "PTXAS"))}
        clocks = asked("nvidia-smi", "--query-gpu=" + ",".join(CLOCKS), "--format=csv,noheader", "-i", "0")
        self.write("environment", **found, variables=variables, nvidia_smi=asked("nvidia-smi", "-q", "-i", "0"))
        if clocks:
            self.say(", ".join(f"{name} {value}" for name, value in zip(CLOCKS, clocks.split(", "), strict=False)))
        if clocks and "Default" not in clocks:
            self.say("only one process at a time may use this GPU (its compute mode): one process does everything")
            self.processes = 1

    def check_layers(self) -> None:
        wanted = self.sizes(CHECKS)
        try:
            for number, case in enumerate(wanted):
                if number == COLD and self.kernels[1] > self.kernels[0]:
                    self.compile(wanted[number:], (OURS,))
                if not self.has_time(LEAST_FOR_TIMES, "some layers"):
                    break
                outcome = self.check(self.checking, case, None)
                found, compiled = outcome.get("kernels", (0, 0))
                self.kernels = self.kernels[0] + found, self.kernels[1] + compiled
                self.say(f"{case}: {verdict_of(outcome)}")
                if is_right(outcome):
                    self.right += 1
                else:
                    self.failed.append((str(case), outcome))
                    self.failed_layers.append(case)
                if len(self.failed_layers) == MOST_FAILURES:
                    self.say(f"{MOST_FAILURES} layers failed: no more are tried")
                    break
        finally:
            self.answers["kernel cache"] = "of these layers' kernels {} found, {} compiled".format(*self.kernels)
            self.say(f"kernel cache: {self.answers['kernel cache']}")

    def compile(self, wanted: Sequence[BenchCase], systems: tuple[str, ...]) -> None:
        """Compile what the cases launch in processes side by side, since Triton's cache does not have it."""
        if self.processes == 1:
            return
        crew = Crew(self.timing, self.processes)
        try:
            crew.compile(dict.fromkeys(wanted, systems), COMPILING * (self.deadline - time.monotonic()))
        finally:
            crew.stop()

    def explain_failures(self) -> None:
        """Run layers that failed again: as they are, with other plans, under a sanitizer. Each run has a new child."""
        what = "some of what the failures depend on"
        for case in self.failed_layers[:EXPLAINED]:
            changes = self.ask(self.checking, {"changes": cases.as_dict(case)}).get("result", ())
            self.checking.stop()
            for change in (None, *changes):
                if not self.has_time(LEAST_FOR_TIMES, what):
                    return
                with ending(self.watchdog("bench.contact_worker")) as watchdog:
                    outcome = self.check(watchdog, case, change)
                self.say(f"  {case}, {change or 'once more, alone'}: {verdict_of(outcome)}")
            if self.on_gpu and shutil.which(SANITIZER[0]) and self.has_time(LEAST_FOR_TIMES, what):
                short = replace(case, T=min(case.T, 2))
                with ending(self.watchdog("bench.contact_worker", SANITIZER, SLOWER * self.silent)) as watchdog:
                    outcome = self.check(watchdog, short, None, SLOWER * SLOWER * HANG)
                self.say(f"  {short}, under {SANITIZER[0]}: {verdict_of(outcome)}; see contact.log")

    def ask_questions(self) -> None:
        """Ask what the planner's estimates rest on: the time of a hand-off, and the host's time for a call."""
        [host] = self.sizes((HOST,))
        for step, what, question in (
            ("handoff", "from one multiprocessor to another", {"handoff": None}),
            ("host", f"microseconds of the host, {host}", {"host": cases.as_dict(host)}),
        ):
            outcome = self.ask(self.checking, question)
            self.write(step, **outcome)
            found = outcome.get("result")
            if found is None:
                self.failed.append((what, outcome))
            text = ", ".join(f"{name} {value}" for name, value in found.items()) if found else verdict_of(outcome)
            self.answers[what] = text
            self.say(f"{what}: {text}")

    def time_layers(self) -> None:
        """Time lstm_triton, nn.LSTM and the exchange alone in turns. The headline is timed with other plans, too."""
        headline, *_ = timed = self.sizes(TIMED)
        plans = self.other_plans(headline)
        self.checking.stop()  # two children would hold memory that neither uses
        if self.kernels[1] > self.kernels[0]:
            self.compile(timed, (OURS, FLOOR))
        for number, case in enumerate(timed):
            if number == 2:  # the headline has been measured as it is
                for mode, label, forced in plans:
                    if self.has_time(self.for_tests, "times of other plans"):
                        self.time_layer(replace(headline, mode=mode), forced, label)
            if self.has_time(self.for_tests, "some times"):
                self.time_layer(case)
        self.timing.stop()

    def other_plans(self, case: BenchCase) -> list[tuple[str, str, JsonObject]]:
        """(mode, label, {"kind", "plan"}) of the plans that are measured beside the planner's own."""
        found = []
        for kind, mode in SCAN_MODES.items():
            outcome = self.ask(self.checking, {"plans": cases.as_dict(case), "kind": kind, "most": CANDIDATES})
            self.write("plans", case=cases.as_dict(case), kind=kind, **outcome)
            for label, plan in outcome.get("result", ()):
                found.append((mode, f", {kind} {label}", {"kind": kind, "plan": plan}))
        return found

    def time_layer(self, case: BenchCase, forced: JsonObject | None = None, label: str = "") -> None:
        rows, failure = self.timing.measure("contact", case, (OURS, BASELINE, FLOOR), self.seconds, forced)
        self.write("times", case=cases.as_dict(case), rows=rows, failure=failure, forced=forced)
        found = {row["system"]: row for row in rows if row["status"] != "missing"}
        name = f"{case}{label}"
        why = failure or next((row for row in found.values() if row["status"] != "ok"), None)
        if why is not None:
            self.say(f"{name}: FAILED: {why['system']}: {why['message']}")
            if forced is None and why["system"] not in (BASELINE, FLOOR):  # other plans may be impossible
                self.failed.append((name, {"error": why["message"]}))
        if OURS in found and found[OURS]["status"] == "ok":
            theirs, exchange = (found.get(system, {}).get("median_us") for system in (BASELINE, FLOOR))
            row = TimeRow(name, found[OURS]["median_us"], theirs, exchange)
            self.times.append(row)
            self.say(str(row))

    def run_tests(self) -> None:
        """Run `pytest -m gpu` as `bench gpu` does."""
        if self.tests is None:
            return
        if self.deadline - time.monotonic() < LEAST_FOR_TESTS or self.checking.origin is None:
            self.skip("the tests")
            return
        self.checking.stop()
        self.timing.stop()
        session = Session(
            self.out, self.watchdog("bench.worker"), self.seconds, self.tests, start=self.start,
            test_workers=self.processes, found=results.Results(self.checking.origin), tell=self.tell,
        )  # fmt: skip
        try:
            session.run_tests()
        except OutOfBudget:
            self.skip("some tests")
        outcomes = session.test_outcomes()
        text = ", ".join(f"{number} {name}" for name, number in outcomes.items())
        self.answers["tests marked gpu"] = text or "none"
        failures = sum(number for name, number in outcomes.items() if name not in ("passed", "skipped"))
        if failures or session.failures:
            self.failed.append(("tests marked gpu", {"error": text or "pytest did not run: see contact.log"}))

    def sizes(self, found: tuple[BenchCase, ...]) -> tuple[BenchCase, ...]:
        """The cases. In a rehearsal some of them, shrunk, and without TF32, which a CPU does not have."""
        if self.on_gpu:
            return found
        small = (cases.shrunk(case) for case in found if case.dtype != "tf32")
        return tuple(dict.fromkeys(small))[:REHEARSED]

    # The end

    def stop(self) -> None:
        self.checking.kill()
        self.timing.kill()

    def summary(self) -> None:
        """Print what matters most at the end."""
        for line in ("", *time_table(self.times), *(f"{what}: {text}" for what, text in self.answers.items())):
            self.tell(line)
        self.tell(f"layers: {self.right} right, {len(self.failed_layers)} failed")
        for what, outcome in self.failed:
            self.tell(f"  {what}: {verdict_of(outcome)}")
        if self.skipped:
            self.tell(f"not done, as the time was up: {', '.join(self.skipped)}")
        good = "everything that was tried is right" if self.right else "nothing was tried"
        self.tell(f"{len(self.failed)} failures" if self.failed else good)


def contact(run: Contact) -> int:
    """All steps in order. Returns 0, or 1 if anything failed or nothing could be tried."""
    devices.require(run.device_name)
    results.require_writable(run.out)
    run.tell(f"contact, {datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')}")
    steps: dict[str, Callable[[], None]] = {
        "the machine": run.environment,
        "layers": run.check_layers,
        "what failures depend on": run.explain_failures,
        "questions": run.ask_questions,
        "times": run.time_layers,
        "tests": run.run_tests,
    }
    with ending_children(run.stop):
        for name, step in steps.items():
            if name in ("questions", "times") and len(run.failed_layers) >= MOST_FAILURES:
                run.say(f"{name}: not asked for, as {MOST_FAILURES} layers failed")
                continue
            try:
                run.checking.time_left()
                step()
            except OutOfBudget:
                run.skip(name)
            except Exception as error:  # a step that fails must not prevent the others
                run.write("broken", what=name, error=traceback.format_exc())
                run.say(f"{name}: this step failed: {measure.one_line(error)}")
                run.failed.append((name, {"error": measure.one_line(error)}))
                if run.checking.origin is None:
                    break  # no child starts
    run.write("end", right=run.right, failures=len(run.failed), skipped=run.skipped)
    run.summary()
    return int(bool(run.failed) or run.right == 0)

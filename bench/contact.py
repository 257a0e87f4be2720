"""`python -m bench contact`: the first command for any GPU. Is everything right, how fast is it, and, if not, why not?

Within minutes, what is worth most first: what the machine is; some layers, forward and backward apart, every error
beside nn.LSTM's; the layers that failed once more with other plans, to see what the fault depends on; times of this
library, of nn.LSTM and of the exchange alone; what the planner's estimates rest on; the tests marked gpu.

Nothing runs on the device in this process. Children do the work (bench.contact_worker, bench.worker), and one that
crashes or hangs becomes a line that says so. The folder gets contact.jsonl, a line for every finding as soon as it is
known; contact.txt, the lines that are printed; contact.log, what the children print; and the journal of the tests.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import cases, devices, measure, results
from .cases import BASELINE, FLOOR, OURS, Case
from .contact_worker import CHANGES, plans_to_try
from .gpu import Session, append, ending_children
from .results import JsonObject
from .watchdog import OutOfBudget, Watchdog

if TYPE_CHECKING:
    from lstm_triton.planner import Kind

BOTH = "forward+backward"
MODES: tuple[tuple[Kind, str], ...] = (("forward", "forward"), ("backward", BOTH))  # what shows a scan's time
DTYPES = ("float16", "bfloat16", "tf32", "float32")
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "compute_mode")
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--print-limit", "20")


def layer(dtype: str, T: int, B: int, I: int, H: int, **more: object) -> Case:  # noqa: E741
    return Case(BOTH, dtype, T=T, B=B, I=I, H=H, **more)  # type: ignore[arg-type]


# In order: one program; some; the headline; odd sizes; several tiles; asynchronous tensor cores; streamed weights;
# lengths and resets; a chain; both directions; full precision with several tiles.
CHECKS = (
    *(layer(dtype, 8, 3, 8, 8) for dtype in DTYPES),
    *(layer(dtype, 8, 3, 16, 64) for dtype in DTYPES),
    *(layer(dtype, 16, 16, 768, 768) for dtype in DTYPES),
    *(layer(dtype, 12, 17, 33, 131) for dtype in ("float16", "tf32")),
    *(layer(dtype, 16, 64, 256, 1024) for dtype in ("bfloat16", "tf32")),
    layer("float16", 12, 256, 256, 768),
    *(layer(dtype, 8, 16, 64, 2048) for dtype in ("float16", "tf32")),
    layer("bfloat16", 6, 16, 64, 4096),
    *(layer(dtype, 16, 16, 64, 256, layout="lengths") for dtype in ("float16", "tf32")),
    layer("float16", 16, 16, 64, 256, layout="resets"),
    layer("bfloat16", 16, 32, 128, 512, layers=4),
    layer("bfloat16", 16, 32, 128, 512, bidirectional=True),
    layer("float32", 16, 64, 96, 512),
)
HEADLINE = layer("float16", 1024, 16, 768, 768)
# The headline; then lengths of time, whose differences tell what a step costs and whether it matters that rows come
# from memory; then the map over H and B, on whose borders nn.LSTM may get ahead; then a call that is all overhead.
TIMED = (
    *(replace(HEADLINE, dtype=dtype, mode=mode) for dtype in DTYPES for mode in ("forward", BOTH)),
    *(replace(HEADLINE, T=steps, mode="forward") for steps in (128, 256, 2048)),
    *(
        replace(HEADLINE, T=256, H=hidden, I=hidden, B=batch)
        for batch, hidden in itertools.product((16, 1, 64, 256), (256, 64, 1024, 512, 128, 2048))
    ),
    replace(HEADLINE, T=2, B=1, H=512, I=512, mode="inference"),
)
HOST = layer("float16", 16, 16, 256, 256)
REHEARSED = 7  # cases of each step in a rehearsal
CASES = (*CHECKS, *TIMED, HOST)
MOST_FAILURES = 4  # layers, after which no more are tried: something is wrong from the ground up
EXPLAINED = 2  # of them, how many are tried with other plans
CANDIDATES = 8  # plans that are timed for each scan of the headline
SHARE_OF_TESTS = 0.3  # of the budget
LEAST_FOR_TESTS = 20.0  # seconds: with fewer none would end


class TimeRow(NamedTuple):
    """Microseconds of one case; None where a system does not take part."""

    name: str
    ours: float
    theirs: float | None
    exchange: float | None

    def __str__(self) -> str:
        parts = [f"lstm_triton {self.ours:.1f} us"]
        if self.theirs is not None:
            parts.append(f"nn.LSTM {self.theirs:.1f} us ({self.theirs / self.ours:.2f} x as long)")
        if self.exchange is not None:
            parts.append(f"the exchange alone {self.exchange:.1f} us")
        return f"{self.name}: {', '.join(parts)}"


def asked(*command: str) -> str:
    """What a command prints; nothing where there is no such command."""
    if shutil.which(command[0]) is None:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    return ""


def title(case: Case) -> str:
    """A case without its mode."""
    more = [f"{case.layers} layers"] if case.layers > 1 else []
    more += ["both directions"] if case.bidirectional else []
    more += [case.layout] if case.layout != "dense" else []
    return " ".join([case.dtype, f"T={case.T} B={case.B} I={case.I} H={case.H}", *more])


def verdict_of(outcome: JsonObject) -> tuple[str, bool]:
    """What a check came to, as a line; and whether all is right."""
    where = f" in {outcome['in']}" if outcome.get("in") else ""
    for name, text in (("timeout", "NO ANSWER"), ("crash", "CRASHED"), ("error", "FAILED")):
        if name in outcome:
            return f"{text}{where}: {outcome[name]}", False
    if "hang" in outcome:
        missing = "; ".join(in_words(each) for each in outcome["hang"]["missing"]) or "everything was published"
        return f"DOES NOT END in {outcome['hang']['in']}: {missing}", False
    parts, good = [], True
    for kind in ("forward", "backward"):
        rows = outcome["result"][kind]
        wrong = [row for row in rows if "wrong" in row]
        worst = max(rows, key=ratio)
        parts.append(f"{kind} {worst['error']:.1e}, {ratio(worst):.2f} x nn.LSTM's")
        parts += [f"WRONG {row['name']}: {json.dumps(row['wrong'])}" for row in wrong]
        good = good and not wrong
    return "; ".join(parts), good


def ratio(row: JsonObject) -> float:
    """An error divided by nn.LSTM's."""
    if not row["error"] >= 0:
        return float("inf")
    return float(row["error"] / max(row["nn.LSTM"], 1e-12))


def in_words(missing: JsonObject | str) -> str:
    """What a scan that does not end waits for."""
    if isinstance(missing, str):
        return missing
    units = ", ".join(f"{first} to {last - 1}" for first, last in missing["units"])
    rows = f"{missing['rows_missing']} of {missing['of_rows']} rows"
    lane = f"{missing['scan']} scan, lane {missing['lane']}: {rows} missing"
    if "first_row" in missing:
        return f"{lane}, the first is row {missing['first_row']}, units {units}"
    rows = ", ".join(f"{first} to {last - 1}" for first, last in missing["rows"])
    programs = f", of program {', '.join(map(str, missing['programs']))}" if "programs" in missing else ""
    return f"{lane}, first in step {missing['step']}: batch rows {rows}, units {units}{programs}"


def launch_besides(device: devices.Cpu) -> None:
    """Launch what this command launches besides its cases, for the sake of Triton's cache (bench.cache)."""
    from lstm_triton import planner

    from . import handoff

    handoff.times(device)
    for kind, mode in MODES:
        case = replace(HEADLINE, mode=mode)
        for _, plan in plans_to_try(case, device, kind, CANDIDATES):
            with planner.forced(planner.Plan(**plan), kind):
                measure.compile_kernels(case, device)


@dataclass
class Contact:
    """One call of the command."""

    out: Path
    device_name: str
    start: float  # time.monotonic()
    deadline: float
    seconds: float = 0.05  # of timing for each system and case
    silent: float = 30.0  # seconds without a sign of life before a child is killed, compiling included
    plugin: str | None = None
    tests: str | None = "tests"  # what pytest -m gpu is run on
    test_workers: int = 1
    times: list[TimeRow] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)  # what was asked, and what came out
    failed: list[tuple[Case, JsonObject]] = field(default_factory=list)
    kernels: tuple[int, int] = (0, 0)  # found in Triton's cache, and compiled
    right: int = 0
    status: int = 0
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        log = self.out / "contact.log"
        self.checking = Watchdog(self.device_name, log, self.deadline, self.silent, self.plugin, "bench.contact_worker")
        self.timing = Watchdog(self.device_name, log, self.deadline, self.silent, self.plugin)

    # Findings

    def write(self, step: str, **finding: object) -> None:
        append(self.out / "contact.jsonl", {"s": round(time.monotonic() - self.start, 1), "step": step, **finding})

    def tell(self, line: str) -> None:
        print(line, flush=True)
        with (self.out / "contact.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def say(self, text: str) -> None:
        self.tell(f"[{time.monotonic() - self.start:7.1f} s] {text}")

    def skip(self, what: str) -> None:
        if what not in self.skipped:
            self.skipped.append(what)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def ask(self, watchdog: Watchdog, question: JsonObject) -> JsonObject:
        """What a child of bench.contact_worker answers: {"result"}, {"error"}, {"hang"}, {"timeout"} or {"crash"}."""
        child = watchdog.started()
        child.ask(**question)
        phase = "start"
        while True:
            try:
                answer = child.answer(min(watchdog.timeout, watchdog.time_left()))
            except queue.Empty:
                watchdog.time_left()  # raises if it is the budget that ended
                watchdog.stop()
                return {"timeout": f"silent for {watchdog.timeout:.0f} s", "in": phase}
            if answer is None:
                return {"crash": watchdog.stop(), "in": phase}
            if "phase" in answer:
                phase = answer["phase"]
                continue
            if "hang" in answer or answer.get("lost"):
                watchdog.stop()
            return {**answer, "in": phase}

    # Steps

    def environment(self) -> None:
        """What the machine is: versions from a child, clocks and compute mode from the driver's own tool."""
        self.checking.started()
        assert self.checking.origin is not None
        found = dict(self.checking.origin)
        named = ("gpu", "driver", "torch", "triton", "cudnn", "commit", "kernel_hash")
        self.say(", ".join(f"{name} {found[name]}" for name in named))
        variables = {name: value for name, value in os.environ.items() if name.startswith(("TRITON", "CUDA", "PTXAS"))}
        clocks = asked("nvidia-smi", "--query-gpu=" + ",".join(CLOCKS), "--format=csv,noheader", "-i", "0")
        self.write("environment", **found, variables=variables, nvidia_smi=asked("nvidia-smi", "-q", "-i", "0"))
        if clocks:
            self.say(", ".join(f"{name} {value}" for name, value in zip(CLOCKS, clocks.split(", "), strict=False)))
        if clocks and "Default" not in clocks:
            self.say("one process at a time may use this GPU (its compute mode): the tests run on one worker")
            self.test_workers = 1

    def check_layers(self) -> None:
        for case in self.sizes(CHECKS):
            outcome = self.ask(self.checking, {"check": cases.as_dict(case), "change": None})
            self.write("check", case=cases.as_dict(case), **outcome)
            found, compiled = outcome.get("kernels", (0, 0))
            self.kernels = self.kernels[0] + found, self.kernels[1] + compiled
            verdict, good = verdict_of(outcome)
            self.say(f"{title(case)}: {verdict}")
            if good:
                self.right += 1
            else:
                self.failed.append((case, outcome))
            if len(self.failed) == MOST_FAILURES:
                self.say(f"{MOST_FAILURES} layers failed: no more are tried")
                break
        self.answers["kernel cache"] = "of these layers' kernels {} were found, {} compiled".format(*self.kernels)
        self.say(f"kernel cache: {self.answers['kernel cache']}")

    def explain_failures(self) -> None:
        """The first failures again, each in a child of its own: as they are, with other plans, under a sanitizer."""
        for case, _ in self.failed[:EXPLAINED]:
            for change in (None, *CHANGES):
                if self.left() < (self.deadline - self.start) / 4:
                    self.skip("some of what the failures depend on")
                    return
                with self.child_of_its_own() as watchdog:
                    outcome = self.ask(watchdog, {"check": cases.as_dict(case), "change": change})
                self.write("again", case=cases.as_dict(case), change=change, **outcome)
                self.say(f"  {title(case)}, {change or 'once more, alone'}: {verdict_of(outcome)[0]}")
            if self.device_name == "cuda" and shutil.which(SANITIZER[0]):
                short = replace(case, T=min(case.T, 2))
                with self.child_of_its_own(SANITIZER, 3 * self.silent) as watchdog:
                    outcome = self.ask(watchdog, {"check": cases.as_dict(short), "change": None})
                self.write("sanitizer", case=cases.as_dict(short), **outcome)
                self.say(f"  {title(short)}, under {SANITIZER[0]}: {verdict_of(outcome)[0]}; see contact.log")

    @contextlib.contextmanager
    def child_of_its_own(self, under: tuple[str, ...] = (), silent: float | None = None) -> Iterator[Watchdog]:
        watchdog = replace(self.checking, under=under, timeout=silent or self.silent, child=None)
        try:
            yield watchdog
        finally:
            watchdog.stop()

    def time_layers(self) -> None:
        """lstm_triton, nn.LSTM and the exchange alone in turns; the headline with other plans, too."""
        headline, *_ = timed = self.sizes(TIMED)
        plans = self.plans_to_try(headline)
        self.checking.stop()  # two children would hold memory that neither uses
        for number, case in enumerate(timed):
            if number == 2:  # the headline has been measured as it is
                for mode, label, forced in plans:
                    if self.has_time("times of other plans"):
                        self.time_layer(replace(headline, mode=mode), forced, label)
            if self.has_time("some times"):
                self.time_layer(case)
        self.timing.stop()

    def plans_to_try(self, case: Case) -> list[tuple[str, str, JsonObject]]:
        """(mode, label, {"kind", "plan"}): what is measured beside the planner's choices for a layer."""
        found = []
        for kind, mode in MODES:
            outcome = self.ask(self.checking, {"plans": cases.as_dict(case), "kind": kind, "most": CANDIDATES})
            self.write("plans", case=cases.as_dict(case), kind=kind, **outcome)
            for label, plan in outcome.get("result", ()):
                found.append((mode, f", {kind} {label}", {"kind": kind, "plan": plan}))
        return found

    def has_time(self, what: str) -> bool:
        """Whether there is time left before that of the tests; if not, `what` is not done."""
        there = self.left() > (SHARE_OF_TESTS * (self.deadline - self.start) if self.tests is not None else 0.0)
        if not there:
            self.skip(what)
        return there

    def time_layer(self, case: Case, forced: JsonObject | None = None, label: str = "") -> None:
        rows, failure = self.timing.measure("contact", case, (OURS, BASELINE, FLOOR), self.seconds, forced)
        self.write("times", case=cases.as_dict(case), rows=rows, failure=failure, forced=forced)
        found = {row["system"]: row for row in rows if row["status"] != "missing"}
        name = f"{title(case)} {case.mode}{label}"
        mine = found.get(OURS)
        if failure is not None or mine is None or mine["status"] != "ok":
            why = failure or mine or {"message": "no row"}
            self.say(f"{name}: FAILED: {why['message']}")
            if forced is None:  # of other plans it is no fault that they fail
                self.failed.append((case, {"error": why["message"]}))
            return
        row = TimeRow(name, *(found.get(system, {}).get("median_us") for system in (OURS, BASELINE, FLOOR)))
        self.times.append(row)
        self.say(str(row))

    def ask_questions(self) -> None:
        """What the planner's estimates rest on: the hand-off between multiprocessors; what a call costs the host."""
        [host] = self.sizes((HOST,))
        for step, what, question in (
            ("handoff", "from one multiprocessor to another", {"handoff": None}),
            ("host", f"microseconds of the host, {title(host)}", {"host": cases.as_dict(host)}),
        ):
            outcome = self.ask(self.checking, question)
            self.write(step, **outcome)
            found = outcome.get("result")
            text = ", ".join(f"{name} {value}" for name, value in found.items()) if found else verdict_of(outcome)[0]
            self.answers[what] = text
            self.say(f"{what}: {text}")

    def run_tests(self) -> int:
        """`pytest -m gpu` as `bench gpu` runs it. Returns the number of failures."""
        if self.tests is None:
            return 0
        if self.left() < LEAST_FOR_TESTS:
            self.skip("the tests")
            return 0
        self.checking.stop()
        self.timing.stop()
        watchdog = Watchdog(self.device_name, self.out / "contact.log", self.deadline, self.silent, self.plugin)
        assert self.checking.origin is not None
        session = Session(
            self.out, watchdog, self.seconds, self.tests, start=self.start, test_workers=self.test_workers,
            found=results.Results(self.checking.origin), tell=self.tell,
        )  # fmt: skip
        try:
            session.run_tests()
        except OutOfBudget:
            self.skip("some tests")
        outcomes = session.test_outcomes()
        self.answers["tests marked gpu"] = ", ".join(f"{number} {name}" for name, number in outcomes.items()) or "none"
        return sum(number for name, number in outcomes.items() if name not in ("passed", "skipped"))

    def sizes(self, found: tuple[Case, ...]) -> tuple[Case, ...]:
        """The cases; in a rehearsal small ones, without those that need a GPU's units."""
        if self.device_name == "cuda":
            return found
        small = (cases.shrunk(case) for case in found if case.dtype != "tf32")
        return tuple(dict.fromkeys(small))[:REHEARSED]

    # The end

    def summary(self, failures: int) -> None:
        """What matters, last."""
        self.tell("")
        if self.times:
            width = max(len(row.name) for row in self.times)
            self.tell(f"{'microseconds':{width}} {'ours':>10} {'nn.LSTM':>10} {'exchange':>10} {'nn.LSTM / ours':>15}")
            for row in self.times:
                numbers = [f"{number:10.1f}" if number is not None else f"{'-':>10}" for number in row[1:4]]
                against = f"{row.theirs / row.ours:15.2f}" if row.theirs is not None else f"{'-':>15}"
                self.tell(f"{row.name:{width}} {' '.join(numbers)} {against}")
        for what, text in self.answers.items():
            self.tell(f"{what}: {text}")
        self.tell(f"layers: {self.right} right, {len(self.failed)} failed")
        for case, outcome in self.failed:
            self.tell(f"  {title(case)}: {verdict_of(outcome)[0]}")
        if self.skipped:
            self.tell(f"not done, as the time was up: {', '.join(self.skipped)}")
        good = "everything that was tried is right" if self.right else "nothing was tried"
        self.tell(good if failures == 0 else f"{failures} failures")


def contact(run: Contact) -> int:
    """All steps in order. Returns 0, or 1 if anything failed."""
    devices.require(run.device_name)
    results.require_writable(run.out)
    failed_tests = 0

    def stop() -> None:
        run.checking.stop()
        run.timing.stop()

    steps: dict[str, Callable[[], int | None]] = {
        "the machine": run.environment,
        "layers": run.check_layers,
        "what failures depend on": run.explain_failures,
        "questions": run.ask_questions,
        "times": run.time_layers,
        "tests": run.run_tests,
    }
    with ending_children(stop):
        for name, step in steps.items():
            if name in ("questions", "times") and len(run.failed) >= MOST_FAILURES:
                continue
            try:
                failed_tests += step() or 0
            except OutOfBudget:
                run.skip(name)
    failures = len(run.failed) + failed_tests
    run.write("end", right=run.right, failures=failures, skipped=run.skipped)
    run.summary(failures)
    return int(failures > 0)

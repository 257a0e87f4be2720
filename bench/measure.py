"""Measures all systems of a case in one process: values against float64, memory, and times, the systems in turns."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .cases import BASELINE, FLOOR, OURS, BenchCase, Grid, Row, as_dict
from .devices import Cpu, tf32
from .floor import lower_bound
from .problem import Outputs, Problem, Runner
from .systems import REGISTRY, System, as_users_write_it

# A system is wrong if its error is above FACTOR times the error of nn.LSTM in the same dtype. Where nn.LSTM happens to
# be nearly exact, an error of so many ROUNDINGS of the dtype is right, too.
FACTOR, ROUNDINGS = 2, 4
ROUNDING = {"float32": 2**-23, "tf32": 2**-10, "float16": 2**-10, "bfloat16": 2**-7}

UNBUILT = Runner(lambda leaf: (leaf, leaf, leaf), [])  # stands for a system until it is built

INPUTS = 4  # calls take so many inputs in turn

Progress = Callable[[str, str], None]  # (phase, system): called before anything that may never end


class DeviceLost(Exception):
    """The device does not answer any more, and the process has to end. `rows`: those of the case so far."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__("the device does not answer any more")
        self.rows = rows


@dataclass
class Entry:
    """A runner, and what was found about it so far."""

    system: System
    runner: Runner
    error: float | None = None
    wrong: str = ""
    failure: str = ""
    first_call_us: float | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    host_us: float = 0.0
    samples: list[float] = field(default_factory=list)  # microseconds

    @property
    def good(self) -> bool:
        return not self.failure and not self.wrong


@dataclass
class Measured:
    """The row of one system. samples: every time that was read, in microseconds."""

    row: Row
    samples: list[float] = field(default_factory=list)


def one_line(error: BaseException) -> str:
    """An error in one line, for a table."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}"[:300]


def compute(runner: Runner, leaf: Tensor, mode: str, cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and states in nn.LSTM's layout. With cotangents also the gradients of the input and of every weight."""
    for module in runner.modules:
        module.train(mode != "inference")
    with torch.inference_mode(mode == "inference"):
        leaf = leaf.detach().clone().requires_grad_(mode != "inference")
        outputs = runner.call(runner.adapt(leaf))
        gradients: Sequence[Tensor] = ()
        if cotangents:
            cotangents = [cotangent.to(output.dtype) for cotangent, output in zip(cotangents, outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, [leaf, *runner.parameters], cotangents)
    return [tensor.detach() for tensor in (*outputs, *gradients)]


def distance(values: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest relative error ||value - reference|| / ||reference|| of a tensor. NaN if any of them is NaN."""
    worst = 0.0
    for value, right in zip(values, reference, strict=True):
        if value.shape != right.shape:
            raise ValueError(f"a result of shape {tuple(value.shape)} instead of {tuple(right.shape)}")
        scale = torch.linalg.vector_norm(right).item() or 1.0
        error = torch.linalg.vector_norm(value.double() - right).item() / scale
        worst = error if math.isnan(error) else max(worst, error)
        if math.isnan(worst):
            break
    return worst


def allowed(their_error: float, dtype: str) -> float:
    """The largest error that is right. their_error: the error of nn.LSTM."""
    return max(ROUNDINGS * ROUNDING[dtype], FACTOR * their_error)


def check_values(problem: Problem, entries: list[Entry], progress: Progress) -> None:
    """Find every entry's error against nn.LSTM in float64, and which entries are wrong."""
    case, device = problem.case, problem.device
    leaf = problem.new_leaf()
    progress("values", "reference")
    exact = nn.LSTM(**problem.constructor_arguments(), device=device.torch_device, dtype=torch.float64)
    exact.load_state_dict(problem.module.state_dict())
    exact_runner = as_users_write_it(problem, exact)
    reference = compute(exact_runner, leaf.double(), case.mode if not case.backward else "forward", ())
    cotangents = []
    if case.backward:
        cotangents = [
            torch.randn(output.shape, generator=problem.generator, device=device.torch_device) for output in reference
        ]
        cotangents = [cotangent.to(problem.dtype).double() for cotangent in cotangents]
        reference = compute(exact_runner, leaf.double(), case.mode, cotangents)
    limit = allowed(0.0, case.dtype)
    # nn.LSTM comes first, since its error decides which errors of the others are right.
    for entry in sorted(entries, key=lambda entry: entry.system.name != BASELINE):
        if not (entry.runner.checked and entry.runner.compared):
            continue
        progress("values", entry.system.name)
        with guarded(entry, device):
            device.synchronize()
            start = time.perf_counter()
            values = compute(entry.runner, leaf, case.mode, cotangents)
            device.synchronize()
            entry.first_call_us = (time.perf_counter() - start) * 1e6
            entry.error = distance(values, reference)
            if entry.system.name == BASELINE:
                limit = allowed(entry.error, case.dtype)
            elif not entry.error <= limit:
                entry.wrong = f"error {entry.error:.2e} against float64, allowed {limit:.2e}"
            if not math.isfinite(entry.error):
                entry.wrong = "the result is not finite"


class _Dead(Exception):
    """The device was lost while a system ran."""


@contextlib.contextmanager
def guarded(entry: Entry, device: Cpu) -> Iterator[None]:
    """An error inside is the failure of this system only, unless the device was lost with it."""
    try:
        yield
    except Exception as error:
        entry.failure = one_line(error)
        if not device.alive():
            entry.failure += " (the device was lost)"
            raise _Dead from error
        del error
        gc.collect()
        if device.torch_device.type == "cuda":
            torch.cuda.empty_cache()


def timed_call(
    problem: Problem, runner: Runner, inputs: list[Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward, all that the mode asks for) as functions without arguments. Each call takes the next input."""
    case = problem.case
    turn = 0

    def forward() -> tuple[Tensor, Outputs]:
        nonlocal turn
        turn += 1
        leaf = inputs[turn % len(inputs)]
        if case.mode == "inference":
            with torch.inference_mode():
                return leaf, runner.call(leaf)
        return leaf, runner.call(leaf)

    if not case.backward or not runner.checked:
        return forward, forward
    # The cotangent has the layout of the output. A batch-first system has a transposed one.
    cotangent = torch.randn_like(runner.call(inputs[0])[0])

    def forward_backward() -> object:
        leaf, outputs = forward()
        return torch.autograd.grad(outputs[0], [leaf, *runner.parameters], cotangent)

    return forward, forward_backward


def measure_times(problem: Problem, entries: list[Entry], seconds: float, wall: bool, progress: Progress) -> None:
    case, device = problem.case, problem.device
    calls: dict[int, Callable[[], object]] = {}
    one_round_us = 0.0
    for index, entry in enumerate(entries):
        runner = entry.runner
        progress("warm-up", entry.system.name)
        for module in runner.modules:
            module.train(case.mode != "inference")
        with guarded(entry, device):
            learns = case.mode != "inference" and runner.checked
            inputs = [runner.adapt(problem.new_leaf()).detach().requires_grad_(learns) for _ in range(INPUTS)]
            forward, whole = timed_call(problem, runner, inputs)
            whole()
            entry.kept_bytes, entry.peak_bytes = device.memory(forward, whole)
            if not learns:
                entry.kept_bytes = None
            device.synchronize()
            start = time.perf_counter()
            whole()
            entry.host_us = (time.perf_counter() - start) * 1e6
            device.synchronize()
            one_round_us += (time.perf_counter() - start) * 1e6
            calls[index] = whole
    if not calls:
        return
    fewest, most = device.rounds
    rounds = min(max(int(seconds * len(calls) * 1e6 / one_round_us), fewest), most)
    order = list(calls)
    for _ in range(rounds):
        for index in order:
            entry = entries[index]
            if entry.failure:
                continue
            progress("times", entry.system.name)
            with guarded(entry, device):
                device.evict()
                if wall:
                    entry.samples.append(device.wall_time(calls[index]))
                else:
                    entry.samples.append(device.time(calls[index], 1.5 * entry.host_us))
        order = order[1:] + order[:1]


def finish_row(grid_name: str, grid: Grid, case: BenchCase, name: str, entries: list[Entry]) -> Measured:
    """The row of one system: of its fastest right variant. The message has the other variants."""
    median = {id(entry): statistics.median(entry.samples) if entry.samples else math.inf for entry in entries}
    best = min(entries, key=lambda entry: (not entry.runner.compared, not entry.good, median[id(entry)]))
    status = "error" if best.failure else "wrong" if best.wrong else "ok"
    notes = [best.runner.label, best.failure or best.wrong]
    if grid.first_call and best.first_call_us is not None:
        notes.append(f"first call {best.first_call_us / 1e3:.1f} ms")
    for other in entries:
        if other is not best:
            outcome = other.failure or other.wrong or f"{median[id(other)]:.1f} us"
            notes.append(f"{other.runner.label}: {outcome}")
    samples = best.samples if status == "ok" else []
    row = new_row(grid_name, case, name, status, "; ".join(filter(None, notes)))
    row["error"] = best.error if best.error is None or math.isfinite(best.error) else None
    if samples:
        row["p20_us"], row["median_us"], row["p80_us"] = quantiles(samples)
        row["kept_bytes"], row["peak_bytes"] = best.kept_bytes, best.peak_bytes
    return Measured(row, samples)


def quantiles(samples: list[float]) -> tuple[float, ...]:
    """(20 %, 50 %, 80 %), rounded to a nanosecond."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return tuple(round(value, 3) for value in torch.tensor(samples, dtype=torch.float64).quantile(levels).tolist())


def new_row(grid_name: str, case: BenchCase, system: str, status: str, message: str) -> Row:
    figures = dict.fromkeys(("median_us", "p20_us", "p80_us", "kept_bytes", "peak_bytes", "error", "floor_us"))
    return {"grid": grid_name, "system": system, **as_dict(case), "status": status, "message": message, **figures}


def compile_kernels(case: BenchCase, device: Cpu, systems: Collection[str] = (OURS, FLOOR)) -> bool:
    """Compile what a case launches: run two steps of it, since the kernels are the same for every T but 1.

    Args:
        systems: only lstm_triton and the exchange alone launch kernels of this library.

    Returns:
        Whether the case runs.
    """
    case = replace(case, T=min(2, case.T))
    try:
        with device.active(), tf32(case.dtype == "tf32"):
            problem = Problem(case, device)
            for name in (OURS, FLOOR):
                if name in systems and REGISTRY[name].why_missing(case, device) is None:
                    for runner in REGISTRY[name].runners(problem):
                        _, whole = timed_call(problem, runner, [problem.new_leaf().requires_grad_(runner.checked)])
                        whole()
            device.synchronize()
    except Exception:  # measuring the case will tell why
        return False
    return True


def measure(
    grid_name: str,
    grid: Grid,
    case: BenchCase,
    systems: Sequence[str],
    device: Cpu,
    seconds: float = 0.3,
    progress: Progress = lambda phase, system: None,
) -> list[Measured]:
    """All rows of a case, in the order of `systems`.

    Every failure but the loss of the device is the status of a row.

    Args:
        seconds: how long to time each system.
        progress: is told what comes next.

    Raises:
        DeviceLost: a system made the device unusable.
    """
    why = {name: REGISTRY[name].why_missing(case, device) for name in systems}
    done = {name: Measured(new_row(grid_name, case, name, "missing", reason)) for name, reason in why.items() if reason}
    present = [name for name in systems if name not in done]

    def rows() -> list[Measured]:
        return [done[name] for name in systems if name in done]

    if not present:
        return rows()
    entries: dict[str, list[Entry]] = {}
    with device.active(), tf32(case.dtype == "tf32"):
        try:
            problem = Problem(case, device)
            # nn.LSTM's error is needed even where its row is not asked for.
            for name in dict.fromkeys([*present, BASELINE]):
                progress("build", name)
                unbuilt = Entry(REGISTRY[name], UNBUILT)
                entries[name] = [unbuilt]
                with guarded(unbuilt, device):
                    entries[name] = [Entry(REGISTRY[name], runner) for runner in REGISTRY[name].runners(problem)]
            live = [entry for group in entries.values() for entry in group if entry.good]
            check_values(problem, live, progress)
            gc.collect()
            if grid.timed:
                timed = [entry for name in present for entry in entries[name] if entry.good]
                measure_times(problem, timed, seconds, grid.first_call, progress)
        except _Dead as dead:
            broken = [name for name in present if any(entry.failure for entry in entries.get(name, []))]
            lost = [finish_row(grid_name, grid, case, name, entries[name]).row for name in broken]
            raise DeviceLost(lost) from dead
        except Exception as error:  # without a reference no values can be judged
            message = f"no float64 reference: {one_line(error)}"
            if not device.alive():
                raise DeviceLost([new_row(grid_name, case, name, "error", message) for name in present]) from error
            done |= {name: Measured(new_row(grid_name, case, name, "error", message)) for name in present}
            return rows()
        for name in present:
            done[name] = finish_row(grid_name, grid, case, name, entries[name])
        exchange = done[FLOOR].row["median_us"] if FLOOR in done else None
        bound = lower_bound(case, device, exchange) if grid.timed else None
        for measured in done.values():
            measured.row["floor_us"] = bound
    return rows()

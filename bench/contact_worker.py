"""The child process of `python -m bench contact`: checks one layer at a time, and says where it goes wrong.

    python -m bench.contact_worker DEVICE [PLUGIN], one JSON object a line

In:   {"check": case, "change": null or one of CHANGES}
      {"handoff": null} (bench.handoff), {"host": case}, {"plans": case, "kind", "most"}
Out:  {"ready": provenance}             once
      {"phase": text}                   before anything that may crash or never come back
      {"hang": {"in", "missing"}}       the last words: a kernel does not end; what its programs have not published
      {"error": text, "lost": bool}     an answer; if "lost", the device is gone and the process ends
      {"result": ..., "kernels"}        an answer; how many kernels Triton found in its cache, and compiled

Forward and backward are looked at one after the other, so that each can be told to be right. A kernel that does not end
keeps the device busy but not the copy engine: what has been published is read on a second stream while it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from . import cases, hits, measure, results, worker
from .cases import Case
from .devices import Cpu, tf32
from .results import JsonObject
from .systems import TORCH_DTYPES, Problem, Runner, as_users_write_it, baseline, ours

if TYPE_CHECKING:
    from lstm_triton.planner import Kind, Plan

HANG = 4.0  # seconds after which a kernel that takes milliseconds hangs
COPY = 3.0  # seconds for copying what it has published
MOST_BYTES = 1 << 26  # of a buffer, that are looked at

# What to change in a layer's plans when it fails: which of these helps tells what the fault depends on.
CHANGES: dict[str, JsonObject] = {
    "all threads wait together": {"thread_elements": 0},
    "no packed sentinels": {"packed": False},
    "one accumulator": {"accumulators": 1},
    "no weights in registers": {"register_chunks": 0},
    "no hold": {"hold": 0},
    "not cooperative": {},
    "one slice": {"slices": 1},
    "K not split": {"split_k": 1},
}

Say = Callable[..., None]


class Hangs(Exception):
    """A kernel does not end. Arguments: in which phase, and what is missing."""


class Watch:
    """The exchange buffers of what is running, and how it is told that it does not end."""

    def __init__(self, device: Cpu) -> None:
        self.device = device
        self.buffers: list[Tensor] = []
        if device.torch_device.type == "cuda":
            # Made, and used, beforehand: the driver may wait for a kernel that never ends before it makes them.
            self.host = torch.empty(MOST_BYTES, dtype=torch.uint8, pin_memory=True)
            self.stream = torch.cuda.Stream()
            with torch.cuda.stream(self.stream):
                self.host[:1].copy_(torch.zeros(1, dtype=torch.uint8, device=device.torch_device), non_blocking=True)
            self.stream.synchronize()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        from lstm_triton import ops

        make = ops.sentinels

        def recorded(shape: tuple[int, ...], like: Tensor) -> Tensor:
            self.buffers.append(make(shape, like))
            return self.buffers[-1]

        with mock.patch.object(ops, "sentinels", recorded):
            yield

    @contextlib.contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Wait for all that is asked for inside. Raises Hangs."""
        from lstm_triton.interpreter import Deadlock

        self.buffers.clear()
        try:
            yield
        except Exception as error:
            if Deadlock in (type(error), type(error.__cause__)):  # Triton's interpreter wraps what a kernel raises
                raise Hangs from error
            raise
        if self.device.torch_device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        until = time.monotonic() + HANG
        while not event.query():  # raises where a kernel crashed
            if time.monotonic() > until:
                raise Hangs
            time.sleep(0.0005)

    def seen(self, buffer: Tensor) -> Tensor | None:
        """A buffer's first bytes on the host, as they are while kernels run; None where even a copy does not end."""
        raw = buffer.view(torch.int32 if buffer.element_size() == 4 else torch.int16)
        if raw.device.type != "cuda":
            return raw.clone()
        raw = raw[: MOST_BYTES // raw[0].nbytes]  # whole lanes
        host = self.host[: raw.nbytes].view(raw.dtype).view(raw.shape)
        with torch.cuda.stream(self.stream):
            host.copy_(raw, non_blocking=True)
        until = time.monotonic() + COPY
        while not self.stream.query():
            if time.monotonic() > until:
                return None
            time.sleep(0.001)
        return host.clone()

    def missing(self, case: Case, plans: dict[Kind, Plan]) -> list[JsonObject | str]:
        """Of every lane that is not complete: which step, rows, units and programs its peers wait for."""
        found: list[JsonObject | str] = []
        for buffer in self.buffers[-4:]:
            if buffer.numel() == 0:
                continue
            host = self.seen(buffer)
            if host is None:
                return [*found, "the copy of what was published does not end either"]
            kind: Kind = "backward" if host.shape[2] >= 4 * case.H else "forward"
            plan = plans.get(kind)
            for lane, rows in enumerate(host):
                if (report := missing_of_lane(rows == -1, case, kind, lane, plan)) is not None:
                    found.append(report)
        return found


def missing_of_lane(empty: Tensor, case: Case, kind: Kind, lane: int, plan: Plan | None) -> JsonObject | None:
    """empty (state rows, columns): where the sentinel is. None where nothing is missing."""
    ragged = case.layout != "dense"
    width = 1 if kind == "forward" else 4  # columns of a unit
    rows = sum(case.lengths) if case.layout in ("packed", "lengths") else case.T * case.B
    empty = empty[case.B : case.B + rows, : width * case.H].unflatten(1, (case.H, width)).any(2)
    if not empty.any():
        return None
    report: JsonObject = {"scan": kind, "lane": lane, "rows_missing": int(empty.any(1).sum()), "of_rows": rows}
    if ragged:  # rows are in an order of their own
        row = int(empty.any(1).nonzero()[0])
        return {**report, "first_row": row, "units": spans(empty[row])}
    steps = empty.view(case.T, case.B, case.H)
    incomplete = steps.flatten(1).any(1)
    late = incomplete.nonzero().flatten()
    # The one after the last complete step, in whichever order steps are taken.
    ascending = not bool(incomplete[0]) or (bool(incomplete[-1]) and kind == "forward")
    step = int(late[0] if ascending else late[-1])
    report |= {"step": step, "rows": spans(steps[step].any(1)), "units": spans(steps[step].any(0))}
    if plan is not None:
        report["programs"] = programs_of(steps[step], plan, lane)
    return report


def programs_of(empty: Tensor, plan: Plan, lane: int) -> list[int]:
    """The programs that own what is missing (B, H) of a step, a dozen at most."""
    found = set()
    for row, unit in empty.nonzero().tolist():
        group = row // plan.block_batch % plan.groups
        found.add(((lane % plan.lanes) * plan.groups + group) * plan.slices + unit // plan.block_hidden)
    return sorted(found)[:12]


def spans(mask: Tensor) -> list[list[int]]:
    """[first, end) of the runs of True, a dozen at most."""
    found: list[list[int]] = []
    for place in mask.nonzero().flatten().tolist():
        if found and found[-1][1] == place:
            found[-1][1] += 1
        else:
            found.append([place, place + 1])
    return found[:12]


# Plans


def plans_of(case: Case, device: Cpu) -> dict[Kind, Plan]:
    """The planner's choice for the first launch of each scan."""
    from lstm_triton import ops

    kinds: tuple[Kind, ...] = ("forward", "backward")
    return {
        kind: ops.launches_of(
            kind,
            num_layers=case.layers,
            directions=2 if case.bidirectional else 1,
            batch_size=case.B,
            input_size=case.I,
            hidden_size=case.H,
            dtype=TORCH_DTYPES[case.dtype],
            device=device.torch_device,
        )[0].plan
        for kind in kinds
    }


def changed_plans(case: Case, device: Cpu, change: str) -> dict[Kind, Plan]:
    """The plans with a change, of those scans in which it changes anything. Raises ValueError if there are none."""
    from lstm_triton import planner

    found: dict[Kind, Plan] = {}
    for kind, plan in plans_of(case, device).items():
        wanted = CHANGES[change]
        if all(getattr(plan, name) == value for name, value in wanted.items()):
            continue
        other: Plan | None = dataclasses.replace(plan, **wanted)
        if "slices" in wanted or "split_k" in wanted:  # other sizes follow from these
            others = planner.candidates(
                kind, batch_size=case.B, input_size=case.I, hidden_size=case.H, dtype=TORCH_DTYPES[case.dtype],
                device=planner.Device.of(device.torch_device), allow_tf32=case.dtype == "tf32", lanes=plan.lanes,
                chained=plan.chained,
            )  # fmt: skip
            other = next((each for each in others if all(getattr(each, n) == v for n, v in wanted.items())), None)
        if other is not None:
            found[kind] = other
    if not found and change != "not cooperative":
        raise ValueError("there is no such plan, or it is the planner's own")
    return found


@contextlib.contextmanager
def with_change(case: Case, device: Cpu, change: str | None) -> Iterator[None]:
    from lstm_triton import ops, planner

    with ExitStack() as stack:
        if change is not None:
            for kind, plan in changed_plans(case, device, change).items():
                stack.enter_context(planner.forced(plan, kind))
        if change == "not cooperative":
            options = ops.launch_options
            alone = lambda plan: {**options(plan), "launch_cooperative_grid": False}  # noqa: E731
            stack.enter_context(mock.patch.object(ops, "launch_options", alone))
        yield


# Values


def compare(names: Sequence[str], mine: Sequence[Tensor], theirs: Sequence[Tensor], right: Sequence[Tensor],
            dtype: str) -> list[JsonObject]:  # fmt: skip
    """A row for each tensor: both errors against float64, and where a wrong one begins to be wrong."""
    rows = []
    for name, one, other, exact in zip(names, mine, theirs, right, strict=True):
        error, their_error = (measure.distance([each], [exact]) for each in (one, other))
        allowed = max(measure.FACTOR * their_error, measure.ROUNDINGS * measure.ROUNDING[dtype])
        row: JsonObject = {"name": name, "error": error, "nn.LSTM": their_error}
        if not error <= allowed:
            row["wrong"] = located(one, other, exact)
        rows.append(row)
    return rows


def located(one: Tensor, other: Tensor, exact: Tensor) -> JsonObject:
    """Where a wrong tensor is wrong: how many elements, the first index of dimension 0, rows and columns there."""
    off = (one.double() - exact).abs()
    off = off.masked_fill(off.isnan(), float("inf"))
    limit = 20 * float((other.double() - exact).abs().max()) + 1e-3 * float(exact.abs().max())
    bad = off > limit
    found: JsonObject = {"elements": int(bad.sum()), "of": bad.numel(), "not_finite": int((~one.isfinite()).sum())}
    if bad.any():
        first = int(bad.flatten(1).any(1).nonzero()[0]) if bad.dim() > 1 else int(bad.nonzero()[0])
        found["first"] = first
        if bad.dim() > 1:
            there = bad[first].reshape(-1, bad.shape[-1])
            found["columns"] = spans(there.any(0))
            if bad.dim() == 3:
                found["rows"] = spans(there.any(1))
    return found


def check(case: Case, change: str | None, watch: Watch, say: Say) -> JsonObject:
    """Forward, then backward: every value beside nn.LSTM's and float64's."""
    import lstm_triton

    device = watch.device
    problem = Problem(case, device)
    exact = nn.LSTM(**problem.constructor_arguments(), device=device.torch_device, dtype=torch.float64)
    exact.load_state_dict(problem.module.state_dict())
    leaf = problem.new_leaf()

    def forward(runner: Runner, data: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        data = data.detach().clone().requires_grad_()
        return data, runner.call(runner.adapt(data))

    def backward(runner: Runner, data: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        given = [each.to(output.dtype) for each, output in zip(cotangents, outputs, strict=True)]
        return list(torch.autograd.grad(list(outputs), [data, *runner.parameters], given))

    say(phase="reference")
    exactly, beside = as_users_write_it(problem, exact), baseline(problem)[0]
    reference, theirs = forward(exactly, leaf.double()), forward(beside, leaf)
    cotangents = [
        torch.randn(each.shape, generator=problem.generator, device=device.torch_device).to(problem.dtype)
        for each in reference[1]
    ]
    right, beside_gradients = backward(exactly, *reference), backward(beside, *theirs)
    names = ["output", "h_n", "c_n"]
    gradient_names = ["input", *(name for name, _ in problem.module.named_parameters())]

    found: JsonObject = {}
    with ExitStack() as stack:
        stack.enter_context(watch.recording())
        stack.enter_context(with_change(case, device, change))
        phase = "compiling"
        say(phase=phase)
        runner = ours(problem)[0]
        if runner.label:
            raise RuntimeError(runner.label)
        shaped = problem.shape_input(leaf)
        with lstm_triton.backend("triton"):
            found["plans"] = [
                f"{scan.kind}: {scan.plan}" for scan in lstm_triton.explain(runner.modules[0], shaped).scans
            ]
        try:
            phase = "forward"
            say(phase=phase)
            with watch.until_the_end():
                data, outputs = forward(runner, leaf)
            say(phase="values")
            found["forward"] = compare(names, outputs, theirs[1], reference[1], case.dtype)
            phase = "backward"
            say(phase=phase)
            with watch.until_the_end():
                gradients = backward(runner, data, outputs)
        except Hangs:
            plans = plans_of(case, device)
            raise Hangs(phase, watch.missing(case, plans)) from None
        say(phase="values")
        found["backward"] = compare(gradient_names, gradients, beside_gradients, right, case.dtype)
    return found


# Times of the host


def host_times(case: Case, device: Cpu) -> JsonObject:
    """Microseconds that the host takes to ask for a call: the median of some calls that nothing is waited for in."""
    problem = Problem(case, device)
    found: JsonObject = {}
    for name, runner in (("lstm_triton", ours(problem)[0]), ("nn.LSTM", baseline(problem)[0])):
        forward, whole = measure.timed_call(problem, runner, [problem.new_leaf().requires_grad_()])
        for part, call in (("forward", forward), ("forward+backward", whole)):
            call()
            device.synchronize()
            times = []
            for _ in range(30 if device.name == "cuda" else 2):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e6)
                device.synchronize()
            found[f"{name} {part}"] = round(statistics.median(times), 1)
    return found


def short(plan: Plan) -> str:
    sizes = f"{plan.block_batch} x {plan.block_hidden}, {plan.programs} programs"
    return sizes + (", input fused" if plan.fuse_input else "")


def plans_to_try(case: Case, device: Cpu, kind: Kind, most: int) -> list[tuple[str, JsonObject]]:
    """Labels and plans: the planner's with the portable wait, the planner's without a hold, the next candidates."""
    from lstm_triton import planner

    found = planner.candidates(
        kind, batch_size=case.B, input_size=case.I, hidden_size=case.H, dtype=TORCH_DTYPES[case.dtype],
        device=planner.Device.of(device.torch_device), allow_tf32=case.dtype == "tf32",
    )[:most]  # fmt: skip
    named = {"portable wait": dataclasses.replace(found[0], thread_elements=0)}
    named["no hold"] = dataclasses.replace(found[0], hold=0)
    named |= {short(plan): plan for plan in found[1:]}
    return [(label, dataclasses.asdict(plan)) for label, plan in named.items() if plan != found[0]]


def answer(question: JsonObject, watch: Watch, say: Say) -> Any:
    device = watch.device
    if "handoff" in question:
        from . import handoff

        return handoff.times(device)
    case = cases.from_dict(question.get("check") or question.get("host") or question["plans"])
    with device.active(), tf32(case.dtype == "tf32"):
        if "host" in question:
            return host_times(case, device)
        if "plans" in question:
            return plans_to_try(case, device, question["kind"], question["most"])
        return check(case, question["change"], watch, say)


def reply(question: JsonObject, watch: Watch, say: Say) -> None:
    try:
        with hits.counting() as kernels:
            result = answer(question, watch, say)
        say(result=result, kernels=[len(kernels.found), len(kernels.compiled)])
    except Hangs as hang:
        say(hang={"in": hang.args[0], "missing": hang.args[1]})
        os._exit(7)  # a context whose kernel does not end cannot be left in another way
    except Exception as error:
        lost = not watch.device.alive()
        say(error=measure.one_line(error), lost=lost)
        if lost:
            os._exit(8)


def work(device_name: str, plugin: str = "") -> int:
    say, device = worker.begin(device_name, plugin)
    watch = Watch(device)
    say(ready=results.provenance(device.gpu, device.driver()))
    for question in worker.questions():
        reply(question, watch, say)
    return 0


if __name__ == "__main__":
    from bench import contact_worker  # as plugins know it, which may change it

    sys.exit(contact_worker.work(*sys.argv[1:]))

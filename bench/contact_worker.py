"""The child process of `python -m bench contact`: checks one layer at a time, and tells where it goes wrong.

    python -m bench.contact_worker DEVICE [PLUGIN], one JSON object a line

In:   {"check": case, "change": null or one of CHANGES, "patience": seconds that a kernel may take}
      {"changes": case}, which changes apply; {"plans": case, "kind", "most"}, plans to time beside the planner's
      {"handoff": null} (bench.handoff); {"host": case}, times of the host
Out:  {"ready": provenance}             once
      {"phase": text}                   before anything that may crash or never end
      {"hang": {"in", "missing"}}       a kernel does not end (bench.hang), and the process ends
      {"error": text, "lost": bool}     an answer; if "lost", the device is gone and the process ends
      {"result": ..., "kernels"}        an answer; the numbers of kernels that Triton found in its cache and compiled

Forward and backward are checked one after the other, so that a fault has its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from . import cases, hits, measure, results, worker
from .cases import BenchCase
from .devices import Cpu, tf32
from .hang import Missing, Watch, spans
from .plans import candidates_of, first_plans, plans_to_try
from .problem import Problem, Runner
from .results import JsonObject
from .systems import as_users_write_it, baseline, ours
from .worker import Say

if TYPE_CHECKING:
    from lstm_triton.scan.plan import Kind, Plan

# Changes to the plans of a layer that failed. The changes that help tell what the fault depends on.
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


class Inapplicable(Exception):
    """A change does not apply: the plans are like this already, or no plan can be."""


# Plans


def changed_plans(case: BenchCase, device: Cpu, change: str) -> dict[Kind, Plan]:
    """The changed plans of a layer, for the scans to which the change applies.

    Raises:
        Inapplicable: the change applies to no scan.
    """
    from lstm_triton.target import Device

    wanted = CHANGES[change]
    found: dict[Kind, Plan] = {}
    for kind, plan in first_plans(case, device).items():
        if change == "not cooperative":
            if plan.slices > 1 or plan.chained:
                found[kind] = plan
        elif any(getattr(plan, name) != value for name, value in wanted.items()):
            if "slices" in wanted or "split_k" in wanted:  # other sizes follow from these sizes
                others = candidates_of(kind, case, Device.of(device.torch_device), plan.lanes, plan.chained)
                others = [each for each in others if all(getattr(each, name) == to for name, to in wanted.items())]
            else:
                others = [dataclasses.replace(plan, **wanted)]
            if others:
                found[kind] = others[0]
    if not found:
        raise Inapplicable(change)
    return found


def applicable_changes(case: BenchCase, device: Cpu) -> list[str]:
    found = []
    for change in CHANGES:
        with contextlib.suppress(Inapplicable):
            changed_plans(case, device, change)
            found.append(change)
    return found


@contextlib.contextmanager
def with_change(case: BenchCase, device: Cpu, change: str | None) -> Iterator[None]:
    from lstm_triton.scan import launch, planner

    with ExitStack() as stack:
        if change is not None:
            for kind, plan in changed_plans(case, device, change).items():
                stack.enter_context(planner.forced(plan, kind))
        if change == "not cooperative":
            options = launch.launch_options

            def alone(plan: Plan) -> dict[str, Any]:
                return {**options(plan), "launch_cooperative_grid": False}

            stack.enter_context(mock.patch.object(launch, "launch_options", alone))
        yield


# Values


def compare(names: Sequence[str], mine: Sequence[Tensor], theirs: Sequence[Tensor], right: Sequence[Tensor],
            dtype: str) -> list[JsonObject]:  # fmt: skip
    """A row for each tensor: both errors against float64, and for a wrong tensor where it is wrong."""
    rows = []
    for name, one, other, exact in zip(names, mine, theirs, right, strict=True):
        error, their_error = (measure.distance([each], [exact]) for each in (one, other))
        row: JsonObject = {"name": name, "error": error, "nn.LSTM": their_error}
        if not error <= measure.allowed(their_error, dtype):
            row["wrong"] = located(one, other, exact)
        rows.append(row)
    return rows


def located(one: Tensor, other: Tensor, exact: Tensor) -> JsonObject:
    """Where a tensor is far off: the number of elements, the first index of dimension 0, rows and columns there."""
    off = (one.double() - exact).abs()
    off = off.masked_fill(off.isnan(), float("inf"))
    limit = 20 * float((other.double() - exact).abs().nan_to_num().max()) + 1e-3 * float(exact.abs().max())
    bad = off > limit
    found: JsonObject = {"far_off": int(bad.sum()), "of": bad.numel(), "not_finite": int((~one.isfinite()).sum())}
    if bad.any():
        first = int(bad.flatten(1).any(1).nonzero()[0]) if bad.dim() > 1 else int(bad.nonzero()[0])
        found["first"] = first
        if bad.dim() > 1:
            there = bad[first].reshape(-1, bad.shape[-1])
            found["columns"] = spans(there.any(0))
            if bad.dim() == 3:
                found["rows"] = spans(there.any(1))
    return found


def check(case: BenchCase, change: str | None, watch: Watch, say: Say) -> JsonObject:
    """Compare all values with float64's, beside nn.LSTM's: of forward, then of backward."""
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
        say(phase="plans")
        stack.enter_context(with_change(case, device, change))
        runner, plans = ours(problem)[0], first_plans(case, device)
        if runner.label:
            raise RuntimeError(runner.label)
        [module] = runner.modules
        assert isinstance(module, lstm_triton.LSTM)
        with lstm_triton.backend("triton"):
            scans = lstm_triton.explain(module, problem.shape_input(leaf)).scans
        found["plans"] = [f"{scan.kind}: {scan.plan}" for scan in scans]
        say(phase="forward")
        with watch.over("forward", case, plans):
            data, outputs = forward(runner, leaf)
        say(phase="values")
        found["forward"] = compare(names, outputs, theirs[1], reference[1], case.dtype)
        say(phase="backward")
        with watch.over("backward", case, plans):
            gradients = backward(runner, data, outputs)
        say(phase="values")
        found["backward"] = compare(gradient_names, gradients, beside_gradients, right, case.dtype)
    return found


# Times of the host


def host_times(case: BenchCase, device: Cpu) -> JsonObject:
    """Microseconds of the host for a call: the median of some calls, which do not wait for the device."""
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


def answer(question: JsonObject, watch: Watch, say: Say) -> Any:
    device = watch.device
    if "handoff" in question:
        from . import handoff

        return handoff.times(device)
    [case] = (cases.from_dict(question[name]) for name in ("check", "changes", "plans", "host") if name in question)
    with device.active(), tf32(case.dtype == "tf32"):
        if "changes" in question:
            return applicable_changes(case, device)
        if "plans" in question:
            return plans_to_try(case, device, question["kind"], question["most"])
        if "host" in question:
            return host_times(case, device)
        watch.patience = question["patience"]
        return check(case, question["change"], watch, say)


def reply(question: JsonObject, watch: Watch, say: Say) -> None:
    try:
        with hits.counting() as kernels:
            result = answer(question, watch, say)
        say(result=result, kernels=[len(kernels.found), len(kernels.compiled)])
    except Exception as error:
        lost = not watch.device.alive()
        say(error=measure.one_line(error), lost=lost)
        if lost:
            os._exit(8)


def work(device_name: str, plugin: str = "") -> int:
    say, device = worker.begin(device_name, plugin)

    def hangs(phase: str, missing: list[Missing]) -> None:
        say(hang={"in": phase, "missing": missing})
        os._exit(7)  # a context whose kernel does not end cannot be left in another way

    watch = Watch(device, hangs)
    say(ready=results.provenance(device.gpu, device.driver()))
    for question in worker.questions():
        reply(question, watch, say)
    return 0


if __name__ == "__main__":
    from bench import contact_worker  # the module that plugins import, and may change

    sys.exit(contact_worker.work(*sys.argv[1:]))

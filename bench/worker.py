"""The child process of `python -m bench gpu` and `tune`: measures cases, and tells what it does.

    python -m bench.worker DEVICE [PLUGIN], one JSON object a line

In:   {"measure": {"grid", "case", "systems", "seconds"}, "forced": null or {"kind", "plan"}, a plan to use}
      {"compile": case, "systems"}
Out:  {"ready": provenance}                     once
      {"phase", "system"}                       before anything that may crash or never end
      {"rows", "rates", "lost": false}          the answer; if "lost", the device is gone and the process ends
      {"compiled": true or false}               the answer
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator

from . import cases, devices, floor, measure, results

Say = Callable[..., None]


def begin(device_name: str, plugin: str = "") -> tuple[Say, devices.Cpu]:
    """Open the device. Returns a function that writes an answer, and the device."""
    # Libraries print to file descriptor 1, so it becomes stderr. The answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**message: object) -> None:
        answers.write(json.dumps(message) + "\n")

    if device_name == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    if plugin:
        importlib.import_module(plugin)
    return say, devices.open_device(device_name)


def questions() -> Iterator[results.JsonObject]:
    """What comes in, until the parent has no more of it."""
    for line in sys.stdin:
        yield json.loads(line)


def work(device_name: str, plugin: str = "") -> int:
    say, device = begin(device_name, plugin)
    said = ("", "", 0.0)

    def progress(phase: str, system: str) -> None:
        nonlocal said
        now = time.monotonic()
        if said[:2] != (phase, system) or now - said[2] > 1.0:
            said = (phase, system, now)
            say(phase=phase, system=system)

    say(ready=results.provenance(device.gpu, device.driver()))
    for question in questions():
        if "compile" in question:
            case = cases.from_dict(question["compile"])
            say(compiled=measure.compile_kernels(case, device, question["systems"]))
            continue
        task = question["measure"]
        grid = cases.GRIDS.get(task["grid"], cases.Grid("a case of its own", ()))
        case = cases.from_dict(task["case"])
        try:
            with forced_plan(question["forced"]):
                rows = measure.measure(task["grid"], grid, case, task["systems"], device, task["seconds"], progress)
        except measure.DeviceLost as error:
            say(rows=error.rows, lost=True)
            return 1
        say(rows=[measured.row for measured in rows], rates=floor.rates(device), lost=False)
    return 0


def forced_plan(forced: results.JsonObject | None) -> contextlib.AbstractContextManager[None]:
    if forced is None:
        return contextlib.nullcontext()
    from lstm_triton.scan import planner
    from lstm_triton.scan.plan import Plan

    return planner.forced(Plan(**forced["plan"]), forced["kind"])


if __name__ == "__main__":
    sys.exit(work(*sys.argv[1:]))

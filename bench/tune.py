"""`python -m bench tune`: measures the planner's candidates, and writes a table of plans.

The planner prefers a plan in the table to its formula. A candidate that spills registers or does not fit the shared
memory is not run (bench.resources). The others are measured on the whole layer, in a child process under a watchdog.
Only candidates with right values count.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lstm_triton.command_line import check_output_file

from . import resources
from .cases import OURS, BenchCase
from .plans import SCAN_MODES, candidates_of, shape_of
from .problem import TORCH_DTYPES
from .report import microseconds
from .results import JsonObject, ResultsError, require_writable, write_atomically
from .watchdog import OutOfBudget, Watchdog, ending

if TYPE_CHECKING:
    from lstm_triton.scan.plan import Kind, Plan
    from lstm_triton.target import Device

TIMED_STEPS = 256  # the best plan does not depend on T


def read_table(path: Path) -> dict[str, JsonObject]:
    """The table in a file. Empty where there is no file. Raises ResultsError for a file that is no table."""
    from lstm_triton.scan.plan import Plan
    from lstm_triton.scan.tables import ABOUT

    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        table.pop(ABOUT, None)
        for entry in table.values():
            Plan(**entry)
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is not a table of plans: {error}") from error
    return dict(table)


def was_measured_on(path: Path, device: Device) -> bool:
    """Whether the plans in a table were measured on this device, with the present kernels, if the table says so."""
    from lstm_triton.scan.tables import ABOUT, about

    expected = about(device)
    return bool(json.loads(path.read_text(encoding="utf-8")).get(ABOUT, expected) == expected)


def write_table(path: Path, table: dict[str, JsonObject], device: Device | None = None) -> None:
    """Write a table. With a device, it says that its plans were measured there, with the present kernels."""
    from lstm_triton.scan.tables import ABOUT, about

    entries = table if device is None else {ABOUT: about(device), **table}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
    write_atomically(path, "{\n" + lines + "\n}\n")


def refusal(kind: Kind, device: Device, hidden_size: int, dtype: str, plan: Plan) -> str | None:
    """Why a plan is not worth running, according to the compiler. None if it is."""
    if device.arch == "interpreter":
        return None
    try:
        needs = resources.resources(resources.compiled(kind, device.arch, hidden_size, TORCH_DTYPES[dtype], plan))
    except Exception as error:  # a compiler may raise anything
        return f"does not compile: {type(error).__name__}"
    if needs["spill_bytes"]:
        return f"spills {needs['spill_bytes']} bytes"
    if (needs["shared_bytes"] or 0) > device.shared_bytes:
        return f"needs {needs['shared_bytes']} bytes of shared memory"
    return None


def kept_candidates(kind: Kind, case: BenchCase, device: Device, limit: int, say: Callable[[str], None]) -> list[Plan]:
    """The most promising candidates that are worth running, at most `limit`."""
    kept: list[Plan] = []
    for plan in candidates_of(kind, case, device):
        if len(kept) == limit:
            break
        if why := refusal(kind, device, case.H, case.dtype, plan):
            say(f"  not run, {why}: {plan}")
        else:
            kept.append(plan)
    return kept


def tune_case(
    kind: Kind,
    case: BenchCase,
    device: Device,
    watchdog: Watchdog,
    limit: int,
    seconds: float,
    say: Callable[[str], None],
) -> Plan | None:
    """The fastest candidate with right values. None where there is none."""
    best, best_us = None, float("inf")
    for plan in kept_candidates(kind, case, device, limit, say):
        rows, failure = watchdog.measure("tune", case, [OURS], seconds, {"kind": kind, "plan": asdict(plan)})
        row = rows[0] if rows else failure
        assert row is not None
        if row["status"] == "ok":
            say(f"  {microseconds(row['median_us'])}: {plan}")
            if row["median_us"] < best_us:
                best, best_us = plan, row["median_us"]
        else:
            say(f"  {row['status']}, {row['message']}: {plan}")
    return best


def tune(
    sizes: list[tuple[int, int]],
    dtypes: list[str],
    watchdog: Watchdog,
    device: Device,
    path: Path,
    *,
    steps: int = TIMED_STEPS,
    limit: int = 8,
    seconds: float = 0.2,
    say: Callable[[str], None] = print,
) -> int:
    """Tune both scans for every (hidden_size, batch_size) and dtype. A plan is in the table as soon as it is found."""
    from lstm_triton.scan.plan import Kind

    require_writable(path.parent)
    check_output_file(path)
    table = read_table(path)
    if table and not was_measured_on(path, device):
        say(f"the plans in {path} were measured with other kernels or on another device: they are dropped")
        table = {}
    found = 0
    with ending(watchdog):
        try:
            for hidden_size, batch_size in sizes:
                for dtype in dtypes:
                    for kind in get_args(Kind):
                        case = BenchCase(SCAN_MODES[kind], dtype, T=steps, B=batch_size, I=hidden_size, H=hidden_size)
                        key = shape_of(kind, case, device).key
                        say(key)
                        best = tune_case(kind, case, device, watchdog, limit, seconds, say)
                        if best is not None:
                            table[key] = asdict(best)
                            write_table(path, table, device)
                            found += 1
        except OutOfBudget:
            say("out of budget")
    say(f"{found} plans in {path}")
    return int(found == 0)

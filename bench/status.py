"""`python -m bench status`: which results belong to the kernels as they are, and what a GPU would be needed for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from . import cases, report


def status(folder: Path) -> int:
    machines = report.load(folder) if folder.is_dir() else []
    for machine in machines:
        origin = machine.results.provenance
        fits = "these kernels" if machine.current else f"other kernels ({origin['kernel_hash']})"
        counts = Counter(row["status"] for row in machine.results.rows)
        statuses = ", ".join(f"{number} {name}" for name, number in counts.items()) or "no rows"
        print(f"{machine.path.relative_to(folder)}: {machine.name}, {origin['date']}, {fits}: {statuses}")
        if outcomes := report.test_outcomes(machine):
            print(f"  {outcomes}")
    if not machines:
        print(f"no results files in {folder}")
    current = [machine for machine in machines if machine.on_gpu and machine.current]
    print("a GPU is needed for:")
    needed = False
    if not any("not all" not in outcomes for machine in current if (outcomes := report.test_outcomes(machine))):
        needed = True
        print("  tests: pytest -m gpu has not been run to its end with these kernels")
    for name, grid in cases.GRIDS.items():
        if name == "smoke":
            continue
        wanted = {case for case, _ in grid}
        measured = {
            case
            for machine in current
            for (_, case), rows in machine.rows_by_case(name).items()
            if cases.OURS in rows and rows[cases.OURS]["status"] != "missing"
        }
        if absent := len(wanted - measured):
            needed = True
            print(f"  {name}: {absent} of {len(wanted)} cases are not measured with these kernels ({grid.about})")
    print(f"  `{report.COMMAND}` does it" if needed else "  nothing")
    return 0

"""What a results file says of a machine: rows by case, times, and comparisons with nn.LSTM."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from . import cases, results
from .cases import FLOOR, Row
from .results import Results, ResultsError

Rows = dict[cases.BenchCase, dict[str, Row]]  # case -> system -> row


@dataclass
class Machine:
    """A results file, and what it says of its machine. slug: begins the names of the machine's pictures."""

    path: Path
    results: Results
    slug: str

    @property
    def on_gpu(self) -> bool:
        return not str(self.results.provenance["gpu"]).startswith("none")

    @property
    def name(self) -> str:
        return str(self.results.provenance["gpu"]).removeprefix("none: ")

    @property
    def current(self) -> bool:
        return bool(self.results.provenance["kernel_hash"] == results.kernel_hash(self.results.provenance["gpu"]))

    @property
    def warning(self) -> str:
        """What a reader has to know before any figure; nothing for a GPU with these kernels."""
        if not self.on_gpu:
            return f"{self.name} figures: a check that everything runs, no statement about a GPU"
        return "" if self.current else "Measured with other kernels than those in this checkout"

    def rows_by_case(self, grid: str | None = None) -> dict[tuple[str, cases.BenchCase], dict[str, Row]]:
        """(grid, case) -> system -> row, in the order of the file."""
        table: dict[tuple[str, cases.BenchCase], dict[str, Row]] = {}
        for row in self.results.rows:
            if grid in (None, row["grid"]):
                table.setdefault((row["grid"], results.case_of(row)), {})[row["system"]] = row
        return table

    def comparisons(self) -> list[Comparison]:
        """lstm_triton against nn.LSTM, in all cases in which lstm_triton was to be timed."""
        found = []
        for (grid, case), rows in self.rows_by_case().items():
            if cases.OURS in rows and rows[cases.OURS]["status"] != "missing":
                if grid in cases.GRIDS and not cases.GRIDS[grid].timed and rows[cases.OURS]["status"] == "ok":
                    continue
                found.append(Comparison(grid, case, rows[cases.OURS], rows.get(cases.BASELINE)))
        return found


@dataclass
class Comparison:
    """lstm_triton and nn.LSTM in one case."""

    grid: str
    case: cases.BenchCase
    ours: Row
    baseline: Row | None

    @property
    def speedup(self) -> float | None:
        return speedup(self.ours, self.baseline)

    @property
    def verdict(self) -> str:
        """Which one is faster. Two times are no different if their ranges from 20 % to 80 % overlap."""
        if self.ours["status"] != "ok":
            return str(self.ours["status"])
        if self.baseline is None or self.speedup is None:
            return "not compared"
        if self.ours["p80_us"] < self.baseline["p20_us"]:
            return "faster"
        return "slower" if self.ours["p20_us"] > self.baseline["p80_us"] else "no different"


def speedup(row: Row | None, baseline: Row | None) -> float | None:
    """How many times as fast as the baseline a system is. None where one of them has no time."""
    if row is None or baseline is None or not row["status"] == baseline["status"] == "ok":
        return None
    return baseline["median_us"] / row["median_us"] if row["median_us"] and baseline["median_us"] else None


def time_of(systems: dict[str, Row], name: str) -> float | None:
    """The median of a system in microseconds. None where the system has no time."""
    row = systems.get(name)
    return row["median_us"] if row is not None and row["status"] == "ok" else None


def timed_systems(rows: Rows) -> list[str]:
    """The systems that have a time in any of the cases, without the floor."""
    return [
        name for name in cases.SYSTEMS if name != FLOOR and any(time_of(systems, name) for systems in rows.values())
    ]


def load(folder: Path) -> list[Machine]:
    """All results files in a folder and the folders in it. Raises ResultsError for a file that cannot be read."""
    if not folder.is_dir():
        raise ResultsError(f"cannot read {folder}: {'not a' if folder.exists() else 'no such'} folder")
    machines = []
    for path in sorted(folder.rglob("*.json")):
        slug = re.sub(r"[^a-z0-9]+", "-", str(path.relative_to(folder).with_suffix("")).lower()).strip("-")
        machines.append(Machine(path, Results.read(path), slug))
    return machines

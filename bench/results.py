"""Results files: one JSON object {"schema": 1, "provenance": {...}, "rows": [...]}. A file is written whole or not."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lstm_triton import triton_package
from lstm_triton.command_line import whole_file
from lstm_triton.ending import Mistake
from lstm_triton.scan.planner import table_path
from lstm_triton.scan.tables import hash_of
from lstm_triton.target import Device

from .cases import BenchCase, Row, from_dict

JsonObject = dict[str, Any]

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
STATUSES = ("ok", "wrong", "error", "missing", "timeout")
PROVENANCE_KEYS = ("gpu", "driver", "torch", "triton", "cudnn", "commit", "kernel_hash", "date")
ROW_KEYS = (
    *("grid", "system", "mode", "dtype", "T", "B", "I", "H", "layers", "bidirectional", "layout", "status", "message"),
    *("median_us", "p20_us", "p80_us", "kept_bytes", "peak_bytes", "error", "floor_us"),
)


class ResultsError(Mistake):
    """A file of results cannot be read or written. The message is one line."""


def kernel_hash(gpu: str) -> str:
    """A hash of the files that decide what runs on a GPU: kernels, launches, planner, and the plans measured there."""
    table = table_path(Device(gpu, arch="", multiprocessors=0, shared_bytes=0))
    library = ROOT / "lstm_triton"
    deciding = [*sorted((ROOT / "kernels").glob("*.py")), *sorted((library / "scan").glob("*.py"))]
    deciding += [library / "target.py", library / "prepared_kernel.py"]
    return hash_of([*deciding, *([table] if table.exists() else [])])


def commit() -> str | None:
    """The commit of the checkout, with "-dirty" where files differ from it. None without git.

    The variable LSTM_TRITON_COMMIT names the commit of a copy that has no folder .git.
    """
    if told := os.environ.get("LSTM_TRITON_COMMIT"):
        return told
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def provenance(gpu: str, driver: str | None) -> JsonObject:
    return {
        "gpu": gpu,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_package.version(),
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "commit": commit(),
        "kernel_hash": kernel_hash(gpu),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def case_of(row: Row) -> BenchCase:
    return from_dict(row)


def key_of(row: Row) -> tuple[str, BenchCase, str]:
    return row["grid"], from_dict(row), row["system"]


def problem_with(content: object) -> str | None:
    """Why this is not the content of a results file, in a few words. None if it is."""
    if not isinstance(content, dict):
        return "not a JSON object"
    if content.get("schema") != SCHEMA:
        return f"schema {content.get('schema')!r}, this version reads schema {SCHEMA}"
    origin, rows = content.get("provenance"), content.get("rows")
    if not isinstance(origin, dict) or not isinstance(rows, list):
        return "no provenance or no rows"
    if absent := [key for key in PROVENANCE_KEYS if key not in origin]:
        return f"no provenance {absent[0]!r}"
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            return f"row {number} is not an object"
        if absent := [key for key in ROW_KEYS if key not in row]:
            return f"row {number} has no {absent[0]!r}"
        if row["status"] not in STATUSES:
            return f"row {number} has the unknown status {row['status']!r}"
        try:
            from_dict(row)
        except (TypeError, ValueError) as error:
            return f"row {number}: {error}"
    return None


@dataclass
class Results:
    provenance: JsonObject
    rows: list[Row] = field(default_factory=list)

    @staticmethod
    def read(path: Path) -> Results:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultsError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:  # cut short, or not JSON or UTF-8 at all
            raise ResultsError(f"{path} is damaged: {error}") from error
        if why := problem_with(content):
            raise ResultsError(f"{path} is not a results file: {why}")
        return Results(content["provenance"], content["rows"])

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows. A row replaces an earlier one with its grid, case and system."""
        new = {key_of(row): row for row in rows}
        self.rows = [new.pop(key_of(row), row) for row in self.rows]
        self.rows += new.values()

    def belongs_with(self, other: JsonObject) -> bool:
        """Whether rows with the other provenance may be in one file with these."""
        return all(self.provenance[key] == other[key] for key in ("gpu", "torch", "triton", "kernel_hash"))

    def write(self, path: Path) -> None:
        rows = ",\n".join("  " + json.dumps(row) for row in self.rows)
        head = json.dumps({"schema": SCHEMA, "provenance": self.provenance}, indent=1)
        text = head.removesuffix("\n}") + ',\n "rows": [\n' + rows + "\n ]\n}\n"
        write_atomically(path, text)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, and the old one where writing fails."""
    try:
        with whole_file(path) as file:
            file.write(text.encode(errors="surrogateescape"))
    except Mistake as error:
        raise ResultsError(str(error)) from error


def require_writable(folder: Path) -> None:
    """Raise ResultsError before any work is done, if its results could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ResultsError(f"cannot write into {folder}: {error.strerror}") from error


def open_for(path: Path, origin: JsonObject) -> Results:
    """The results in a file, to which rows with this provenance can be added. New results where there is no file."""
    require_writable(path.parent)
    if not path.exists():
        return Results(origin)
    results = Results.read(path)
    if not results.belongs_with(origin):
        raise ResultsError(f"{path} holds results of other kernels or of another machine: choose another file")
    results.provenance = origin
    return results

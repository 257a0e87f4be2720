"""Whether an edit changed what the kernels compile to (bench/digest.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import digest
from tests.support.processes import ROOT

pytest.importorskip("triton")

CASE = "sm_80 cell_backward"


def digests(checkout: Path, *arguments: str) -> tuple[int, str]:
    """(exit status, what is printed) of the command, in a copy of the project."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.digest", "--only", CASE, "--workers", "1", *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_an_edit_shows_where_it_changes_the_code(tmp_path: Path) -> None:
    """A comment, more lines and another name of the kernel do not; another constant does."""
    for folder in ("bench", "kernels", "lstm_triton"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("results"))
    before = tmp_path / "before.json"
    status, printed = digests(tmp_path, "--out", str(before))
    assert status == 0, printed
    [(name, found)] = json.loads(before.read_text())["cases"].items()
    assert name.startswith(CASE)
    assert f"{found} {name}" in printed

    gates, cell = tmp_path / "kernels" / "gates.py", tmp_path / "kernels" / "cell.py"
    edit(gates, "    cell_tanh = tanh(cell)\n", "    # A comment.\n\n    cell_tanh = tanh(cell)\n")
    edit(cell, "def cell_backward(", "def derivative_of_cell(")
    edit(
        tmp_path / "bench" / "resources.py",
        "import cell_backward, cell_forward",
        "import cell_forward, derivative_of_cell",
    )
    edit(tmp_path / "bench" / "resources.py", "_compiled(cell_backward,", "_compiled(derivative_of_cell,")
    status, printed = digests(tmp_path, "--compare", str(before))
    assert status == 0, printed
    assert "1 cases, 0 differ" in printed

    edit(gates, "(1.0 - cell_tanh * cell_tanh)", "(1.5 - cell_tanh * cell_tanh)")
    status, printed = digests(tmp_path, "--compare", str(before))
    assert status == 1, printed
    assert f"differs: {name}" in printed


def test_cases_that_are_new_or_gone_differ() -> None:
    assert digest.differences({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == []
    assert digest.differences({"a": "1", "b": "2"}, {"a": "1", "c": "2"}) == ["c", "b (gone)"]


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({str(variant) for variant in digest.VARIANTS}) == len(digest.VARIANTS)

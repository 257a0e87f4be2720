"""`python -m bench run`: measures one grid in this process with pytest-benchmark, and writes a results file."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lstm_triton.command_line import check_output_file
from lstm_triton.ending import Mistake

from . import cases, devices, floor, results
from .cases import Row
from .systems import load_plugin

if TYPE_CHECKING:
    import pytest


class MissingPackage(Mistake):
    """A command needs a package that is not installed. The message is one line."""


class RowCollector:
    """A plugin of pytest: saves the row of every test as soon as the test is over."""

    def __init__(self, found: results.Results, path: Path | None) -> None:
        self.found = found
        self.path = path
        self.rows: list[Row] = []
        self.stopped_by: BaseException | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self.stopped_by = self.stopped_by or excinfo.value

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties) if report.when == "call" else {}
        new: list[Row] = [row] if isinstance(row := found.get("row"), dict) else []
        self.rows += new
        self.found.add(new)
        if new and self.path is not None and self.stopped_by is None:
            try:
                self.found.write(self.path)
            except results.ResultsError as error:  # raised here it would be a fault of pytest
                self.stopped_by = error
                self.session.shouldstop = str(error)


@contextlib.contextmanager
def empty_kernel_caches() -> Iterator[None]:
    """Processes that start inside find empty kernel caches, and compile everything again."""
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="bench-cache-", ignore_cleanup_errors=True) as folder:
        for name in names:
            os.environ[name] = os.path.join(folder, name.lower())
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def run(
    grid_name: str, device_name: str, systems: str | None, out: Path | None, seconds: float, plugin: str | None = None
) -> int:
    """Measure a grid and print the table of pytest-benchmark.

    Returns:
        1 if a row of lstm_triton or nn.LSTM is not right, else 0.
    """
    for package in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"run needs the package {package.replace('_', '-')}: pip install '.[bench]'")
    import pytest

    work = cases.work_list(grid_name, systems, rehearse=device_name == "interpreter")
    devices.require(device_name)
    if device_name == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is later
    load_plugin(plugin)
    if out is not None:
        results.require_writable(out.parent)
        check_output_file(out)
        if out.exists():
            results.Results.read(out)
    caches = empty_kernel_caches() if cases.GRIDS[grid_name].first_call else contextlib.nullcontext()
    with caches:
        device = devices.open_device(device_name)
        origin = results.provenance(device.gpu, device.driver()) | {"rates": floor.rates(device)}
        found = results.open_for(out, origin) if out is not None else results.Results(origin)
        collector = RowCollector(found, out)
        print(f"{grid_name}: {len(work)} cases on {device.gpu}")
        arguments = [f"--bench-grid={grid_name}", f"--bench-device={device_name}", f"--bench-seconds={seconds}"]
        arguments += [f"--bench-systems={systems}"] if systems else []
        arguments += [f"--bench-plugin={plugin}"] if plugin else []
        table = ["--benchmark-columns=median,iqr,min,max,rounds", "--benchmark-sort=name", "--benchmark-warmup=off"]
        quiet = [
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            f"--rootdir={results.ROOT}",
            f"--config-file={results.ROOT / 'pyproject.toml'}",
        ]
        test = str(results.ROOT / "bench" / "test_bench.py")
        code = pytest.main([test, *arguments, *table, *quiet], plugins=[collector])
    if collector.stopped_by is not None:
        raise collector.stopped_by
    counts = Counter(row["status"] for row in collector.rows)
    print(
        f"{len(collector.rows)} rows: {', '.join(f'{number} {status}' for status, number in counts.items()) or 'none'}"
    )
    print(f"saved in {out}" if out is not None else "not saved: name a file with --out")
    ours = [row for row in collector.rows if row["system"] in (cases.OURS, cases.BASELINE)]
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not collector.rows:
        return 1
    return int(any(row["status"] not in ("ok", "missing") for row in ours))

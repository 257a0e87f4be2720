"""A test for each case and system: `pytest bench/ --benchmark-json=FILE`. `python -m bench run` runs these tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measure import Measured
from bench.results import case_of


class DeviceClock:
    """The timer of pytest-benchmark. Only the times that were read on the device make it go on."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, microseconds: float) -> None:
        self.seconds += microseconds / 1e6


clock = DeviceClock()


@pytest.mark.benchmark(timer=clock)
def test_case(
    measured: dict[str, Measured],
    system: str,
    benchmark: BenchmarkFixture,
    record_property: Callable[[str, object], None],
) -> None:
    if system not in measured:
        pytest.fail("not measured: the device does not answer any more", pytrace=False)
    row, samples = measured[system].row, measured[system].samples
    record_property("row", row)
    benchmark.extra_info.update(row)
    benchmark.group = f"{row['grid']}: {case_of(row)}"
    if row["status"] == "missing":
        pytest.skip(f"{system}: {row['message']}")
    if row["status"] != "ok":
        pytest.fail(f"{system} is {row['status']}: {row['message']}", pytrace=False)
    if samples:
        turns = iter(samples)
        benchmark.pedantic(lambda: clock.advance(next(turns)), rounds=len(samples), iterations=1)
    else:  # a grid of values without times
        benchmark.skipped = True

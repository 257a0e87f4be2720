"""Options of `pytest bench/`, and the measuring of a case for all tests of this case."""

from __future__ import annotations

import pytest

from bench import cases, devices, measure, systems


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--bench-grid", default="smoke", help=f"cases: {', '.join(cases.GRIDS)}")
    group.addoption("--bench-device", default=devices.default_device(), help=f"one of {', '.join(devices.DEVICES)}")
    group.addoption("--bench-systems", help=f"some of {','.join(cases.SYSTEMS)}; otherwise those that the grid names")
    group.addoption("--bench-seconds", type=float, default=0.3, help="how long to time each system in each case")
    group.addoption("--bench-plugin", help="a module to import first, which may change bench.systems.REGISTRY")


def pytest_configure(config: pytest.Config) -> None:
    if plugin := config.getoption("--bench-plugin"):
        try:
            systems.load_plugin(plugin)
        except cases.UnknownName as error:
            raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measured" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    try:
        devices.require(option("--bench-device"))
        work = cases.work_list(
            option("--bench-grid"), option("--bench-systems"), rehearse=option("--bench-device") == "interpreter"
        )
    except (cases.UnknownName, devices.UnusableDevice) as error:
        raise pytest.UsageError(str(error)) from error
    pairs = [((case, names), name) for case, names in work for name in names]
    ids = [f"{case}-{name}" for (case, _), name in pairs]
    metafunc.parametrize(("measured", "system"), pairs, indirect=["measured"], ids=ids, scope="module")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> devices.Cpu:
    return devices.open_device(request.config.getoption("--bench-device"))


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, device: devices.Cpu) -> dict[str, measure.Measured]:
    """The systems of one case. They are measured in turns, for the first test of the case."""
    case, names = request.param
    option = request.config.getoption
    grid_name = option("--bench-grid")
    try:
        rows = measure.measure(grid_name, cases.GRIDS[grid_name], case, names, device, option("--bench-seconds"))
    except measure.DeviceLost as error:
        request.session.shouldstop = str(error)
        rows = [measure.Measured(row) for row in error.rows]
    return {measured.row["system"]: measured for measured in rows}

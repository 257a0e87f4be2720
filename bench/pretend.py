"""A plugin of pytest: runs the gpu tests on a pretended GPU, to compile the kernels that they launch.

    python -m pytest tests/gpu/test_gpu.py tests/gpu/test_gpu_pytorch.py -m gpu -p bench.pretend -n 2

`--arch` names another GPU than sm_90, and `--libtriton` the library for another Python. Tensors are on the CPU. Kernels
are compiled into Triton's cache and do nothing (bench.cache), so results mean nothing. Most comparisons are left out. A
test that fails all the same is an expected failure. Pytest's summary has its name and the reason, since such a test may
have had more to launch. A section of the summary counts the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported, and by tests/conftest.py

import pytest
import torch

from . import cache, cases

Patch = Callable[[object, str, object], None]
LONG = 1000  # with so many steps nn.LSTM takes too long on a CPU, and it launches none of these kernels
FOR_GPUS = (  # functions and classes of torch.cuda that are made to do nothing
    "CUDAGraph", "Stream", "current_stream", "graph", "reset_peak_memory_stats", "set_sync_debug_mode", "stream",
    "synchronize",
)  # fmt: skip


class Counted:
    """The launches and the compiled kernels of the running test so far."""

    def __init__(self) -> None:
        self.launches = 0
        self.compiled = cache.Compiled()


COUNTED = Counted()
FOUND: dict[str, cases.Row] = {}  # test -> launches, hashes and errors, of the tests that are over


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pretended GPU")
    group.addoption("--arch", default="sm_90", help="what to compile for")
    group.addoption("--libtriton", help="the library of the wheel for another Python (bench.cache)")


def memory() -> tuple[int, int]:
    """For torch.cuda.mem_get_info: three times the free and the whole memory here, since little of it is ever used."""
    free, whole = (os.sysconf(pages) for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    return 3 * free * os.sysconf("SC_PAGE_SIZE"), 3 * whole * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def pretending(modules: Sequence[ModuleType], arch: str, libtriton: str | None) -> Iterator[Patch]:
    """Let the tests of the modules run on CPU tensors and compare nothing. Yields a function that patches more."""
    from lstm_triton import interpreter, target
    from lstm_triton.scan import dropout, products
    from lstm_triton.scan.layers import scan_lane as scan_layer

    lstm = torch._VF.lstm

    def short_lstm(input: torch.Tensor, hx: Any, *others: Any) -> Any:
        if input.shape[0] < LONG:
            return lstm(input, hx, *others)
        return input.new_empty((*input.shape[:2], hx[0].shape[2])), *hx

    def batched_matmul(left: torch.Tensor, right: torch.Tensor, exact: bool = False) -> torch.Tensor:
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        return left.new_empty((*batch, left.shape[-2], right.shape[-1]))

    dropout_scale = dropout.dropout_scale

    def drawn_scale(seed: torch.Tensor, lane: int, dropout: float, *others: Any) -> torch.Tensor:
        return torch.nn.functional.dropout(torch.ones_like(dropout_scale(seed, lane, dropout, *others)), dropout)

    with ExitStack() as stack:

        def patch(target: object, name: str, replacement: object) -> None:
            stack.enter_context(mock.patch.object(target, name, replacement))

        COUNTED.compiled = stack.enter_context(cache.compiling(arch, libtriton))

        def counted(launched: target.Launched) -> None:
            COUNTED.launches += 1

        stack.enter_context(target.watched_launches(after=counted))
        patch(products, "batched_matmul", batched_matmul)
        patch(dropout, "dropout_scale", drawn_scale)  # a test checks how many are kept, and then goes on
        patch(interpreter, "interpret", lambda seed=0: nullcontext())
        for module in modules:
            patch(module, "DEVICE", "cpu")
            for name in vars(module):
                if name.startswith("assert_"):
                    patch(module, name, lambda *arguments, **options: None)
            if hasattr(module, "Layer"):
                patch(module.Layer, "check", lambda layer: layer.run(scan_layer))
        patch(torch.testing, "assert_close", lambda *arguments, **options: None)
        patch(torch, "equal", lambda *tensors: True)
        patch(torch, "use_deterministic_algorithms", lambda *arguments, **options: None)  # else they fill all memory
        patch(torch._VF, "lstm", short_lstm)
        for name in FOR_GPUS:
            patch(torch.cuda, name, mock.MagicMock())
        patch(torch.cuda, "make_graphed_callables", lambda module, sample: module)
        patch(torch.cuda, "mem_get_info", memory)
        for name in ("memory_allocated", "max_memory_allocated"):
            patch(torch.cuda, name, lambda: 0)
        yield patch


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """Pretend in a process that runs tests. With pytest-xdist the first process runs none."""
    if not session.items:
        return (yield)
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # it lacks layers that autocast needs
    option = session.config.getoption
    parents = (item.getparent(pytest.Module) for item in session.items)
    modules = list(dict.fromkeys(parent.obj for parent in parents if parent is not None))
    if without := [module.__name__ for module in modules if not hasattr(module, "DEVICE")]:
        raise pytest.UsageError(f"no constant DEVICE, where the tests run, in {', '.join(without)}")
    [conftest] = (each for each in session.config.pluginmanager.get_plugins() if hasattr(each, "why_skipped"))
    with pretending(modules, option("--arch"), option("--libtriton")) as patch:
        patch(conftest, "why_skipped", lambda marker: None)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    COUNTED.launches = 0
    COUNTED.compiled.clear()
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        first, *_ = str(error).strip().splitlines() or [""]
        pytest.xfail(f"{type(error).__name__}: {first[:150]}")
    finally:
        item.user_properties.append(("launches", COUNTED.launches))
        item.user_properties.append(("hashes", sorted(COUNTED.compiled.hashes)))
        item.user_properties.append(("errors", list(COUNTED.compiled.errors)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        FOUND[report.nodeid] = dict(report.user_properties)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = FOUND.values()
    hashes = {each for row in found for each in row.get("hashes", ())}
    launching = sum(row.get("launches", 0) > 0 for row in found)
    errors = [f"{test}: {error}" for test, row in FOUND.items() for error in row.get("errors", ())]
    terminalreporter.section("pretended GPU")
    for error in errors:
        terminalreporter.write_line(f"does not compile: {error}")
    terminalreporter.write_line(
        f"{len(hashes)} kernels compiled, {len(errors)} failed to; {launching} of {len(FOUND)} tests launched some"
    )

"""What every test relies on: where kernels run, which tests can run here, and memory that is never zero by luck."""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from lstm_triton import triton_package

HAS_GPU = torch.cuda.is_available()  # ROCm's GPUs are reported here too

# Set before any test: Triton reads it when it decorates a function, those of its own library when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if HAS_GPU else "1")
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"

# Everything is small, also in the processes that tests start. Several threads would wait for each other, for long if
# other programs share the processors (lstm_triton/commands/threads.py).
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

settings.register_profile(
    "lstm_triton",
    deadline=None,
    derandomize="CI" in os.environ,
    max_examples=int(os.environ.get("LSTM_TRITON_EXAMPLES", "10")),
    phases=set(Phase) - {Phase.explain},  # it traces every line, of which the interpreter has many
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lstm_triton")


def pytest_report_header() -> str:
    versions = f"triton {triton_package.version()}"
    if importlib.util.find_spec("numpy"):
        versions += f", numpy {importlib.metadata.version('numpy')}"
    gpu = torch.cuda.get_device_name() if HAS_GPU else "no GPU"
    return f"torch {torch.__version__}, {versions}; {gpu}; kernels {'interpreted' if INTERPRETED else 'compiled'}"


def why_skipped(marker: str) -> str | None:
    """The reason why tests with this marker cannot run here, or None."""
    if marker == "gpu":
        if not HAS_GPU:
            return "needs a GPU: torch.cuda.is_available() is False"
        return "needs compiled kernels: TRITON_INTERPRET=1 is set" if INTERPRETED else None
    if not triton_package.installed():
        return 'needs Triton, which is not installed: pip install "lstm-triton[interpreter]"'
    if marker == "emulated":
        return "needs compiled kernels: test_the_emulated_ones runs it" if INTERPRETED else None
    if not INTERPRETED:
        return "needs interpreted kernels: run again with TRITON_INTERPRET=1"
    if not triton_package.older_than(triton_package.OLDEST_INTERPRETED):
        return None
    return f"needs Triton 3.6 or later, which lstm_triton.interpreter can change, not {triton_package.version()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("gpu", "interpreted", "emulated"):
        if item.get_closest_marker(marker) and (reason := why_skipped(marker)):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """Uninitialised memory holds NaN (the largest value, for integers), so that reading what was never written shows.

    PyTorch does the filling, for every factory (`torch.empty`, `Tensor.new_empty`, `torch.empty_like`, ...), as part of
    its deterministic mode; `warn_only`, because an operation that has no deterministic form is no failure here.
    """
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(was_enabled, warn_only=was_warn_only)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """torch.compile starts anew in every test: what it once gave up on stays uncompiled until it is reset."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()

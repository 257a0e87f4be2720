"""The gpu tests on a pretended GPU (bench/pretend.py)."""

from pathlib import Path

import pytest

from tests.support.processes import output_of_python

pytest.importorskip("triton")


def test_compiles_what_a_gpu_test_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step forward that keeps gates, one that does not, and a step backward; and what stops a test is told."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wanted = "test_cell and tf32 and 37 and torch.float16 or test_second_derivative_through_cudnns_dropout"
    printed = output_of_python(
        "-m", "pytest", "tests/gpu", "-m", "gpu", "-k", wanted,
        "-p", "bench.pretend", "-p", "no:cacheprovider",
    )  # fmt: skip
    assert "3 kernels compiled, 0 failed to; 1 of 2 tests launched some" in printed
    assert "test_second_derivative_through_cudnns_dropout - Failed: DID NOT RAISE RuntimeError" in printed
    assert len(list(tmp_path.rglob("*.cubin"))) == 3

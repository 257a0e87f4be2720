"""The test harness itself: poisoned memory, and tests that do not run say why."""

import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.processes import ROOT

FACTORIES = {
    "torch.empty": lambda dtype: torch.empty(64, dtype=dtype),
    "torch.empty_like": lambda dtype: torch.empty_like(torch.ones(64, dtype=dtype)),
    "torch.empty_strided": lambda dtype: torch.empty_strided((8, 8), (1, 8), dtype=dtype),
    "Tensor.new_empty": lambda dtype: torch.ones(1).new_empty(64, dtype=dtype),
    "Tensor.new_empty_strided": lambda dtype: torch.ones(1, dtype=dtype).new_empty_strided((8, 8), (16, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
def test_uninitialised_floats_are_nan(factory, dtype):
    assert factory(dtype).isnan().all()


def test_uninitialised_integers_are_the_largest():
    assert (torch.empty(64, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.gpu
def test_uninitialised_gpu_memory_is_nan():
    assert torch.empty(1 << 20, device="cuda").isnan().all()


@pytest.mark.parametrize(
    ("marker", "interpret", "reason"),
    [
        ("interpreted", "0", "needs interpreted kernels: run again with TRITON_INTERPRET=1"),
        ("gpu", "1", "needs compiled kernels" if torch.cuda.is_available() else "needs a GPU"),
    ],
)
def test_a_test_that_cannot_run_here_says_why(tmp_path, monkeypatch, marker, interpret, reason):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers = {marker}\n")
    (tmp_path / "test_it.py").write_text(
        f"import pytest\n\n@pytest.mark.{marker}\ndef test_something():\n    raise AssertionError\n"
    )
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", tmp_path]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "1 skipped" in finished.stdout
    assert reason in finished.stdout

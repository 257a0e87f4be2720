"""Which Triton is installed under which name, and that this package runs without any."""

import os
import subprocess
import sys

import pytest

from lstm_triton import triton_package
from tests.support.processes import ROOT


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"triton": "3.5.0"}, None),
        ({"triton": "3.9.0"}, None),
        ({"triton": "4.0.0"}, None),
        ({"pytorch-triton": "3.6.0+git9844da95"}, None),
        ({}, None),  # built by hand, say: nothing tells a version
        ({"triton": "3.4.0"}, "Triton 3.4.0 is too old: the kernels need Triton 3.5 or later"),
        ({"triton-rocm": "3.6.0"}, "the installed Triton, triton-rocm, is for AMD GPUs"),
        ({"pytorch-triton-rocm": "3.5.1"}, "pytorch-triton-rocm, is for AMD GPUs"),
        ({"triton-xpu": "3.6.0"}, "triton-xpu, is for Intel GPUs"),
        ({"pytorch-triton-xpu": "3.5.0"}, "pytorch-triton-xpu, is for Intel GPUs"),
        ({"triton-windows": "3.6.0.post25"}, "triton-windows, is for Windows, where the kernels have never been run"),
    ],
)
def test_what_is_refused(found: dict[str, str], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_package, "installed", lambda: True)
    monkeypatch.setattr(triton_package, "distributions", lambda: found)
    monkeypatch.setattr(triton_package, "obstacle", triton_package.obstacle.__wrapped__)
    obstacle = triton_package.obstacle()
    assert (obstacle is None) if reason is None else (obstacle is not None and reason in obstacle)
    described = triton_package.described()
    assert triton_package.RANGE in described if reason is None else str(obstacle) in described
    assert all(version in described for version in found.values())


def test_the_installed_one() -> None:
    pytest.importorskip("triton")
    import triton

    assert triton_package.installed()
    assert triton_package.version() == triton.__version__
    assert triton_package.obstacle() is None


def test_a_folder_named_triton_is_no_triton(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton").mkdir()
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not triton_package.installed.__wrapped__()


def test_a_hook_that_forbids_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hook:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "triton":
                raise ModuleNotFoundError("No module named 'triton'", name=name)

    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hook(), *sys.meta_path])
    assert not triton_package.installed.__wrapped__()


PROGRAM = """
import importlib, pkgutil, sys
sys.modules["triton"] = None  # as if it were not installed
import torch, lstm_triton

only_with_triton = ("lstm_triton.kernels.", "lstm_triton.shortcuts")
for module in pkgutil.walk_packages(lstm_triton.__path__, "lstm_triton."):
    if not module.name.startswith(only_with_triton):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name.split(".")[0] not in ("matplotlib", "sklearn", "tqdm"):  # of the extra "demo"
                raise

lstm, input = lstm_triton.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
lstm(input)[0].sum().backward()
lstm(input, lengths=torch.tensor([5, 2]), resets=torch.zeros(5, 2, dtype=torch.bool))
lstm.with_cells(input)
lstm_triton.LSTMCell(3, 4)(input[0])
lstm_triton.trace(lstm, input)
print(lstm_triton.explain(lstm, input))
stock = torch.nn.LSTM(3, 4)
lstm_triton.replace_lstm(stock).undo()
with lstm_triton.accelerate():
    stock(input)
torch.func.grad(lambda x: lstm(x)[0].sum())(input)
torch.export.export(lstm, (input,))

for run in (lambda: lstm(input), lambda: lstm_triton.LSTMCell(3, 4)(input[0])):
    try:
        with lstm_triton.backend("triton"):
            run()
    except RuntimeError as error:
        print("REFUSED:", error)
from lstm_triton.interpreter import interpret
try:
    with interpret():
        lstm(input)
except RuntimeError as error:
    print("INTERPRETED:", error)
"""


def test_everything_runs_without_triton() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    refused = [line for line in finished.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(refused) == 2
    assert all('the backend "triton" was asked for, but cannot take this call' in line for line in refused)
    assert "INTERPRETED: interpreting the kernels needs Triton, which is not installed" in finished.stdout

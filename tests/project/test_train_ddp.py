"""examples/train_ddp.py: started with torchrun, killed, and resumed."""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lstm_triton.ending import Mistake
from tests.support.comparing import assert_same
from tests.support.processes import ROOT

EXAMPLE = ROOT / "examples" / "train_ddp.py"
STEPS = 300


@pytest.fixture(scope="module")
def example() -> ModuleType:
    specification = importlib.util.spec_from_file_location("train_ddp", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def start(checkpoint: Path, processes: int = 2, gpus: str = "") -> subprocess.Popen[str]:
    """A small run, which prints every step; on the CPU unless told otherwise, where sums have one order."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    sizes = {"--steps": STEPS, "--time-steps": 6, "--hidden-size": 8, "--batch-size": 8, "--save-every": 7}
    options = [str(word) for option in sizes.items() for word in option]
    return subprocess.Popen(
        [*torchrun, str(EXAMPLE), "--checkpoint", str(checkpoint), "--print-every", "1", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # From the checkout, whatever is installed.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus},
    )


def finish(run: subprocess.Popen[str]) -> str:
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 0, printed
    return printed


def workers_of(run: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes to kill in /proc")
def test_killed_and_resumed(tmp_path: Path) -> None:
    """Bit by bit what an uninterrupted run gives; on another number of processes, what rounding leaves of it."""
    whole_path, killed_path, single_path = (tmp_path / name for name in ("whole.pt", "killed.pt", "single.pt"))
    printed = finish(start(whole_path))
    assert "2 processes on cpu, from step 0 to 300" in printed
    assert printed.count("step 150: loss of this process") == 1  # the first process alone prints
    whole = torch.load(whole_path, weights_only=True)
    assert whole["step"] == STEPS

    run = start(killed_path)
    for line in run.stdout:
        if line.startswith("step 100:"):
            break
    for pid in workers_of(run):
        os.kill(pid, signal.SIGKILL)
    run.communicate(timeout=120)
    assert run.returncode != 0
    killed = torch.load(killed_path, weights_only=True)
    assert 98 <= killed["step"] < STEPS
    assert killed["step"] % 7 == 0
    single_path.write_bytes(killed_path.read_bytes())

    printed = finish(start(killed_path))
    assert f"2 processes on cpu, from step {killed['step']} to 300" in printed
    assert "step 50:" not in printed
    assert_same(torch.load(killed_path, weights_only=True), whole)

    finish(start(single_path, processes=1))
    torch.testing.assert_close(
        torch.load(single_path, weights_only=True)["model"], whole["model"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    printed = finish(start(tmp_path / "checkpoint.pt", processes=1, gpus="0"))
    assert "1 processes on cuda, from step 0 to 300" in printed
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step ")]
    assert len(losses) == STEPS
    assert sum(losses[-50:]) < sum(losses[:50])


def test_a_checkpoint_is_whole_or_not_there(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = example.Adder(3)
    optimizer = torch.optim.Adam(model.parameters())
    path = tmp_path / "checkpoint.pt"
    assert example.load(path, model, optimizer, torch.device("cpu")) == 0
    example.save(path, model, optimizer, 7)
    plain_save: Callable[..., None] = torch.save

    def interrupted(content: Any, file: Any) -> None:
        plain_save({"half": 1}, file)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        example.save(path, model, optimizer, 14)
    assert example.load(path, model, optimizer, torch.device("cpu")) == 7


def test_a_full_disk_leaves_the_old_checkpoint(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = example.Adder(3)
    optimizer = torch.optim.Adam(model.parameters())
    path = tmp_path / "checkpoint.pt"
    example.save(path, model, optimizer, 7)

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(Mistake, match=r"cannot write .*checkpoint\.pt: .*No space left on device"):
        example.save(path, model, optimizer, 14)
    assert example.load(path, model, optimizer, torch.device("cpu")) == 7
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"PK\x03\x04 and no more", b"", None])
def test_what_is_no_checkpoint_is_refused(example: ModuleType, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content) if content is not None else torch.save({"other": 1}, path)
    model = example.Adder(3)
    with pytest.raises(Mistake, match="is no checkpoint of this model"):
        example.load(path, model, torch.optim.Adam(model.parameters()), torch.device("cpu"))


def test_adding_problem(example: ModuleType) -> None:
    sequences, sums = example.adding_problem(9, 50, seed=1)
    numbers, marks = sequences.unbind(2)
    assert sequences.shape == (9, 50, 2)
    assert (marks[:4].sum(0) == 1).all()
    assert (marks[4:].sum(0) == 1).all()
    torch.testing.assert_close((numbers * marks).sum(0), sums)
    assert_same(example.adding_problem(9, 50, seed=1)[0], sequences)
    assert not torch.equal(example.adding_problem(9, 50, seed=2)[0], sequences)


def test_wrong_starts_are_explained(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_ddp.py"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        example.main()
    assert "start it with torchrun" in capsys.readouterr().err
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Mistake, match=r"--batch-size must be a multiple of the 3 processes, got 64"):
        example.train(argparse.Namespace(batch_size=64))

"""How programs end (lstm_triton/ending.py), and files that are written whole (lstm_triton/command_line.py)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lstm_triton
from lstm_triton import ending
from lstm_triton.command_line import whole_file
from lstm_triton.ending import Mistake, program
from tests.support.processes import ROOT


def ended_by(work: Callable[[], object], argv: list[str] | None = None) -> int:
    """The exit code of a program that does this."""

    @program("a program", extra="bench", commands=("dance",))
    def main(argv: object) -> int:
        work()
        return 0

    return main(argv or [])


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(32, "Broken pipe"), 141, None),
        (OSError(28, "No space left on device"), 2, "cannot read or write: No space left on device"),
        (PermissionError(13, "Permission denied", "a file"), 2, "cannot read or write a file: Permission denied"),
        (Mistake("two\nlines"), 2, "two lines"),
        (MemoryError(), 2, "out of memory: choose smaller sizes"),
        (RuntimeError("1] DefaultCPUAllocator: can't"), 2, "out of memory: 1] DefaultCPUAllocator: can't"),
        (ModuleNotFoundError("", name="tqdm.auto"), 2,
         'tqdm is not installed; it comes with pip install "lstm-triton[bench]"'),
    ],
)  # fmt: skip
def test_an_ending_is_one_line(
    error: BaseException, code: int, line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_by(failing(error), ["dance", "--nicely"]) == code
    assert capsys.readouterr().err == (f"a program dance: {line}\n" if line else "")


@pytest.mark.parametrize("error", [RuntimeError("a fault"), ModuleNotFoundError("", name="lstm_triton.nothing")])
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        ended_by(failing(error))


@pytest.mark.parametrize(("name", "line"), [("SIGTERM", "ended by SIGTERM"), ("SIGHUP", "ended by SIGHUP"),
                                            ("SIGINT", "interrupted")])  # fmt: skip
def test_a_signal_lets_the_program_clean_up(name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    signum = getattr(signal, name)
    before = signal.getsignal(signum)
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signum)
            time.sleep(10)
        finally:
            cleaned.append(True)

    assert ended_by(work) == 128 + signum
    assert capsys.readouterr().err == f"a program: {line}\n"
    assert cleaned == [True]
    assert signal.getsignal(signum) == before
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        assert ended_by(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_closed_streams(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, name, None)  # as Python starts under >&-
    assert ended_by(lambda: print("text", file=getattr(sys, name))) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python", "-m", "lstm_triton", "demo"], True),
        (["python", "-X", "dev", "-m", "lstm_triton"], True),
        (["python", "-m", "other", "-m", "lstm_triton"], False),
        (["python", "script.py", "lstm_triton"], False),
    ],
)
def test_python_started_with_the_package(words: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program that imports lstm_triton keeps its own handler of Ctrl-C."""
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", ["-m"])
    assert ending.starts("lstm_triton") is expected
    monkeypatch.setattr(sys, "argv", ["/path/of/a/module.py"])
    assert ending.starts("lstm_triton") is False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("program", [["-m", "lstm_triton", "demo"], [str(ROOT / "examples" / "stock_prices.py")]])
def test_interrupted_while_it_imports(program: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *program, "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE) as running:
        deadline = time.monotonic() + 60
        while "libtorch" not in Path(f"/proc/{running.pid}/maps").read_text():
            assert time.monotonic() < deadline
        running.send_signal(signal.SIGINT)
        _, printed = running.communicate(timeout=60)
    assert running.returncode == 130, printed
    assert printed == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lstm_triton", "info"]
        finished = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert finished.returncode == 2
    assert finished.stderr == "python -m lstm_triton info: cannot read or write: No space left on device\n"


# --- Files ---


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a fault")])
def test_the_old_file_stays_until_the_new_one_is_whole(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with whole_file(path) as file:
            file.write(b"ne")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(Mistake if isinstance(error, OSError) else type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_whole_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    for text, mode in (("new", None), ("newer", 0o600)):
        if mode is not None:
            path.chmod(mode)
        with whole_file(link) as file:
            file.write(text.encode())
        assert path.read_text() == text
        assert link.is_symlink()
        assert mode is None or path.stat().st_mode & 0o777 == mode


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_device_is_written_and_not_replaced(tmp_path: Path) -> None:
    link = tmp_path / "picture.png"
    link.symlink_to("/dev/full")
    with pytest.raises(Mistake, match="No space left on device"), whole_file(link) as file:
        file.write(b"text")
    assert Path("/dev/full").is_char_device()


def test_the_package_is_light_to_end() -> None:
    """lstm_triton imports lstm_triton.ending first: it may import nothing slow."""
    source = Path(ending.__file__).read_text(encoding="utf-8")
    assert "import torch" not in source
    assert lstm_triton.__file__

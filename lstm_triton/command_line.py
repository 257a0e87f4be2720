"""What a program takes: a type for each kind of argument. Its commands, examples and benchmarks share them.

A mistake gets one line on stderr and exit code 2, before any work. Files are written whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from .ending import Mistake, one_line, reason_of

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

MOST = 10**9  # of anything that is counted
MOST_SEED = 2**32 - 1  # for every generator: NumPy takes no larger seed


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake gets one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


def quoted(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """The type of an argument that is a whole number."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = most + 1 if text.isdecimal() else least - 1  # Python refuses numbers of thousands of digits
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {quoted(text)}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be a whole number of at most {most}, got {quoted(text)}")
        return value

    return parse


seed = whole(0, MOST_SEED)


def above_zero(text: str) -> float:
    """The type of an argument that is a length of time, a rate or another positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST:
        limit = f"must be a number of at most {MOST}" if MOST < value < float("inf") else "must be a number above 0"
        raise argparse.ArgumentTypeError(f"{limit}, got {quoted(text)}")
    return value


def usable_device(text: str) -> torch.device:
    """A device that can hold tensors on this machine. It is tested by using it."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            device = torch.device(text)
            torch.zeros(1, dtype=torch.float32, device=device).cpu()
    except Exception as error:  # each kind of device fails in its own way, and some with pages of text
        reason = one_line(str(error).strip().split("\n")[0].split(". ")[0], 160)
        if "aten::" in reason or "INTERNAL" in reason:  # words for those who make PyTorch
            reason = "this build of PyTorch cannot reach such a device"
        raise argparse.ArgumentTypeError(f"{quoted(text)} cannot be used here: {reason}") from error
    return device


def check_output_file(path: Path) -> None:
    """Raise Mistake if a file cannot be written. It is tested now, before the work that the file is to keep."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "Is a directory")
        if path.exists():
            path.open("r+b").close()
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name can be too long
        if may_be_replaced(path):
            check_folder(target_of(path).parent)
    except OSError as error:
        raise Mistake(f"cannot write {quoted(str(path))}: {reason_of(error)}") from error


def check_folder(folder: Path) -> None:
    """Raise OSError if no file can be created in a folder."""
    handle, unfinished = create_in(folder)
    os.close(handle)
    unfinished.unlink()


def output_file(text: str) -> Path:
    """A path to which a file can be written."""
    try:
        if not text or text.endswith(("/", os.sep)):
            raise Mistake(f"cannot write {quoted(text)}: the name of a file is missing")
        check_output_file(Path(text))
    except Mistake as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def picture_file(kinds: Collection[str] = ("png",)) -> Callable[[str], Path]:
    """The type of a path to which a picture can be written. kinds: the endings of its name that are allowed."""
    allowed = " or ".join([f".{kind}" for kind in kinds] if len(kinds) < 4 else ["." + ", .".join(kinds)])

    def parse(text: str) -> Path:
        if Path(text).suffix.lower().removeprefix(".") not in kinds:
            raise argparse.ArgumentTypeError(f"{quoted(text)} does not end in {allowed}")
        return output_file(text)

    return parse


def output_folder(text: str) -> Path:
    """A folder into which files can be written. It need not exist yet."""
    path = Path(text)
    try:
        if not text:
            raise FileNotFoundError(0, "the name is empty")
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name can be too long
        there = target_of(path)
        while not there.exists():
            there = there.parent
        check_folder(there)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write into {quoted(text)}: {reason_of(error)}") from error
    return path


# Memory


def check_memory(needed: int, device: torch.device, arguments: str) -> None:
    """Raise Mistake if the arguments need more memory than the device has. Linux would end the process without a word.

    Args:
        needed: bytes, or a lower bound of them.
    """
    available = free_memory(device)
    if available is not None and needed > available:
        raise Mistake(
            f"{arguments} would need {gibibytes(needed)} of memory or more; {device} has {gibibytes(available)} free"
        )


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated. None where the system does not tell."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        limits.append(1024 * int(text.split("MemAvailable:")[1].split()[0]))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container, versions 2 and 1 of control groups
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")))
    return min(limits, default=None)


# Files


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write. A reader finds the old one or the new one, and the old one where writing fails or is stopped."""
    try:
        if not may_be_replaced(path):
            with path.open("wb") as file:
                yield file
            return
        target = target_of(path)
        handle, unfinished = create_in(target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, unfinished)
            os.replace(unfinished, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                unfinished.unlink()
    except OSError as error:
        raise Mistake(f"cannot write {path}: {reason_of(error)}") from error


def may_be_replaced(path: Path) -> bool:
    """Whether a path is that of a plain file, or of none. A device or a pipe is written as it is."""
    return path.is_file() or not path.exists()


def target_of(path: Path) -> Path:
    """The file that a path leads to, through all links."""
    try:
        return path.resolve()
    except RuntimeError as error:  # older versions of Python, for links in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def create_in(folder: Path) -> tuple[int, Path]:
    """A new empty file in a folder: its descriptor, and its path."""
    unfinished = folder / f".unfinished-{secrets.token_hex(8)}"
    return os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), unfinished


def save_picture(figure: Figure, path: Path, dpi: int) -> None:
    """Draw a figure of matplotlib into a file, whose name tells the kind of picture."""
    with whole_file(path) as file:
        figure.savefig(file, dpi=dpi, format=path.suffix.lower().removeprefix("."))

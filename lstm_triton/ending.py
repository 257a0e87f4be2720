"""How a program ends: with one line and an exit code, not with a traceback, whatever happens around it.

Ctrl-C, SIGTERM, a full disk, a closed pipe, a missing package, too little memory: see `program`. This file imports
nothing slow, since Ctrl-C has to work while PyTorch is imported, too.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

OPTIONAL = ("greenlet", "gymnasium", "matplotlib", "numpy", "opacus", "pytest", "pytest_benchmark", "sklearn", "tqdm")
OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "not enough memory", "can't allocate memory")  # torch's words
INTERRUPTED, CLOSED_PIPE = 128 + 2, 128 + 13  # as a shell counts: 128 and the number of the signal


class Mistake(Exception):
    """The user has to correct something first. The message is one line."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP has come. What stops and cleans up for Ctrl-C does so for these, too."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def one_line(text: str, most: int = 300) -> str:
    return textwrap.shorten(text, most, placeholder=" ...") if len(text.split()) > 1 else text.strip()[:most]


def reason_of(error: BaseException) -> str:
    return getattr(error, "strerror", None) or one_line(str(error)) or type(error).__name__


# Packages


def how_to_install(error: ModuleNotFoundError, extra: str) -> str | None:
    """One line about a package that may be missing. None for a module that always has to be there."""
    package = (error.name or "").split(".")[0]
    if package == "triton":
        return 'triton is not installed; it comes with pip install "lstm-triton[interpreter]", on Linux'
    if package in OPTIONAL:
        return f'{package} is not installed; it comes with pip install "lstm-triton[{extra}]"'
    return None


@contextlib.contextmanager
def packages_of(extra: str) -> Iterator[None]:
    """Import optional packages inside. Where one of them is missing, the program ends with a line that names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (message := how_to_install(error, extra)) is None:
            raise
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)


# The end of a program


def program(
    name: str = "", extra: str = "demo", commands: Collection[str] = ()
) -> Callable[[Callable[[Sequence[str] | None], int]], Callable[..., int]]:
    """Make a function of the arguments the whole of a program: it returns an exit code, and shows no traceback.

    0: fine, 1: what the function finds wrong, 2: the user has to correct something first, 128 and more: a signal came.
    An error of any other kind is a fault of the program, and keeps its traceback.

    Args:
        name: begins each message. The name of the file that was started, if it is not given.
        extra: the packages that the program needs, an extra of lstm-triton.
        commands: the program's commands; one that is among the arguments is named in a message.
    """

    def decorate(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            words = sys.argv[1:] if argv is None else argv
            command = next((word for word in words if word in commands), "")
            prog = f"{name or Path(sys.argv[0]).name} {command}".strip()
            mend_streams()
            with signals_as_exceptions():
                try:
                    try:
                        return main(argv)
                    finally:
                        sys.stdout.flush()
                except (Exception, KeyboardInterrupt) as error:
                    ignore_interrupts()
                    ending = ending_of(error, extra)
                    if ending is None:
                        raise
                    message, code = ending
                    if message:
                        tell(f"{prog}: {message}")
                    return code

        return run

    return decorate


def ending_of(error: BaseException, extra: str) -> tuple[str, int] | None:
    """The line and the exit code with which a program ends. None for an error that is a fault of the program."""
    if isinstance(error, Terminated):
        return f"ended by {signal.Signals(error.signum).name}", 128 + error.signum
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, BrokenPipeError):
        discard_output()
        return "", CLOSED_PIPE
    if isinstance(error, Mistake):
        return one_line(str(error)), 2
    if isinstance(error, ModuleNotFoundError):
        message = how_to_install(error, extra)
        return None if message is None else (message, 2)
    if isinstance(error, OSError):
        discard_output()
        where = f" {error.filename}" if error.filename else ""
        return f"cannot read or write{where}: {reason_of(error)}", 2
    lack = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    if lack or isinstance(error, MemoryError):
        return f"out of memory: {one_line(str(error)) or 'choose smaller sizes'}", 2
    return None


def tell(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens
        print(line, file=sys.stderr, flush=True)


def discard_output() -> None:
    """If what is left to be printed cannot be printed, send it to nowhere: Python would try once more at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def mend_streams() -> None:
    """Let print work whatever the terminal: one that is closed, or that cannot show a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the program ends)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Inside, Ctrl-C is KeyboardInterrupt, and SIGTERM and SIGHUP are Terminated, so that files and children end well.

    A signal that is ignored stays ignored. Signals reach the main thread only.
    """

    def leave(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated(signum)

    before = {}
    for signum in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")):
        if signum is not None and signal.getsignal(signum) not in (signal.SIG_IGN, None):
            with contextlib.suppress(ValueError):  # in another thread
                before[signum] = signal.signal(signum, leave)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def ignore_interrupts() -> None:
    with contextlib.suppress(ValueError):  # in another thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave_at_once(signum: int, frame: object) -> NoReturn:
    """A handler of signals while nothing but imports is under way: they may turn an exception into another one."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


def starts(package: str) -> bool:
    """Whether Python was started with `-m package`, and is importing the package before anything of it runs."""
    words = sys.orig_argv
    started = next((word for before, word in pairwise(words) if before == "-m"), None)
    return sys.argv[:1] == ["-m"] and started == package

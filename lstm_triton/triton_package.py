"""Which Triton is installed, and whether the kernels are for it. Nothing of Triton is imported.

This package does not require Triton: which Triton fits is PyTorch's choice. PyTorch's builds for GPUs bring the Triton
that each was made with. It comes under several names, and all of them have the module `triton`: a requirement of one
name would overwrite what another name brought. Without Triton every call takes PyTorch's own function.
"""

import importlib.metadata
import importlib.util
import re
from contextlib import suppress
from functools import cache

OLDEST = (3, 5)  # 3.4 and older fail in a compiler pass on weights that stay on the chip across the time loop
OLDEST_INTERPRETED = (3, 6)  # what interpreter.py changes is not in older ones
RANGE = "the kernels need Triton 3.5 or later, and Triton 3.6 or later to be interpreted on a CPU"

# Every distribution that brings the module `triton`, and why the kernels do not run with it.
REFUSED = {
    "triton": None,
    "pytorch-triton": None,  # of PyTorch's nightly builds for CUDA
    "triton-rocm": "is for AMD GPUs, on which the kernels do not run yet",
    "pytorch-triton-rocm": "is for AMD GPUs, on which the kernels do not run yet",
    "triton-xpu": "is for Intel GPUs, on which the kernels do not run",
    "pytorch-triton-xpu": "is for Intel GPUs, on which the kernels do not run",
    "triton-windows": "is for Windows, where the kernels have never been run",
}


@cache
def installed() -> bool:
    """Whether there is a module `triton`. A folder of this name, without code, is none."""
    try:
        found = importlib.util.find_spec("triton")
    except (ValueError, ImportError):  # a module without a specification stands in its place, or a hook forbids it
        return False
    return found is not None and found.origin is not None


@cache
def distributions() -> dict[str, str]:
    """The versions of all installed distributions that bring the module, by name. Empty if it came in another way."""
    found = {}
    for name in REFUSED if installed() else ():
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def version() -> str | None:
    """Triton's version; None if there is no Triton, or if nothing tells its version."""
    return next(iter(distributions().values()), None)


def older_than(oldest: tuple[int, int]) -> bool:
    """Whether the installed Triton is known to be older."""
    numbers = re.match(r"(\d+)\.(\d+)", version() or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < oldest


@cache
def obstacle() -> str | None:
    """Why the kernels cannot be compiled for a GPU with what is installed; None if they can."""
    if not installed():
        return "Triton is not installed (PyTorch's builds for CUDA bring it; else: pip install triton)"
    reasons = {name: REFUSED[name] for name in distributions()}
    if reasons and all(reasons.values()):
        return "; ".join(f"the installed Triton, {name}, {reason}" for name, reason in reasons.items())
    if older_than(OLDEST):
        return f"Triton {version()} is too old: the kernels need Triton 3.5 or later"
    return None


def described() -> str:
    """What is installed, and what the kernels need, in one line."""
    if not installed():
        return f"not installed: every LSTM takes PyTorch's own path; {RANGE}"
    found = [each if name == "triton" else f"{each} ({name})" for name, each in distributions().items()]
    reason = obstacle()
    return "; ".join([", ".join(found) or "of unknown version", reason or RANGE])

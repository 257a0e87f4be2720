"""Kernels that Triton cannot compile on this machine, or that the driver does not launch: what is wrong, what to do.

The backend "auto" then takes PyTorch's own function. Only faults of the machine count here. A fault in a kernel or in
its arguments, an error of an earlier kernel, and memory that is used up stay the errors that they are.
"""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from textwrap import shorten
from types import TracebackType
from typing import NamedTuple

import torch


class LaunchRefused(RuntimeError):
    """Triton cannot compile a kernel here, or the driver refuses to launch it. The cause is their own error.

    Attributes:
        reason: what is wrong, and what to do.
        everywhere: whether all kernels are concerned. If not, smaller layers may do.
    """

    def __init__(self, reason: str, everywhere: bool) -> None:
        super().__init__(f'{reason}. lstm_triton.backend("aten") computes without these kernels')
        self.reason, self.everywhere = reason, everywhere


class _Fault(NamedTuple):
    """A fault of the machine."""

    signs: tuple[str, ...]  # in messages of Triton and of the driver
    what: str
    advice: str
    everywhere: bool = True


NO_COMPILER = _Fault(
    ("Failed to find C compiler", "Failed to find C++ compiler"),
    "Triton finds no working C compiler",
    "install gcc or clang and the headers of Python, or let CC name a compiler",
)
NO_CACHE = _Fault(
    ("Could not create or locate cache dir",),
    "Triton cannot use its cache folder",
    "let TRITON_CACHE_DIR name a folder that can be written and has room, and TMPDIR, too",
)
DAMAGED_CACHE = _Fault(
    ("device kernel image is invalid", "named symbol not found", "Failed to load newly compiled"),
    "an entry of Triton's cache is damaged",
    "remove Triton's cache folder, ~/.triton/cache unless TRITON_CACHE_DIR names another one",
)
NO_ASSEMBLER = _Fault(
    ("Cannot find ptxas", "is not defined for option 'gpu-name'", "Unsupported .version"),
    "Triton's assembler ptxas is missing, or does not know this GPU",
    "install a newer Triton, or let TRITON_PTXAS_PATH name the ptxas of your CUDA",
)
OLD_DRIVER = _Fault(
    (
        "unsupported toolchain",
        "no kernel image is available",
        "PTX JIT compil",
        "driver version is insufficient",
        "unsupported display driver",
        "cuLaunchKernelEx",
        "libcuda.so",
        "active drivers",
    ),
    "the GPU's driver is too old for this Triton, or is not found",
    "update the driver, or install the Triton that belongs to its version of CUDA",
)
NOT_TOGETHER = _Fault(
    ("too many blocks in cooperative launch", "operation not supported"),
    "the driver does not run all programs of a scan at the same time",
    "give this process the whole GPU (no share of MPS, no other process that fills it)",
    everywhere=False,
)
TOO_LARGE = _Fault(
    ("out of resource:", "too many resources requested for launch"),
    "a kernel needs more registers, threads or shared memory than this GPU gives",
    "please report what `python -m lstm_triton info` prints",
    everywhere=False,
)
FAULTS = (NO_COMPILER, NO_CACHE, DAMAGED_CACHE, NO_ASSEMBLER, OLD_DRIVER, NOT_TOGETHER, TOO_LARGE)
MOST_TOLD = 200  # characters of the cause's message
MEMORY = ("out of memory", "Cannot allocate memory")
# Functions of Triton that read files of its cache.
READING_THE_CACHE = (("triton.runtime.cache", "get_group"), ("triton.compiler.compiler", "CompiledKernel.__init__"))


def refused(error: Exception) -> LaunchRefused | None:
    """The exception to raise instead of an error of a launch, if the machine is at fault; None for any other error."""
    fault = _fault(error)
    if fault is None:
        return None
    lines = str(error).strip().splitlines() or [""]
    told = f"{type(error).__name__}: {shorten(lines[0], MOST_TOLD)}"
    return LaunchRefused(f"{fault.what} ({told}): {fault.advice}", fault.everywhere)


def _fault(error: Exception) -> _Fault | None:
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(sign in message for sign in MEMORY):
        return None
    reads_the_cache = not set(_places(error.__traceback__)).isdisjoint(READING_THE_CACHE)
    if isinstance(error, subprocess.CalledProcessError):  # Triton's own assembler has an error of its own
        return NO_COMPILER
    if isinstance(error, OSError):
        if "ptxas" in str(error.filename):
            return NO_ASSEMBLER
        if any(module == "subprocess" for module, _ in _places(error.__traceback__)):
            return NO_COMPILER
        is_damage = error.errno is None or (reads_the_cache and isinstance(error, FileNotFoundError))
        return DAMAGED_CACHE if is_damage else NO_CACHE
    if isinstance(error, ImportError):  # of the launcher, which Triton compiles and keeps in its cache
        return DAMAGED_CACHE
    if isinstance(error, RuntimeError | AssertionError) or type(error).__name__ in ("OutOfResources", "PTXASError"):
        return next((fault for fault in FAULTS if any(sign in message for sign in fault.signs)), None)
    # A damaged file is no JSON, is no text, or lacks an entry. Elsewhere such an error is a fault of a kernel.
    is_damage = isinstance(error, ValueError | LookupError | TypeError | AttributeError | EOFError) and reads_the_cache
    return DAMAGED_CACHE if is_damage or "'KernelMetadata' object has no attribute" in message else None


def _places(traceback: TracebackType | None) -> Iterator[tuple[str, str]]:
    """(module, function) of each frame that an error passed. A method is named with its class."""
    while traceback is not None:
        frame = traceback.tb_frame
        name, instance = frame.f_code.co_name, frame.f_locals.get("self")
        owner = f"{type(instance).__name__}." if name == "__init__" else ""
        yield frame.f_globals.get("__name__", ""), owner + name
        traceback = traceback.tb_next


# --- What was refused in this process ---

Scope = tuple[object, str]  # a target and a device, or a target and layers of one dtype and size on a device
_reasons: dict[Scope, str] = {}
_warned: set[Scope] = set()
# Changes with every refusal. torch.compile guards on it, so it then compiles again without the kernels.
state = ""


class Layers(NamedTuple):
    """Which layers are concerned: those of one size and dtype, on a device of a target (target.py)."""

    target: object
    device: torch.device
    dtype: torch.dtype
    hidden_size: int

    def everywhere(self) -> str:
        return f"all LSTM layers on {self.device}"

    def alone(self) -> str:
        return f"layers with hidden_size {self.hidden_size} in {self.dtype} on {self.device}"

    def scopes(self) -> tuple[Scope, Scope]:
        """Under which such layers may have been refused."""
        return (self.target, self.everywhere()), (self.target, self.alone())


def remember(error: LaunchRefused, layers: Layers) -> None:
    """Keep such layers away from the kernels from now on."""
    global state
    _reasons[layers.target, layers.everywhere() if error.everywhere else layers.alone()] = error.reason
    state = _described()


def give_way(error: LaunchRefused, layers: Layers) -> None:
    """`remember`, by who computes without the kernels, and warn of it the first time."""
    remember(error, layers)
    known(layers)


def known(layers: Layers) -> str | None:
    """Why kernels for such layers were refused before; None: they were not. Warns of it the first time."""
    for scope in layers.scopes():
        reason = _reasons.get(scope)
        if reason is not None:
            if scope not in _warned:
                _warned.add(scope)
                text = f"{reason}. Until then PyTorch's own function computes {scope[1]}. "
                text += 'backend("triton") tries again'
                warnings.warn(text, RuntimeWarning, stacklevel=_level_of_caller())
            return reason
    return None


def forget(layers: Layers | None = None) -> None:
    """Let "auto" try the kernels of such layers again, since they have now run; None: those of all layers.

    What was refused to other layers stays refused: smaller layers may run where larger ones cannot.
    """
    global state
    for scope in list(_reasons) if layers is None else layers.scopes():
        _reasons.pop(scope, None)
        _warned.discard(scope)
    state = _described()


def _described() -> str:
    return " and ".join([what for _, what in list(_reasons)])  # a copy: other threads may change it


def _level_of_caller() -> int:
    """The stack level of the code that called this library, as `warnings.warn` counts in `remember`."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith((f"{__package__}.", "torch.")):
        level, frame = level + 1, frame.f_back
    return level

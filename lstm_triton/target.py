"""Where kernels run: on GPUs, or on what stands in for them.

A *target* says for which tensors the kernels are, describes the device to the planner, and runs a kernel. GPUs are the
usual target. The interpreter (interpreter.py) is another one; tests and benchmarks bring their own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Device:
    """What the planner needs to know of a GPU.

    Attributes:
        name: the product's name, the key of its table of measured plans.
        arch: "sm_90", "gfx942", ...
        multiprocessors: how many programs run at the same time when each takes a whole multiprocessor.
        shared_bytes: bytes of shared memory that one program can have.
    """

    name: str
    arch: str
    multiprocessors: int
    shared_bytes: int

    @staticmethod
    def of(device: torch.device) -> "Device":
        """The device as the current target describes it."""
        return _current.describe(device)

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability as one number, 90 for 9.0; 0 elsewhere."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def threads_per_warp(self) -> int:
        return 64 if self.arch.startswith("gfx9") else 32


INTERPRETER = Device("interpreter", "interpreter", 16, 64 * 1024)  # a CPU stands for a small GPU


class Target(Protocol):
    """Where kernels run."""

    def takes(self, device: torch.device) -> bool:
        """Whether the kernels are for tensors on this device."""
        ...

    def describe(self, device: torch.device) -> Device:
        """The device's properties, for the planner."""
        ...

    def may_take_tf32(self, tensor: Tensor) -> bool:
        """Whether PyTorch's own matrix products of a tensor depend on the TF32 setting."""
        ...

    def run(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        arguments: Mapping[str, object],
        options: Mapping[str, object],
    ) -> None:
        """Run a kernel. `arguments` has all parameters of the kernel by name, `options` are those of the compiler."""
        ...


class Gpus:
    """The GPUs of this machine, as PyTorch numbers them."""

    def takes(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def describe(self, device: torch.device) -> Device:
        if device.type == "cpu":
            return INTERPRETER
        return _gpu(device.index if device.index is not None else torch.cuda.current_device())

    def may_take_tf32(self, tensor: Tensor) -> bool:
        return tensor.dtype == torch.float32 and tensor.is_cuda

    def run(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        arguments: Mapping[str, object],
        options: Mapping[str, object],
    ) -> None:
        values = in_order(kernel, arguments)
        if device.type == "cpu":  # a backward pass, after the interpreter's `with` block
            kernel[grid](*values)
            return
        with torch.cuda.device(device):
            kernel[grid](*values, **options)


def in_order(kernel: Any, arguments: Mapping[str, object]) -> list[object]:
    """A kernel's arguments in the order of its parameters: Triton takes longer to find arguments by their names."""
    return [arguments[name] for name in kernel.arg_names]


@cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        shared_bytes = 160 * 1024 if arch.startswith("gfx95") else 64 * 1024
    else:
        arch = f"sm_{properties.major}{properties.minor}"
        shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device(properties.name, arch, properties.multi_processor_count, shared_bytes)


_current: Target = Gpus()  # a plain global: torch.compile guards on it


def current() -> Target:
    return _current


@contextmanager
def running_on(target: Target) -> Iterator[None]:
    """Run every kernel on this target inside the `with` block. Holds for all threads."""
    global _current
    previous, _current = _current, target
    try:
        yield
    finally:
        _current = previous


class Launched(NamedTuple):
    """One launch of a kernel, as `Target.run` was asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, object]
    options: Mapping[str, object]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


Watcher = Callable[[Launched], object]
_before: list[Watcher] = []
_after: list[Watcher] = []


def run(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    arguments: Mapping[str, object],
    options: Mapping[str, object],
) -> None:
    """Run a kernel on the current target: every launch of this library goes through here."""
    if not (_before or _after):
        _current.run(kernel, grid, device, arguments, options)
        return
    launched = Launched(kernel, grid, arguments, options)
    for call in _before:
        call(launched)
    _current.run(kernel, grid, device, arguments, options)
    for call in _after:
        call(launched)


@contextmanager
def watched_launches(before: Watcher | None = None, after: Watcher | None = None) -> Iterator[None]:
    """Call these functions before and after every launch inside the `with` block, on whatever target."""
    watchers = [(calls, call) for calls, call in ((_before, before), (_after, after)) if call is not None]
    for calls, call in watchers:
        calls.append(call)
    try:
        yield
    finally:
        for calls, call in watchers:
            calls.remove(call)


@contextmanager
def recorded_launches() -> Iterator[list[Launched]]:
    """Yield a list to which every launch inside the `with` block is appended before it runs."""
    launches: list[Launched] = []
    with watched_launches(before=launches.append):
        yield launches

"""Where kernels run: on GPUs, or on what stands in for them.

A *target* says which tensors the kernels take, describes the device to the planner, and runs a kernel. GPUs are the
usual target. The interpreter (interpreter.py) is another target. Tests and benchmarks bring their own targets.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from . import refusal
from .prepared_kernel import PreparedKernel
from .settings import Block, Setting


@dataclass(frozen=True)
class Device:
    """What the planner needs to know about a GPU.

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
        return current().describe(device)

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability as one number, 90 for 9.0; 0 elsewhere."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def threads_per_warp(self) -> int:
        return 64 if self.arch.startswith("gfx9") else 32


INTERPRETER = Device("interpreter", "interpreter", 16, 64 * 1024)  # to the planner, a CPU is a small GPU


class KernelLaunch:
    """One launch of a kernel.

    Attributes:
        prepared: the kernel, its grid, its compile-time arguments and its options.
        device: where its tensors are.
        values: of all parameters of the kernel, in their order.
    """

    __slots__ = ("device", "prepared", "values")

    def __init__(self, prepared: PreparedKernel, device: torch.device, values: list[Any]) -> None:
        self.prepared, self.device, self.values = prepared, device, values

    @property
    def kernel(self) -> Any:
        return self.prepared.kernel

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def grid(self) -> tuple[int, ...]:
        return self.prepared.grid

    @property
    def options(self) -> Mapping[str, object]:
        """The options of Triton's compiler and launcher."""
        return self.prepared.options

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by the names of the kernel's parameters."""
        return dict(zip(self.kernel.arg_names, self.values, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer: that of the first tensor, for every kernel of this library."""
        dtypes = [value.dtype for value in self.values if isinstance(value, Tensor)]
        return dtypes[0] if dtypes else torch.float32

    @property
    def hidden_size(self) -> int:
        """H of the layer; 0 for a kernel that does not know H."""
        hidden_size = self.arguments.get("HIDDEN", 0)
        assert isinstance(hidden_size, int)
        return hidden_size


class Target(Protocol):
    """Where kernels run."""

    def takes(self, device: torch.device) -> bool:
        """Whether the kernels take tensors on this device."""
        ...

    def describe(self, device: torch.device) -> Device:
        """The device's properties, for the planner."""
        ...

    def may_take_tf32(self, tensor: Tensor) -> bool:
        """Whether PyTorch's own matrix products of a tensor depend on the TF32 setting."""
        ...

    def may_refuse(self, device: torch.device) -> bool:
        """Whether a launch may be refused there (refusal.py), so that a trial pays before torch.compile."""
        ...

    def run(self, launch: KernelLaunch) -> None: ...


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

    def may_refuse(self, device: torch.device) -> bool:
        return True

    def run(self, launch: KernelLaunch) -> None:
        if launch.device.type == "cpu":  # interpreted; a backward pass may run after the interpreter's `with` block
            launch.prepared.run_interpreted(launch.values)
        else:
            self.run_on_gpu(launch, launch.device.index)

    def run_on_gpu(self, launch: KernelLaunch, index: int) -> None:
        if torch._C._cuda_getDevice() == index:
            launch.prepared.run_on_gpu(index, launch.values)
            return
        with torch.cuda.device(index):
            launch.prepared.run_on_gpu(index, launch.values)


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


_target: Setting[Target] = Setting("target", Gpus())

Watcher = Callable[[KernelLaunch], object]
_before: list[Watcher] = []
_after: list[Watcher] = []


def current() -> Target:
    return _target.now


def running_on(target: Target, *, all_threads: bool = False) -> Block:
    """Run every kernel on this target inside the `with` block (settings.py)."""
    return _target.block(target, all_threads=all_threads)


def layers(device: torch.device, dtype: torch.dtype, hidden_size: int) -> refusal.Layers:
    """Layers on the current target, of which kernels may be refused."""
    return refusal.Layers(current(), device, dtype, hidden_size)


def run(launch: KernelLaunch, on: Target | None = None) -> None:
    """Run a kernel on a target; None: on the current one. Every launch of this library goes through here.

    Raises:
        LaunchRefused: Triton cannot compile the kernel on this machine, or the driver does not launch it.
    """
    for watch in _before:
        watch(launch)
    try:
        (on or current()).run(launch)
    except Exception as error:
        instead = refusal.refused(error)
        if instead is None:
            raise
        # Who falls back remembers it, too. A program of torch.compile cannot: it raises, and is compiled anew.
        refusal.remember(instead, layers(launch.device, launch.dtype, launch.hidden_size))
        raise instead from error
    for watch in _after:
        watch(launch)


@contextmanager
def watched_launches(before: Watcher | None = None, after: Watcher | None = None) -> Iterator[None]:
    """Call these functions before and after every launch inside the `with` block, on any target."""
    watchers = [(calls, call) for calls, call in ((_before, before), (_after, after)) if call is not None]
    for calls, call in watchers:
        calls.append(call)
    try:
        yield
    finally:
        for calls, call in watchers:
            calls.remove(call)


@contextmanager
def recorded_launches() -> Iterator[list[KernelLaunch]]:
    """Yield a list to which every launch inside the `with` block is appended before it runs."""
    launches: list[KernelLaunch] = []
    with watched_launches(before=launches.append):
        yield launches

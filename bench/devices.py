"""Where a case runs, and how time and memory are read: a GPU, a CPU, or kernels that are interpreted on a CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property

import torch

from lstm_triton.ending import Mistake

Call = Callable[[], object]

# A GPU keeps the clock that it has. The host gets ahead of it by at most this time (see Cuda.time).
LONGEST_SPIN_US = 5_000


class UnusableDevice(Mistake):
    """The device is not there. The message is one line."""


class Cpu:
    name = "cpu"
    gpu = "none: CPU"  # the provenance's `gpu`
    torch_device = torch.device("cpu")
    rounds = (5, 200)  # how often each system is timed: at least, at most

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Kernels run inside of this, forward and backward."""
        yield

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""

    def alive(self) -> bool:
        """Whether the device still works after an error."""
        return True

    def evict(self) -> None:
        """Remove earlier inputs from the cache."""

    def wall_time(self, call: Call) -> float:
        """Microseconds from the start of the call until the device has done all its work: with the call's overhead."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return (time.perf_counter() - start) * 1e6

    def time(self, call: Call, host_us: float = 0.0) -> float:
        """Microseconds that the device works on the call. host_us: about how long the host needs to launch the work."""
        return self.wall_time(call)

    def memory(self, forward: Call, whole: Call) -> tuple[int | None, int | None]:
        """Bytes that stay allocated while the result of `forward` lives, and the peak of `whole`."""
        return None, None

    def driver(self) -> str | None:
        return None


class Interpreter(Cpu):
    """A CPU that interprets the kernels. Values are right, times mean nothing."""

    name = "interpreter"
    gpu = "none: interpreter"
    rounds = (1, 1)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        from lstm_triton.interpreter import interpret

        with interpret():
            yield


class Cuda(Cpu):
    """An NVIDIA or AMD GPU."""

    name = "cuda"
    torch_device = torch.device("cuda", 0)

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.gpu = properties.name
        self.cache_bytes = getattr(properties, "L2_cache_size", 1 << 26)

    @cached_property
    def evictor(self) -> torch.Tensor:
        return torch.empty(2 * self.cache_bytes, dtype=torch.int8, device=self.torch_device)

    @cached_property
    def cycles_per_us(self) -> float:
        cycles = 1_000_000
        torch.cuda._sleep(cycles)
        return cycles / self._between_events(lambda: torch.cuda._sleep(cycles))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with torch.cuda.device(self.torch_device):
            yield

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def alive(self) -> bool:
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True

    def evict(self) -> None:
        self.evictor.zero_()

    def _between_events(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end) * 1e3)

    def time(self, call: Call, host_us: float = 0.0) -> float:
        # The device spins until the host has launched the work. So gaps between launches do not count: in a training
        # loop the host is ahead of the device, too.
        torch.cuda._sleep(int(min(host_us, LONGEST_SPIN_US) * self.cycles_per_us))
        return self._between_events(call)

    def memory(self, forward: Call, whole: Call) -> tuple[int | None, int | None]:
        self.synchronize()
        before = torch.cuda.memory_allocated(self.torch_device)
        result = forward()
        kept = torch.cuda.memory_allocated(self.torch_device) - before
        del result
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        whole()
        return kept, torch.cuda.max_memory_allocated(self.torch_device) - before

    def driver(self) -> str | None:
        if torch.version.hip is not None:
            return f"ROCm {torch.version.hip}"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
        return None


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products of cuDNN and of matmul may run in TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


DEVICES = {"cpu": Cpu, "cuda": Cuda, "interpreter": Interpreter}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def require(name: str) -> None:
    """Raise UnusableDevice unless the device is there. Nothing is started on a GPU."""
    if name not in DEVICES:
        raise UnusableDevice(f"unknown device {name!r}: choose from {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UnusableDevice("device 'cuda': torch finds no GPU here (torch.cuda.is_available() is False)")
    if name == "interpreter":
        for package in ("triton", "greenlet"):
            if importlib.util.find_spec(package) is None:
                raise UnusableDevice(f"device 'interpreter': needs the package {package}")


def open_device(name: str) -> Cpu:
    require(name)
    return DEVICES[name]()

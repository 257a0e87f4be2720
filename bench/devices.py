"""Where a case runs, and how time and memory are read there: a GPU, a CPU, or the kernels interpreted on a CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property

import torch

Call = Callable[[], object]

# GPUs keep the clock they are found with; the host gets at most this far ahead of them (see Cuda.time).
LONGEST_SPIN_US = 5_000


class UnusableDevice(Exception):
    """The device asked for is not there; the message is one line."""


class Cpu:
    name = "cpu"
    gpu = "none: CPU"  # the provenance's `gpu`
    torch_device = torch.device("cpu")
    rounds = (5, 200)  # at least, at most: how often each system is timed

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """What must be on while kernels run, forward and backward."""
        yield

    def synchronize(self) -> None:
        """Wait until everything asked for is done."""

    def alive(self) -> bool:
        """Whether the device still works after an error."""
        return True

    def evict(self) -> None:
        """Drive earlier inputs out of the cache."""

    def wall_time(self, call: Call) -> float:
        """Microseconds from asking until everything is done, the call's overhead included."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return (time.perf_counter() - start) * 1e6

    def time(self, call: Call, host_us: float = 0.0) -> float:
        """Microseconds that the device works on the call. host_us: about how long the host needs to ask for it."""
        return self.wall_time(call)

    def memory(self, forward: Call, whole: Call) -> tuple[int | None, int | None]:
        """Bytes that `forward` leaves allocated while its result lives; the most that `whole` has at a time."""
        return None, None

    def driver(self) -> str | None:
        return None


class Interpreter(Cpu):
    """The kernels, interpreted on a CPU: right values, meaningless times."""

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
        # The device spins until the host has asked for the work, so that launch gaps do not count: in a training loop,
        # too, the host is ahead of the device.
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
    """Let float32 products run in TF32, or not: cuDNN's and those of matmul."""
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
    """Raise UnusableDevice unless the device is there. Starts nothing on a GPU."""
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

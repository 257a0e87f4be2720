"""A GPU that does not exist: what Triton asks of its driver, and launches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.emulator.machine import LANES, Machine
from tests.emulator.program import program_of


def launch(text: str, grid: tuple[int, ...], arguments: Sequence[Any], shared_bytes: int, seed: int) -> None:
    """Run the entry point of a PTX text to its end.

    Args:
        arguments: tensors, whose contents the kernel sees and changes, or numbers; missing ones are 0.
    """
    program = program_of(text)
    machine = Machine(program, grid, shared_bytes, seed)
    for at, (value, dtype) in enumerate(zip(arguments, program.parameters, strict=False)):
        value = machine.address_of(value) if isinstance(value, torch.Tensor) else value
        bytes_ = np.array([value]).astype(dtype).view(np.uint8)
        machine.parameters[8 * at : 8 * at + len(bytes_)] = bytes_
    with np.errstate(all="ignore"):
        machine.run()


class _Driver:
    """What Triton asks of the driver of a GPU."""

    def __init__(self, capability: int, shared_bytes: int, seed: int) -> None:
        self.capability, self.shared_bytes, self.seed = capability, shared_bytes, seed
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, LANES)

    def get_current_device(self) -> int:
        return 1000 + self.capability  # Triton keeps kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, kernel, 0, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        from triton.runtime import driver

        def flat(value: Any) -> Iterator[Any]:
            if isinstance(value, tuple):
                for each in value:
                    yield from flat(each)
            else:
                yield value

        def run(x: int, y: int, z: int, stream: int, function: bytes, packed: Any, *others: Any) -> None:
            types, values = flat(tuple(source.signature.values())), flat(others[3:])
            arguments = [value for type_, value in zip(types, values, strict=True) if type_ != "constexpr"]
            launch(function.decode(), (x, y, z), arguments, metadata.shared, driver.active.seed)

        return run


@contextmanager
def emulated(capability: int = 90, shared_bytes: int = 232448, seed: int = 0) -> Iterator[None]:
    """Compile and emulate the kernels that are launched inside the `with` block, on CPU tensors.

    Triton must not be interpreting: TRITON_INTERPRET is not 1 when it is first imported.

    Args:
        capability: the compute capability of the GPU that is emulated, 80 or 90.
        shared_bytes: shared memory that one program can have.
        seed: of the schedule.
    """
    from triton.backends import Backend, backends
    from triton.runtime import driver

    class Compiler(backends["nvidia"].compiler):
        """Ends with PTX."""

        def __init__(self, target: Any) -> None:
            super().__init__(target)
            self.binary_ext = "ptx"

        def hash(self) -> str:
            return f"{super().hash()}, without a binary"  # what is cached is of no use to a GPU

        def add_stages(self, stages: dict[str, Any], *arguments: Any) -> None:
            super().add_stages(stages, *arguments)
            del stages["cubin"]

    changed = {"nvidia": Backend(compiler=Compiler, driver=backends["nvidia"].driver)}
    with (
        mock.patch.dict(backends, changed),
        mock.patch.object(driver, "_active", _Driver(capability, shared_bytes, seed)),
    ):
        yield

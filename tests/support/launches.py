"""Which kernels are launched, and how."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lstm_triton import target
from lstm_triton.scan.plan import Plan


@dataclass
class Launched:
    """One launch."""

    kernel: str
    arguments: dict[str, Any]  # of the kernel, its compile-time constants among them
    plan: Plan | None  # of a scan


class Launches(list[Launched]):
    """Launches in their order."""

    @property
    def kernels(self) -> list[str]:
        return [each.kernel for each in self]

    @property
    def scans(self) -> list[Launched]:
        return [each for each in self if each.plan is not None]

    @property
    def plans(self) -> list[Plan]:
        """Of the scans."""
        return [each.plan for each in self if each.plan is not None]


@contextmanager
def recorded_launches() -> Iterator[Launches]:
    """Yield what is launched inside the `with` block, noted before it runs; of scans with their plans."""
    found = Launches()

    def recorded(launched: target.KernelLaunch) -> None:
        found.append(Launched(launched.name, launched.arguments, launched.prepared.plan))

    with target.watched_launches(before=recorded):
        yield found

"""Which kernels are launched, and how."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lstm_triton import target
from lstm_triton.scan import backward, forward, launch
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
    found, plans = Launches(), list[Plan]()

    def recorded_scan(kernel: Any, plan: Plan, device: torch.device, **arguments: Any) -> None:
        plans.append(plan)
        launch.launch_scan(kernel, plan, device, **arguments)

    def recorded(launched: target.KernelLaunch) -> None:
        found.append(Launched(launched.name, dict(launched.arguments), plans.pop() if plans else None))

    with pytest.MonkeyPatch.context() as patch, target.watched_launches(before=recorded):
        for scan in (forward, backward):
            patch.setattr(scan, "launch_scan", recorded_scan)
        yield found

"""Which kernels are launched, and how: the one place where tests stand between the library and its launches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lstm_triton import ops
from lstm_triton.planner import Plan


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


def replace_launch(patch: pytest.MonkeyPatch, launch: Callable[..., None]) -> None:
    """Let `launch` launch every kernel of the library, with the arguments of the library's own function."""
    patch.setattr(ops, "launch", launch)


@contextmanager
def recorded_launches() -> Iterator[Launches]:
    """Every launch inside the `with` block, noted before it happens."""
    found, plans = Launches(), []
    launch, launch_scan = ops.launch, ops._launch

    def recorded_scan(kernel: Any, plan: Plan, device: torch.device, **arguments: Any) -> None:
        plans.append(plan)
        launch_scan(kernel, plan, device, **arguments)

    def recorded(
        kernel: Any, grid: Any, device: torch.device, arguments: Any, constants: Any, options: dict[str, Any]
    ) -> None:
        plan = plans.pop() if plans else None
        found.append(Launched(kernel.fn.__name__, {**arguments, **constants}, plan))
        launch(kernel, grid, device, arguments, constants, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_launch", recorded_scan)
        replace_launch(patch, recorded)
        yield found

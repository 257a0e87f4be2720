"""What the planner says of a case."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cases import Case
from .devices import Cpu
from .problem import TORCH_DTYPES

if TYPE_CHECKING:
    from lstm_triton.planner import Device, Kind, Launch, Plan

# What shows a scan's time; the rest of it is the same for all plans.
MODES: dict[Kind, str] = {"forward": "forward", "backward": "forward+backward"}


def launches_of(kind: Kind, case: Case, device: Cpu) -> tuple[Launch, ...]:
    """A scan's launches, with the planner's choices."""
    from lstm_triton import ops

    return ops.launches_of(
        kind,
        num_layers=case.layers,
        directions=2 if case.bidirectional else 1,
        batch_size=case.B,
        input_size=case.I,
        hidden_size=case.H,
        dtype=TORCH_DTYPES[case.dtype],
        device=device.torch_device,
    )


def candidates_of(kind: Kind, case: Case, device: Device, lanes: int = 1, chained: bool = False) -> list[Plan]:
    """Every plan that fits the device for one launch of a scan, the one that promises most first."""
    from lstm_triton import planner

    return planner.candidates(
        kind,
        batch_size=case.B,
        input_size=case.I,
        hidden_size=case.H,
        dtype=TORCH_DTYPES[case.dtype],
        device=device,
        allow_tf32=case.dtype == "tf32",
        lanes=lanes,
        chained=chained,
    )

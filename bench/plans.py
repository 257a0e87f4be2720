"""What the planner says of a case."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .cases import BenchCase
from .devices import Cpu
from .problem import TORCH_DTYPES
from .results import JsonObject

if TYPE_CHECKING:
    from lstm_triton.planner import Device, Kind, Launch, Plan

# The mode in which a scan's time is seen. What else runs in this mode is the same for all plans.
SCAN_MODES: dict[Kind, str] = {"forward": "forward", "backward": "forward+backward"}


def planned_launches(kind: Kind, case: BenchCase, device: Cpu) -> tuple[Launch, ...]:
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


def candidates_of(kind: Kind, case: BenchCase, device: Device, lanes: int = 1, chained: bool = False) -> list[Plan]:
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


def first_plans(case: BenchCase, device: Cpu) -> dict[Kind, Plan]:
    """The planner's choice for the first launch of each scan."""
    return {kind: planned_launches(kind, case, device)[0].plan for kind in SCAN_MODES}


def sizes_of(plan: Plan) -> str:
    sizes = f"{plan.block_batch} x {plan.block_hidden}, {plan.programs} programs"
    return sizes + (", input fused" if plan.fuse_input else "")


def plans_to_try(case: BenchCase, device: Cpu, kind: Kind, most: int) -> list[tuple[str, JsonObject]]:
    """Labels and plans: the planner's with the portable wait, the planner's without a hold, the next candidates."""
    from lstm_triton.planner import Device

    found = candidates_of(kind, case, Device.of(device.torch_device))[:most]
    named = {"portable wait": dataclasses.replace(found[0], thread_elements=0)}
    named["no hold"] = dataclasses.replace(found[0], hold=0)
    named |= {sizes_of(plan): plan for plan in found[1:]}
    return [(label, dataclasses.asdict(plan)) for label, plan in named.items() if plan != found[0]]

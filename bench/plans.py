"""What the planner says of a case."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .cases import BenchCase
from .devices import Cpu
from .problem import TORCH_DTYPES
from .results import JsonObject

if TYPE_CHECKING:
    from lstm_triton.scan.plan import Kind, Launch, Plan, ScanShape
    from lstm_triton.target import Device

# The mode whose time shows the time of a scan. Everything else in this mode is the same for all plans.
SCAN_MODES: dict[Kind, str] = {"forward": "forward", "backward": "forward+backward"}


def shape_of(kind: Kind, case: BenchCase, device: Device) -> ScanShape:
    """What the planner is asked for one lane of the first layer of a case."""
    from lstm_triton.scan.plan import ScanShape

    return ScanShape(kind, case.B, case.I, case.H, TORCH_DTYPES[case.dtype], device, allow_tf32=case.dtype == "tf32")


def planned_launches(kind: Kind, case: BenchCase, device: Cpu) -> tuple[Launch, ...]:
    """The launches of a scan, with the plans that the planner chooses."""
    from lstm_triton.scan import planner
    from lstm_triton.scan.launch import allows_tf32
    from lstm_triton.target import Device

    first = dataclasses.replace(shape_of(kind, case, Device.of(device.torch_device)), allow_tf32=allows_tf32())
    return planner.launches(first, case.layers, directions=2 if case.bidirectional else 1)


def candidates_of(kind: Kind, case: BenchCase, device: Device, lanes: int = 1, chained: bool = False) -> list[Plan]:
    """All plans that fit the device for one launch of a scan, the most promising first."""
    from lstm_triton.scan import planner

    return planner.candidates(dataclasses.replace(shape_of(kind, case, device), lanes=lanes, chained=chained))


def first_plans(case: BenchCase, device: Cpu) -> dict[Kind, Plan]:
    """The plan that the planner chooses for the first launch of each scan."""
    return {kind: planned_launches(kind, case, device)[0].plan for kind in SCAN_MODES}


def label_of(plan: Plan) -> str:
    sizes = f"{plan.block_batch} x {plan.block_hidden}, {plan.programs} programs"
    return sizes + (", input fused" if plan.fuse_input else "")


def plans_to_try(case: BenchCase, device: Cpu, kind: Kind, most: int) -> list[tuple[str, JsonObject]]:
    """Plans to time beside the planner's own, with labels.

    These are the planner's plan with the portable wait and without a hold, and the next candidates.
    """
    from lstm_triton.target import Device

    found = candidates_of(kind, case, Device.of(device.torch_device))[:most]
    named = {"portable wait": dataclasses.replace(found[0], thread_elements=0)}
    named["no hold"] = dataclasses.replace(found[0], hold=0)
    named |= {label_of(plan): plan for plan in found[1:]}
    return [(label, dataclasses.asdict(plan)) for label, plan in named.items() if plan != found[0]]

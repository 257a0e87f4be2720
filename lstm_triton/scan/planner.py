"""The one place where sizes are chosen: from a layer's sizes and a device's properties to tiles, warps and weights.

`plan` is a pure function of a `ScanShape`. It lists the plans that fit the device (`candidates`, fit.py), estimates the
cycles of a step for each plan (cost.py), and takes the cheapest plan. If a plan was measured on the device
(`table_path`), it takes the measured plan.

Nothing here depends on the number of steps. The batch size only decides between a few tile heights, and whether a
program serves one batch tile or several. So a layer needs few compiled kernels, whatever the batches are.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import torch

from ..target import Device
from .cost import StepCost, hold
from .fit import Placement, divided, placed
from .plan import (
    CellPlan,
    Kind,
    Launch,
    Plan,
    ScanShape,
    chunk_columns,
    divide_up,
    dot_precision,
    power_of_2,
    round_up,
    tf32_rounding,
)
from .tables import BadTable, read_plans

# The planner remembers so many plans (about 1 KB each), and so many layers (about 20 KB each): what fits the device for
# any batch size, which takes most of the time.
PLANNED_CALLS, PLANNED_LAYERS = 1024, 128
CELL_TILE_BYTES = 80 * 1024  # bytes of weights and rows that a program of the cell loads at a time, in all stages


def plan(shape: ScanShape) -> Plan:
    """The plan for one launch of a scan.

    Raises:
        ValueError: no plan fits the device.
    """
    return _plan(shape, forced_plans[shape.kind])


def candidates(shape: ScanShape) -> list[Plan]:
    """Every plan that fits the device, the plan with the fewest predicted cycles first."""
    found = [_assembled(placement, cost.cycles(shape.batch_size), shape) for placement, cost in _fitting(shape)]
    return sorted(found, key=lambda each: each.predicted_cycles)


def _fitting(shape: ScanShape) -> list[tuple[Placement, StepCost]]:
    """What fits the device and is not much higher than the batch."""
    most = max(8, power_of_2(shape.batch_size))
    return [each for each in _placements(replace(shape, batch_size=1)) if each[1].block_batch <= most]


@lru_cache(maxsize=PLANNED_LAYERS)
def _placements(layer: ScanShape) -> tuple[tuple[Placement, StepCost], ...]:
    """What fits the device, for any batch size. The batch size of `layer` is 1: nothing here depends on it."""
    found = []
    for block_hidden in (8, 16, 32, 64, 128):
        for block_batch in (8, 16, 32, 64):
            for fuse_input in (False, True) if layer.kind == "forward" and not layer.chained else (False,):
                placement = _largest_chunks(layer, block_batch, block_hidden, fuse_input)
                if placement is not None:
                    found.append((placement, StepCost.of(placement)))
    return tuple(found)


def launches(first: ScanShape, num_layers: int, directions: int) -> tuple[Launch, ...]:
    """The launches that a stack of layers takes, from the first layer to the last.

    Layers of one direction share a launch if they fit on the device together and take less time together. Each layer is
    then one step behind the layer below. A bidirectional layer can begin only when the layer below has ended, so only
    its two directions share a launch.

    Args:
        first: the shape of one lane of the first layer.
        num_layers, directions: the stack's number of layers, and of directions of each layer.

    Raises:
        ValueError: no plan fits the device.
    """
    return _launches(first, num_layers, directions, forced_plans[first.kind])


@lru_cache(maxsize=PLANNED_CALLS)  # every call of a layer needs it
def _launches(first: ScanShape, num_layers: int, directions: int, forced_plan: Plan | None) -> tuple[Launch, ...]:
    found, lane = [], 0
    for count in _lane_counts(first, num_layers, directions, forced_plan):
        input_size = first.input_size if lane < directions else directions * first.hidden_size
        shape = replace(first, input_size=input_size, lanes=count, chained=directions == 1 and count > 1)
        found.append(Launch(lane, _plan(shape, forced_plan)))
        lane += count
    return tuple(found)


def _lane_counts(first: ScanShape, num_layers: int, directions: int, forced_plan: Plan | None) -> tuple[int, ...]:
    """How many lanes each launch takes."""
    if directions == 1:
        groupings = [_evenly(num_layers, parts) for parts in range(1, num_layers + 1)]
    else:
        groupings = [(2,) * num_layers, (1,) * (num_layers * directions)]
    if forced_plan is not None:
        groupings = [grouping for grouping in groupings if max(grouping) == forced_plan.lanes] or groupings[-1:]
    widest = replace(first, input_size=max(first.input_size, directions * first.hidden_size))

    def cycles_of(grouping: tuple[int, ...]) -> int | None:
        """Cycles of one step of all layers; None: the grouping does not fit the device."""
        total = 0
        for count in grouping:
            found = _best(replace(widest, lanes=count, chained=directions == 1 and count > 1))
            if found is None:
                return None
            total += found.predicted_cycles
        return total

    possible = [(found, grouping) for grouping in groupings if (found := cycles_of(grouping)) is not None]
    return min(possible, key=lambda each: each[0])[1] if possible else groupings[-1]


def _evenly(total: int, parts: int) -> tuple[int, ...]:
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def _plan(shape: ScanShape, forced_plan: Plan | None) -> Plan:
    if forced_plan is not None and (forced_plan.lanes, forced_plan.chained) == (shape.lanes, shape.chained):
        return forced_plan
    found = _best(shape)
    if found is None:
        raise ValueError(f"no plan for {shape} fits {shape.device}")
    return found


@lru_cache(maxsize=PLANNED_CALLS)
def _best(shape: ScanShape) -> Plan | None:
    """The measured plan, otherwise the plan with the fewest predicted cycles; None: no plan fits the device."""
    table = _table(shape.device)
    if table and (measured := table.get(shape.key)) is not None:
        return measured
    batch_size = shape.batch_size
    finalists = _finalists(replace(shape, batch_size=round_up(batch_size, 8) if batch_size >= 8 else 1))
    priced = [(each.predicted_cycles + cost.projecting(batch_size), each) for each, cost in finalists]
    cycles, found = min(priced, key=lambda each: each[0], default=(0, None))
    return None if found is None else replace(found, predicted_cycles=cycles)


@lru_cache(maxsize=PLANNED_CALLS)
def _finalists(shape: ScanShape) -> tuple[tuple[Plan, StepCost], ...]:
    """The best plan of those that fuse the input projection, and the best of the others, without its projection.

    Only the number of tiles decides among either. So the batch sizes from 8 * n + 1 to 8 * n + 8 share their finalists.
    """
    found: dict[bool, tuple[int, int, Placement, StepCost]] = {}
    for number, (placement, cost) in enumerate(_fitting(shape)):
        cycles = cost.cycles(shape.batch_size) - cost.projecting(shape.batch_size)
        is_fused = placement.division.fuse_input
        if is_fused not in found or cycles < found[is_fused][1]:
            found[is_fused] = number, cycles, placement, cost
    finalists = sorted(found.values(), key=lambda each: each[0])  # of plans with the same cycles the first one wins
    return tuple((_assembled(placement, cycles, shape), cost) for _, cycles, placement, cost in finalists)


def _largest_chunks(shape: ScanShape, block_batch: int, block_hidden: int, fuse_input: bool) -> Placement | None:
    """The placement with these tiles and the largest chunks that fit the device; None: no chunks fit."""
    for row_bytes in (1024, 512, 256, 128, 64):
        division = divided(shape, block_batch, block_hidden, fuse_input, row_bytes)
        placement = None if division is None else placed(division)
        if placement is not None:
            return placement
    return None


def _assembled(placement: Placement, cycles: int, shape: ScanShape) -> Plan:
    """The plan for a batch of `shape`."""
    division = replace(placement.division, shape=shape)
    placement = replace(placement, division=division)
    device = shape.device
    return Plan(
        block_batch=division.block_batch,
        block_hidden=division.block_hidden,
        slices=division.slices,
        batch_tiles=division.batch_tiles,
        groups=division.groups,
        block_k=division.block_k,
        block_input=division.block_input,
        split_k=division.split_k,
        resident_chunks=placement.resident_chunks,
        chunks=division.chunks,
        group_chunks=placement.group_chunks,
        accumulators=placement.accumulators,
        fuse_input=division.fuse_input,
        dot_precision=shape.dot_precision,
        tf32_rounding=tf32_rounding(shape.dot_precision, device),
        thread_elements=division.block_batch * division.block_k // division.threads if device.capability else 0,
        packed=shape.itemsize == 2 and device.capability >= 90,
        num_warps=division.num_warps,
        predicted_cycles=cycles,
        lanes=shape.lanes,
        chained=shape.chained,
        register_chunks=placement.register_chunks,
        hold=hold(placement),
    )


# --- Measured plans and forced plans ---


def table_path(device: Device) -> Path:
    """Where a device's measured plans are kept: `python -m bench tune` writes the file."""
    name = "".join(letter if letter.isalnum() else "-" for letter in device.name.lower())
    return Path(__file__).parent / "plans" / f"{name}.json"


@cache
def _table(device: Device) -> dict[str, Plan]:
    """The measured plans of a device; empty if there are none, or if the table is wrong."""
    path = table_path(device)
    if not path.exists():
        return {}
    try:
        return read_plans(path, device, candidates)
    except BadTable as error:
        warnings.warn(f"the table of measured plans {path} is ignored: {error}", RuntimeWarning, stacklevel=2)
        return {}


forced_plans: dict[Kind, Plan | None] = {"forward": None, "backward": None}


@contextmanager
def forced(chosen: Plan, kind: Kind = "forward") -> Iterator[None]:
    """Run every scan of this kind with this plan inside the `with` block. For tests and for tuning."""
    previous, forced_plans[kind] = forced_plans[kind], chosen
    try:
        yield
    finally:
        forced_plans[kind] = previous


# --- One step of a cell ---


@lru_cache(maxsize=PLANNED_CALLS)
def plan_cell(
    *, batch_size: int, input_size: int, hidden_size: int, dtype: torch.dtype, device: Device, allow_tf32: bool
) -> CellPlan:
    """The plan for one step of the cell. The plan fits every device.

    A single step takes as long as reading the weights. So tiles are as large as possible while every multiprocessor has
    a tile.
    """
    block_batch = min(max(8, power_of_2(batch_size)), 64)
    row_tiles = divide_up(batch_size, block_batch)
    block_hidden = min(32, max(4, power_of_2(hidden_size)))  # 4 units at least: tensor cores take 16 rows of weights
    while block_hidden > 4 and row_tiles * divide_up(hidden_size, block_hidden) < device.multiprocessors:
        block_hidden //= 2
    rows, num_stages = 4 * block_hidden + block_batch, 3
    precision = dot_precision(dtype, device, allow_tf32)
    row_bytes = 256 if precision == "tf32x3" else 512  # tf32x3 keeps several parts of its operands
    while row_bytes > 64 and num_stages * rows * row_bytes > min(CELL_TILE_BYTES, device.shared_bytes * 3 // 4):
        row_bytes //= 2
    return CellPlan(
        block_batch=block_batch,
        block_hidden=block_hidden,
        programs=row_tiles * divide_up(hidden_size, block_hidden),
        block_input=chunk_columns(input_size, row_bytes // dtype.itemsize),
        block_k=chunk_columns(hidden_size, row_bytes // dtype.itemsize),
        dot_precision=precision,
        tf32_rounding=tf32_rounding(precision, device),
        num_stages=num_stages,
        num_warps=8 if 4 * block_hidden * block_batch >= 64 * 32 else 4,
    )

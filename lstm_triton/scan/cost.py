"""The cost of a step: an estimate in cycles, from what it moves, multiplies and waits for.

The cost only ranks plans, so only the ratios of the rates matter. A plan that was measured on a device replaces the
plan of lowest cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .fit import Division, Placement
from .plan import divide_up

SECTOR_BYTES = 32  # bytes of a sector of L2
SCHEDULERS = 4  # schedulers of a multiprocessor, each with a tensor core


@dataclass(frozen=True)
class Rates:
    """How much a family of GPUs moves and computes in a clock cycle, and how many cycles it waits.

    Latencies were read off compiled kernels (bench/resources.py), unless another source is named.
    """

    link_bytes: int  # bytes a cycle, from L2 to one multiprocessor
    l2_bytes: int  # bytes a cycle, from L2 to all multiprocessors, which read the same lines at the same time
    shared_bytes: int  # bytes a cycle, within one multiprocessor
    memory_bytes: int  # bytes a cycle, to and from the device's memory
    operations: int  # operations a cycle, of a large product of 16-bit matrices; of 32-bit ones half as many
    multiplied: Mapping[str, int]  # multiplications a cycle, of one multiprocessor; by `ScanShape.operands`
    load: int  # cycles from asking L2 for a value to having it
    exchange: int  # cycles from publishing a value to having it in another program
    round: int  # cycles of one more request, for a further group of chunks
    fixed: int  # cycles of a step for addresses, sentinels, barriers, and the gates of the first unit
    half_sector: int  # cycles of a step, if two programs share each sector of L2 that they write
    projection: int  # cycles of a step, for a separate input projection: its launch, and reading its result
    staging: int  # cycles of a step, for states on their way to asynchronous tensor cores
    least_hold: int  # cycles that threads hold back at least, if they hold back (kernels/hold.py)
    most_hold: int  # cycles that threads hold back at most
    hold_from: int  # threads hold back if L2 takes at least so many cycles for what all programs read


# l2_bytes and projection were measured on an H100, projection at H = 256, B = 16: 220 cycles.
DATA_CENTRE = Rates(
    link_bytes=64,
    l2_bytes=2000,
    shared_bytes=128,
    memory_bytes=2500,
    operations=300_000,
    multiplied={"16 bit": 1300, "tf32": 650, "tf32x3": 220, "ieee": 128},
    load=600,
    exchange=1000,
    round=1200,
    fixed=500,
    half_sector=200,
    projection=250,
    staging=400,
    least_hold=320,
    most_hold=768,
    hold_from=70,
)


class StepCost(NamedTuple):
    """The cost of a step as a function of the batch size. All that the batch size does not change is computed once.

    Attributes:
        block_batch: as in `Plan`.
        most_groups: groups for which a lane has multiprocessors.
        group_programs: programs of a group of all lanes.
        loaded: bytes that a program reads from L2.
        working: cycles of products, gates and further requests.
        half_sectors: cycles for sectors of L2 that two programs share, if the batch has 8 rows.
        waiting: cycles of waiting for requested states, besides `Rates.exchange`.
        projected: input projections of a row that are computed before the scan: (bytes to move, operations).
    """

    block_batch: int
    most_groups: int
    group_programs: int
    loaded: int
    working: int
    half_sectors: int
    waiting: int
    projected: tuple[int, int] | None
    rates: Rates

    @staticmethod
    def of(placement: Placement, rates: Rates = DATA_CENTRE) -> "StepCost":
        division, shape = placement.division, placement.division.shape
        loaded = _exchanged_bytes(placement)
        loaded += division.block_batch * shape.input_size * shape.itemsize if division.fuse_input else 0
        working = _multiplying(placement, rates) + _around_products(division, rates)
        halves = division.block_hidden * shape.itemsize < SECTOR_BYTES and division.slices > 1
        # States are requested one after the other. A fused input is read while the state is on its way, so it counts
        # here.
        waiting = shape.states * rates.load + placement.input_bytes // rates.shared_bytes
        return StepCost(
            division.block_batch,
            division.most_groups,
            shape.lanes * division.slices,
            loaded,
            working + (placement.rounds - 1) * rates.round,
            rates.half_sector if shape.kind == "forward" and halves else 0,
            waiting,
            _projected(division),
            rates,
        )

    def cycles(self, batch_size: int) -> int:
        """Cycles of one step of all lanes and all batch tiles."""
        rates = self.rates
        batch_tiles = divide_up(batch_size, self.block_batch)
        groups = min(batch_tiles, self.most_groups)
        moving = max(self.loaded // rates.link_bytes, self.loaded * self.group_programs * groups // rates.l2_bytes)
        work = moving + self.working + (self.half_sectors if min(batch_size, self.block_batch) >= 8 else 0)
        # A program of several tiles works on the other tiles while one tile is exchanged.
        turns = divide_up(batch_tiles, groups)
        found = max(work + max(rates.exchange, self.waiting), turns * (work + self.waiting))
        return found + self.projecting(batch_size)

    def projecting(self, batch_size: int) -> int:
        """Cycles of a step for a separate input projection; 0 if it is fused. It is the same for all divisions."""
        if self.projected is None:
            return 0
        moved, multiplied = self.projected
        moving = batch_size * moved // self.rates.memory_bytes
        return self.rates.projection + moving + batch_size * multiplied // self.rates.operations


def hold(placement: Placement, rates: Rates = DATA_CENTRE) -> int:
    """Cycles after publishing before a program first looks for its peers' values; 0: at once.

    A program of several tiles does not hold back: the states of its next tile are there already. A few programs with
    little to read do not hold back either: they do not slow each other down.
    """
    division, shape = placement.division, placement.division.shape
    waits = shape.device.capability > 0 and (division.slices > 1 or shape.chained)
    traffic = _exchanged_bytes(placement) * division.programs // rates.l2_bytes  # cycles
    if not waits or division.batch_tiles > division.groups or traffic < rates.hold_from:
        return 0
    return min(rates.least_hold + traffic // 2, rates.most_hold)


def _state_bytes(division: Division) -> int:
    """Bytes of the states of a batch tile."""
    return division.shape.states * division.block_batch * division.shape.depth * division.shape.itemsize


def _exchanged_bytes(placement: Placement) -> int:
    """Bytes that a program reads from L2 while programs wait for each other."""
    return _state_bytes(placement.division) + placement.streamed_chunks * placement.division.chunk_bytes


def _multiplying(placement: Placement, rates: Rates) -> int:
    """Cycles of the products of a step, with the passage of their operands through shared memory."""
    division, shape = placement.division, placement.division.shape
    if division.operands_in_registers:
        weights_bytes = division.chunk_bytes * (placement.resident_chunks - placement.register_chunks)
        other_bytes = 2 * division.partial_sum_bytes
    else:
        weights_bytes = division.chunk_bytes * (division.chunks + placement.streamed_chunks)
        other_bytes = 2 * (_state_bytes(division) + division.partial_sum_bytes)
    pairs = shape.states * division.weight_rows * division.chunks * division.block_k * division.block_batch
    multiplying = _idle(division) * pairs // rates.multiplied[shape.operands]
    return max(weights_bytes // rates.shared_bytes, multiplying) + other_bytes // rates.shared_bytes


def _around_products(division: Division, rates: Rates) -> int:
    """Cycles of gates, addresses and barriers of a step."""
    found = rates.fixed + _idle(division) * division.block_batch * division.block_hidden
    found += rates.staging if division.asynchronous else 0
    return found


def _idle(division: Division) -> int:
    """How many times longer a program computes if it has fewer warps than a multiprocessor has schedulers."""
    return max(1, SCHEDULERS // division.num_warps)


def _projected(division: Division) -> tuple[int, int] | None:
    """Bytes and operations of a separate input projection of one row, which is written to memory and read back.

    None: the projection is fused.
    """
    shape = division.shape
    if division.fuse_input or shape.kind == "backward":
        return None
    projected_lanes = 1 if shape.chained else shape.lanes
    numbers = 4 * shape.hidden_size * projected_lanes
    return 2 * numbers * shape.itemsize, numbers * shape.input_size * shape.itemsize

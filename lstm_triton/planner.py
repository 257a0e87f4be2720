"""The one place where sizes are chosen: from a layer's sizes and a device's properties to tiles, warps and weights.

`plan` is a pure function. It lists the plans that fit the device (`candidates`), estimates the time of a step for each
from what has to move where, and takes the cheapest, unless a table measured on that device (`table_path`) knows better.

Nothing here depends on the number of steps. The batch size only decides between a few tile heights, and whether a
program serves one batch tile or several, so a layer needs few compiled kernels, whatever batches it meets.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

import torch

Kind = Literal["forward", "backward"]

# Of a thread's 255 registers, how many may hold what it has requested: more makes the compiler spill.
LOAD_REGISTERS = {"16 bit": 128, "tf32": 128, "tf32x3": 24, "ieee": 32}
LOAD_REGISTERS_OF_ASYNCHRONOUS = 96
LOAD_REGISTERS_OF_LARGE_TILES = 64
# Those for requested states, sums and weights, of which the gates of every 8 rows take some.
OPERAND_REGISTERS = 232
GATE_REGISTERS = 32
MASK_REGISTERS = 24  # where the last chunk is not a whole one
MIN_DOT_DEPTH = 16
MAX_RESIDENT_CHUNKS = 32  # each is unrolled into the kernel
MAX_INPUT_CHUNKS = 8
DROPOUT_BLOCK = 1024  # elements of a program of dropout_scales (kernels/lanes.py)
AGAIN_BLOCK, AGAIN_WARPS = (4, 64), 4  # of kernels/recompute.py, in which every sequence and unit is by itself

# Rates of a data-centre GPU per clock cycle, and latencies in cycles read off compiled kernels (bench/resources.py).
# Only their ratios matter, and plans measured on a device replace what they lead to.
LINK_BYTES_PER_CYCLE = 64  # from L2 to one multiprocessor
L2_BYTES_PER_CYCLE = 2000  # from L2 to all of them, where all read the same lines at the same time: measured on an H100
SECTOR_BYTES = 32  # of L2
SHARED_BYTES_PER_CYCLE = 128  # within one multiprocessor
MEMORY_BYTES_PER_CYCLE = 2500
OPERATIONS_PER_CYCLE = 300_000  # of a large product of 16-bit matrices; of 32-bit ones half as many
LOAD_CYCLES = 600  # from asking L2 for a value to having it
EXCHANGE_CYCLES = 1000  # from publishing a value to having it elsewhere
ROUND_CYCLES = 1200  # of asking again: for a further group of chunks
MULTIPLIED_PER_CYCLE = {"16 bit": 1300, "tf32": 650, "tf32x3": 220, "ieee": 128}  # pairs of numbers, one multiprocessor
FIXED_CYCLES = 500  # addresses, sentinels, barriers, and the gates of the first unit
# Cycles that threads hold back (kernels/hold.py), where what all programs read takes L2 so many cycles.
LEAST_HOLD, MOST_HOLD, HOLD_FROM = 320, 768, 70
HALF_SECTOR_CYCLES = 200  # for states of which two programs write a sector of L2, and so each half of one
# Of a product of its own for the input: its launch, and that a step waits for its result from the device's memory. An
# H100 took 220 cycles a step longer with such a product (H = 256, B = 16).
PROJECTION_CYCLES = 250
STAGING_CYCLES = 400  # of states on their way to the asynchronous tensor cores


@dataclass(frozen=True)
class Device:
    """What the planner needs to know of a GPU.

    Attributes:
        name: the product's name, the key of its table of measured plans.
        arch: "sm_90", "gfx942", ...
        multiprocessors: how many programs run at the same time when each takes a whole multiprocessor.
        shared_bytes: shared memory that one program can have.
    """

    name: str
    arch: str
    multiprocessors: int
    shared_bytes: int

    @staticmethod
    def of(device: torch.device) -> "Device":
        """The device's properties, asked for once. A CPU stands for a small GPU: kernels are interpreted there."""
        if device.type == "cpu":
            return Device("interpreter", "interpreter", 16, 64 * 1024)
        return _of_gpu(device.index if device.index is not None else torch.cuda.current_device())

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability as one number, 90 for 9.0; 0 elsewhere."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def threads_per_warp(self) -> int:
        return 64 if self.arch.startswith("gfx9") else 32


@cache
def _of_gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        shared_bytes = 160 * 1024 if arch.startswith("gfx95") else 64 * 1024
    else:
        arch = f"sm_{properties.major}{properties.minor}"
        shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device(properties.name, arch, properties.multi_processor_count, shared_bytes)


@dataclass(frozen=True)
class Plan:
    """How one scan runs. The names are the kernels' own (kernels/forward.py, kernels/backward.py).

    Attributes:
        block_batch: rows of a batch tile.
        block_hidden: hidden units a program owns.
        slices: programs that share one batch tile; together they own all units.
        batch_tiles: tiles in the batch.
        groups: sets of programs of a lane; each set serves every groups-th tile.
        block_k: columns of a chunk of the recurrent weights.
        block_input: the same for the input projection.
        split_k: parts of a chunk that different warps multiply at the same time.
        chunks: chunks of the recurrent weights in all.
        resident_chunks: chunks that stay on the chip; the others are read every step.
        register_chunks: resident chunks that stay in registers; the other resident chunks stay in shared memory.
        group_chunks: resident chunks of the state that are requested together.
        accumulators: independent chains of dots.
        fuse_input: whether the scan computes the input projection itself.
        dot_precision: "tf32", "tf32x3" or "ieee"; it matters for float32 only.
        tf32_rounding: how operands are rounded where that is "tf32", in PTX's words: "rn" or "rna"; "": not at all.
        thread_elements: elements of a state chunk that every thread waits for by itself; 0: all wait together.
        packed: whether 16-bit sentinels are tested two at a time (needs compute capability 9.0).
        num_warps: warps of a program.
        predicted_cycles: the estimate by which this plan was preferred, for one step.
        lanes: scans that run side by side, each in programs of its own.
        chained: whether these are layers, one above the other, and not the two directions of one.
        hold: cycles after publishing before a program first looks for its peers' values; 0: at once.
    """

    block_batch: int
    block_hidden: int
    slices: int
    batch_tiles: int
    groups: int
    block_k: int
    block_input: int
    split_k: int
    resident_chunks: int
    chunks: int
    group_chunks: int
    accumulators: int
    fuse_input: bool
    dot_precision: str
    tf32_rounding: str
    thread_elements: int
    packed: bool
    num_warps: int
    predicted_cycles: int = 0
    lanes: int = 1
    chained: bool = False
    register_chunks: int = 0
    hold: int = 0

    @property
    def programs(self) -> int:
        """Programs of a launch; they all run at the same time."""
        return self.lanes * self.slices * self.groups

    @property
    def resident_fraction(self) -> float:
        """The part of the recurrent weights that stays on the chip."""
        return self.resident_chunks / self.chunks

    def __str__(self) -> str:
        resident = (
            "all weights resident"
            if self.resident_chunks == self.chunks
            else (f"{self.resident_chunks} of {self.chunks} weight chunks resident")
        )
        projection = ", input projection fused" if self.fuse_input else ""
        lanes = "" if self.lanes == 1 else f"{self.lanes} {'layers' if self.chained else 'directions'} x "
        return (
            f"{self.programs} programs of {self.num_warps} warps ({lanes}{self.slices} slices of {self.block_hidden} "
            f"units x {self.groups} groups for {self.batch_tiles} tiles of {self.block_batch} rows), "
            f"{resident}{projection}"
        )


@dataclass(frozen=True)
class Launch:
    """One launch of a scan, for some of the lanes of a stack: layer after layer, each with its directions.

    Attributes:
        first: the first of its lanes.
        plan: for `plan.lanes` of them.
    """

    first: int
    plan: Plan

    @property
    def lanes(self) -> range:
        return range(self.first, self.first + self.plan.lanes)


def state_stride(hidden_size: int) -> int:
    """Elements between two rows of the kernels' state buffers: aligned, and never shared between two words' writers."""
    return _round_up(hidden_size, 16)


def plan(
    kind: Kind,
    *,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: Device,
    allow_tf32: bool,
    lanes: int = 1,
    chained: bool = False,
) -> Plan:
    """The plan for one launch of a scan.

    Raises:
        ValueError: no plan fits the device.
    """
    forced_plan = _forced.get(kind)
    if forced_plan is not None and (forced_plan.lanes, forced_plan.chained) == (lanes, chained):
        return forced_plan
    found = _plan(kind, batch_size, input_size, hidden_size, dtype, device, allow_tf32, lanes, chained)
    if found is None:
        side_by_side = "" if lanes == 1 else f", {lanes} side by side,"
        raise ValueError(f"no plan for hidden_size {hidden_size} in {dtype}{side_by_side} fits {device}")
    return found


@cache
def _plan(
    kind: Kind,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: Device,
    allow_tf32: bool,
    lanes: int,
    chained: bool,
) -> Plan | None:
    measured = _table(device).get(key(kind, batch_size, input_size, hidden_size, dtype, allow_tf32, lanes, chained))
    if measured is not None:
        return measured
    found = candidates(
        kind, batch_size=batch_size, input_size=input_size, hidden_size=hidden_size, dtype=dtype, device=device,
        allow_tf32=allow_tf32, lanes=lanes, chained=chained,
    )  # fmt: skip
    return found[0] if found else None


def launches(
    kind: Kind,
    *,
    num_layers: int,
    directions: int,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: Device,
    allow_tf32: bool,
) -> tuple[Launch, ...]:
    """The launches that a stack of layers takes, from the first layer to the last.

    Layers of one direction go together where they all fit on the device and their steps, one layer a step behind the
    other, take less time than one layer after the other. A layer that is read in both directions waits for the one
    below to end: only its two directions go together.

    Raises:
        ValueError: no plan fits the device.
    """
    forced_plan = _forced.get(kind)
    forced_lanes = None if forced_plan is None else forced_plan.lanes
    sizes = (num_layers, directions, batch_size, input_size, hidden_size, dtype, device, allow_tf32, forced_lanes)
    counts = _lane_counts(kind, *sizes)
    found, first = [], 0
    for count in counts:
        layer_input = input_size if first < directions else directions * hidden_size
        chosen = plan(
            kind, batch_size=batch_size, input_size=layer_input, hidden_size=hidden_size, dtype=dtype, device=device,
            allow_tf32=allow_tf32, lanes=count, chained=directions == 1 and count > 1,
        )  # fmt: skip
        found.append(Launch(first, chosen))
        first += count
    return tuple(found)


@cache
def _lane_counts(
    kind: Kind,
    num_layers: int,
    directions: int,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: Device,
    allow_tf32: bool,
    forced_lanes: int | None,
) -> tuple[int, ...]:
    """How many lanes each launch takes."""
    lanes = num_layers * directions
    if directions == 1:
        divisions = [_evenly(num_layers, parts) for parts in range(1, num_layers + 1)]
    else:
        divisions = [(2,) * num_layers, (1,) * lanes]
    if forced_lanes is not None:
        divisions = [division for division in divisions if max(division) == forced_lanes] or divisions[-1:]

    def cycles(division: tuple[int, ...]) -> int | None:
        """Of one step of all layers."""
        total = 0
        for count in division:
            found = _plan(
                kind, batch_size, max(input_size, directions * hidden_size), hidden_size, dtype, device, allow_tf32,
                count, directions == 1 and count > 1,
            )  # fmt: skip
            if found is None:
                return None
            total += found.predicted_cycles
        return total

    possible = [(found, division) for division in divisions if (found := cycles(division)) is not None]
    return min(possible, key=lambda each: each[0])[1] if possible else divisions[-1]


def _evenly(total: int, parts: int) -> tuple[int, ...]:
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def candidates(
    kind: Kind,
    *,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: Device,
    allow_tf32: bool,
    lanes: int = 1,
    chained: bool = False,
) -> list[Plan]:
    """Every plan that fits the device, the one that promises most first."""
    precision = _dot_precision(dtype, device, allow_tf32)
    found = []
    for block_hidden in (8, 16, 32, 64, 128):
        for block_batch in (8, 16, 32, 64):
            if block_batch > max(8, _power_of_2(batch_size)):
                continue
            for fuse_input in (False, True) if kind == "forward" and not chained else (False,):
                for row_bytes in (1024, 512, 256, 128, 64):
                    candidate = _fitted(
                        kind, batch_size, input_size, hidden_size, dtype, device, precision, lanes, chained,
                        block_hidden, block_batch, fuse_input, row_bytes,
                    )  # fmt: skip
                    if candidate is not None:
                        found.append(candidate)
                        break
    return sorted(found, key=lambda each: each.predicted_cycles)


def key(
    kind: Kind,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    allow_tf32: bool,
    lanes: int = 1,
    chained: bool = False,
) -> str:
    """A case's name in a table of measured plans."""
    name = dtype_name(dtype, allow_tf32)
    input_part = f" I={input_size}" if kind == "forward" else ""  # the backward scan never sees the input
    lanes_part = "" if lanes == 1 else f" {lanes} {'layers' if chained else 'directions'}"
    return f"{kind} {name} B={batch_size}{input_part} H={hidden_size}{lanes_part}"


def dtype_name(dtype: torch.dtype, allow_tf32: bool) -> str:
    """The name of a dtype; "tf32" is float32 whose products may be rounded."""
    return "tf32" if dtype == torch.float32 and allow_tf32 else str(dtype).removeprefix("torch.")


def table_path(device: Device) -> Path:
    """Where a device's measured plans are kept: `python -m bench tune` writes the file."""
    name = "".join(letter if letter.isalnum() else "-" for letter in device.name.lower())
    return Path(__file__).parent / "plans" / f"{name}.json"


@cache
def _table(device: Device) -> dict[str, Plan]:
    path = table_path(device)
    if not path.exists():
        return {}
    names = {field.name for field in fields(Plan)}
    found = {}
    for case, entry in json.loads(path.read_text()).items():
        measured = {name: value for name, value in entry.items() if name in names}
        # The rounding is no matter of speed, and tables of earlier versions do not have it.
        measured["tf32_rounding"] = _tf32_rounding(measured["dot_precision"], device)
        found[case] = Plan(**measured)
    return found


_forced: dict[str, Plan] = {}


@contextmanager
def forced(chosen: Plan, kind: Kind = "forward") -> Iterator[None]:
    """Run every scan of that kind with this plan inside the `with` block: for tests and for tuning."""
    previous = _forced.get(kind)
    _forced[kind] = chosen
    try:
        yield
    finally:
        if previous is None:
            del _forced[kind]
        else:
            _forced[kind] = previous


CELL_BACKWARD_BLOCK = 512  # elements of a program of the cell's backward kernel
CELL_BACKWARD_WARPS = 4
CELL_TILE_BYTES = 80 * 1024  # of weights and rows under way to a program, in all of its stages


@dataclass(frozen=True)
class CellPlan:
    """How one step of the cell runs. The names are the kernel's own (kernels/cell.py).

    Attributes:
        block_batch: rows of a program's tile.
        block_hidden: hidden units of a program's tile.
        programs: of the launch.
        block_input: columns of a chunk of the input and its weights.
        block_k: the same for the recurrent weights.
        dot_precision: "tf32", "tf32x3" or "ieee"; it matters for float32 only.
        tf32_rounding: how operands are rounded where that is "tf32", in PTX's words: "rn" or "rna"; "": not at all.
        num_stages: chunks that are under way at the same time.
        num_warps: warps of a program.
    """

    block_batch: int
    block_hidden: int
    programs: int
    block_input: int
    block_k: int
    dot_precision: str
    tf32_rounding: str
    num_stages: int
    num_warps: int

    def __str__(self) -> str:
        return (
            f"{self.programs} programs of {self.num_warps} warps (tiles of {self.block_batch} rows x "
            f"{self.block_hidden} units)"
        )


@cache
def plan_cell(
    *, batch_size: int, input_size: int, hidden_size: int, dtype: torch.dtype, device: Device, allow_tf32: bool
) -> CellPlan:
    """The plan for one step of the cell, which fits every device.

    A single step is bound by reading the weights: the tiles are as large as they can be while every multiprocessor has
    one.
    """
    size = dtype.itemsize
    block_batch = min(max(8, _power_of_2(batch_size)), 64)
    row_tiles = _divide_up(batch_size, block_batch)
    block_hidden = min(32, max(4, _power_of_2(hidden_size)))  # 4: tensor cores want 16 rows of weights
    while block_hidden > 4 and row_tiles * _divide_up(hidden_size, block_hidden) < device.multiprocessors:
        block_hidden //= 2
    rows, num_stages = 4 * block_hidden + block_batch, 3
    precision = _dot_precision(dtype, device, allow_tf32)
    row_bytes = 256 if precision == "tf32x3" else 512  # full precision keeps several parts of what it multiplies
    while row_bytes > 64 and num_stages * rows * row_bytes > min(CELL_TILE_BYTES, device.shared_bytes * 3 // 4):
        row_bytes //= 2
    return CellPlan(
        block_batch=block_batch,
        block_hidden=block_hidden,
        programs=row_tiles * _divide_up(hidden_size, block_hidden),
        block_input=_chunk(input_size, row_bytes // size),
        block_k=_chunk(hidden_size, row_bytes // size),
        dot_precision=precision,
        tf32_rounding=_tf32_rounding(precision, device),
        num_stages=num_stages,
        num_warps=8 if 4 * block_hidden * block_batch >= 64 * 32 else 4,
    )


def _dot_precision(dtype: torch.dtype, device: Device, allow_tf32: bool) -> str:
    if dtype != torch.float32 or device.arch == "interpreter":
        return "ieee"
    if device.capability >= 80:
        return "tf32" if allow_tf32 else "tf32x3"
    return "ieee"


def _tf32_rounding(precision: str, device: Device) -> str:
    """How PTX is told to round to nearest TF32: ties to even take one instruction, and need compute capability 9.0."""
    if precision != "tf32":
        return ""
    return "rn" if device.capability >= 90 else "rna"


def _fitted(
    kind: Kind,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: Device,
    precision: str,
    lanes: int,
    chained: bool,
    block_hidden: int,
    block_batch: int,
    fuse_input: bool,
    row_bytes: int,
) -> Plan | None:
    """The plan with these tiles and chunks of that many bytes a row, with everything else derived from them.

    None if it does not fit the device.
    """
    size = dtype.itemsize
    operands = "16 bit" if size == 2 else precision
    slices = _divide_up(hidden_size, block_hidden)
    multiprocessors = device.multiprocessors // lanes
    if slices > multiprocessors or block_hidden > max(16, _power_of_2(hidden_size)):
        return None
    batch_tiles = _divide_up(batch_size, block_batch)
    groups = min(batch_tiles, multiprocessors // slices)

    weight_rows = 4 * block_hidden if kind == "forward" else block_hidden  # M of the product
    depth = hidden_size if kind == "forward" else 4 * hidden_size  # K of the product
    # Hopper's asynchronous tensor cores take 64 rows of weights from 4 warps; elsewhere warps share the depth.
    asynchronous = kind == "forward" and device.capability == 90 and size == 2 and min(block_hidden, block_batch) >= 16
    # Larger tiles spill, and are taken only of 8 rows, where smaller ones would be too many for the device.
    needed = block_batch == 8 and _divide_up(hidden_size, block_hidden // 2) > multiprocessors
    if block_batch > (16 if chained else 64 if kind == "forward" else 32 if size == 2 else 8):
        return None
    if fuse_input and block_batch > (16 if size == 2 else 8):
        return None  # the input takes as many registers as the state
    largest = 16 if kind == "backward" else 128 if asynchronous else min(32, 512 // block_batch)
    if block_hidden > (min(largest, 256 // block_batch) if precision == "tf32x3" else largest) and not needed:
        return None
    if asynchronous:
        num_warps, split_k = (8 if weight_rows > 64 or block_batch > 32 else 4), 1
        block_k = _chunk(depth, min(row_bytes, 512) // size)
        block_input = _chunk(input_size, row_bytes // size)
    else:
        # Of every chunk, four threads of each warp take 16 bytes of a row (kernels/fragments.py).
        part = 64 // size
        num_warps = split_k = min(8, row_bytes // 64, max(2, _power_of_2(_divide_up(depth, part))))
        if split_k < 2:
            return None
        block_k = block_input = split_k * part
    # No element of a state tile may be polled by two threads: one might see the sentinel and the other the value.
    assert num_warps * device.threads_per_warp * 4 <= block_batch * block_k * size
    chunks = _divide_up(depth, block_k)

    states = 2 if chained else 1  # the own state, and that of the layer below or above
    # Full precision keeps two TF32 parts of every weight.
    chunk_bytes = states * weight_rows * block_k * size * (2 if precision == "tf32x3" else 1)
    register_bytes = 4 * num_warps * device.threads_per_warp  # of one register in every thread
    chunk_registers = max(1, block_batch * block_k * size // register_bytes)
    load_registers = LOAD_REGISTERS_OF_ASYNCHRONOUS if asynchronous else LOAD_REGISTERS[operands]
    if block_batch >= (64 if asynchronous else 32):
        load_registers = min(load_registers, LOAD_REGISTERS_OF_LARGE_TILES)
    rounds = _divide_up(chunks, max(1, load_registers // chunk_registers))
    group_chunks = _divide_up(chunks, rounds)
    if rounds > 1 and (block_batch > 16 or asynchronous):
        return None  # spills

    accumulators, register_chunks = 1, 0
    in_registers = not asynchronous and not device.arch.startswith("gfx")  # AMD's operands are made otherwise
    if not asynchronous:
        tiles = max(1, weight_rows // 16) * (block_batch // 8)  # of 4 registers, which do not wait for each other
        accumulators = min(chunks, max(1, 4 // tiles))
        if in_registers and precision != "tf32x3":
            weight_registers = OPERAND_REGISTERS - GATE_REGISTERS * (block_batch // 8)
            weight_registers -= group_chunks * chunk_registers + 4 * accumulators * tiles
            weight_registers -= MASK_REGISTERS if depth % block_k != 0 else 0
            register_chunks = min(chunks, max(0, weight_registers) // max(1, chunk_bytes // register_bytes))
            if rounds > 1 and block_batch > 8:  # the next round's states are under way beside those being multiplied
                register_chunks = min(register_chunks, 4)

    staging = 0 if in_registers else states * block_batch * block_k * size * (group_chunks if asynchronous else 1)
    partial_sums = 4 * split_k * weight_rows * block_batch if split_k > 1 else 0
    input_chunks = _divide_up(input_size, block_input) if fuse_input else 0
    input_bytes = chunk_bytes // block_k * block_input * input_chunks
    input_bytes += 0 if in_registers else block_batch * block_input * size * input_chunks
    room = device.shared_bytes - max(staging, partial_sums, 8 * weight_rows * block_batch) - input_bytes - 2048
    if room < 0:
        return None
    resident_chunks = min(chunks, MAX_RESIDENT_CHUNKS, register_chunks + room // chunk_bytes)
    if resident_chunks < chunks and not in_registers:
        resident_chunks -= 1  # a streamed chunk passes through shared memory, too
    if resident_chunks < (chunks if chained else 1) or (
        fuse_input and (resident_chunks < chunks or input_chunks > MAX_INPUT_CHUNKS)
    ):
        return None
    streamed_chunks = chunks - resident_chunks
    rounds = _divide_up(resident_chunks, group_chunks) + streamed_chunks

    # The cycles of a step: what has to move, over how fast it can, and what has to wait.
    programs = lanes * slices * groups
    state_bytes = states * block_batch * depth * size
    from_l2 = state_bytes + streamed_chunks * chunk_bytes  # while programs wait for each other
    loaded = from_l2 + (block_batch * input_size * size if fuse_input else 0)
    if in_registers:
        weights_from_shared, through_shared = chunk_bytes * (resident_chunks - register_chunks), 2 * partial_sums
    else:
        weights_from_shared = chunk_bytes * (chunks + streamed_chunks)
        through_shared = 2 * (state_bytes + partial_sums)
    pairs = states * weight_rows * chunks * block_k * block_batch
    idle = max(1, 4 // num_warps)  # a multiprocessor has four schedulers, and as many tensor cores
    work = max(loaded // LINK_BYTES_PER_CYCLE, loaded * programs // L2_BYTES_PER_CYCLE)
    work += max(weights_from_shared // SHARED_BYTES_PER_CYCLE, idle * pairs // MULTIPLIED_PER_CYCLE[operands])
    work += through_shared // SHARED_BYTES_PER_CYCLE + (rounds - 1) * ROUND_CYCLES
    work += FIXED_CYCLES + idle * block_batch * block_hidden + (STAGING_CYCLES if asynchronous else 0)
    # What the input takes passes while the state is under way; one state is asked for after the other.
    waiting = states * LOAD_CYCLES + input_bytes // SHARED_BYTES_PER_CYCLE
    if kind == "forward" and block_hidden * size < SECTOR_BYTES and min(batch_size, block_batch) >= 8 and slices > 1:
        work += HALF_SECTOR_CYCLES
    # A program that serves several tiles works on the others while one is exchanged.
    cycles = max(work + max(EXCHANGE_CYCLES, waiting), _divide_up(batch_tiles, groups) * (work + waiting))
    if not fuse_input and kind == "forward":
        # The projections are written to memory and read back, and a product of their own computes them.
        projected = 1 if chained else lanes
        numbers = 4 * hidden_size * batch_size * projected
        cycles += PROJECTION_CYCLES
        cycles += 2 * numbers * size // MEMORY_BYTES_PER_CYCLE
        cycles += numbers * input_size * size // OPERATIONS_PER_CYCLE
    # Of several tiles, the next one's states are there. Few programs with little to read do not slow each other down.
    hold, traffic = 0, from_l2 * programs // L2_BYTES_PER_CYCLE
    if device.capability > 0 and (slices > 1 or chained) and batch_tiles <= groups and traffic >= HOLD_FROM:
        hold = min(LEAST_HOLD + traffic // 2, MOST_HOLD)
    return Plan(
        block_batch=block_batch,
        block_hidden=block_hidden,
        slices=slices,
        batch_tiles=batch_tiles,
        groups=groups,
        block_k=block_k,
        block_input=block_input,
        split_k=split_k,
        resident_chunks=resident_chunks,
        chunks=chunks,
        group_chunks=min(group_chunks, resident_chunks),
        accumulators=accumulators,
        fuse_input=fuse_input,
        dot_precision=precision,
        tf32_rounding=_tf32_rounding(precision, device),
        thread_elements=block_batch * block_k // (num_warps * device.threads_per_warp) if device.capability else 0,
        packed=size == 2 and device.capability >= 90,
        num_warps=num_warps,
        predicted_cycles=cycles,
        lanes=lanes,
        chained=chained,
        register_chunks=register_chunks,
        hold=hold,
    )


def _chunk(depth: int, largest: int) -> int:
    """Columns of a chunk: as many as possible without much padding in the last chunk."""
    enough = max(depth + depth // 8, min(2 * depth, depth + 64))
    block = min(largest, _power_of_2(depth))
    while block > MIN_DOT_DEPTH and _round_up(depth, block) > enough:
        block //= 2
    return max(block, MIN_DOT_DEPTH)


def _divide_up(value: int, by: int) -> int:
    return -(-value // by)


def _round_up(value: int, to: int) -> int:
    return _divide_up(value, to) * to


def _power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()

"""The one place where sizes are chosen: from a layer's sizes and a device's properties to tiles, warps and resident weights.

`plan` is a pure function. It lists the plans that fit the device (`candidates`), estimates the time of a step for each from
what has to move where, and takes the cheapest, unless a table measured on that device (`table_path`) knows better.

Nothing here depends on the number of steps. The batch size only decides between a few tile heights, and whether a program
serves one batch tile or several, so a layer needs a handful of compiled kernels whatever batches it meets.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

import torch

Kind = Literal["forward", "backward"]

THREADS_PER_WARP = 32
LOAD_REGISTERS = 96  # of a thread's 255, for the tiles that it has requested and not yet received
MAX_RESIDENT_CHUNKS = 32  # each is unrolled into the kernel


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
    def is_nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability as one number, 90 for 9.0; 0 elsewhere."""
        return int(self.arch.removeprefix("sm_")) if self.is_nvidia else 0


@cache
def _of_gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        shared_bytes = 160 * 1024 if arch.startswith("gfx95") else 64 * 1024
    else:
        arch = f"sm_{properties.major}{properties.minor}"
        shared_bytes = properties.shared_memory_per_block_optin
    return Device(properties.name, arch, properties.multi_processor_count, shared_bytes)


@dataclass(frozen=True)
class Plan:
    """How one scan runs. The names are the kernels' own (kernels/forward.py, kernels/backward.py).

    Attributes:
        block_batch: rows of a batch tile.
        block_hidden: hidden units a program owns.
        slices: programs that share one batch tile; together they own all units.
        batch_tiles: tiles in the batch.
        groups: sets of programs; each set serves every groups-th tile.
        block_k: columns of a chunk of the recurrent weights.
        block_input: the same for the input projection.
        split_k: parts of a chunk that different warps multiply at the same time.
        resident_chunks: chunks of the recurrent weights that stay on the chip.
        chunks: chunks of the recurrent weights in all; what is not resident is read every step.
        group_chunks: resident chunks of the state that are requested together.
        accumulators: independent chains of dots.
        fuse_input: whether the scan computes the input projection itself.
        dot_precision: "tf32", "tf32x3" or "ieee"; it matters for float32 only.
        packed: whether 16-bit sentinels are tested two at a time (needs compute capability 9.0).
        num_warps: warps of a program.
        predicted_cycles: the estimate by which this plan was preferred, for one step.
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
    packed: bool
    num_warps: int
    predicted_cycles: int = 0

    @property
    def programs(self) -> int:
        """Programs of a launch; they all run at the same time."""
        return self.slices * self.groups

    @property
    def resident_fraction(self) -> float:
        """The part of the recurrent weights that stays on the chip."""
        return self.resident_chunks / self.chunks

    def __str__(self) -> str:
        resident = "all weights resident" if self.resident_chunks == self.chunks else (
            f"{self.resident_chunks} of {self.chunks} weight chunks resident"
        )
        projection = ", input projection fused" if self.fuse_input else ""
        return (
            f"{self.programs} programs of {self.num_warps} warps ({self.slices} slices of {self.block_hidden} units x "
            f"{self.groups} groups for {self.batch_tiles} tiles of {self.block_batch} rows), {resident}{projection}"
        )


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
) -> Plan:
    """The plan for one scan of one layer in one direction.

    Raises:
        ValueError: no plan fits the device.
    """
    if kind in _forced:
        return _forced[kind]
    sizes = (kind, batch_size, input_size, hidden_size, dtype, device, allow_tf32)
    return _plan(*sizes)


@cache
def _plan(
    kind: Kind, batch_size: int, input_size: int, hidden_size: int, dtype: torch.dtype, device: Device, allow_tf32: bool
) -> Plan:
    measured = _table(device).get(key(kind, batch_size, input_size, hidden_size, dtype, allow_tf32))
    if measured is not None:
        return measured
    found = candidates(
        kind, batch_size=batch_size, input_size=input_size, hidden_size=hidden_size, dtype=dtype, device=device,
        allow_tf32=allow_tf32,
    )  # fmt: skip
    if not found:
        raise ValueError(f"no plan for hidden_size {hidden_size} in {dtype} fits {device}")
    return found[0]


def candidates(
    kind: Kind,
    *,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: Device,
    allow_tf32: bool,
) -> list[Plan]:
    """Every plan that fits the device, the one that promises most first."""
    precision = _dot_precision(dtype, device, allow_tf32)
    found = []
    for block_hidden in (8, 16, 32, 64, 128):
        for block_batch in (8, 16, 32, 64):
            if block_batch > max(8, _power_of_2(batch_size)):
                continue
            for fuse_input in (False, True) if kind == "forward" else (False,):
                candidate = _fitted(
                    kind, batch_size, input_size, hidden_size, dtype, device, precision, block_hidden, block_batch, fuse_input
                )
                if candidate is not None:
                    found.append(candidate)
    return sorted(found, key=lambda each: each.predicted_cycles)


def key(kind: Kind, batch_size: int, input_size: int, hidden_size: int, dtype: torch.dtype, allow_tf32: bool) -> str:
    """A case's name in a table of measured plans."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and allow_tf32:
        name = "tf32"
    return f"{kind} {name} B={batch_size} I={input_size} H={hidden_size}"


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
    entries = json.loads(path.read_text())
    return {case: Plan(**{name: value for name, value in entry.items() if name in names}) for case, entry in entries.items()}


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


def as_table_entry(chosen: Plan) -> dict[str, object]:
    return asdict(chosen)


def _dot_precision(dtype: torch.dtype, device: Device, allow_tf32: bool) -> str:
    if dtype != torch.float32 or device.arch == "interpreter":
        return "ieee"
    if device.capability >= 80:
        return "tf32" if allow_tf32 else "tf32x3"
    return "ieee"


def _fitted(
    kind: Kind,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: Device,
    precision: str,
    block_hidden: int,
    block_batch: int,
    fuse_input: bool,
) -> Plan | None:
    """The plan with these tiles, with everything else derived from them; None if it does not fit the device."""
    size = dtype.itemsize
    slices = _divide_up(hidden_size, block_hidden)
    if slices > device.multiprocessors or (block_hidden > 16 and block_hidden >= 2 * _power_of_2(hidden_size)):
        return None
    batch_tiles = _divide_up(batch_size, block_batch)
    groups = min(batch_tiles, device.multiprocessors // slices)

    weight_rows = 4 * block_hidden if kind == "forward" else block_hidden  # M of the product
    depth = hidden_size if kind == "forward" else 4 * hidden_size  # K of the product
    # Hopper's asynchronous tensor cores take 64 rows of weights from 4 warps; elsewhere warps share the depth.
    asynchronous = device.capability >= 90 and weight_rows % 64 == 0 and precision != "tf32x3"
    if asynchronous:
        num_warps, split_k = (4 if block_batch < 64 and weight_rows == 64 else 8), 1
    else:
        num_warps, split_k = 8, 8
    smallest_k = 16 if kind == "forward" else 64  # the backward depth, 4H, is never less than 64 columns of its buffer
    block_k = _chunk(depth, (512 if kind == "forward" else 1024) // size, smallest_k)
    block_input = _chunk(input_size, 512 // size, 16)
    while block_k // split_k < 32 // size or block_input // split_k < 32 // size:
        split_k //= 2  # each warp's part of a chunk has at least the tensor cores' depth
    chunks = _divide_up(depth, block_k)

    def in_bytes(rows: int, columns: int) -> int:
        return rows * columns * size

    threads = num_warps * THREADS_PER_WARP
    chunk_registers = max(1, in_bytes(block_batch, block_k) // (4 * threads))
    if precision == "tf32x3":
        chunk_registers *= 2  # high and low parts
    requests = _divide_up(chunks, max(1, LOAD_REGISTERS // chunk_registers))  # rounds of requests, evenly filled
    group_chunks = _divide_up(chunks, requests)

    staging_chunks = group_chunks if asynchronous else 1
    staging = in_bytes(block_batch, block_k) * staging_chunks
    partial_sums = split_k * weight_rows * block_batch * 4
    scratch = max(staging, partial_sums, 8 * weight_rows * block_batch) + 2048
    input_chunks = _divide_up(input_size, block_input) if fuse_input else 0
    input_bytes = in_bytes(weight_rows + block_batch, block_input) * input_chunks
    chunk_bytes = in_bytes(weight_rows, block_k)
    resident_chunks = min(chunks, MAX_RESIDENT_CHUNKS, (device.shared_bytes - scratch - input_bytes) // chunk_bytes)
    if resident_chunks < chunks:
        # A streamed chunk passes through shared memory, too.
        resident_chunks = min(resident_chunks, (device.shared_bytes - scratch - input_bytes) // chunk_bytes - 1)
    if resident_chunks < 1 or (fuse_input and (resident_chunks < chunks or input_chunks > 4)):
        return None

    cycles = _predicted_cycles(
        device=device,
        programs=slices * groups,
        turns=_divide_up(batch_tiles, groups),
        state_bytes=in_bytes(block_batch, depth),
        weight_bytes=chunk_bytes * resident_chunks,
        streamed_bytes=chunk_bytes * (chunks - resident_chunks),
        input_weight_bytes=input_bytes,
        rounds=requests + chunks - resident_chunks,
        sum_bytes=0 if asynchronous else partial_sums,
    )
    # Without fusion the projections are written to and read from memory once more, by all programs together.
    projection = 4 * hidden_size * batch_size * size
    cycles += 0 if fuse_input else 2 * projection // MEMORY_BYTES_PER_CYCLE
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
        group_chunks=group_chunks,
        accumulators=1 if asynchronous or split_k > 1 else 2,
        fuse_input=fuse_input,
        dot_precision=precision,
        packed=size == 2 and device.capability >= 90,
        num_warps=num_warps,
        predicted_cycles=cycles,
    )


# Rates of a current data-centre GPU, per clock cycle; only their ratios matter, and a measured table replaces the estimate.
L2_LATENCY = 700  # cycles from asking to having
OTHER_LATENCY = 900  # cycles of a step that are neither waiting nor moving: gates, barriers, publishing
SHARED_BYTES_PER_CYCLE = 128  # one multiprocessor
LINK_BYTES_PER_CYCLE = 64  # from L2 to one multiprocessor
L2_BYTES_PER_CYCLE = 3000  # from L2 to all of them
MEMORY_BYTES_PER_CYCLE = 2500


def _predicted_cycles(
    *,
    device: Device,
    programs: int,
    turns: int,
    state_bytes: int,
    weight_bytes: int,
    streamed_bytes: int,
    input_weight_bytes: int,
    rounds: int,
    sum_bytes: int,
) -> int:
    """Cycles of one step: what has to move, over how fast it can, plus the latencies that nothing hides.

    A program that serves several tiles in turn works on the others while one is under way, so only work adds up.
    """
    from_l2 = state_bytes + streamed_bytes
    link = max(from_l2 // LINK_BYTES_PER_CYCLE, from_l2 * programs // L2_BYTES_PER_CYCLE)
    shared = (2 * state_bytes + weight_bytes + 2 * streamed_bytes + 2 * sum_bytes + input_weight_bytes) // SHARED_BYTES_PER_CYCLE
    work = link + shared + OTHER_LATENCY // 2
    latency = L2_LATENCY * rounds + OTHER_LATENCY // 2
    return max(work + latency, turns * work)


def _chunk(depth: int, largest: int, smallest: int) -> int:
    """Columns of a chunk: as large as possible, unless padding the last chunk would add more than an eighth of work."""
    block = largest
    while block > smallest and _round_up(depth, block) > max(depth * 9 // 8, smallest):
        block //= 2
    return max(block, smallest)


def _divide_up(value: int, by: int) -> int:
    return -(-value // by)


def _round_up(value: int, to: int) -> int:
    return _divide_up(value, to) * to


def _power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()

"""The planner's question (`ScanShape`) and its answers (`Plan`, `CellPlan`, `Launch`), as data."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..target import Device

Kind = Literal["forward", "backward"]
Operands = Literal["16 bit", "tf32", "tf32x3", "ieee"]

MIN_DOT_DEPTH = 16  # columns: Triton's smallest K of a product
DROPOUT_BLOCK = 1024  # elements of a program of dropout_scales (kernels/lanes.py)
RECOMPUTE_BLOCK, RECOMPUTE_WARPS = (4, 64), 4  # (rows, units) and warps of a program of kernels/recompute.py
CELL_BACKWARD_BLOCK, CELL_BACKWARD_WARPS = 512, 4  # elements and warps of a program of the cell's backward kernel


@dataclass(frozen=True)
class ScanShape:
    """The planner's question: what one launch of a scan has to compute, and on which device.

    Attributes:
        kind: which of the two scans.
        batch_size: B.
        input_size: I, the features that the layer reads.
        hidden_size: H.
        dtype: of input, states and weights.
        device: where the scan runs.
        allow_tf32: whether products of float32 may be rounded to TF32.
        lanes: scans that run side by side, each in programs of its own.
        chained: whether the lanes are layers, one above the other, and not the two directions of one layer.
    """

    kind: Kind
    batch_size: int
    input_size: int
    hidden_size: int
    dtype: torch.dtype
    device: Device
    allow_tf32: bool
    lanes: int = 1
    chained: bool = False

    @property
    def key(self) -> str:
        """The name of this shape in a device's table of measured plans."""
        input_part = f" I={self.input_size}" if self.kind == "forward" else ""  # the backward scan never sees the input
        lanes_part = "" if self.lanes == 1 else f" {self.lanes} {'layers' if self.chained else 'directions'}"
        name = dtype_name(self.dtype, self.allow_tf32)
        return f"{self.kind} {name} B={self.batch_size}{input_part} H={self.hidden_size}{lanes_part}"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def operands(self) -> Operands:
        """How tensor cores take the operands of a product."""
        return "16 bit" if self.itemsize == 2 else self.dot_precision

    @property
    def dot_precision(self) -> Literal["tf32", "tf32x3", "ieee"]:
        return dot_precision(self.dtype, self.device, self.allow_tf32)

    @property
    def depth(self) -> int:
        """K of the product with the recurrent weights. Forward reads H values of h, backward 4H gate gradients."""
        return self.hidden_size if self.kind == "forward" else 4 * self.hidden_size

    @property
    def states(self) -> int:
        """How many states a step waits for: that of its own lane, and if chained also that of a neighbouring lane."""
        return 2 if self.chained else 1

    @property
    def multiprocessors_of_a_lane(self) -> int:
        return self.device.multiprocessors // self.lanes

    def __str__(self) -> str:
        side_by_side = "" if self.lanes == 1 else f", {self.lanes} side by side,"
        return f"hidden_size {self.hidden_size} in {self.dtype}{side_by_side}"


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
        block_input: columns of a chunk of the input weights.
        split_k: parts of a chunk that different warps multiply at the same time.
        chunks: chunks of the recurrent weights in all.
        resident_chunks: chunks that stay on the chip; the others are read every step.
        register_chunks: resident chunks that stay in registers; the other resident chunks stay in shared memory.
        group_chunks: resident chunks of the state that are requested together.
        accumulators: independent chains of dots.
        fuse_input: whether the scan computes the input projection itself.
        dot_precision: "tf32", "tf32x3" or "ieee"; it matters for float32 only.
        tf32_rounding: how operands are rounded to TF32, in PTX's words: "rn" or "rna"; "": not at all.
        thread_elements: elements of a state chunk that every thread waits for by itself; 0: all wait together.
        packed: whether 16-bit sentinels are tested two at a time (needs compute capability 9.0).
        num_warps: warps of a program.
        predicted_cycles: the estimated cycles of one step, by which the planner ranks plans.
        lanes: scans that run side by side, each in programs of its own.
        chained: whether the lanes are layers, one above the other, and not the two directions of one layer.
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
    def projected_lanes(self) -> int:
        """Lanes whose input projection is a separate product, computed before the scan."""
        if self.fuse_input:
            return 0
        return 1 if self.chained else self.lanes

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
class CellPlan:
    """How one step of the cell runs. The names are the kernel's own (kernels/cell.py).

    Attributes:
        block_batch: rows of a program's tile.
        block_hidden: hidden units of a program's tile.
        programs: programs of the launch.
        block_input: columns of a chunk of the input and its weights.
        block_k: columns of a chunk of the recurrent weights.
        dot_precision: "tf32", "tf32x3" or "ieee"; it matters for float32 only.
        tf32_rounding: how operands are rounded to TF32, in PTX's words: "rn" or "rna"; "": not at all.
        num_stages: chunks that are loaded at the same time.
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


@dataclass(frozen=True)
class Launch:
    """One launch that the planner chose for some of the lanes of a stack.

    The lanes of a stack are numbered layer after layer, each layer with its directions.

    Attributes:
        first: the number of the launch's first lane.
        plan: the plan of the launch, which takes `plan.lanes` lanes.
    """

    first: int
    plan: Plan

    @property
    def lanes(self) -> range:
        return range(self.first, self.first + self.plan.lanes)


def dtype_name(dtype: torch.dtype, allow_tf32: bool) -> str:
    """The name of a dtype; "tf32" is float32 whose products may be rounded to TF32."""
    return "tf32" if dtype == torch.float32 and allow_tf32 else str(dtype).removeprefix("torch.")


def dot_precision(dtype: torch.dtype, device: Device, allow_tf32: bool) -> Literal["tf32", "tf32x3", "ieee"]:
    if dtype != torch.float32 or device.arch == "interpreter":
        return "ieee"
    if device.capability >= 80:
        return "tf32" if allow_tf32 else "tf32x3"
    return "ieee"


def tf32_rounding(precision: str, device: Device) -> str:
    """PTX's mode of rounding to the nearest TF32. "rn" (ties to even) is one instruction but needs capability 9.0."""
    if precision != "tf32":
        return ""
    return "rn" if device.capability >= 90 else "rna"


def state_stride(hidden_size: int) -> int:
    """Row stride of the state buffers, in elements: hidden_size, rounded up to 16.

    Rows then begin at multiples of 32 bytes or more, so that loads are wide. No two rows share a 32-bit word, so no two
    programs write parts of one word.
    """
    return (hidden_size + 15) // 16 * 16


def chunk_columns(depth: int, largest: int) -> int:
    """Columns of a chunk: as many as possible, up to `largest`, without much padding in the last chunk."""
    enough = max(depth + depth // 8, min(2 * depth, depth + 64))
    block = min(largest, power_of_2(depth))
    while block > MIN_DOT_DEPTH and round_up(depth, block) > enough:
        block //= 2
    return max(block, MIN_DOT_DEPTH)


def divide_up(value: int, by: int) -> int:
    return -(-value // by)


def round_up(value: int, to: int) -> int:
    return divide_up(value, to) * to


def power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()

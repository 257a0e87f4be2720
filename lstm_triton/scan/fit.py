"""Which tiles and chunks fit a device: how the work of a scan is divided, and where its weights and states lie.

The limits of registers were read off compiled kernels (bench/resources.py). Beyond them the compiler spills registers.
"""

from dataclasses import dataclass
from functools import cached_property

from .plan import ScanShape, chunk_columns, divide_up, power_of_2

# How many of a thread's 255 registers may hold requested states. The keys are `ScanShape.operands`.
LOAD_REGISTERS = {"16 bit": 128, "tf32": 128, "tf32x3": 24, "ieee": 32}
LOAD_REGISTERS_OF_ASYNCHRONOUS = 96  # ... of asynchronous products
LOAD_REGISTERS_OF_LARGE_TILES = 64  # ... of tiles of at least 32 rows; asynchronous: 64 rows
OPERAND_REGISTERS = 232  # registers of a thread for requested states, sums, weights and gates
GATE_REGISTERS = 32  # registers of a thread for the gates of every 8 rows
MASK_REGISTERS = 24  # registers of a thread for masks, if the last chunk is not full
MAX_RESIDENT_CHUNKS = 32  # chunks: each is unrolled into the kernel
MAX_INPUT_CHUNKS = 8  # chunks of the input weights
REGISTER_BYTES = 4
SUM_BYTES = 4  # sums are float32
RESERVED_SHARED_BYTES = 2048  # bytes of shared memory for the compiler's own use
READ_BYTES = 16  # bytes of a row that a thread takes at once (kernels/fragments.py)
THREADS_OF_A_ROW = 4  # threads of a warp that share a row of a chunk (kernels/fragments.py)


@dataclass(frozen=True)
class Division:
    """How the work of a scan is divided: among programs, among their warps, and into chunks.

    Attributes:
        shape: what is divided.
        block_batch, block_hidden, block_k, block_input, split_k, num_warps, fuse_input: as in `Plan`.
        asynchronous: whether products run on Hopper's asynchronous tensor cores.
    """

    shape: ScanShape
    block_batch: int
    block_hidden: int
    block_k: int
    block_input: int
    split_k: int
    num_warps: int
    fuse_input: bool
    asynchronous: bool

    @cached_property
    def slices(self) -> int:
        return divide_up(self.shape.hidden_size, self.block_hidden)

    @cached_property
    def batch_tiles(self) -> int:
        return divide_up(self.shape.batch_size, self.block_batch)

    @cached_property
    def most_groups(self) -> int:
        """Groups for which a lane has multiprocessors."""
        return self.shape.multiprocessors_of_a_lane // self.slices

    @cached_property
    def groups(self) -> int:
        return min(self.batch_tiles, self.most_groups)

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return self.shape.lanes * self.slices * self.groups

    @cached_property
    def weight_rows(self) -> int:
        """M of the product: rows of the recurrent weights that a program owns."""
        return weight_rows(self.shape, self.block_hidden)

    @cached_property
    def chunks(self) -> int:
        return divide_up(self.shape.depth, self.block_k)

    @property
    def input_chunks(self) -> int:
        return divide_up(self.shape.input_size, self.block_input) if self.fuse_input else 0

    @cached_property
    def column_bytes(self) -> int:
        """Bytes of one column of a program's weights. Full precision keeps two TF32 parts of every weight."""
        parts = 2 if self.shape.operands == "tf32x3" else 1
        return self.shape.states * self.weight_rows * self.shape.itemsize * parts

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk of a program's recurrent weights."""
        return self.column_bytes * self.block_k

    @property
    def state_chunk_bytes(self) -> int:
        """Bytes of a chunk of one state of a batch tile."""
        return self.block_batch * self.block_k * self.shape.itemsize

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return self.num_warps * self.shape.device.threads_per_warp

    @property
    def operands_in_registers(self) -> bool:
        """Whether each warp reads its operands into registers. Asynchronous products and AMD's products do not."""
        return not self.asynchronous and not self.shape.device.arch.startswith("gfx")

    @property
    def sum_bytes(self) -> int:
        """Bytes of the sums of one batch tile."""
        return SUM_BYTES * self.weight_rows * self.block_batch

    @property
    def partial_sum_bytes(self) -> int:
        """Bytes of the partial sums that warps exchange in shared memory, if they share K."""
        return self.split_k * self.sum_bytes if self.split_k > 1 else 0


@dataclass(frozen=True)
class Placement:
    """Where the weights and the states of a program lie.

    Attributes:
        division: how the work is divided.
        group_chunks, resident_chunks, register_chunks, accumulators: as in `Plan`.
        input_bytes: bytes of shared memory for the input and its weights, if the input projection is fused.
    """

    division: Division
    group_chunks: int
    resident_chunks: int
    register_chunks: int
    accumulators: int
    input_bytes: int

    @property
    def streamed_chunks(self) -> int:
        """Chunks of the recurrent weights that are read from L2 in every step."""
        return self.division.chunks - self.resident_chunks

    @property
    def rounds(self) -> int:
        """How often a step requests states: for each group of resident chunks, and for each streamed chunk."""
        return divide_up(self.resident_chunks, self.group_chunks) + self.streamed_chunks


def divided(shape: ScanShape, block_batch: int, block_hidden: int, fuse_input: bool, row_bytes: int) -> Division | None:
    """The division into these tiles, with chunks of at most `row_bytes` bytes a row; None if it does not fit."""
    slices = divide_up(shape.hidden_size, block_hidden)
    if slices > shape.multiprocessors_of_a_lane or block_hidden > max(16, power_of_2(shape.hidden_size)):
        return None
    if block_batch > _most_rows(shape, fuse_input):
        return None
    # Hopper's asynchronous tensor cores take 64 rows of weights from 4 warps. In other products warps share K.
    hopper = shape.kind == "forward" and shape.device.capability == 90 and shape.itemsize == 2
    asynchronous = hopper and min(block_hidden, block_batch) >= 16
    # More than `_most_units` spill registers. They are allowed with 8 rows only, and only if half as many units would
    # need more programs than a lane has multiprocessors.
    needed = block_batch == 8 and divide_up(shape.hidden_size, block_hidden // 2) > shape.multiprocessors_of_a_lane
    if block_hidden > _most_units(shape, block_batch, asynchronous) and not needed:
        return None
    if asynchronous:
        num_warps = 8 if weight_rows(shape, block_hidden) > 64 or block_batch > 32 else 4
        block_k = chunk_columns(shape.depth, min(row_bytes, 512) // shape.itemsize)
        block_input = chunk_columns(shape.input_size, row_bytes // shape.itemsize)
        return Division(shape, block_batch, block_hidden, block_k, block_input, 1, num_warps, fuse_input, True)
    part_bytes = THREADS_OF_A_ROW * READ_BYTES  # bytes of a row of a chunk, for each warp
    part = part_bytes // shape.itemsize
    warps = min(8, row_bytes // part_bytes, max(2, power_of_2(divide_up(shape.depth, part))))
    if warps < 2:
        return None
    columns = warps * part
    division = Division(shape, block_batch, block_hidden, columns, columns, warps, warps, fuse_input, False)
    # No element of a state tile may be polled by two threads: one might see the sentinel and the other the value.
    assert division.threads * REGISTER_BYTES <= division.state_chunk_bytes
    return division


def weight_rows(shape: ScanShape, block_hidden: int) -> int:
    """Rows of the recurrent weights for this many units. Forward: four gates a unit. Backward: one row a unit."""
    return 4 * block_hidden if shape.kind == "forward" else block_hidden


def _most_rows(shape: ScanShape, fuse_input: bool) -> int:
    """The largest block_batch that is allowed."""
    if fuse_input:  # the input takes as many registers as the state
        return 16 if shape.itemsize == 2 else 8
    if shape.chained:
        return 16
    if shape.kind == "forward":
        return 64
    return 32 if shape.itemsize == 2 else 8


def _most_units(shape: ScanShape, block_batch: int, asynchronous: bool) -> int:
    """The largest block_hidden that does not spill."""
    if shape.kind == "backward":
        most = 16
    elif asynchronous:
        most = 128
    else:
        most = min(32, 512 // block_batch)
    return min(most, 256 // block_batch) if shape.operands == "tf32x3" else most


def placed(division: Division) -> Placement | None:
    """Where a program's weights and states lie; None if they do not fit the chip."""
    group_chunks = _group_chunks(division)
    several_groups = group_chunks < division.chunks
    if several_groups and (division.block_batch > 16 or division.asynchronous):
        return None  # spills
    accumulators = _accumulators(division)
    register_chunks = _register_chunks(division, group_chunks, accumulators)
    input_bytes = _input_bytes(division)
    room = division.shape.device.shared_bytes - _working_bytes(division, group_chunks) - input_bytes
    if room < 0:
        return None
    resident_chunks = min(division.chunks, MAX_RESIDENT_CHUNKS, register_chunks + room // division.chunk_bytes)
    if resident_chunks < division.chunks and not division.operands_in_registers:
        resident_chunks -= 1  # room for a streamed chunk, which passes through shared memory here
    all_resident = resident_chunks == division.chunks
    if resident_chunks < 1 or (division.shape.chained and not all_resident):
        return None
    if division.fuse_input and (not all_resident or division.input_chunks > MAX_INPUT_CHUNKS):
        return None
    group_chunks = min(group_chunks, resident_chunks)
    return Placement(division, group_chunks, resident_chunks, register_chunks, accumulators, input_bytes)


def _chunk_registers(division: Division) -> int:
    """Registers of a thread for a chunk of one state."""
    return max(1, division.state_chunk_bytes // (REGISTER_BYTES * division.threads))


def _group_chunks(division: Division) -> int:
    """Chunks of the state that are requested together: as many as registers allow, in groups of about equal size."""
    most = LOAD_REGISTERS_OF_ASYNCHRONOUS if division.asynchronous else LOAD_REGISTERS[division.shape.operands]
    if division.block_batch >= (64 if division.asynchronous else 32):
        most = min(most, LOAD_REGISTERS_OF_LARGE_TILES)
    groups = divide_up(division.chunks, max(1, most // _chunk_registers(division)))
    return divide_up(division.chunks, groups)


def _accumulator_tiles(division: Division) -> int:
    """Tiles of sums that do not wait for each other. Each tile takes 4 registers of a thread."""
    return max(1, division.weight_rows // 16) * (division.block_batch // 8)


def _accumulators(division: Division) -> int:
    """Independent chains of dots: enough that tensor cores do not wait for the previous dot."""
    if division.asynchronous:
        return 1
    return min(division.chunks, max(1, 4 // _accumulator_tiles(division)))


def _register_chunks(division: Division, group_chunks: int, accumulators: int) -> int:
    """Chunks of the recurrent weights that stay in registers."""
    if not division.operands_in_registers or division.shape.operands == "tf32x3":
        return 0
    registers = OPERAND_REGISTERS - GATE_REGISTERS * (division.block_batch // 8)
    registers -= group_chunks * _chunk_registers(division) + 4 * accumulators * _accumulator_tiles(division)
    registers -= MASK_REGISTERS if division.shape.depth % division.block_k != 0 else 0
    registers_of_a_chunk = max(1, division.chunk_bytes // (REGISTER_BYTES * division.threads))
    chunks = min(division.chunks, max(0, registers) // registers_of_a_chunk)
    if group_chunks < division.chunks and division.block_batch > 8:
        chunks = min(chunks, 4)  # the next group's states also take registers, while this group is multiplied
    return chunks


def _working_bytes(division: Division, group_chunks: int) -> int:
    """Bytes of shared memory that are in use besides weights and input."""
    staging = 0  # bytes of states on their way to tensor cores
    if not division.operands_in_registers:
        staging = division.shape.states * division.state_chunk_bytes * (group_chunks if division.asynchronous else 1)
    return max(staging, division.partial_sum_bytes, 2 * division.sum_bytes) + RESERVED_SHARED_BYTES


def _input_bytes(division: Division) -> int:
    """Bytes of shared memory for the input and its weights, if the input projection is fused."""
    columns = division.block_input * division.input_chunks
    rows_bytes = 0 if division.operands_in_registers else division.block_batch * division.shape.itemsize
    return columns * (division.column_bytes + rows_bytes)

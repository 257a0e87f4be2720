"""The product at the heart of both scans: weights on the chip times the state that the peers are writing.

Both are cut along K into chunks of BLOCK_K. A weight chunk is a tile (M, BLOCK_K), a state chunk (rows, BLOCK_K); the
result is (M, rows), float32: M first, so that tensor cores see the weights as their tall operand and small batches
waste little. SPLIT_K > 1 cuts every chunk further into parts that different warps multiply at the same time; both are
then *fragments* (fragments.py), tiles of other shapes.
"""

import triton
import triton.language as tl

from .exchange import receive, request
from .fragments import fragments_of_rows, row_places
from .sizes import smaller


@triton.jit
def places(ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SHARED: tl.constexpr = False):
    """The rows and (rows or 1, columns) k's of a tile for a chunk of states or weights."""
    if SPLIT_K > 1:
        rows, ks = row_places(ROWS, BLOCK_K, SPLIT_K, SHARED)
    else:
        rows, ks = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)[None, :]
    return rows, ks


@triton.jit
def as_right(tile, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """A state chunk as the right operand of a dot."""
    if SPLIT_K > 1:
        right = tl.permute(fragments_of_rows(tile, ROWS, BLOCK_K, SPLIT_K, False), (0, 2, 1))
    else:
        right = tl.trans(tile)
    return right


@triton.constexpr_function
def _rounding_code(TF32_ROUNDING):
    return f"{{ .reg .b32 bits; cvt.{TF32_ROUNDING}.tf32.f32 bits, $1; mov.b32 $0, bits; }}"


@triton.jit
def rounded(tile, TF32_ROUNDING: tl.constexpr):
    """A tile as tensor cores multiply it in TF32, to nearest: they would cut off the bits that they do not take.

    Cutting makes every operand smaller, so that the errors of many steps add up in one direction.
    """
    if TF32_ROUNDING != "":
        tile = tl.inline_asm_elementwise(
            _rounding_code(TF32_ROUNDING), "=f,f", [tile], dtype=tl.float32, is_pure=True, pack=1
        )
    return tile


@triton.jit
def no_sums(M: tl.constexpr, ROWS: tl.constexpr, SPLIT_K: tl.constexpr, ACCUMULATORS: tl.constexpr):
    """Zeros for ACCUMULATORS chains of dots that do not wait for each other."""
    sums = ()
    for chain in tl.static_range(ACCUMULATORS):
        if SPLIT_K > 1:
            sums = sums + (tl.zeros((SPLIT_K, M, ROWS), tl.float32),)
        else:
            sums = sums + (tl.zeros((M, ROWS), tl.float32),)
    return sums


@triton.jit
def add_products(
    sums, lefts, first: tl.constexpr, tiles, COUNT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, DOT_PRECISION: tl.constexpr,
    TF32_ROUNDING: tl.constexpr,
):  # fmt: skip
    """Add lefts[first + k] @ tiles[k]^T to the sums in turn."""
    for chunk in tl.static_range(COUNT):
        right = as_right(rounded(tiles[chunk], TF32_ROUNDING), ROWS, BLOCK_K, SPLIT_K)
        # Tuples cannot be assigned to: the chain whose turn it is comes first.
        sums = sums[1:] + (tl.dot(lefts[first + chunk], right, sums[0], input_precision=DOT_PRECISION),)
    return sums


@triton.jit
def total(sums, SPLIT_K: tl.constexpr, ACCUMULATORS: tl.constexpr):
    """(M, rows)"""
    result = sums[0]
    for chain in tl.static_range(1, ACCUMULATORS):
        result += sums[chain]
    if SPLIT_K > 1:
        # By halves: all parts of an element then come to one thread at once. tl.sum makes three exchanges of it.
        result = tl.permute(result, (1, 2, 0))
        for _ in tl.static_range(4):  # enough for 16 parts
            if result.shape[2] > 1:
                even, odd = tl.split(tl.reshape(result, (result.shape[0], result.shape[1], result.shape[2] // 2, 2)))
                result = even + odd
        result = tl.reshape(result, (result.shape[0], result.shape[1]))
    return result


@triton.jit
def load_left(
    pointers,
    m_mask,
    ks,
    chunk,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TF32_ROUNDING: tl.constexpr,
    SHARED: tl.constexpr = False,
):
    """One weight chunk; pointers: those of chunk 0, at the places of `places`."""
    mask = m_mask[:, None] & (chunk * BLOCK_K + ks < SIZE)
    tile = tl.load(pointers + tl.cast(chunk, tl.int64) * BLOCK_K, mask=mask, other=0.0)
    tile = rounded(tile, TF32_ROUNDING)
    if SPLIT_K > 1:
        tile = fragments_of_rows(tile, tile.numel // BLOCK_K, BLOCK_K, SPLIT_K, SHARED)
    return tile


@triton.jit
def load_lefts(
    pointers,
    m_mask,
    ks,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TF32_ROUNDING: tl.constexpr,
    SHARED: tl.constexpr = False,
):
    """The weight chunks from FIRST up to END: loaded before the time loop, they stay on the chip throughout."""
    lefts = ()
    for chunk in tl.static_range(FIRST, END):
        left = load_left(pointers, m_mask, ks, chunk, SIZE, BLOCK_K, SPLIT_K, TF32_ROUNDING, SHARED)
        lefts = lefts + (left,)
    return lefts


@triton.jit
def load_resident(
    pointers,  # of chunk 0, as the next two: see load_left
    mask,
    ks,
    shared_pointers,  # the same for tiles in shared memory
    shared_mask,
    shared_ks,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TF32_ROUNDING: tl.constexpr,
    REGISTER_CHUNKS: tl.constexpr,
    RESIDENT_CHUNKS: tl.constexpr,
):
    """The chunks that stay on the chip, as many in registers as there are to be, the others in shared memory."""
    in_registers = load_lefts(pointers, mask, ks, 0, REGISTER_CHUNKS, SIZE, BLOCK_K, SPLIT_K, TF32_ROUNDING)
    in_shared = load_lefts(
        shared_pointers, shared_mask, shared_ks, REGISTER_CHUNKS, RESIDENT_CHUNKS, SIZE, BLOCK_K,
        SPLIT_K, TF32_ROUNDING, SHARED=True,
    )  # fmt: skip
    return in_registers + in_shared


@triton.jit
def add_received(
    sums,
    tiles,  # the first GROUP chunks of the state as `request`ed by the caller
    state_pointers,  # of chunk 0
    wait,  # whether the state comes from peers of this launch
    lefts,  # RESIDENT weight chunks
    weight_pointers,  # for the weight chunks that are not resident: see load_left
    m_mask,
    weight_ks,
    ks,
    WEIGHT_SIZE: tl.constexpr,  # K as far as there are weights
    STATE_SIZE: tl.constexpr,  # K as far as peers write
    RESIDENT: tl.constexpr,
    GROUP: tl.constexpr,  # resident chunks that are waited for together
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    TF32_ROUNDING: tl.constexpr,
    THREAD_ELEMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    TOGETHER: tl.constexpr,  # see spin.py
):
    """Add weights @ state^T to the sums, waiting for the state as needed."""
    for first in tl.static_range(0, RESIDENT, GROUP):
        if first > 0:
            tiles = request(state_pointers, ks, first, smaller(GROUP, RESIDENT - first), STATE_SIZE, BLOCK_K)
        tiles = receive(
            tiles, state_pointers, ks, first, smaller(GROUP, RESIDENT - first), STATE_SIZE, BLOCK_K, wait,
            THREAD_ELEMENTS, PACKED, TOGETHER,
        )  # fmt: skip
        sums = add_products(
            sums, lefts, first, tiles, smaller(GROUP, RESIDENT - first), ROWS, BLOCK_K, SPLIT_K, DOT_PRECISION,
            TF32_ROUNDING,
        )  # fmt: skip
    for streamed in range(RESIDENT, (WEIGHT_SIZE + BLOCK_K - 1) // BLOCK_K):
        # Asked for before the wait: the weights are there already.
        left = load_left(weight_pointers, m_mask, weight_ks, streamed, WEIGHT_SIZE, BLOCK_K, SPLIT_K, TF32_ROUNDING)
        pointers, streamed_ks = state_pointers + streamed * BLOCK_K, streamed * BLOCK_K + ks
        requested = request(pointers, streamed_ks, 0, 1, STATE_SIZE, BLOCK_K, MASKED=True)
        received = receive(
            requested, pointers, streamed_ks, 0, 1, STATE_SIZE, BLOCK_K, wait, THREAD_ELEMENTS, PACKED, TOGETHER,
            MASKED=True,
        )  # fmt: skip
        sums = add_products(sums, (left,), 0, received, 1, ROWS, BLOCK_K, SPLIT_K, DOT_PRECISION, TF32_ROUNDING)
    return sums

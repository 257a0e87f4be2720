"""The product at the heart of both scans: weights on the chip times the state that the peers are writing.

Both are cut along K into chunks of BLOCK_K. A weight chunk is (M, BLOCK_K), a state chunk (rows, BLOCK_K); the result
is (M, rows), float32. M comes first, so that tensor cores see the weights as their tall operand and small batches waste
little. SPLIT_K > 1 cuts every chunk further into parts that different warps multiply at the same time. Chunks are then
*fragments* (fragments.py), of other shapes.
"""

import triton
import triton.language as tl

from .exchange import receive, request
from .fragments import fragments_of_rows, row_places
from .sizes import smaller
from .tiling import Weights


@triton.jit
def places(ROWS: tl.constexpr, tiling, SHARED: tl.constexpr = False):
    """The rows and (rows or 1, columns) k's of a chunk of states or weights."""
    if tiling.SPLIT_K > 1:
        rows, ks = row_places(ROWS, tiling.BLOCK_K, tiling.SPLIT_K, SHARED)
    else:
        rows, ks = tl.arange(0, ROWS), tl.arange(0, tiling.BLOCK_K)[None, :]
    return rows, ks


@triton.jit
def right_operand(chunk, tiling):
    """A state chunk as the right operand of a dot."""
    if tiling.SPLIT_K > 1:
        fragments = fragments_of_rows(chunk, tiling.BLOCK_BATCH, tiling.BLOCK_K, tiling.SPLIT_K, False)
        right = tl.permute(fragments, (0, 2, 1))
    else:
        right = tl.trans(chunk)
    return right


@triton.constexpr_function
def _rounding_code(TF32_ROUNDING):
    return f"{{ .reg .b32 bits; cvt.{TF32_ROUNDING}.tf32.f32 bits, $1; mov.b32 $0, bits; }}"


@triton.jit
def rounded(values, TF32_ROUNDING: tl.constexpr):
    """Values as tensor cores multiply them in TF32, but rounded to nearest: tensor cores cut off the bits they ignore.

    Cutting makes every operand smaller, so that the errors of many steps add up in one direction.
    """
    if TF32_ROUNDING != "":
        values = tl.inline_asm_elementwise(
            _rounding_code(TF32_ROUNDING), "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
        )
    return values


@triton.jit
def zero_sums(M: tl.constexpr, tiling):
    """Zeros (M, BLOCK_BATCH) for ACCUMULATORS chains of dots that do not wait for each other."""
    sums = ()
    for chain in tl.static_range(tiling.ACCUMULATORS):
        if tiling.SPLIT_K > 1:
            sums = sums + (tl.zeros((tiling.SPLIT_K, M, tiling.BLOCK_BATCH), tl.float32),)
        else:
            sums = sums + (tl.zeros((M, tiling.BLOCK_BATCH), tl.float32),)
    return sums


@triton.jit
def add_products(sums, weight_chunks, first: tl.constexpr, chunks, tiling):
    """Add weight_chunks[first + i] @ chunks[i]^T for all i, each to another one of the sums in turn."""
    for chunk in tl.static_range(len(chunks)):
        right = right_operand(rounded(chunks[chunk], tiling.TF32_ROUNDING), tiling)
        # Tuples cannot be assigned to: the chain whose turn it is comes first.
        added = tl.dot(weight_chunks[first + chunk], right, sums[0], input_precision=tiling.DOT_PRECISION)
        sums = sums[1:] + (added,)
    return sums


@triton.jit
def total(sums, tiling):
    """(M, BLOCK_BATCH)"""
    result = sums[0]
    for chain in tl.static_range(1, tiling.ACCUMULATORS):
        result += sums[chain]
    if tiling.SPLIT_K > 1:
        # By halves: all parts of an element then come to one thread at once. With tl.sum there are three exchanges.
        result = tl.permute(result, (1, 2, 0))
        for _ in tl.static_range(4):  # enough for 16 parts
            if result.shape[2] > 1:
                even, odd = tl.split(tl.reshape(result, (result.shape[0], result.shape[1], result.shape[2] // 2, 2)))
                result = even + odd
        result = tl.reshape(result, (result.shape[0], result.shape[1]))
    return result


@triton.jit
def load_weight_chunk(
    pointers,  # (M, BLOCK_K) of chunk 0, at the rows and k's of `places`
    mask,  # (M,)
    ks,  # of chunk 0
    chunk,
    SIZE: tl.constexpr,  # K as far as there are weights
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TF32_ROUNDING: tl.constexpr,
    SHARED: tl.constexpr = False,
):
    full_mask = mask[:, None] & (chunk * BLOCK_K + ks < SIZE)
    loaded = tl.load(pointers + tl.cast(chunk, tl.int64) * BLOCK_K, mask=full_mask, other=0.0)
    loaded = rounded(loaded, TF32_ROUNDING)
    if SPLIT_K > 1:
        loaded = fragments_of_rows(loaded, loaded.numel // BLOCK_K, BLOCK_K, SPLIT_K, SHARED)
    return loaded


@triton.jit
def load_weight_chunks(
    pointers, mask, ks, FIRST: tl.constexpr, END: tl.constexpr, SIZE: tl.constexpr, tiling,
    SHARED: tl.constexpr = False,
):  # fmt: skip
    """The chunks from FIRST up to END: loaded before the time loop, they stay on the chip throughout."""
    chunks = ()
    for chunk in tl.static_range(FIRST, END):
        loaded = load_weight_chunk(
            pointers, mask, ks, chunk, SIZE, tiling.BLOCK_K, tiling.SPLIT_K, tiling.TF32_ROUNDING, SHARED
        )
        chunks = chunks + (loaded,)
    return chunks


@triton.jit
def load_weights(
    pointers,  # of chunk 0, as the next two: see load_weight_chunk
    mask,
    ks,
    shared_pointers,  # the same for chunks in shared memory
    shared_mask,
    shared_ks,
    SIZE: tl.constexpr,
    tiling,
):
    """A program's weights: the first chunks in registers, the next in shared memory, the others left in memory."""
    in_registers = load_weight_chunks(pointers, mask, ks, 0, tiling.REGISTER_CHUNKS, SIZE, tiling)
    in_shared = load_weight_chunks(
        shared_pointers, shared_mask, shared_ks, tiling.REGISTER_CHUNKS, tiling.RESIDENT_CHUNKS, SIZE, tiling,
        SHARED=True,
    )  # fmt: skip
    return Weights(in_registers + in_shared, pointers, mask, ks)


@triton.jit
def add_received(
    sums,
    requested,  # the first GROUP_CHUNKS chunks of the state, as the caller has requested them
    state_pointers,  # of chunk 0
    ks,  # of the state's chunk 0
    wait,  # whether the state comes from peers of this launch
    weights,
    WEIGHT_SIZE: tl.constexpr,  # K as far as there are weights
    STATE_SIZE: tl.constexpr,  # K as far as peers write
    tiling,
    polling,
):
    """Add weights @ state^T to the sums, waiting for the state as needed."""
    for first in tl.static_range(0, tiling.RESIDENT_CHUNKS, tiling.GROUP_CHUNKS):
        if first > 0:
            requested = request(
                state_pointers, ks, first, smaller(tiling.GROUP_CHUNKS, tiling.RESIDENT_CHUNKS - first), STATE_SIZE,
                tiling.BLOCK_K,
            )  # fmt: skip
        received = receive(requested, state_pointers, ks, first, STATE_SIZE, tiling.BLOCK_K, wait, polling)
        sums = add_products(sums, weights.chunks, first, received, tiling)
    for streamed in range(tiling.RESIDENT_CHUNKS, (WEIGHT_SIZE + tiling.BLOCK_K - 1) // tiling.BLOCK_K):
        # Asked for before the wait: the weights are there already.
        weight_chunk = load_weight_chunk(
            weights.pointers, weights.mask, weights.ks, streamed, WEIGHT_SIZE, tiling.BLOCK_K, tiling.SPLIT_K,
            tiling.TF32_ROUNDING,
        )  # fmt: skip
        pointers, streamed_ks = state_pointers + streamed * tiling.BLOCK_K, streamed * tiling.BLOCK_K + ks
        asked = request(pointers, streamed_ks, 0, 1, STATE_SIZE, tiling.BLOCK_K, MASKED=True)
        found = receive(asked, pointers, streamed_ks, 0, STATE_SIZE, tiling.BLOCK_K, wait, polling, MASKED=True)
        sums = add_products(sums, (weight_chunk,), 0, found, tiling)
    return sums

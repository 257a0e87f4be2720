"""Operands of the product (product.py) as tensor cores want them, loaded straight into the registers.

Of an operand of an mma instruction, thread t of a warp holds row t // 4 of every eight, of a state or of weights, and
some of that row's elements; three threads beside it hold the others. As a sum can be taken in any order, it does not
matter which ones, as long as both operands agree. Here they are those that a thread loads at once, 16 bytes of a state
row. So states go from memory to where they are multiplied, and weights stay there throughout: neither has to be
handed from thread to thread in every step, by way of shared memory and barriers.

A chunk is BLOCK_K deep; SPLIT_K warps share it, and 4 threads of a warp its part of BLOCK_K // SPLIT_K. It is the
compiler that assigns elements to threads: the shapes below are such that it does so in this way (a load spreads its
last elements over the threads of a warp, then over the warps, and what is left over registers), and then sees that
nothing has to move. Where it does otherwise, results are the same.
"""

import triton
import triton.language as tl

ROWS_OF_WARP = tl.constexpr(8)
THREADS_OF_ROW = tl.constexpr(4)


@triton.jit
def row_places(ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SHARED: tl.constexpr):
    """Rows (ROWS * SPLIT_K,) and k's (ROWS * SPLIT_K, BLOCK_K // SPLIT_K) of a chunk of states or weights.

    Tiles for SHARED memory are loaded by other warps than multiply them, so that the compiler puts them there.
    """
    tile_rows = tl.arange(0, ROWS * SPLIT_K)
    rows, parts = tile_rows % ROWS_OF_WARP, tile_rows // ROWS_OF_WARP % SPLIT_K
    if SHARED:  # a thread has its place among rows by its warp, and the other way round
        rows, parts = rows // 2 * 2 + parts % 2, parts // 2 * 2 + rows % 2
    rows += tile_rows // (ROWS_OF_WARP * SPLIT_K) * ROWS_OF_WARP
    return rows, (parts * (BLOCK_K // SPLIT_K))[:, None] + tl.arange(0, BLOCK_K // SPLIT_K)[None, :]


@triton.jit
def fragments_of_rows(tile, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SHARED: tl.constexpr):
    """A tile loaded from `row_places` -> (SPLIT_K, ROWS, BLOCK_K // SPLIT_K), K reordered."""
    VECTOR: tl.constexpr = BLOCK_K // SPLIT_K // THREADS_OF_ROW  # elements that a thread loads at once
    if SHARED:
        tile = tl.reshape(
            tile, (ROWS // ROWS_OF_WARP, SPLIT_K // 2, 2, ROWS_OF_WARP // 2, 2, THREADS_OF_ROW, 4, VECTOR // 4)
        )
        tile = tl.permute(tile, (1, 4, 0, 3, 2, 6, 5, 7))
    else:
        tile = tl.reshape(tile, (ROWS // ROWS_OF_WARP, SPLIT_K, ROWS_OF_WARP, THREADS_OF_ROW, 4, VECTOR // 4))
        tile = tl.permute(tile, (1, 0, 2, 4, 3, 5))
    return tl.reshape(tile, (SPLIT_K, ROWS, BLOCK_K // SPLIT_K))

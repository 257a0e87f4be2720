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
    """Rows (ROWS * SPLIT_K,) and k's (ROWS * SPLIT_K, BLOCK_K // SPLIT_K) of a chunk whose rows lie along K.

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


@triton.jit
def column_places(M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SHARED: tl.constexpr):
    """m's and k's, each (M * BLOCK_K,), of the elements of a weight chunk whose columns lie along M.

    Neighbouring m's, which are neighbours in memory, too, go to one thread. SHARED: as of `row_places`.
    """
    VECTOR: tl.constexpr = BLOCK_K // SPLIT_K // THREADS_OF_ROW
    NEIGHBOURS: tl.constexpr = min(M // ROWS_OF_WARP, 2)
    elements = tl.arange(0, M * BLOCK_K)
    threads = elements // NEIGHBOURS
    warps = threads // (THREADS_OF_ROW * ROWS_OF_WARP)
    registers = warps // SPLIT_K
    parts, threads_of_row = warps % SPLIT_K, threads % THREADS_OF_ROW
    if SHARED:  # a thread has its place in a row by its warp, and the other way round
        parts, threads_of_row = parts // 2 * 2 + threads_of_row % 2, threads_of_row // 2 * 2 + parts % 2
    ms = registers // VECTOR * ROWS_OF_WARP + threads // THREADS_OF_ROW % ROWS_OF_WARP
    ks = (parts * THREADS_OF_ROW + threads_of_row) * VECTOR + registers % VECTOR
    return ms * NEIGHBOURS + elements % NEIGHBOURS, ks


@triton.jit
def fragments_of_columns(tile, M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SHARED: tl.constexpr):
    """A tile loaded from `column_places` -> (SPLIT_K, M, BLOCK_K // SPLIT_K), M in the order that `ordered` undoes."""
    VECTOR: tl.constexpr = BLOCK_K // SPLIT_K // THREADS_OF_ROW
    NEIGHBOURS: tl.constexpr = min(M // ROWS_OF_WARP, 2)
    FIRST: tl.constexpr = M // (ROWS_OF_WARP * NEIGHBOURS)
    if SHARED:
        tile = tl.reshape(tile, (FIRST, 4, VECTOR // 4, SPLIT_K // 2, 2, ROWS_OF_WARP, 2, 2, NEIGHBOURS))
        tile = tl.permute(tile, (3, 7, 0, 8, 5, 1, 6, 4, 2))
    else:
        tile = tl.reshape(tile, (FIRST, 4, VECTOR // 4, SPLIT_K, ROWS_OF_WARP, THREADS_OF_ROW, NEIGHBOURS))
        tile = tl.permute(tile, (3, 0, 6, 4, 1, 5, 2))
    return tl.reshape(tile, (SPLIT_K, M, BLOCK_K // SPLIT_K))


@triton.jit
def ordered(sums, M: tl.constexpr, ROWS: tl.constexpr):
    """(M, ROWS) sums over fragments of columns -> the same in the order of the weights."""
    NEIGHBOURS: tl.constexpr = min(M // ROWS_OF_WARP, 2)
    sums = tl.reshape(sums, (M // (ROWS_OF_WARP * NEIGHBOURS), NEIGHBOURS, ROWS_OF_WARP, ROWS))
    return tl.reshape(tl.permute(sums, (0, 2, 1, 3)), (M, ROWS))

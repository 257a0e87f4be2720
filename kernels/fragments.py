"""Operands of the product (product.py) as tensor cores want them, loaded straight into the registers.

Of an operand of an mma instruction, thread t of a warp holds row t // 4 of every eight rows, together with three
neighbours: each of the four holds some of the row's elements. A sum can be taken in any order. So it does not matter
which elements a thread holds, as long as both operands agree. Here a thread holds what it loads at once, 16 bytes of a
row. States then go from memory to where they are multiplied, and weights stay there throughout. Nothing is handed from
thread to thread in a step, by way of shared memory and barriers.

A chunk is BLOCK_K deep. SPLIT_K warps share it, and four threads of a warp share the warp's part of BLOCK_K // SPLIT_K.
The compiler decides which thread gets which elements: a load spreads its last elements over the threads of a warp, then
over the warps, and the rest over registers. With the shapes below that gives this order, and the compiler sees that
nothing has to move. Should a compiler decide otherwise, the results are the same.
"""

import triton
import triton.language as tl

ROWS_OF_WARP = tl.constexpr(8)
THREADS_OF_ROW = tl.constexpr(4)


@triton.jit
def row_places(ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SHARED: tl.constexpr):
    """Rows (ROWS * SPLIT_K,) and k's (ROWS * SPLIT_K, BLOCK_K // SPLIT_K) of a chunk of states or weights.

    With SHARED the compiler puts the chunk into shared memory and leaves it there.
    """
    places = tl.arange(0, ROWS * SPLIT_K)
    rows, parts = places % ROWS_OF_WARP, places // ROWS_OF_WARP % SPLIT_K
    if SHARED:
        # Swap one bit of the row with one bit of the part. Other warps then load the chunk than multiply it, so that it
        # has to pass through shared memory.
        rows, parts = rows // 2 * 2 + parts % 2, parts // 2 * 2 + rows % 2
    rows += places // (ROWS_OF_WARP * SPLIT_K) * ROWS_OF_WARP
    return rows, (parts * (BLOCK_K // SPLIT_K))[:, None] + tl.arange(0, BLOCK_K // SPLIT_K)[None, :]


@triton.jit
def fragments_of_rows(chunk, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SHARED: tl.constexpr):
    """A chunk loaded from `row_places` -> (SPLIT_K, ROWS, BLOCK_K // SPLIT_K), K reordered."""
    VECTOR: tl.constexpr = BLOCK_K // SPLIT_K // THREADS_OF_ROW  # elements that a thread loads at once
    if SHARED:
        chunk = tl.reshape(
            chunk, (ROWS // ROWS_OF_WARP, SPLIT_K // 2, 2, ROWS_OF_WARP // 2, 2, THREADS_OF_ROW, 4, VECTOR // 4)
        )
        chunk = tl.permute(chunk, (1, 4, 0, 3, 2, 6, 5, 7))
    else:
        chunk = tl.reshape(chunk, (ROWS // ROWS_OF_WARP, SPLIT_K, ROWS_OF_WARP, THREADS_OF_ROW, 4, VECTOR // 4))
        chunk = tl.permute(chunk, (1, 0, 2, 4, 3, 5))
    return tl.reshape(chunk, (SPLIT_K, ROWS, BLOCK_K // SPLIT_K))

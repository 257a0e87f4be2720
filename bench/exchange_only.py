"""The scans without their arithmetic: what handing values around takes, and nothing else. Device code, for floor.py.

The same grid, batch tiles and turns as kernels/forward.py and kernels/backward.py; the same requests, polls and
publications of state; the same loads of a step's own tiles and, where forward saves, the same stores. No weights are
read, nothing is computed.
"""

import triton
import triton.language as tl

from lstm_triton.kernels.exchange import MOST_LOOKS, Polling, any_missing, give_up, publish, receive, request
from lstm_triton.kernels.hold import clock, hold_back
from lstm_triton.kernels.lanes import place
from lstm_triton.kernels.sizes import smaller


@triton.jit
def wait_for(
    chunks, pointers, ks, first: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, wait, polling,
    MASKED: tl.constexpr = False,
):  # fmt: skip
    """`receive`, of which nobody uses what it returns."""
    if polling.THREAD_ELEMENTS > 0:
        receive(chunks, pointers, ks, first, SIZE, BLOCK_K, wait, polling, MASKED)
    else:
        # Not with `receive`: chunks carried by its loop and then not used crash the compiler of Triton 3.6.
        missing, looks = any_missing(chunks, polling.PACKED) & wait, 0
        while missing:
            looks += 1
            if looks > MOST_LOOKS:
                give_up()
            again = request(pointers, ks, first, len(chunks), SIZE, BLOCK_K, MASKED)
            missing = any_missing(again, polling.PACKED)


@triton.jit(do_not_specialize=["seq_len", "batch_size", "batch_tiles", "hold"])
def exchange_scan(
    state_ptr,  # (LANES, T + 1, B, COPIES * STATE_STRIDE) I/O dtype: the initial state, then sentinels on entry
    gates_ptr,  # (LANES, T, B, 4H) I/O dtype
    cell_ptr,  # (LANES, T + 1, B, STATE_STRIDE) float32
    input_ptr,  # (T, B, INPUT) I/O dtype: read in forward if FUSE_INPUT, in backward as the outputs' gradients
    seq_len,
    batch_size,
    batch_tiles,
    hold,
    HIDDEN: tl.constexpr,
    INPUT: tl.constexpr,
    STATE_STRIDE: tl.constexpr,
    COPIES: tl.constexpr,  # values a unit publishes: 1 (h) in forward, 4 (its gates' gradients) in backward
    SAVE: tl.constexpr,
    FUSE_INPUT: tl.constexpr,
    LANES: tl.constexpr,
    CHAINED: tl.constexpr,
    SEVERAL_TILES: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_INPUT: tl.constexpr,
    RESIDENT_CHUNKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,
    THREAD_ELEMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    HOLDS: tl.constexpr,
):
    BACKWARD: tl.constexpr = COPIES > 1
    SLICES: tl.constexpr = (HIDDEN + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    WIDTH: tl.constexpr = COPIES * STATE_STRIDE
    WRITTEN: tl.constexpr = COPIES * smaller(SLICES * BLOCK_HIDDEN, STATE_STRIDE)
    GROUP: tl.constexpr = smaller(GROUP_CHUNKS, RESIDENT_CHUNKS)
    polling: tl.constexpr = Polling(THREAD_ELEMENTS, PACKED, False)

    slice_index, group, groups, lane = place(SLICES, LANES)
    state_ptr += lane.to(tl.int64) * (seq_len + 1) * batch_size * WIDTH
    gates_ptr += lane.to(tl.int64) * seq_len * batch_size * (4 * HIDDEN)
    cell_ptr += lane.to(tl.int64) * (seq_len + 1) * batch_size * STATE_STRIDE
    to_neighbour = (seq_len.to(tl.int64) + 1) * batch_size * WIDTH
    tiles_per_step = (batch_tiles - group + groups - 1) // groups

    rows = tl.arange(0, BLOCK_BATCH)
    ks = tl.arange(0, BLOCK_K)
    units = (slice_index * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN))[None, :]
    own = (slice_index * COPIES * BLOCK_HIDDEN + tl.arange(0, COPIES * BLOCK_HIDDEN))[None, :]
    values = tl.zeros((BLOCK_BATCH, COPIES * BLOCK_HIDDEN), tl.float32)
    numbers = tl.zeros((BLOCK_BATCH, BLOCK_HIDDEN), tl.float32)

    published = clock(HOLDS)
    for index in range(seq_len * tiles_per_step):
        step = index
        first_row = group * BLOCK_BATCH
        if SEVERAL_TILES:
            step = index // tiles_per_step
            first_row = (group + index % tiles_per_step * groups) * BLOCK_BATCH
        batch_rows = (first_row + rows)[:, None]
        step_rows = step.to(tl.int64) * batch_size + batch_rows
        row_mask = batch_rows < batch_size
        mask = row_mask & (units < HIDDEN)

        # Rows past the batch: its last row once more.
        read_rows = step.to(tl.int64) * batch_size + tl.minimum(batch_rows, batch_size - 1)
        previous = state_ptr + read_rows * WIDTH + ks[None, :]
        # Volatile, so that what nobody uses is loaded all the same.
        if BACKWARD or not FUSE_INPUT:
            for gate in tl.static_range(4):
                tl.load(gates_ptr + step_rows * (4 * HIDDEN) + gate * HIDDEN + units, mask=mask, volatile=True)
        if BACKWARD:
            tl.load(input_ptr + step_rows * INPUT + units, mask=mask & (units < INPUT), volatile=True)
            tl.load(cell_ptr + step_rows * STATE_STRIDE + units, mask=mask, volatile=True)
            tl.load(cell_ptr + (step_rows + batch_size) * STATE_STRIDE + units, mask=mask, volatile=True)
        elif FUSE_INPUT:
            inputs = tl.arange(0, BLOCK_INPUT)
            for chunk in tl.static_range((INPUT + BLOCK_INPUT - 1) // BLOCK_INPUT):
                columns = (chunk * BLOCK_INPUT + inputs)[None, :]
                tl.load(input_ptr + step_rows * INPUT + columns, mask=row_mask & (columns < INPUT), volatile=True)

        hold_back(hold, published, HOLDS)
        if CHAINED:
            if lane > 0:  # the lane beside it waits for this one: which way makes no difference here
                beside = previous + tl.cast(batch_size, tl.int64) * WIDTH - to_neighbour
                for first in tl.static_range(0, RESIDENT_CHUNKS, GROUP):
                    chunks = request(beside, ks, first, smaller(GROUP, RESIDENT_CHUNKS - first), WRITTEN, BLOCK_K)
                    wait_for(chunks, beside, ks, first, WRITTEN, BLOCK_K, step >= 0, polling)
        chunks = request(previous, ks, 0, GROUP, WRITTEN, BLOCK_K)
        for first in tl.static_range(0, RESIDENT_CHUNKS, GROUP):
            if first > 0:
                chunks = request(previous, ks, first, smaller(GROUP, RESIDENT_CHUNKS - first), WRITTEN, BLOCK_K)
            wait_for(chunks, previous, ks, first, WRITTEN, BLOCK_K, step > 0, polling)
        for streamed in range(RESIDENT_CHUNKS, CHUNKS):
            pointers, streamed_ks = previous + streamed * BLOCK_K, streamed * BLOCK_K + ks
            asked = request(pointers, streamed_ks, 0, 1, WRITTEN, BLOCK_K, MASKED=True)
            wait_for(asked, pointers, streamed_ks, 0, WRITTEN, BLOCK_K, step > 0, polling, MASKED=True)

        publish(state_ptr + (step_rows + batch_size) * WIDTH + own, values, row_mask & (own < WIDTH))
        published = clock(HOLDS)
        if SAVE:
            tl.store(
                cell_ptr + (step_rows + batch_size) * STATE_STRIDE + units,
                numbers,
                mask=row_mask & (units < STATE_STRIDE),
            )
            for gate in tl.static_range(4):
                gates = gates_ptr + step_rows * (4 * HIDDEN) + gate * HIDDEN + units
                tl.store(gates, numbers.to(gates_ptr.dtype.element_ty), mask=mask)

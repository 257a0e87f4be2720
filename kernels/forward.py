"""The forward scan: all steps of one LSTM layer, or of several, in one launch.

Notation: T steps, B batch rows, I input_size, H hidden_size; gate order i, f, g, o; formula in gates.py.

A program owns BLOCK_HIDDEN units (a *slice*), that is 4 * BLOCK_HIDDEN gate-minor rows of W_hh. They stay on the chip
while the program walks over time, for its batch tiles of BLOCK_BATCH rows. A step needs h_{t-1} of all units: the
program reads in hidden_ptr what its peers have written there (exchange.py).

One launch runs LANES scans side by side (lanes.py): the two directions of a layer, or, CHAINED, consecutive layers of a
stack. A chained layer waits for the h_t of the layer below as it waits for its own h_{t-1}.

State rows: a buffer of states begins with B rows for the initial states of the forward direction. Then come the rows of
the steps, then B rows for the initial states of the reverse direction. There are T * B rows of steps, and h_{t-1} is
always B rows away from h_t, whatever the step and the direction. In a RAGGED batch there may be fewer rows of steps. A
table then says where each step's h_{t-1} is (turns.py), and B more rows at the end hold the states for resets.
"""

import triton
import triton.language as tl

from .exchange import Polling, publish, request
from .gates import activate, add_gates, load_bias, load_gates, split_gates, store_gates, update_state
from .hold import clock, hold_back
from .lanes import dropout_scale, of_lane, place
from .product import add_products, add_received, load_weights, places, total, zero_sums
from .sizes import smaller
from .tiling import Tiling
from .turns import Schedule, count_turns, dense_turn, look_ahead, next_turn, no_turn


@triton.jit
def load_weight_rows(pointer, slice_index, gates_end, HIDDEN: tl.constexpr, SIZE: tl.constexpr, tiling):
    """The rows of a weight (4H, SIZE) that belong to a program's units, gate-minor; none from gates_end on."""
    gates, ks = places(4 * tiling.BLOCK_HIDDEN, tiling)
    shared_gates, shared_ks = places(4 * tiling.BLOCK_HIDDEN, tiling, SHARED=True)
    gates += slice_index * 4 * tiling.BLOCK_HIDDEN
    shared_gates += slice_index * 4 * tiling.BLOCK_HIDDEN
    pointers = pointer + (gates % 4 * HIDDEN + gates // 4).to(tl.int64)[:, None] * SIZE + ks
    mask = gates < gates_end
    shared_pointers = pointer + (shared_gates % 4 * HIDDEN + shared_gates // 4).to(tl.int64)[:, None] * SIZE + shared_ks
    return load_weights(pointers, mask, ks, shared_pointers, shared_gates < gates_end, shared_ks, SIZE, tiling)


@triton.jit(
    do_not_specialize=[
        "input_stride_step",
        "input_stride_batch",
        "seq_len",
        "row_count",
        "state_rows",
        "gate_rows",
        "first_step",
        "batch_size",
        "batch_tiles",
        "reverse",
        "dropped_lanes",
        "first_lane",
        "hold",
    ],
    do_not_specialize_on_alignment=["offsets_ptr"],  # a window begins anywhere
)
def forward_scan(
    # Input
    # (LANES, rows, 4H) I/O dtype. On entry x_t W_ih^T, unless FUSE_INPUT; CHAINED, only in the first lane. On return
    # activated gates if KEEP_GATES
    gates_ptr,
    input_ptr,  # (T, B, I), RAGGED (rows, I); read only if FUSE_INPUT
    input_stride_step,  # in units of INPUT_STRIDE_UNIT elements
    input_stride_batch,  # in units of INPUT_STRIDE_UNIT elements
    # Weights, a pointer for each lane
    weight_ih_ptrs,  # (4H, I), read only if FUSE_INPUT; or CHAINED, (4H, STATE_STRIDE)
    weight_hh_ptrs,  # (4H, STATE_STRIDE): (4H, H), padded
    bias_ih_ptrs,  # (4H,), read only if HAS_BIAS
    bias_hh_ptrs,  # (4H,), read only if HAS_BIAS
    # State
    hidden_ptr,  # (LANES, state rows, STATE_STRIDE) h, I/O dtype; the steps' rows are sentinels on entry
    hidden_dropped_ptr,  # like hidden_ptr: h after dropout, for the layer above; written only if DROPOUT
    # float32 c. KEEP_CELLS: (LANES, state rows, STATE_STRIDE), every c_t. Otherwise (LANES, B, STATE_STRIDE), c_0 on
    # entry and c_n on return; RAGGED (LANES, 2B, STATE_STRIDE), where rows B to 2B are the c for resets
    cell_ptr,
    # Tables, read only if RAGGED
    before_ptr,  # (rows,) the state row that a step starts from, -1 for no step
    after_ptr,  # (rows,) the same for the reverse direction
    offsets_ptr,  # (T + 1,) the first row of every time step
    tile_steps_ptr,  # (batch_tiles,) the steps of every batch tile
    # Dropout, read only if DROPOUT
    seed_ptr,  # (1,) int64
    dropout,  # probability
    dropped_lanes,  # how many lanes have dropout: the first ones
    first_lane,  # number of this launch's first lane in the whole stack
    # Sizes
    seq_len,  # steps of this launch
    row_count,  # rows of all steps
    state_rows,  # in each lane of the buffers
    gate_rows,  # in each lane of the gates: those of this launch's steps
    first_step,  # of this launch, among all T; RAGGED, offsets_ptr and tile_steps_ptr begin there
    batch_size,
    batch_tiles,  # tiles of BLOCK_BATCH rows in the batch
    reverse,  # of the first lane; 0: forward in time, 1: backward in time
    hold,  # cycles that threads hold back (hold.py); read only if HOLDS
    HIDDEN: tl.constexpr,
    INPUT: tl.constexpr,
    STATE_STRIDE: tl.constexpr,  # elements between state rows: a multiple of 16
    INPUT_STRIDE_UNIT: tl.constexpr,  # 16 tells the compiler that rows are aligned, without a compilation per stride
    # What is computed
    HAS_BIAS: tl.constexpr,
    KEEP_CELLS: tl.constexpr,  # every c
    KEEP_GATES: tl.constexpr,
    DROPOUT: tl.constexpr,
    LANES: tl.constexpr,
    CHAINED: tl.constexpr,  # the lanes are layers, one above the other; otherwise directions
    RAGGED: tl.constexpr,  # sequences differ in length, are packed, or are reset
    # The plan: see Tiling (tiling.py) and Polling (exchange.py)
    FUSE_INPUT: tl.constexpr,  # compute x_t W_ih^T here
    SEVERAL_TILES: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_INPUT: tl.constexpr,  # depth of a chunk of the input and of W_ih
    SPLIT_K: tl.constexpr,
    RESIDENT_CHUNKS: tl.constexpr,
    REGISTER_CHUNKS: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,
    ACCUMULATORS: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    TF32_ROUNDING: tl.constexpr,
    THREAD_ELEMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    HOLDS: tl.constexpr,  # threads hold back before they look for their peers' values
):
    SLICES: tl.constexpr = (HIDDEN + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    WRITTEN: tl.constexpr = smaller(SLICES * BLOCK_HIDDEN, STATE_STRIDE)  # columns of a state row that are written
    INPUT_CHUNKS: tl.constexpr = (INPUT + BLOCK_INPUT - 1) // BLOCK_INPUT if FUSE_INPUT else 0
    GROUP: tl.constexpr = smaller(GROUP_CHUNKS, RESIDENT_CHUNKS)
    tiling: tl.constexpr = Tiling(
        SEVERAL_TILES, BLOCK_BATCH, BLOCK_HIDDEN, BLOCK_K, SPLIT_K, RESIDENT_CHUNKS, REGISTER_CHUNKS, GROUP,
        ACCUMULATORS, DOT_PRECISION, TF32_ROUNDING,
    )  # fmt: skip
    input_tiling: tl.constexpr = Tiling(
        SEVERAL_TILES, BLOCK_BATCH, BLOCK_HIDDEN, BLOCK_INPUT, SPLIT_K, INPUT_CHUNKS, 0, INPUT_CHUNKS,
        ACCUMULATORS, DOT_PRECISION, TF32_ROUNDING,
    )  # fmt: skip
    polling: tl.constexpr = Polling(THREAD_ELEMENTS, PACKED, CHAINED)

    slice_index, group, groups, lane = place(SLICES, LANES)
    if not CHAINED:
        reverse += lane
    hidden_ptr += lane.to(tl.int64) * state_rows * STATE_STRIDE
    hidden_dropped_ptr += lane.to(tl.int64) * state_rows * STATE_STRIDE
    rows_before = tl.load(offsets_ptr).to(tl.int64) if RAGGED else first_step.to(tl.int64) * batch_size
    gates_ptr += (lane.to(tl.int64) * gate_rows - rows_before) * (4 * HIDDEN)
    if KEEP_CELLS:
        cell_ptr += lane.to(tl.int64) * state_rows * STATE_STRIDE
    else:
        cell_ptr += lane.to(tl.int64) * batch_size * ((2 if RAGGED else 1) * STATE_STRIDE)
    weight_ih_ptr = of_lane(weight_ih_ptrs, lane, LANES)
    weight_hh_ptr = of_lane(weight_hh_ptrs, lane, LANES)
    tiles_per_step = (batch_tiles - group + groups - 1) // groups

    rows = tl.arange(0, BLOCK_BATCH)
    chunk_rows, ks = places(BLOCK_BATCH, tiling)
    _, input_ks = places(BLOCK_BATCH, input_tiling)
    units = slice_index * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    unit_mask = (units < HIDDEN)[None, :]
    written_mask = (units < WRITTEN)[None, :]

    weights_hh = load_weight_rows(weight_hh_ptr, slice_index, 4 * HIDDEN, HIDDEN, STATE_STRIDE, tiling)
    if CHAINED:
        # The layer below has as many units as this one, so the states of both have the same chunks.
        below_end = tl.where(lane > 0, 4 * HIDDEN, 0)
        weights_ih = load_weight_rows(weight_ih_ptr, slice_index, below_end, HIDDEN, STATE_STRIDE, tiling)
        below_ptr = (hidden_dropped_ptr if DROPOUT else hidden_ptr) - state_rows.to(tl.int64) * STATE_STRIDE
    else:
        weights_ih = load_weight_rows(weight_ih_ptr, slice_index, 4 * HIDDEN, HIDDEN, INPUT, input_tiling)
    if HAS_BIAS:
        bias = load_bias(of_lane(bias_ih_ptrs, lane, LANES), of_lane(bias_hh_ptrs, lane, LANES), units, HIDDEN)

    hidden_ptrs = hidden_ptr + rows[:, None] * STATE_STRIDE + units[None, :]
    cell_ptrs = cell_ptr + rows[:, None] * STATE_STRIDE + units[None, :]
    hidden_dropped_ptrs = hidden_dropped_ptr + rows[:, None] * STATE_STRIDE + units[None, :]
    gates_ptrs = gates_ptr + rows[:, None] * (4 * HIDDEN) + units[None, :]
    input_ptrs = input_ptr + chunk_rows[:, None].to(tl.int64) * input_stride_batch * INPUT_STRIDE_UNIT + input_ks

    first_row = group * BLOCK_BATCH
    cell_row = first_row.to(tl.int64)
    if KEEP_CELLS and not RAGGED:  # in a ragged batch every sequence looks up its source
        cell_row += rows_before + (seq_len.to(tl.int64) + 1) * batch_size * reverse
    cell_mask = (first_row + rows < batch_size)[:, None] & written_mask
    cell = tl.load(cell_ptrs + cell_row * STATE_STRIDE, mask=cell_mask, other=0.0)
    turns = seq_len * tiles_per_step
    if RAGGED:
        sources_ptr = tl.where(reverse != 0, after_ptr, before_ptr)
        schedule = Schedule(tile_steps_ptr, offsets_ptr, sources_ptr, None, reverse != 0, group, groups, batch_tiles)
        turns = count_turns(schedule)
        turn = next_turn(no_turn(schedule, tiling), turns, schedule, tiling)
        ahead = look_ahead(turn, schedule, rows, chunk_rows, tiling)
        turn_after = next_turn(turn, turns - 1, schedule, tiling)
    published = clock(HOLDS)
    for index in range(turns):
        if RAGGED:
            step = tl.cast(index, tl.int32)  # when interpreted, index is a Python integer
            source, chunk_source = ahead.sources
            first_row = ahead.turn.tile * BLOCK_BATCH
            step_row = ahead.turn.first.to(tl.int64) + first_row
            row_mask = (source >= 0)[:, None]
            chunk_mask = (chunk_source >= 0)[:, None]
            # Rows without a step read state row 0, an initial state: it is there from the beginning.
            hidden_prev = hidden_ptr + tl.maximum(chunk_source, 0)[:, None].to(tl.int64) * STATE_STRIDE + ks
        else:
            step, first_row = dense_turn(index, group, groups, tiles_per_step, tiling)
            time = (first_step + tl.where(reverse != 0, seq_len - 1 - step, step)).to(tl.int64)
            step_row = time * batch_size + first_row
            previous_row = step_row + batch_size + tl.where(reverse != 0, batch_size, -batch_size)
            row_mask = (first_row + rows < batch_size)[:, None]
            chunk_mask = (first_row + chunk_rows < batch_size)[:, None]
            read_rows = tl.minimum(chunk_rows, batch_size - 1 - first_row)[:, None]  # past the batch: its last row
            hidden_prev = hidden_ptr + previous_row * STATE_STRIDE + read_rows * STATE_STRIDE + ks
        state_row = step_row + batch_size
        mask = row_mask & unit_mask
        state_mask = row_mask & written_mask
        step_gates_ptrs = gates_ptrs + step_row * (4 * HIDDEN)
        if RAGGED:
            ahead = look_ahead(turn_after, schedule, rows, chunk_rows, tiling)
            turn_after = next_turn(turn_after, turns - 2 - index, schedule, tiling)

        # What does not depend on h_{t-1} is computed, or asked for, while h_{t-1} is under way.
        sums = zero_sums(4 * BLOCK_HIDDEN, tiling)
        if DROPOUT:
            elements = (step_row + rows)[:, None] * HIDDEN + units[None, :]
            scale = dropout_scale(seed_ptr, first_lane + lane, elements, tl.where(lane < dropped_lanes, dropout, 0.0))
        if FUSE_INPUT:
            if RAGGED:
                input_row = step_row * input_stride_batch
            else:
                input_row = time * input_stride_step + first_row.to(tl.int64) * input_stride_batch
            inputs = input_ptrs + input_row * INPUT_STRIDE_UNIT
            input_chunks = ()
            for chunk in tl.static_range(INPUT_CHUNKS):
                input_mask = chunk_mask & (chunk * BLOCK_INPUT + input_ks < INPUT)
                input_chunks = input_chunks + (tl.load(inputs + chunk * BLOCK_INPUT, mask=input_mask, other=0.0),)
        else:
            share_mask = row_mask & (units < tl.where(lane == 0, HIDDEN, 0))[None, :] if CHAINED else mask
            shares = load_gates(step_gates_ptrs, share_mask, HIDDEN, gates_ptr.dtype.element_ty)
        if SEVERAL_TILES:
            tl.debug_barrier()  # other threads of this program may have written c, one step ago
        if RAGGED:
            reset = source >= row_count + 2 * batch_size
            # Sequences whose c is not in the registers. In a launch's first step these are all: the launch before had
            # the steps before.
            starts = (source < tl.where(step == 0, state_rows, batch_size)) | (source >= row_count + batch_size)
            cell_rows = source if KEEP_CELLS else first_row + rows + tl.where(reset, batch_size, 0)
            cell_sources = cell_ptr + cell_rows[:, None].to(tl.int64) * STATE_STRIDE + units[None, :]
            if SEVERAL_TILES:
                cell = tl.load(cell_sources, mask=state_mask, other=0.0)
            else:
                initial = tl.load(cell_sources, mask=state_mask & starts[:, None], other=0.0)
                cell = tl.where(starts[:, None] & row_mask, initial, cell)
        elif SEVERAL_TILES:
            cell = tl.load(
                cell_ptrs + (previous_row if KEEP_CELLS else first_row.to(tl.int64)) * STATE_STRIDE,
                mask=state_mask,
                other=0.0,
            )

        hold_back(hold, published, HOLDS)
        if CHAINED:
            if lane > 0:
                if RAGGED:
                    below_rows = tl.where(chunk_mask, state_row + chunk_rows[:, None], 0)
                else:
                    below_rows = state_row + read_rows
                below = below_ptr + below_rows * STATE_STRIDE + ks
                below_chunks = request(below, ks, 0, GROUP, WRITTEN, BLOCK_K)
                sums = add_received(
                    sums, below_chunks, below, ks, step >= 0, weights_ih, STATE_STRIDE, WRITTEN, tiling, polling
                )
        # Asked for no earlier: both states at once would take too many registers, and the layer below is a step ahead.
        hidden_chunks = request(hidden_prev, ks, 0, GROUP, WRITTEN, BLOCK_K)
        if FUSE_INPUT:
            sums = add_products(sums, weights_ih.chunks, 0, input_chunks, input_tiling)
        wait = step >= (0 if RAGGED else 1)
        sums = add_received(
            sums, hidden_chunks, hidden_prev, ks, wait, weights_hh, STATE_STRIDE, WRITTEN, tiling, polling
        )
        preact = split_gates(total(sums, tiling), BLOCK_HIDDEN, BLOCK_BATCH)
        if not FUSE_INPUT:
            # Added last: if the sums started from the shares, the program would wait for these before h_{t-1}.
            preact = add_gates(preact, shares)
        if HAS_BIAS:
            preact = add_gates(preact, bias)

        gates = activate(preact)
        cell_next, hidden = update_state(gates, cell)
        cell = tl.where(row_mask, cell_next, cell) if RAGGED else cell_next
        if HIDDEN % BLOCK_HIDDEN != 0:
            # Units past the last one stay 0. Their weights of 0 are not enough: 0 times an infinity or a NaN is a NaN.
            hidden = tl.where(unit_mask, hidden, 0.0)
        publish(hidden_ptrs + state_row * STATE_STRIDE, hidden, state_mask)
        if DROPOUT:
            publish(hidden_dropped_ptrs + state_row * STATE_STRIDE, hidden * scale, state_mask)
        published = clock(HOLDS)

        if KEEP_CELLS:
            tl.store(cell_ptrs + state_row * STATE_STRIDE, cell, mask=state_mask)
        elif SEVERAL_TILES:
            tl.store(cell_ptrs + first_row.to(tl.int64) * STATE_STRIDE, cell, mask=state_mask)
        if KEEP_GATES:
            store_gates(step_gates_ptrs, gates, mask, HIDDEN)
    if not KEEP_CELLS and not SEVERAL_TILES:
        tl.store(cell_ptrs + first_row.to(tl.int64) * STATE_STRIDE, cell, mask=cell_mask)

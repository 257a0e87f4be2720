"""The backward scan: from the gradients of all h_t to those of all gate pre-activations, in one launch.

Notation and state rows as in forward.py. A program owns BLOCK_HIDDEN units, that is BLOCK_HIDDEN columns of W_hh, and
walks over time against the forward direction:

    dh_t = dL/dh_t + dgates_{t+1} W_hh          (the exchange: dgates_{t+1} of all units, written by the peers)
    dgates_t, dc_{t-1} = differentiate(...)     (gates.py)

Each CHAINED layer but the last one also gets dgates_t W_ih from the layer above, and waits for that layer's dgates_t.
The gradients of inputs, weights, biases and of h_0 are plain matrix products over dgates, done afterwards.

dgates rows are gate-minor, so that a unit's four gradients leave in one piece. Two neighbouring threads store them, one
those of i and f, the other those of g and o. Each of the two computes the whole unit: twice the arithmetic, but nothing
moves between threads. Values therefore have one element for each row, unit and half: (BLOCK_BATCH * 2 * BLOCK_HIDDEN,).
Such an element is called a *pair*.
"""

import triton
import triton.language as tl

from .exchange import Polling, publish, request
from .gates import as_float32, differentiate, load_gates
from .hold import clock, hold_back
from .lanes import dropout_scale, of_lane, place
from .product import add_received, load_weights, places, total, zero_sums
from .sizes import smaller
from .tiling import Tiling
from .turns import Schedule, count_turns, dense_turn, look_ahead, next_turn, no_turn


@triton.jit
def load_weight_columns(
    pointer, slice_index, units_end, HIDDEN: tl.constexpr, STATE_STRIDE: tl.constexpr, tiling
):  # fmt: skip
    """The columns of a weight (4H, H) that belong to a program's units; none from units_end on.

    pointer: to the weight transposed, (STATE_STRIDE, 4 * STATE_STRIDE): a row for each unit, gate-minor.
    """
    units, ks = places(tiling.BLOCK_HIDDEN, tiling)
    shared_units, shared_ks = places(tiling.BLOCK_HIDDEN, tiling, SHARED=True)
    units += slice_index * tiling.BLOCK_HIDDEN
    shared_units += slice_index * tiling.BLOCK_HIDDEN
    pointers = pointer + units.to(tl.int64)[:, None] * (4 * STATE_STRIDE) + ks
    mask = units < units_end
    shared_pointers = pointer + shared_units.to(tl.int64)[:, None] * (4 * STATE_STRIDE) + shared_ks
    return load_weights(pointers, mask, ks, shared_pointers, shared_units < units_end, shared_ks, 4 * HIDDEN, tiling)


@triton.jit
def as_pairs(values, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """(UNITS, ROWS) -> (ROWS * 2 * UNITS,)"""
    return tl.reshape(tl.broadcast_to(tl.trans(values)[:, :, None], (ROWS, UNITS, 2)), (ROWS * 2 * UNITS,))


@triton.jit(
    do_not_specialize=[
        "grad_output_stride_step",
        "grad_output_stride_batch",
        "grad_output_stride_lane",
        "seq_len",
        "row_count",
        "batch_size",
        "batch_tiles",
        "reverse",
        "dropped_lanes",
        "first_lane",
        "hold",
    ]
)
def backward_scan(
    # Gradients of the results
    # (T, B, H), RAGGED (rows, H), I/O dtype: of the outputs h_t of every lane; CHAINED, of the last lane only
    grad_output_ptr,
    grad_output_stride_step,
    grad_output_stride_batch,
    grad_output_stride_lane,
    grad_hidden_ptr,  # (LANES, B, H) I/O dtype: of h_n
    grad_cells_ptr,  # (LANES, rows, H) I/O dtype: of the c_t as results, read only if GRAD_CELLS
    # (LANES, B, STATE_STRIDE) float32: of c_n on entry, of c_0 on return. RAGGED (LANES, 2B, STATE_STRIDE): rows B to
    # 2B are the gradients of the c for resets
    grad_cell_ptr,
    # What the forward scan left
    gates_ptr,  # (LANES, rows, 4H) I/O dtype: activated gates
    cell_ptr,  # (LANES, state rows, STATE_STRIDE) float32 c
    # Weights, a pointer for each lane; each (STATE_STRIDE, 4 * STATE_STRIDE): (4H, H), transposed, gate-minor, padded
    weight_ih_ptrs,  # read only if CHAINED
    weight_hh_ptrs,
    # State
    # (LANES, state rows, 4 * STATE_STRIDE) I/O dtype, gate-minor: the pre-activations' gradients. On entry sentinels in
    # the steps' rows and zeros in the B rows after the last step; RAGGED, zeros in all rows without a step
    grad_gates_ptr,
    # Tables, read only if RAGGED
    before_ptr,  # (rows,) the state row that a step started from, -1 for no step
    after_ptr,  # (rows,) the same for the reverse direction; forward in time, these are the successors
    before_successors_ptr,  # (rows,) the successors of the reverse direction: `before`, but for sequences' first steps
    offsets_ptr,  # (T + 1,) the first row of every time step
    tile_steps_ptr,  # (batch_tiles,) the steps of every batch tile
    # Dropout, read only if DROPOUT: as the forward scan had it
    seed_ptr,  # (1,) int64
    dropout,
    dropped_lanes,
    first_lane,
    # Sizes
    seq_len,
    row_count,  # rows of the steps
    batch_size,
    batch_tiles,
    reverse,  # the forward scan's, of the first lane
    hold,
    HIDDEN: tl.constexpr,
    STATE_STRIDE: tl.constexpr,
    # What is computed
    GRAD_CELLS: tl.constexpr,
    DROPOUT: tl.constexpr,
    LANES: tl.constexpr,
    CHAINED: tl.constexpr,
    RAGGED: tl.constexpr,
    # The plan: see Tiling (tiling.py) and Polling (exchange.py)
    SEVERAL_TILES: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    RESIDENT_CHUNKS: tl.constexpr,
    REGISTER_CHUNKS: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,
    ACCUMULATORS: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    TF32_ROUNDING: tl.constexpr,
    THREAD_ELEMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    HOLDS: tl.constexpr,
):
    SLICES: tl.constexpr = (HIDDEN + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    WRITTEN: tl.constexpr = 4 * smaller(SLICES * BLOCK_HIDDEN, STATE_STRIDE)  # columns of gradients that are written
    GROUP: tl.constexpr = smaller(GROUP_CHUNKS, RESIDENT_CHUNKS)
    tiling: tl.constexpr = Tiling(
        SEVERAL_TILES, BLOCK_BATCH, BLOCK_HIDDEN, BLOCK_K, SPLIT_K, RESIDENT_CHUNKS, REGISTER_CHUNKS, GROUP,
        ACCUMULATORS, DOT_PRECISION, TF32_ROUNDING,
    )  # fmt: skip
    polling: tl.constexpr = Polling(THREAD_ELEMENTS, PACKED, CHAINED)

    slice_index, group, groups, lane = place(SLICES, LANES)
    if not CHAINED:
        reverse += lane
        grad_output_ptr += lane.to(tl.int64) * grad_output_stride_lane
    state_rows = row_count.to(tl.int64) + (3 if RAGGED else 2) * batch_size
    grad_hidden_ptr += lane.to(tl.int64) * batch_size * HIDDEN
    grad_cells_ptr += lane.to(tl.int64) * row_count * HIDDEN
    grad_cell_ptr += lane.to(tl.int64) * batch_size * ((2 if RAGGED else 1) * STATE_STRIDE)
    gates_ptr += lane.to(tl.int64) * row_count * (4 * HIDDEN)
    cell_ptr += lane * state_rows * STATE_STRIDE
    grad_gates_ptr += lane * state_rows * (4 * STATE_STRIDE)
    weight_hh_ptr = of_lane(weight_hh_ptrs, lane, LANES)
    tiles_per_step = (batch_tiles - group + groups - 1) // groups

    chunk_rows, ks = places(BLOCK_BATCH, tiling)
    pairs = tl.arange(0, BLOCK_BATCH * 2 * BLOCK_HIDDEN)
    rows = pairs // (2 * BLOCK_HIDDEN)
    units = slice_index * BLOCK_HIDDEN + pairs // 2 % BLOCK_HIDDEN
    gate_minor = slice_index * 4 * BLOCK_HIDDEN + pairs % (2 * BLOCK_HIDDEN) * 2  # the first of two neighbours

    weights_hh = load_weight_columns(weight_hh_ptr, slice_index, STATE_STRIDE, HIDDEN, STATE_STRIDE, tiling)
    if CHAINED:
        above_end = tl.where(lane < LANES - 1, STATE_STRIDE, 0)
        weight_above_ptr = of_lane(weight_ih_ptrs, lane + 1, LANES)
        weights_above = load_weight_columns(weight_above_ptr, slice_index, above_end, HIDDEN, STATE_STRIDE, tiling)
        above_ptr = grad_gates_ptr + state_rows * (4 * STATE_STRIDE)

    grad_output_ptrs = grad_output_ptr + rows.to(tl.int64) * grad_output_stride_batch + units
    grad_hidden_ptrs = grad_hidden_ptr + rows * HIDDEN + units
    grad_cell_ptrs = grad_cell_ptr + rows * STATE_STRIDE + units
    gates_ptrs = gates_ptr + rows * (4 * HIDDEN) + units
    cell_ptrs = cell_ptr + rows * STATE_STRIDE + units
    grad_gates_ptrs = grad_gates_ptr + (rows * (4 * STATE_STRIDE) + gate_minor)[:, None] + tl.arange(0, 2)[None, :]

    first_row = group * BLOCK_BATCH
    grad_cell_mask = (first_row + rows < batch_size) & (units < STATE_STRIDE)
    grad_cell = tl.load(grad_cell_ptrs + first_row.to(tl.int64) * STATE_STRIDE, mask=grad_cell_mask, other=0.0)
    grad_reset = tl.zeros_like(grad_cell)  # of the c for resets
    grad_reset_ptrs = grad_cell_ptrs + batch_size.to(tl.int64) * STATE_STRIDE
    turns = seq_len * tiles_per_step
    if RAGGED:
        sources_ptr = tl.where(reverse != 0, after_ptr, before_ptr)
        successors_ptr = tl.where(reverse != 0, before_successors_ptr, after_ptr)
        schedule = Schedule(
            tile_steps_ptr, offsets_ptr, sources_ptr, successors_ptr, reverse == 0, group, groups, batch_tiles
        )
        turns = count_turns(schedule)
        turn = next_turn(no_turn(schedule, tiling), turns, schedule, tiling)
        ahead = look_ahead(turn, schedule, rows, chunk_rows, tiling)
        turn_after = next_turn(turn, turns - 1, schedule, tiling)
    published = clock(HOLDS)
    for index in range(turns):
        if RAGGED:
            step = tl.cast(index, tl.int32)  # when interpreted, index is a Python integer
            source, chunk_source = ahead.sources
            successor, chunk_successor = ahead.successors
            first_row = ahead.turn.tile * BLOCK_BATCH
            step_row = ahead.turn.first.to(tl.int64) + first_row
            row_mask = source >= 0
            end = tl.where(reverse != 0, 0, row_count + batch_size)  # the first of the B rows after the last steps
            last_mask = (successor >= end) & (successor < end + batch_size) & (units < HIDDEN)
            # Rows without a step read state row 0: it is there from the beginning.
            grad_gates_next = grad_gates_ptr + tl.maximum(chunk_successor, 0).to(tl.int64) * (4 * STATE_STRIDE)
            cell_prev_ptrs = cell_ptr + source.to(tl.int64) * STATE_STRIDE + units
            output_row = step_row * grad_output_stride_batch
        else:
            step, first_row = dense_turn(index, group, groups, tiles_per_step, tiling)
            time = tl.where(reverse != 0, step, seq_len - 1 - step).to(tl.int64)
            step_row = time * batch_size + first_row
            to_next_row = tl.where(reverse != 0, -batch_size, batch_size)
            row_mask = first_row + rows < batch_size
            last_mask = (first_row + rows < tl.where(step == 0, batch_size, 0)) & (units < HIDDEN)
            read_rows = tl.minimum(chunk_rows, batch_size - 1 - first_row)  # past the batch: its last row
            grad_gates_next = grad_gates_ptr + (step_row + batch_size + to_next_row) * (4 * STATE_STRIDE)
            grad_gates_next += read_rows * (4 * STATE_STRIDE)
            cell_prev_ptrs = cell_ptrs + (step_row + batch_size - to_next_row) * STATE_STRIDE
            output_row = time * grad_output_stride_step + first_row.to(tl.int64) * grad_output_stride_batch
        state_row = step_row + batch_size
        mask = row_mask & (units < HIDDEN)

        grad_gates_next = grad_gates_next[:, None] + ks
        if RAGGED:
            ahead = look_ahead(turn_after, schedule, rows, chunk_rows, tiling)
            turn_after = next_turn(turn_after, turns - 2 - index, schedule, tiling)

        gates = load_gates(gates_ptrs + step_row * (4 * HIDDEN), mask, HIDDEN, gates_ptr.dtype.element_ty)
        cell = tl.load(cell_ptrs + state_row * STATE_STRIDE, mask=mask, other=0.0)
        cell_prev = tl.load(cell_prev_ptrs, mask=mask, other=0.0)
        output_mask = row_mask & (units < tl.where(lane == LANES - 1, HIDDEN, 0)) if CHAINED else mask
        grad_output = tl.load(grad_output_ptrs + output_row, mask=output_mask, other=0.0)
        grad_last = tl.load(grad_hidden_ptrs + first_row.to(tl.int64) * HIDDEN, mask=last_mask, other=0.0)
        if GRAD_CELLS:
            grad_here = tl.load(grad_cells_ptr + (step_row + rows) * HIDDEN + units, mask=mask, other=0.0)
        if SEVERAL_TILES:
            tl.debug_barrier()  # other threads of this program may have written it one step ago
            grad_cell = tl.load(grad_cell_ptrs + first_row.to(tl.int64) * STATE_STRIDE, mask=mask, other=0.0)

        if DROPOUT:
            elements = (step_row + rows) * HIDDEN + units
            scale = dropout_scale(seed_ptr, first_lane + lane, elements, tl.where(lane < dropped_lanes, dropout, 0.0))
        sums = zero_sums(BLOCK_HIDDEN, tiling)
        hold_back(hold, published, HOLDS)
        if CHAINED:
            if lane < LANES - 1:
                if RAGGED:
                    above_rows = tl.where(chunk_source >= 0, state_row + chunk_rows, 0)
                else:
                    above_rows = state_row + read_rows
                above = (above_ptr + above_rows * (4 * STATE_STRIDE))[:, None] + ks
                above_chunks = request(above, ks, 0, GROUP, WRITTEN, BLOCK_K)
                sums = add_received(
                    sums, above_chunks, above, ks, step >= 0, weights_above, 4 * HIDDEN, WRITTEN, tiling, polling
                )
        if CHAINED and DROPOUT:  # dropout lies between the layers, but not between the steps of this one
            from_above = as_pairs(total(sums, tiling), BLOCK_HIDDEN, BLOCK_BATCH)
            sums = zero_sums(BLOCK_HIDDEN, tiling)
        grad_gates_chunks = request(grad_gates_next, ks, 0, GROUP, WRITTEN, BLOCK_K)  # no earlier: see forward.py
        wait = step >= (0 if RAGGED else 1)
        sums = add_received(
            sums, grad_gates_chunks, grad_gates_next, ks, wait, weights_hh, 4 * HIDDEN, WRITTEN, tiling, polling
        )
        grad_hidden = as_pairs(total(sums, tiling), BLOCK_HIDDEN, BLOCK_BATCH)
        from_outside = grad_output.to(tl.float32)
        if DROPOUT:
            from_outside = (from_outside + from_above) * scale if CHAINED else from_outside * scale
        grad_hidden += from_outside + grad_last.to(tl.float32)

        grad_cell_now = grad_cell + grad_here.to(tl.float32) if GRAD_CELLS else grad_cell
        grad_preact, grad_cell_prev = differentiate(as_float32(gates), cell_prev, cell, grad_hidden, grad_cell_now)
        even = tl.where(pairs % 2 == 0, grad_preact.input, grad_preact.candidate)
        odd = tl.where(pairs % 2 == 0, grad_preact.forget, grad_preact.output)
        if HIDDEN % BLOCK_HIDDEN != 0:
            even, odd = tl.where(units < HIDDEN, even, 0.0), tl.where(units < HIDDEN, odd, 0.0)  # see forward.py
        written_mask = (row_mask & (gate_minor < WRITTEN))[:, None]
        publish(grad_gates_ptrs + state_row * (4 * STATE_STRIDE), tl.join(even, odd), written_mask)
        published = clock(HOLDS)
        if RAGGED:
            # The gradient of the c before a reset is that of the c for resets.
            reset = source >= row_count + 2 * batch_size
            if SEVERAL_TILES:
                reset_ptrs = grad_reset_ptrs + first_row.to(tl.int64) * STATE_STRIDE
                grad_reset = tl.load(reset_ptrs, mask=mask & reset, other=0.0)
                tl.store(reset_ptrs, grad_reset + grad_cell_prev, mask=mask & reset)
            else:
                grad_reset += tl.where(reset, grad_cell_prev, 0.0)
            grad_cell = tl.where(row_mask, tl.where(reset, 0.0, grad_cell_prev), grad_cell)
        else:
            grad_cell = grad_cell_prev
        if SEVERAL_TILES:
            tl.store(grad_cell_ptrs + first_row.to(tl.int64) * STATE_STRIDE, grad_cell, mask=mask)
    if not SEVERAL_TILES:
        tl.store(grad_cell_ptrs + first_row.to(tl.int64) * STATE_STRIDE, grad_cell, mask=grad_cell_mask)
        if RAGGED:
            tl.store(grad_reset_ptrs + first_row.to(tl.int64) * STATE_STRIDE, grad_reset, mask=grad_cell_mask)

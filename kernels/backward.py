"""The backward scan: from the gradients of all h_t to those of all gate pre-activations, in one launch.

Notation and state rows as in forward.py. A program owns BLOCK_HIDDEN units, that is 4H x BLOCK_HIDDEN of W_hh, and
walks against the forward direction:

    dh_t = dL/dh_t + dgates_{t+1} W_hh          (the exchange: dgates_{t+1} of all units, written by the peers)
    dgates_t, dc_{t-1} = differentiate(...)     (gates.py)

The gradients of inputs, weights, biases and of h_0 are plain matrix products over dgates, done afterwards. dgates
rows are gate-minor, so that a unit's four gradients leave in one piece.
"""

import triton
import triton.language as tl

from .exchange import publish, request
from .gates import differentiate, join_gates
from .product import add_received, load_lefts, no_sums, total


@triton.jit(
    do_not_specialize=[
        "grad_output_stride_step",
        "grad_output_stride_batch",
        "seq_len",
        "batch_size",
        "batch_tiles",
        "reverse",
    ]
)
def backward_scan(
    grad_output_ptr,  # (T, B, H) I/O dtype: gradients of the h_t as outputs
    grad_output_stride_step,
    grad_output_stride_batch,
    grad_hidden_ptr,  # (B, H) I/O dtype: gradient of h_n
    grad_cell_ptr,  # (B, STATE_STRIDE) float32: gradient of c_n on entry, of c_0 on return
    gates_ptr,  # (T * B, 4H) I/O dtype: activated gates
    cell_ptr,  # (B + T * B + B, STATE_STRIDE) float32 state rows of c
    weight_hh_ptr,  # (4H, H)
    # (B + T * B + B, 4 * STATE_STRIDE) I/O dtype: state rows of the pre-activations' gradients, gate-minor; on entry
    # sentinels, and zeros in the rows after the last step
    grad_gates_ptr,
    seq_len,
    batch_size,
    batch_tiles,
    reverse,  # the forward scan's
    HIDDEN: tl.constexpr,
    STATE_STRIDE: tl.constexpr,
    SEVERAL_TILES: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    RESIDENT_CHUNKS: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,
    ACCUMULATORS: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):
    SLICES: tl.constexpr = (HIDDEN + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    WRITTEN: tl.constexpr = 4 * min(SLICES * BLOCK_HIDDEN, STATE_STRIDE)  # columns of grad_gates_ptr that are written
    GROUP: tl.constexpr = min(GROUP_CHUNKS, RESIDENT_CHUNKS)

    slice_index = tl.program_id(0) % SLICES
    group = tl.program_id(0) // SLICES
    groups = tl.num_programs(0) // SLICES
    tiles_per_step = (batch_tiles - group + groups - 1) // groups

    rows = tl.arange(0, BLOCK_BATCH)
    ks = tl.arange(0, BLOCK_K)
    local_units = slice_index * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    units = local_units[None, :]
    gate_minor = slice_index * 4 * BLOCK_HIDDEN + tl.arange(0, 4 * BLOCK_HIDDEN)[None, :]

    weight_ptrs = weight_hh_ptr + (ks % 4 * HIDDEN + ks // 4).to(tl.int64)[None, :] * HIDDEN + local_units[:, None]
    CHUNK_STRIDE: tl.constexpr = BLOCK_K // 4 * HIDDEN
    weights = load_lefts(
        weight_ptrs, local_units < HIDDEN, ks, RESIDENT_CHUNKS, CHUNK_STRIDE, 4 * HIDDEN, BLOCK_K, SPLIT_K
    )

    grad_output_ptrs = grad_output_ptr + rows[:, None].to(tl.int64) * grad_output_stride_batch + units
    grad_hidden_ptrs = grad_hidden_ptr + rows[:, None] * HIDDEN + units
    grad_cell_ptrs = grad_cell_ptr + rows[:, None] * STATE_STRIDE + units
    gates_ptrs = gates_ptr + rows[:, None] * (4 * HIDDEN) + units
    cell_ptrs = cell_ptr + rows[:, None] * STATE_STRIDE + units
    grad_gates_ptrs = grad_gates_ptr + rows[:, None] * (4 * STATE_STRIDE) + gate_minor

    first_row = group * BLOCK_BATCH
    grad_cell_mask = (first_row + rows < batch_size)[:, None] & (units < STATE_STRIDE)
    grad_cell = tl.load(grad_cell_ptrs + first_row.to(tl.int64) * STATE_STRIDE, mask=grad_cell_mask, other=0.0)
    for index in range(seq_len * tiles_per_step):
        step = tl.cast(index, tl.int32)  # when interpreted, index is a Python integer
        if SEVERAL_TILES:
            step = step // tiles_per_step
            first_row = (group + index % tiles_per_step * groups) * BLOCK_BATCH
        time = tl.where(reverse != 0, step, seq_len - 1 - step).to(tl.int64)
        step_row = time * batch_size + first_row
        state_row = step_row + batch_size
        to_next_row = tl.where(reverse != 0, -batch_size, batch_size)
        row_mask = (first_row + rows < batch_size)[:, None]
        mask = row_mask & (units < HIDDEN)

        read_rows = tl.minimum(rows, batch_size - 1 - first_row)[:, None]  # past the batch: its last row once more
        grad_gates_next = grad_gates_ptr + (state_row + to_next_row) * (4 * STATE_STRIDE)
        grad_gates_next = grad_gates_next + read_rows * (4 * STATE_STRIDE) + ks[None, :]
        grad_gates_tiles = request(grad_gates_next, ks, 0, GROUP, WRITTEN, BLOCK_K)

        gates = gates_ptrs + step_row * (4 * HIDDEN)
        input_gate = tl.load(gates, mask=mask, other=0.0)
        forget_gate = tl.load(gates + HIDDEN, mask=mask, other=0.0)
        candidate = tl.load(gates + 2 * HIDDEN, mask=mask, other=0.0)
        output_gate = tl.load(gates + 3 * HIDDEN, mask=mask, other=0.0)
        cell = tl.load(cell_ptrs + state_row * STATE_STRIDE, mask=mask, other=0.0)
        cell_prev = tl.load(cell_ptrs + (state_row - to_next_row) * STATE_STRIDE, mask=mask, other=0.0)
        grad_outputs = (
            grad_output_ptrs + time * grad_output_stride_step + first_row.to(tl.int64) * grad_output_stride_batch
        )
        grad_output = tl.load(grad_outputs, mask=mask, other=0.0)
        last_mask = (first_row + rows < tl.where(step == 0, batch_size, 0))[:, None] & (units < HIDDEN)
        grad_last = tl.load(grad_hidden_ptrs + first_row.to(tl.int64) * HIDDEN, mask=last_mask, other=0.0)
        if SEVERAL_TILES:
            tl.debug_barrier()  # other threads of this program may have written it, one step ago
            grad_cell = tl.load(grad_cell_ptrs + first_row.to(tl.int64) * STATE_STRIDE, mask=mask, other=0.0)

        sums = no_sums(BLOCK_HIDDEN, BLOCK_BATCH, SPLIT_K, ACCUMULATORS)
        sums = add_received(
            sums, grad_gates_tiles, grad_gates_next, step > 0, weights, weight_ptrs, local_units < HIDDEN,
            ks, CHUNK_STRIDE, 4 * HIDDEN, WRITTEN, RESIDENT_CHUNKS, GROUP, BLOCK_BATCH, BLOCK_K, SPLIT_K,
            DOT_PRECISION, PACKED,
        )  # fmt: skip
        grad_hidden = tl.trans(total(sums, SPLIT_K, ACCUMULATORS))
        grad_hidden += grad_output.to(tl.float32) + grad_last.to(tl.float32)

        grad_input_preact, grad_forget_preact, grad_cell_preact, grad_output_preact, grad_cell = differentiate(
            input_gate.to(tl.float32), forget_gate.to(tl.float32), candidate.to(tl.float32), output_gate.to(tl.float32),
            cell_prev, cell, grad_hidden, grad_cell,
        )  # fmt: skip
        grad_gates = join_gates(
            grad_input_preact, grad_forget_preact, grad_cell_preact, grad_output_preact, BLOCK_HIDDEN, BLOCK_BATCH
        )
        if HIDDEN % BLOCK_HIDDEN != 0:
            grad_gates = tl.where(gate_minor < 4 * HIDDEN, grad_gates, 0.0)  # see forward.py
        publish(grad_gates_ptrs + state_row * (4 * STATE_STRIDE), grad_gates, row_mask & (gate_minor < WRITTEN))
        if SEVERAL_TILES:
            tl.store(grad_cell_ptrs + first_row.to(tl.int64) * STATE_STRIDE, grad_cell, mask=mask)
    if not SEVERAL_TILES:
        tl.store(grad_cell_ptrs + first_row.to(tl.int64) * STATE_STRIDE, grad_cell, mask=grad_cell_mask)

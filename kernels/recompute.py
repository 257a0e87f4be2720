"""The gates and cell states of a layer, computed again for a backward scan: the forward scan did not keep them.

All h are known, so the pre-activations of all steps come from two large matrix products. What is left for this kernel
is sequential only along time: c_t = f_t * c_{t-1} + i_t * g_t. Every sequence and unit is by itself, and nothing is
exchanged.
"""

import triton
import triton.language as tl

from .gates import activate, add_gates, load_bias, load_gates, store_gates, update_state


@triton.jit(do_not_specialize=["seq_len", "batch_size", "reverse"])
def recompute_gates(
    # State and weights
    gates_ptr,  # (rows, 4H) I/O dtype: pre-activations without biases on entry, activated gates on return
    bias_ih_ptr,  # (4H,), read only if HAS_BIAS
    bias_hh_ptr,  # (4H,), read only if HAS_BIAS
    cell_ptr,  # (state rows, STATE_STRIDE) float32 c: on entry those that sequences start from, on return all
    # Tables, read only if RAGGED: see forward.py
    before_ptr,
    after_ptr,
    offsets_ptr,
    # Sizes
    seq_len,
    batch_size,
    reverse,
    HIDDEN: tl.constexpr,
    STATE_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    sequences = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    units = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    columns = units[None, :]
    if HAS_BIAS:
        bias = load_bias(bias_ih_ptr, bias_hh_ptr, units, HIDDEN)
    if RAGGED:
        sources_ptr = tl.where(reverse != 0, after_ptr, before_ptr)
    for index in range(seq_len):
        step = tl.cast(index, tl.int32)  # when interpreted, index is a Python integer
        time = tl.where(reverse != 0, seq_len - 1 - step, step).to(tl.int64)
        if RAGGED:
            first = tl.load(offsets_ptr + time)
            count = tl.load(offsets_ptr + time + 1) - first
            rows = first.to(tl.int64) + sequences
            sources = tl.load(sources_ptr + rows, mask=sequences < count, other=-1).to(tl.int64)
        else:
            rows = time * batch_size + sequences
            sources = tl.where(sequences < batch_size, rows + tl.where(reverse != 0, 2 * batch_size, 0), -1)
        mask = (sources >= 0)[:, None] & (columns < HIDDEN)
        gates_ptrs = gates_ptr + rows[:, None] * (4 * HIDDEN) + columns
        preact = load_gates(gates_ptrs, mask, HIDDEN, tl.float32)
        if HAS_BIAS:
            preact = add_gates(preact, bias)
        tl.debug_barrier()  # other threads of this program may have written c, one step ago
        cell_prev = tl.load(cell_ptr + sources[:, None] * STATE_STRIDE + columns, mask=mask, other=0.0)
        gates = activate(preact)
        cell, _ = update_state(gates, cell_prev)
        tl.store(cell_ptr + (rows[:, None] + batch_size) * STATE_STRIDE + columns, cell, mask=mask)
        store_gates(gates_ptrs, gates, mask, HIDDEN)

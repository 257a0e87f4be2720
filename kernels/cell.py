"""The cell: one step of an LSTM layer, and its derivative. The programs do not wait for each other.

Notation: B batch rows, I input_size, H hidden_size; gate order i, f, g, o; formula in gates.py. A program of the
forward kernel owns a tile of BLOCK_BATCH rows x BLOCK_HIDDEN units, that is 4 * BLOCK_HIDDEN gate-minor rows of both
weights, which it reads chunk by chunk:

    gates = activate(x W_ih^T + b_ih + h W_hh^T + b_hh)
    c', h' = update_state(gates, c)

The backward kernel goes from the gradients of h' and c' to the gradients of the pre-activations and of c, element by
element. The gradients of x, h, the weights and the biases are plain matrix products and sums, done afterwards.
"""

import triton
import triton.language as tl

from .gates import activate, add_bias, differentiate, load_gates, split_gates, store_gates, update_state
from .product import load_weight_chunk, rounded


@triton.jit
def add_linear(
    sums,  # (M, rows) float32
    weight_ptr,  # (4H, SIZE)
    gate_rows,  # (M,) rows of the weight
    gate_mask,
    row_ptrs,  # (rows,) to the first elements of the other factor's rows
    row_mask,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
    TF32_ROUNDING: tl.constexpr,
):
    """Add weight[gate_rows] @ rows^T to the sums."""
    ks = tl.arange(0, BLOCK_K)[None, :]
    weight_ptrs = weight_ptr + gate_rows[:, None] * SIZE + ks
    for chunk in range((SIZE + BLOCK_K - 1) // BLOCK_K):
        left = load_weight_chunk(weight_ptrs, gate_mask, ks, chunk, SIZE, BLOCK_K, 1, TF32_ROUNDING)
        mask = row_mask[:, None] & (chunk * BLOCK_K + ks < SIZE)
        right = tl.load(row_ptrs[:, None] + chunk * BLOCK_K + ks, mask=mask, other=0.0)
        sums = tl.dot(left, tl.trans(rounded(right, TF32_ROUNDING)), sums, input_precision=DOT_PRECISION)
    return sums


@triton.jit(do_not_specialize=["input_stride", "output_stride", "batch_size"])
def cell_forward(
    # Input and state
    input_ptr,  # (B, I)
    input_stride,  # between rows, in units of INPUT_STRIDE_UNIT elements
    hidden_ptr,  # (B, H), read only if HAS_STATE
    cell_ptr,  # (B, H), read only if HAS_STATE
    # Weights
    weight_ih_ptr,  # (4H, I)
    weight_hh_ptr,  # (4H, H)
    bias_ih_ptr,  # (4H,), read only if HAS_BIAS
    bias_hh_ptr,  # (4H,), read only if HAS_BIAS
    # Results
    hidden_next_ptr,  # (B, H) h'
    cell_next_ptr,  # (B, H) c'
    output_ptr,  # (B, H) h' once more, written only if HAS_OUTPUT
    output_stride,  # elements between rows
    gates_ptr,  # (B, 4H) activated gates, written only if KEEP_GATES
    # Sizes
    batch_size,
    INPUT: tl.constexpr,
    INPUT_STRIDE_UNIT: tl.constexpr,  # as in the forward scan
    HIDDEN: tl.constexpr,
    # What is computed
    HAS_STATE: tl.constexpr,  # otherwise h and c are zeros
    HAS_BIAS: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    KEEP_GATES: tl.constexpr,
    # The plan
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INPUT: tl.constexpr,  # columns of a chunk of x and W_ih
    BLOCK_K: tl.constexpr,  # columns of a chunk of h and W_hh
    DOT_PRECISION: tl.constexpr,
    TF32_ROUNDING: tl.constexpr,
):
    SLICES: tl.constexpr = (HIDDEN + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    slice_index = tl.program_id(0) % SLICES
    rows = (tl.program_id(0) // SLICES).to(tl.int64) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    row_mask = rows < batch_size
    units = slice_index * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    gate_minor = slice_index * 4 * BLOCK_HIDDEN + tl.arange(0, 4 * BLOCK_HIDDEN)
    gate_rows = (gate_minor % 4 * HIDDEN + gate_minor // 4).to(tl.int64)
    gate_mask = gate_minor < 4 * HIDDEN
    mask = row_mask[:, None] & (units < HIDDEN)[None, :]
    states = rows[:, None] * HIDDEN + units[None, :]

    sums = tl.zeros((4 * BLOCK_HIDDEN, BLOCK_BATCH), tl.float32)
    input_rows = input_ptr + rows * input_stride * INPUT_STRIDE_UNIT
    sums = add_linear(
        sums, weight_ih_ptr, gate_rows, gate_mask, input_rows, row_mask, INPUT, BLOCK_INPUT, DOT_PRECISION,
        TF32_ROUNDING,
    )  # fmt: skip
    if HAS_STATE:
        sums = add_linear(
            sums, weight_hh_ptr, gate_rows, gate_mask, hidden_ptr + rows * HIDDEN, row_mask, HIDDEN, BLOCK_K,
            DOT_PRECISION, TF32_ROUNDING,
        )  # fmt: skip
    preact = split_gates(sums, BLOCK_HIDDEN, BLOCK_BATCH)
    if HAS_BIAS:
        preact = add_bias(preact, bias_ih_ptr, bias_hh_ptr, units, HIDDEN)

    gates = activate(preact)
    cell = tl.zeros_like(gates.input)
    if HAS_STATE:
        cell += tl.load(cell_ptr + states, mask=mask, other=0.0)
    cell, hidden = update_state(gates, cell)
    hidden = hidden.to(hidden_next_ptr.dtype.element_ty)
    tl.store(hidden_next_ptr + states, hidden, mask=mask)
    if HAS_OUTPUT:
        tl.store(output_ptr + rows[:, None] * output_stride + units[None, :], hidden, mask=mask)
    tl.store(cell_next_ptr + states, cell.to(cell_next_ptr.dtype.element_ty), mask=mask)
    if KEEP_GATES:
        store_gates(gates_ptr + rows[:, None] * (4 * HIDDEN) + units[None, :], gates, mask, HIDDEN)


@triton.jit(do_not_specialize=["batch_size"])
def cell_backward(
    grad_hidden_ptr,  # (B, H) gradient of h'
    grad_cell_next_ptr,  # (B, H) gradient of c'
    gates_ptr,  # (B, 4H) activated gates
    cell_ptr,  # (B, H) c, read only if HAS_STATE
    cell_next_ptr,  # (B, H) c'
    grad_gates_ptr,  # (B, 4H) gradients of the pre-activations
    grad_cell_ptr,  # (B, H) gradient of c
    batch_size,
    HIDDEN: tl.constexpr,
    HAS_STATE: tl.constexpr,  # otherwise c is zeros
    BLOCK: tl.constexpr,  # elements of a program
):
    states = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = states // HIDDEN
    mask = rows < batch_size
    gate_places = states + rows * (3 * HIDDEN)  # of the input gates
    gates = load_gates(gates_ptr + gate_places, mask, HIDDEN, tl.float32)
    cell_next = tl.load(cell_next_ptr + states, mask=mask, other=0.0).to(tl.float32)
    cell = tl.zeros_like(cell_next)
    if HAS_STATE:
        cell += tl.load(cell_ptr + states, mask=mask, other=0.0)
    grad_hidden = tl.load(grad_hidden_ptr + states, mask=mask, other=0.0).to(tl.float32)
    grad_cell_next = tl.load(grad_cell_next_ptr + states, mask=mask, other=0.0).to(tl.float32)

    grad_preact, grad_cell = differentiate(gates, cell, cell_next, grad_hidden, grad_cell_next)
    store_gates(grad_gates_ptr + gate_places, grad_preact, mask, HIDDEN)
    tl.store(grad_cell_ptr + states, grad_cell.to(grad_gates_ptr.dtype.element_ty), mask=mask)

"""Gate mathematics, written once and shared by every kernel. All values are float32.

    input  gate  i = sigmoid(a_i)    how much of the potential memory to add
    forget gate  f = sigmoid(a_f)    what percentage of the long-term memory to keep
    candidate    g = tanh(a_g)       the potential memory
    output gate  o = sigmoid(a_o)    how much of the long-term memory becomes the new short-term memory
    cell state   c = f * c_prev + i * g          "long-term memory"
    hidden state h = o * tanh(c)                 "short-term memory"

Source: Hochreiter & Schmidhuber 1997; forget gate, Gers et al. 2000; gate order i, f, g, o as in torch.nn.LSTM.

An axis is *gate-minor* where the four gates of a unit lie side by side: index = 4 * unit + gate.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    # For very negative x, exp2 overflows to inf, and 1 / (1 + inf) is the exact limit 0. There is no inf / inf.
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def tanh(x):
    # Near 0, where exp(-2|x|) is close to 1 and digits would be lost, Moshier's polynomial (Cephes, tanhf) takes over.
    # Elsewhere the exponent is never positive, so nothing overflows.
    square = x * x
    series = -3.33332819422e-1 + square * (
        1.33314422036e-1 + square * (-5.37397155531e-2 + square * (2.06390887954e-2 - square * 5.70498872745e-3))
    )
    near_zero = x + x * square * series
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, near_zero, tl.where(x < 0, -far, far))


class Gates(NamedTuple):
    """A value for each of the four gates: pre-activations, biases, activated gates, or their gradients."""

    input: tl.tensor
    forget: tl.tensor
    candidate: tl.tensor
    output: tl.tensor


@triton.jit
def activate(preact):
    """Pre-activations -> activated gates."""
    return Gates(sigmoid(preact.input), sigmoid(preact.forget), tanh(preact.candidate), sigmoid(preact.output))


@triton.jit
def update_state(gates, cell_prev):
    """Gates and c_{t-1} -> (c_t, h_t)."""
    cell = gates.forget * cell_prev + gates.input * gates.candidate
    return cell, gates.output * tanh(cell)


@triton.jit
def differentiate(gates, cell_prev, cell, grad_hidden, grad_cell):
    """Gradients of h_t and c_t -> gradients of the pre-activations, and of c_{t-1}."""
    cell_tanh = tanh(cell)
    grad_cell += grad_hidden * gates.output * (1.0 - cell_tanh * cell_tanh)
    grad_preact = Gates(
        grad_cell * gates.candidate * gates.input * (1.0 - gates.input),
        grad_cell * cell_prev * gates.forget * (1.0 - gates.forget),
        grad_cell * gates.input * (1.0 - gates.candidate * gates.candidate),
        grad_hidden * cell_tanh * gates.output * (1.0 - gates.output),
    )
    return grad_preact, grad_cell * gates.forget


@triton.jit
def as_float32(gates):
    """The gates in float32."""
    return Gates(
        gates.input.to(tl.float32),
        gates.forget.to(tl.float32),
        gates.candidate.to(tl.float32),
        gates.output.to(tl.float32),
    )


@triton.jit
def add_gates(preact, others):
    """The sums of pre-activations and of values in any dtype, gate by gate, in float32."""
    return Gates(
        preact.input + others.input.to(tl.float32),
        preact.forget + others.forget.to(tl.float32),
        preact.candidate + others.candidate.to(tl.float32),
        preact.output + others.output.to(tl.float32),
    )


@triton.jit
def load_gates(pointers, mask, HIDDEN: tl.constexpr, DTYPE: tl.constexpr):
    """Gates from rows of 4H; pointers: to the input gates; DTYPE: of the result."""
    return Gates(
        tl.load(pointers, mask=mask, other=0.0).to(DTYPE),
        tl.load(pointers + HIDDEN, mask=mask, other=0.0).to(DTYPE),
        tl.load(pointers + 2 * HIDDEN, mask=mask, other=0.0).to(DTYPE),
        tl.load(pointers + 3 * HIDDEN, mask=mask, other=0.0).to(DTYPE),
    )


@triton.jit
def store_gates(pointers, gates, mask, HIDDEN: tl.constexpr):
    """Gates into rows of 4H, in their dtype; pointers: to the input gates."""
    dtype = pointers.dtype.element_ty
    tl.store(pointers, gates.input.to(dtype), mask=mask)
    tl.store(pointers + HIDDEN, gates.forget.to(dtype), mask=mask)
    tl.store(pointers + 2 * HIDDEN, gates.candidate.to(dtype), mask=mask)
    tl.store(pointers + 3 * HIDDEN, gates.output.to(dtype), mask=mask)


@triton.jit
def load_gate_bias(bias_ih_ptr, bias_hh_ptr, units, gate: tl.constexpr, HIDDEN: tl.constexpr):
    bias_ih = tl.load(bias_ih_ptr + gate * HIDDEN + units, mask=units < HIDDEN, other=0.0).to(tl.float32)
    bias_hh = tl.load(bias_hh_ptr + gate * HIDDEN + units, mask=units < HIDDEN, other=0.0).to(tl.float32)
    return (bias_ih + bias_hh)[None, :]


@triton.jit
def load_bias(bias_ih_ptr, bias_hh_ptr, units, HIDDEN: tl.constexpr):
    """(1, units) of b_ih + b_hh in float32, for each gate."""
    return Gates(
        load_gate_bias(bias_ih_ptr, bias_hh_ptr, units, 0, HIDDEN),
        load_gate_bias(bias_ih_ptr, bias_hh_ptr, units, 1, HIDDEN),
        load_gate_bias(bias_ih_ptr, bias_hh_ptr, units, 2, HIDDEN),
        load_gate_bias(bias_ih_ptr, bias_hh_ptr, units, 3, HIDDEN),
    )


@triton.jit
def add_bias(preact, bias_ih_ptr, bias_hh_ptr, units, HIDDEN: tl.constexpr):
    """Pre-activations plus b_ih + b_hh, for a kernel that adds them once: each one as soon as it is there."""
    return Gates(
        preact.input + load_gate_bias(bias_ih_ptr, bias_hh_ptr, units, 0, HIDDEN),
        preact.forget + load_gate_bias(bias_ih_ptr, bias_hh_ptr, units, 1, HIDDEN),
        preact.candidate + load_gate_bias(bias_ih_ptr, bias_hh_ptr, units, 2, HIDDEN),
        preact.output + load_gate_bias(bias_ih_ptr, bias_hh_ptr, units, 3, HIDDEN),
    )


@triton.jit
def split_gates(values, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """(4 * UNITS, ROWS), gate-minor along the first axis -> gates (ROWS, UNITS)."""
    pairs = tl.permute(tl.reshape(values, (UNITS, 2, 2, ROWS)), (3, 0, 1, 2))
    even, odd = tl.split(pairs)
    input_gate, candidate = tl.split(even)
    forget_gate, output_gate = tl.split(odd)
    return Gates(input_gate, forget_gate, candidate, output_gate)

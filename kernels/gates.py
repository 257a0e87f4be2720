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

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    # exp2 overflows to inf for very negative x, and 1 / (1 + inf) is the exact limit 0: never inf / inf.
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


@triton.jit
def activate(input_preact, forget_preact, cell_preact, output_preact):
    """Pre-activations -> (input gate, forget gate, candidate, output gate)."""
    return sigmoid(input_preact), sigmoid(forget_preact), tanh(cell_preact), sigmoid(output_preact)


@triton.jit
def update_state(input_gate, forget_gate, candidate, output_gate, cell_prev):
    """Gates and c_{t-1} -> (c_t, h_t)."""
    cell = forget_gate * cell_prev + input_gate * candidate
    return cell, output_gate * tanh(cell)


@triton.jit
def differentiate(input_gate, forget_gate, candidate, output_gate, cell_prev, cell, grad_hidden, grad_cell):
    """Gradients of h_t and c_t -> gradients of the four pre-activations (i, f, g, o) and of c_{t-1}."""
    cell_tanh = tanh(cell)
    grad_cell += grad_hidden * output_gate * (1.0 - cell_tanh * cell_tanh)
    grad_input_preact = grad_cell * candidate * input_gate * (1.0 - input_gate)
    grad_forget_preact = grad_cell * cell_prev * forget_gate * (1.0 - forget_gate)
    grad_cell_preact = grad_cell * input_gate * (1.0 - candidate * candidate)
    grad_output_preact = grad_hidden * cell_tanh * output_gate * (1.0 - output_gate)
    return grad_input_preact, grad_forget_preact, grad_cell_preact, grad_output_preact, grad_cell * forget_gate


@triton.jit
def split_gates(tile, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """(4 * UNITS, ROWS), gate-minor along the first axis -> four tiles (ROWS, UNITS) in the order i, f, g, o."""
    pairs = tl.permute(tl.reshape(tile, (UNITS, 2, 2, ROWS)), (3, 0, 1, 2))
    even, odd = tl.split(pairs)
    input_gate, candidate = tl.split(even)
    forget_gate, output_gate = tl.split(odd)
    return input_gate, forget_gate, candidate, output_gate

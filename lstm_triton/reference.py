"""One LSTM layer as the formula says it: the yardstick every other implementation is measured with.

Plain PyTorch operations in any floating dtype; tests run it in float64. It is differentiable as often as PyTorch is.

The formula is that of Hochreiter & Schmidhuber (1997), "Long Short-Term Memory", with the forget gate of Gers,
Schmidhuber & Cummins (2000), "Learning to Forget". Names and gate order (i, f, g, o) are those of `torch.nn.LSTM`.
"""

import torch
from torch import Tensor


def lstm_layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction. T time steps, B sequences, I inputs, H hidden units.

    Args:
        input: (T, B, I).
        h_0, c_0: (B, H), the short-term and the long-term memory to start with; None: zeros.
        weight_ih, weight_hh: (4H, I) and (4H, H), the gates i, f, g, o one above the other.
        bias_ih, bias_hh: (4H,), or None.
        reverse: read the sequence from its end.

    Returns:
        output (T, B, H), at each time step the h of that step, and the final h_n and c_n (B, H).

    >>> output, h_n, c_n = lstm_layer(torch.randn(5, 2, 3), None, None, torch.randn(16, 3), torch.randn(16, 4))
    >>> output.shape, torch.equal(output[-1], h_n)
    (torch.Size([5, 2, 4]), True)
    """
    steps, batch_size, _ = input.shape
    h = weight_hh.new_zeros(batch_size, weight_hh.shape[1]) if h_0 is None else h_0
    c = torch.zeros_like(h) if c_0 is None else c_0
    output = [h] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        gates = input[t] @ weight_ih.T + h @ weight_hh.T
        if bias_ih is not None and bias_hh is not None:
            gates = gates + bias_ih + bias_hh
        i, f, g, o = gates.chunk(4, dim=-1)
        keep = torch.sigmoid(f)  # forget gate: what percentage of the long-term memory to keep
        write = torch.sigmoid(i)  # input gate: what percentage of the potential memory to write
        potential = torch.tanh(g)  # the potential long-term memory
        show = torch.sigmoid(o)  # output gate: what percentage of the long-term memory to show
        c = keep * c + write * potential
        h = show * torch.tanh(c)
        output[t] = h
    return torch.stack(output), h, c

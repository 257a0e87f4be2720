"""The yardstick itself: against nn.LSTM in float64, and by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lstm_triton.reference import lstm_layer


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_one_step_by_hand() -> None:
    """One input, one unit, weights that tell the gates apart: i, f, g, o."""
    x, h_0, c_0 = 0.5, -0.3, 0.8
    weight_ih, weight_hh = (0.1, 0.2, 0.3, 0.4), (-0.5, 0.6, -0.7, 0.8)
    bias_ih, bias_hh = (0.01, 0.02, 0.03, 0.04), (0.1, -0.2, 0.3, -0.4)
    i, f, g, o = (w * x + r * h_0 + b + d for w, r, b, d in zip(weight_ih, weight_hh, bias_ih, bias_hh, strict=True))
    c = sigmoid(f) * c_0 + sigmoid(i) * math.tanh(g)
    h = sigmoid(o) * math.tanh(c)

    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).unsqueeze(1)

    output, h_n, c_n = lstm_layer(
        column(x).unsqueeze(0),
        column(h_0),
        column(c_0),
        column(*weight_ih),
        column(*weight_hh),
        column(*bias_ih).squeeze(1),
        column(*bias_hh).squeeze(1),
    )
    assert output.item() == h_n.item() == pytest.approx(h, rel=1e-14)
    assert c_n.item() == pytest.approx(c, rel=1e-14)


@given(
    time_steps=st.integers(1, 6),
    batch_size=st.integers(0, 4),
    input_size=st.integers(1, 5),
    hidden_size=st.integers(1, 5),
    bias=st.booleans(),
    with_states=st.booleans(),
)
def test_both_directions_are_those_of_nn_lstm(
    time_steps: int, batch_size: int, input_size: int, hidden_size: int, bias: bool, with_states: bool
) -> None:
    stock = nn.LSTM(input_size, hidden_size, bias=bias, bidirectional=True, dtype=torch.float64)
    input = torch.randn(time_steps, batch_size, input_size, dtype=torch.float64)
    hx = None
    if with_states:
        hx = tuple(torch.randn(2, batch_size, hidden_size, dtype=torch.float64) for _ in range(2))
    expected, (h_n, c_n) = stock(input, hx)
    results = []
    for direction, weights in enumerate(stock.all_weights):
        h_0, c_0 = (None, None) if hx is None else (hx[0][direction], hx[1][direction])
        results.append(lstm_layer(input, h_0, c_0, *weights, reverse=direction == 1))
        torch.testing.assert_close(results[-1][1:], (h_n[direction], c_n[direction]))
    torch.testing.assert_close(torch.cat([output for output, _, _ in results], dim=2), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    results = lstm_layer(*(torch.randn(size, dtype=dtype) for size in ((5, 2, 3), (2, 4), (2, 4), (16, 3), (16, 4))))
    assert [result.dtype for result in results] == [dtype] * 3


@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives(reverse: bool) -> None:
    sizes = ((3, 2, 2), (2, 2), (2, 2), (8, 2), (8, 2), (8,), (8,))
    tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda *t: lstm_layer(*t, reverse=reverse), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: lstm_layer(*t, reverse=reverse), tensors)

"""Floating-point operations, as PyTorch's FlopCounterMode counts them: those of nn.LSTM, on both paths."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import lstm_triton
from lstm_triton.interpreter import interpret

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

T, B, I, H, P = 4, 3, 5, 6, 2  # noqa: E741
LENGTHS = torch.tensor([4, 3, 1])
KERNELS = pytest.param("triton", marks=pytest.mark.interpreted)


def flops_of(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def stock_flops_of(function: Callable[[], Any]) -> int:
    """PyTorch counts nothing for nn.LSTM in oneDNN."""
    torch._C._set_mkldnn_enabled(False)
    try:
        return flops_of(function)
    finally:
        torch._C._set_mkldnn_enabled(True)


@contextlib.contextmanager
def on(path: str) -> Any:
    with interpret() if path == "triton" else contextlib.nullcontext(), lstm_triton.backend(path):
        yield


def trained(lstm: nn.Module, input: Tensor | PackedSequence, hx: Any = None, **options: Any) -> Callable[[], None]:
    def train() -> None:
        output, (h_n, c_n) = lstm(input, hx, **options)
        data = output.data if isinstance(output, PackedSequence) else output
        (data.sum() + h_n.sum() + c_n.sum()).backward()

    return train


@pytest.mark.parametrize("path", ["aten", KERNELS])
@pytest.mark.parametrize("needs", ["weights", "weights and input", "everything"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_as_of_nn_lstm(options: dict[str, Any], needs: str, path: str) -> None:
    ours = lstm_triton.LSTM(I, H, **options)
    stock, lanes = ours.to_torch_lstm(), ours.num_layers * (2 if ours.bidirectional else 1)
    input, hx = torch.randn(T, B, I, requires_grad=needs != "weights"), None
    if needs == "everything":
        hx = (torch.randn(lanes, B, H, requires_grad=True), torch.randn(lanes, B, H, requires_grad=True))
    packs = [False, True]
    if ours.bidirectional and hx is None:  # there nn.LSTM sends gradients to zeros before the first steps, too
        packs = [False]
    for packed in packs:

        def form(packed: bool = packed) -> Any:
            return pack_padded_sequence(input, LENGTHS) if packed else input

        expected = stock_flops_of(trained(stock, form(), hx))
        with on(path):
            assert flops_of(trained(ours, form(), hx)) == expected
    if options == {} and needs == "everything":
        assert expected == 3 * 2 * int(LENGTHS.sum()) * 4 * H * (I + H)


@pytest.mark.parametrize("path", ["aten", KERNELS])
def test_without_gradients(path: str) -> None:
    """A single step is another kernel. The states of an evaluated LSTM may be given or not."""
    lstm = lstm_triton.LSTM(I, H, num_layers=2).eval()
    of_a_step = 2 * B * 4 * H * (I + H + 2 * H)
    with torch.no_grad(), on(path):
        assert flops_of(lambda: lstm(torch.randn(T, B, I))) == T * of_a_step
        assert flops_of(lambda: lstm(torch.randn(1, B, I))) == of_a_step
        assert flops_of(lambda: lstm.with_cells(torch.randn(T, B, I))) == T * of_a_step


@pytest.mark.parametrize("path", ["aten", KERNELS])
def test_lengths_leave_out_what_is_padding(path: str) -> None:
    """In the kernels, the products after the backward scan multiply padding, and count it."""
    lstm, input = lstm_triton.LSTM(I, H), torch.randn(T, B, I)
    of_a_step = 2 * 4 * H * (I + H)
    with on(path):
        with torch.no_grad():
            assert flops_of(lambda: lstm(input, lengths=LENGTHS)) == 8 * of_a_step
            assert flops_of(lambda: lstm(input, lengths=torch.tensor([0, 4, 0]))) == 4 * of_a_step
        rows = 8 if path == "aten" else T * B
        through_h = (8 - B) * 2 * 4 * H * H
        assert flops_of(trained(lstm, input, lengths=LENGTHS)) == (8 + rows) * of_a_step + through_h


@pytest.mark.parametrize("path", ["aten", KERNELS])
def test_projections(path: str) -> None:
    """The kernels multiply the folded weight W_hh W_hr. What they multiply is counted."""
    lstm = lstm_triton.LSTM(I, H, proj_size=P)
    rows = T * B
    expected = 2 * rows * (4 * H * I + 4 * H * P + P * H)
    if path == "triton":
        expected = 2 * rows * (4 * H * I + 4 * H * H + P * H) + 2 * 4 * H * P * H + 2 * B * P * H  # and h_n
    with torch.no_grad(), on(path):
        assert flops_of(lambda: lstm(torch.randn(T, B, I))) == expected


@pytest.mark.interpreted
def test_low_memory_counts_what_is_computed_again() -> None:
    input = torch.randn(T, B, I, requires_grad=True)
    with on("triton"):
        for options in ({}, {"lengths": LENGTHS}):
            found = flops_of(trained(lstm_triton.LSTM(I, H, memory="low"), input, **options))
            assert found == 4 * 2 * (8 if options else T * B) * 4 * H * (I + H)


@pytest.mark.parametrize("path", ["aten", KERNELS])
def test_cell(path: str) -> None:
    ours, stock = lstm_triton.LSTMCell(I, H), nn.LSTMCell(I, H)
    input, states = torch.randn(B, I), (torch.randn(B, H, requires_grad=True), torch.randn(B, H))

    def step(cell: nn.Module) -> Callable[[], None]:
        return lambda: sum(each.sum() for each in cell(input, states)).backward()

    with on(path):
        assert flops_of(step(ours)) == flops_of(step(stock)) > 2 * B * 4 * H * (I + H)


@pytest.mark.parametrize("path", ["aten", KERNELS])
def test_counting_changes_no_value(path: str) -> None:
    lstm, input = lstm_triton.LSTM(I, H), torch.randn(T, B, I)
    with on(path):
        expected = lstm(input)[0]
        with FlopCounterMode(display=False):
            found = lstm(input)[0]
    torch.testing.assert_close(found, expected)


def test_products_of_a_gpu() -> None:
    """On a GPU the products outside the scans are an operator, too."""
    from lstm_triton.scan.dispatch import invoke
    from lstm_triton.scan.products import cuda_matmul

    assert flops_of(lambda: invoke(cuda_matmul, torch.randn(3, 5), torch.randn(5, 7))) == 2 * 3 * 5 * 7

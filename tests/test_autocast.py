"""autocast on the CPU, on both paths: nn.LSTM's dtypes, float32 master weights, training."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton import interpreter
from tests.comparing import assert_results_as_accurate, assert_same, run, twins

PATHS = [
    pytest.param(nullcontext, id="fallback"),
    pytest.param(interpreter.interpret, id="kernels", marks=pytest.mark.interpreted),
]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_are_nn_lstms(path: Any, input_dtype: torch.dtype) -> None:
    ours, stock = twins(3, 8, num_layers=2, bidirectional=True)
    input, hx = torch.randn(4, 2, 3, dtype=input_dtype), (torch.randn(4, 2, 8), torch.randn(4, 2, 8))
    for states in (None, hx):
        with torch.autocast("cpu", torch.bfloat16):
            expected = run(stock, input, states)
            with path():
                actual = run(ours, input, states)
        assert {name: t.dtype for name, t in actual.items()} == {name: t.dtype for name, t in expected.items()}
        assert actual["output"].dtype == torch.bfloat16
        assert actual["gradient of weight_hh_l0"].dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_float16_where_pytorchs_own_function_may_refuse_it(training: bool) -> None:
    """Whether it does depends on the processor: the same results, or the same error."""

    def results(module: nn.RNNBase) -> Any:
        with torch.autocast("cpu", torch.float16), torch.set_grad_enabled(training):
            try:
                return module(torch.ones(4, 2, 3))
            except RuntimeError as error:
                return str(error).splitlines()[0]

    ours, stock = (results(module) for module in twins(3, 8))
    if isinstance(stock, str):
        assert ours == stock
    else:
        assert_same(ours, stock)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_through_the_kernels(dtype: torch.dtype) -> None:
    """Those of the converted module, whose gradients come back in float32."""
    ours, stock = twins(3, 20, num_layers=2)
    input = torch.randn(4, 2, 3)
    with interpreter.interpret():
        with torch.autocast("cpu", dtype):
            actual = run(ours, input)
        converted = run(ours.to(dtype), input.to(dtype))
    for name, tensor in actual.items():
        assert torch.equal(tensor.to(dtype), converted[name]), name
    assert_results_as_accurate(converted, stock.to(dtype), input.to(dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("enabled", [False, True])
def test_inside_and_outside(path: Any, enabled: bool) -> None:
    """A region that is switched off inside another one is computed in float32, and backward does not mind either."""
    ours, stock = twins(3, 8)
    input = torch.randn(4, 2, 3)
    with path(), torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=enabled):
            output, _ = ours(input)
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        output.float().sum().backward()
    if not enabled:
        expected = run(stock, input)
        torch.testing.assert_close(output, expected["output"])


@pytest.mark.parametrize("path", PATHS)
def test_training_in_bfloat16(path: Any) -> None:
    """Master weights stay float32, their updates follow those of nn.LSTM, and the loss goes down."""
    losses, weights = [], []
    for module in twins(3, 8):
        head = nn.Linear(8, 1, bias=False)
        with torch.no_grad():
            head.weight.fill_(0.5)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        torch.manual_seed(0)
        input, target = torch.randn(4, 6, 3), torch.rand(6, 1)
        found: list[float] = []
        for _ in range(5):
            optimizer.zero_grad()
            with path() if isinstance(module, lstm_triton.LSTM) else nullcontext():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = (head(module(input)[0][-1]).float() - target).square().mean()
                loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
        weights.append(module.weight_hh_l0)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.02)
    torch.testing.assert_close(weights[0], weights[1], rtol=0.02, atol=0.02)
    assert weights[0].dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_packed_input_and_lengths(path: Any) -> None:
    ours = lstm_triton.LSTM(3, 8)
    input, lengths = torch.randn(4, 2, 3), torch.tensor([4, 2])
    packed = nn.utils.rnn.pack_padded_sequence(input, lengths)
    with path(), torch.autocast("cpu", torch.bfloat16):
        output: Tensor = ours(input, lengths=lengths)[0]
        through_kernels = path is not nullcontext
        packed_output, _ = ours(packed)
    assert output.dtype == torch.bfloat16
    # On the CPU autocast leaves packed sequences to nn.LSTM as they are.
    assert packed_output.data.dtype == (torch.bfloat16 if through_kernels else torch.float32)

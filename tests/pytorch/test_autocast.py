"""autocast on the CPU, on both paths: nn.LSTM's dtypes, float32 master weights, training."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton import interpreter
from lstm_triton.aten import native
from tests.support.comparing import (
    assert_as_accurate,
    assert_results_as_accurate,
    assert_same,
    can_autocast,
    run,
    run_converted,
    stock_in_autocast,
    twins,
)

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
        expected = {name: tensor.dtype for name, tensor in stock_in_autocast(stock, input, states).items()}
        if path is not nullcontext or input_dtype == torch.float32:  # otherwise it depends on the processor
            expected |= dict.fromkeys(("output", "h_n", "c_n"), torch.bfloat16)
        with path(), torch.autocast("cpu", torch.bfloat16):
            actual = run(ours, input, states)
        assert {name: tensor.dtype for name, tensor in actual.items()} == expected
        assert actual["gradient of weight_hh_l0"].dtype == torch.float32


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("kind", ["usual", "projected", "no sequences", "input in that dtype"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_pytorchs_own_function_may_fail(dtype: torch.dtype, kind: str, with_states: bool) -> None:
    """Whether it does depends on the processor: the same results, or those of the converted module."""
    proj_size = 4 if kind == "projected" else 0
    ours, stock = twins(3, 8, num_layers=2, bidirectional=True, proj_size=proj_size)
    batch_size = 0 if kind == "no sequences" else 2
    hx = (torch.randn(4, batch_size, proj_size or 8), torch.randn(4, batch_size, 8)) if with_states else None
    input = torch.randn(4, batch_size, 3)
    if kind == "input in that dtype":
        input = input.to(dtype)
    expected = stock_in_autocast(stock, input, hx, dtype)
    with torch.autocast("cpu", dtype):
        assert_same(run(ours, input, hx), expected)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, None], ids=["float32", "that dtype"])
def test_inference_where_pytorchs_own_function_may_fail(
    input_dtype: torch.dtype | None, dtype: torch.dtype, with_states: bool
) -> None:
    """PyTorch computes inference by other functions than training, in float16 at least."""
    ours, stock = twins(3, 8, num_layers=2, bidirectional=True)
    hx = (torch.randn(4, 2, 8), torch.randn(4, 2, 8)) if with_states else None
    input = torch.randn(4, 2, 3).to(input_dtype or dtype)
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            results = ours(input, hx)
        if native._is_onednns(dtype) or input_dtype is None:
            with torch.autocast("cpu", dtype):
                expected = stock(input, hx)
        else:
            expected = stock.to(dtype)(input.to(dtype), None if hx is None else [state.to(dtype) for state in hx])
    assert_same(results, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_it_would_fail(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The way around it, on every processor."""
    monkeypatch.setattr(native, "_WITHOUT_ONEDNNS_LAYERS", {dtype})
    ours, stock = twins(3, 8, num_layers=2, bidirectional=True)
    input, hx = torch.randn(4, 2, 3), (torch.randn(4, 2, 8), torch.randn(4, 2, 8))
    with torch.autocast("cpu", dtype):
        assert_same(run(ours, input, hx), run_converted(stock, input, hx, dtype))


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
    """Master weights stay float32, their updates follow those of nn.LSTM, and the loss goes down.

    nn.LSTM is in float32 where its processor refuses bfloat16.
    """
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
            is_ours = isinstance(module, lstm_triton.LSTM)
            with path() if is_ours else nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=is_ours or can_autocast(torch.bfloat16)):
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


# --- Scaled losses ---


def rounded_twins(dtype: torch.dtype) -> tuple[lstm_triton.LSTM, nn.LSTM]:
    """float32 weights that autocast does not round: what differs is what was computed."""
    ours, stock = twins(3, 20, num_layers=2)
    with torch.no_grad():
        for weight in (*ours.parameters(), *stock.parameters()):
            weight.copy_(weight.to(dtype))
    return ours, stock


def scaled_step(module: nn.RNNBase, input: Tensor, scale: float, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Gradients before and after unscale_, weights after the step, and the next scale; dtype None: without autocast."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        output, _ = module(input)
        loss = 16 * output.float().square().sum()
    scaler.scale(loss).backward()
    named = dict(module.named_parameters())
    found = {f"scaled gradient of {name}": weight.grad.clone() for name, weight in named.items()}
    if dtype is not None:
        scaler.unscale_(optimizer)
        found |= {f"gradient of {name}": weight.grad.clone() for name, weight in named.items()}
        scaler.step(optimizer)
        scaler.update()
        found |= {name: weight.detach().clone() for name, weight in named.items()}
        found["scale"] = torch.tensor(scaler.get_scale())
    return found


SCALE = 2.0**6  # a power of two: scaling rounds nothing
OVERFLOW = 2.0**127  # the largest in float32: the gradients are infinite


@pytest.mark.parametrize("scale", [SCALE, OVERFLOW], ids=["step", "skipped step"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_scaler_on_the_fallback(dtype: torch.dtype, scale: float) -> None:
    """nn.LSTM's gradients, weights and next scale, bit by bit where it does not refuse."""
    input = torch.randn(4, 2, 3).to(dtype).float()
    ours, stock = rounded_twins(dtype)
    actual = scaled_step(ours, input, scale, dtype)
    if can_autocast(dtype):
        assert_same(actual, scaled_step(stock, input, scale, dtype))
    assert actual["scale"] == (scale / 2 if scale == OVERFLOW else scale)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_with_grad_scaler(path: Any, dtype: torch.dtype) -> None:
    """Scaled gradients as accurate as those of nn.LSTM in that dtype, and the step that follows from them."""
    ours, stock = rounded_twins(dtype)
    before = {name: weight.detach().clone() for name, weight in ours.named_parameters()}
    input = torch.randn(4, 2, 3).to(dtype)
    with path():
        actual = scaled_step(ours, input.float(), SCALE, dtype)
    exact = scaled_step(copy.deepcopy(stock).double(), input.double(), SCALE, None)
    expected = scaled_step(stock.to(dtype), input, SCALE, None)
    for name, weight in before.items():
        scaled, gradient = actual[f"scaled gradient of {name}"], actual[f"gradient of {name}"]
        reference, theirs = exact[f"scaled gradient of {name}"], expected[f"scaled gradient of {name}"]
        assert scaled.dtype == torch.float32
        assert_as_accurate(scaled.to(dtype), reference, theirs, name=name)
        assert torch.equal(gradient, scaled / SCALE)
        torch.testing.assert_close(actual[name], weight - 0.5 * gradient)
    assert actual["scale"] == SCALE


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_scaler_skips_a_step_with_kernels(dtype: torch.dtype) -> None:
    ours, _ = rounded_twins(dtype)
    before = {name: weight.detach().clone() for name, weight in ours.named_parameters()}
    with interpreter.interpret():
        actual = scaled_step(ours, torch.randn(4, 2, 3), OVERFLOW, dtype)
    assert not actual["gradient of weight_hh_l0"].isfinite().all()
    assert_same({name: actual[name] for name in before}, before)
    assert actual["scale"] == OVERFLOW / 2


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

"""The kernels themselves, interpreted: against float64, under random schedules, with poisoned memory (conftest.py)."""

import mmap
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lstm_triton import interpreter
from lstm_triton.interpreter import Deadlock
from lstm_triton.scan import alignment, backward, forward, planner
from lstm_triton.scan.plan import Kind, ScanShape
from lstm_triton.scan.planner import candidates, plan
from lstm_triton.target import Device
from tests.support.lanes import DTYPES, LaneCase, interpretable, lane_cases, scan_layer, streamed

pytestmark = pytest.mark.interpreted

SEEDS = (0, 1, 2)
BOTH: tuple[Kind, ...] = ("forward", "backward")


@given(lane_cases(), st.integers(0, 2**32))
def test_any_layer_with_any_plan(layer: LaneCase, seed: int) -> None:
    layer.check(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward in time", "reversed"])
@pytest.mark.parametrize("hidden_size", [1, 7, 16, 33, 131])
def test_hidden_sizes(hidden_size: int, reverse: bool, dtype: torch.dtype) -> None:
    LaneCase(3, 5, 3, hidden_size, dtype, reverse).check()


@pytest.mark.parametrize("fuse_input", [False, True], ids=["projected beforehand", "fused"])
@pytest.mark.parametrize("input_size", [1, 17, 64, 130])
def test_input_projection_both_ways(input_size: int, fuse_input: bool) -> None:
    device = Device("one of each", "interpreter", 4, 200 * 1024)
    found = candidates(ScanShape("forward", 3, input_size, 20, torch.float32, device, allow_tf32=False))
    chosen = next(each for each in found if each.fuse_input == fuse_input)
    LaneCase(3, 3, input_size, 20, forward=chosen).check()


def streamed_layer(dtype: torch.dtype = torch.float32) -> LaneCase:
    """A layer whose weights do not all fit on the device, with more batch tiles than programs to take them."""
    device = Device("few", "interpreter", 20, 64 * 1024)
    plans = {}
    for kind in BOTH:
        shape = ScanShape(kind, 20, 5, 148, dtype, device, allow_tf32=False)
        several_tiles = next(each for each in candidates(shape) if each.batch_tiles > each.groups)
        plans[kind] = streamed(several_tiles, shape.depth)
    return LaneCase(3, 20, 5, 148, dtype, **plans)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_do_not_fit_are_streamed(dtype: torch.dtype) -> None:
    streamed_layer(dtype).check()


def test_the_order_of_programs_changes_nothing() -> None:
    for layer in (LaneCase(4, 11, 3, 37), LaneCase(4, 11, 3, 37, torch.bfloat16, reverse=True), streamed_layer()):
        runs = [layer.run(scan_layer, seed=seed) for seed in SEEDS]
        for other in runs[1:]:
            for name, tensor in other.items():
                assert torch.equal(tensor, runs[0][name]), name


def test_negative_control_without_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from lstm_triton.kernels import exchange

    layer = LaneCase(4, 3, 3, 37)
    layer.check()
    monkeypatch.setattr(exchange, "any_missing", lambda chunks, packed: False)
    for seed in SEEDS:
        with pytest.raises(AssertionError):
            layer.check(seed)


@pytest.mark.parametrize("scan", ["forward", "backward"])
def test_negative_control_without_the_values(monkeypatch: pytest.MonkeyPatch, scan: str) -> None:
    from lstm_triton.kernels import backward, forward

    monkeypatch.setattr({"forward": forward, "backward": backward}[scan], "publish", lambda *arguments: None)
    with pytest.raises(Exception, match="wait for values that none of them writes") as raised:
        LaneCase(3, 3, 3, 37).run(scan_layer)
    assert isinstance(raised.value, Deadlock) or isinstance(raised.value.__cause__, Deadlock)


def bits(value: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([value], dtype=torch.int32 if dtype.itemsize == 4 else torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["input", "h_0", "c_0", "weight_hh"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "the sentinel's bits"])
def test_values_that_are_no_numbers(value: str, where: str, dtype: torch.dtype) -> None:
    """They come out where nn.LSTM has them, and nothing hangs."""
    layer = LaneCase(4, 3, 5, 21, dtype)
    arguments = layer.tensors()
    position = ("input", "h_0", "c_0", "weight_ih", "weight_hh").index(where)
    broken = arguments[position].clone()
    broken.view(-1)[broken.numel() // 2] = bits(-1, dtype) if "bits" in value else float(value)
    arguments[position] = broken
    with interpreter.interpret():
        actual = scan_layer(*arguments, reverse=False)
    for ours, stock in zip(actual, layer.stock(*arguments, reverse=False), strict=True):
        assert torch.equal(ours.isnan(), stock.isnan())
        assert torch.equal(ours.isinf(), stock.isinf())
        torch.testing.assert_close(ours, stock, equal_nan=True, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_are_no_numbers_do_not_hang(dtype: torch.dtype) -> None:
    layer = LaneCase(4, 3, 5, 21, dtype)
    arguments = [tensor.requires_grad_() for tensor in layer.tensors() if tensor is not None]
    with interpreter.interpret():
        output, _, _ = scan_layer(*arguments, reverse=False)
        grad = torch.ones_like(output)
        grad[2, 1, 3] = bits(-1, dtype)
        output.backward(grad)
    assert arguments[0].grad is not None
    found = arguments[0].grad.isnan()
    expected = torch.zeros_like(found)
    expected[:3, 1] = True  # the steps up to the broken one, in its row
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_gates_are_finite(dtype: torch.dtype) -> None:
    """sigmoid and tanh of the largest numbers there are."""
    layer = LaneCase(2, 4, 1, 6, dtype, states=False)
    arguments = layer.tensors()
    largest = torch.finfo(dtype).max
    arguments[0] = torch.tensor([largest, -largest, 100.0, -88.8]).to(dtype).expand(2, 4).unsqueeze(2)
    arguments[3] = torch.sign(arguments[3])
    with interpreter.interpret():
        actual = scan_layer(*arguments, reverse=False)
    for ours, stock in zip(actual, layer.stock(*arguments, reverse=False), strict=True):
        torch.testing.assert_close(ours, stock)


def of_256_values(function: Callable[..., object], values: Tensor) -> Tensor:
    """A function of kernels/gates.py, elementwise."""
    import triton
    import triton.language as tl

    @triton.jit
    def apply(values_ptr, result_ptr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, 256)
        tl.store(result_ptr + offsets, function_under_test(tl.load(values_ptr + offsets)))  # noqa: F821

    apply.fn.__globals__["function_under_test"] = function  # a kernel sees globals only
    result = torch.empty_like(values)
    apply[(1,)](values, result)
    return result


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_gate_functions_over_their_whole_range(name: str) -> None:
    from lstm_triton.kernels import gates

    magnitudes = torch.logspace(-30, 38.5, 127, dtype=torch.float64).float()
    for values in (torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, -0.0])]), torch.linspace(-2, 2, 256)):
        found, expected = of_256_values(getattr(gates, name), values), getattr(torch, name)(values.double())
        # A gate is a percentage, exact to a unit of float32 at 100 %; a tanh keeps its digits also near 0.
        unit = 1.0 if name == "sigmoid" else expected.abs().clamp_min(2.0**-126)
        error = ((found.double() - expected).abs() / unit).max()
        print(f"{name}: largest error {error:.2e}")
        assert error < (1.2e-7 if name == "sigmoid" else 4e-7)


@pytest.mark.parametrize("which", ["input", "output's gradient"])
def test_offsets_beyond_32_bits(which: str) -> None:
    """Two steps that lie more than 2^31 elements apart, in memory of which only the touched pages exist."""
    stride = 2**31 + 16
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (stride + 64)), dtype=torch.float16)
    device = Device("one of each", "interpreter", 4, 200 * 1024)
    shape, backward_shape = (ScanShape(kind, 1, 16, 16, torch.float16, device, allow_tf32=False) for kind in BOTH)
    fused = next(each for each in candidates(shape) if each.fuse_input)
    layer = LaneCase(2, 1, 16, 16, torch.float16, forward=fused)
    far = memory.as_strided((2, 1, 16), (stride, 16, 1))
    arguments = [tensor for tensor in layer.tensors() if tensor is not None]
    far.copy_(arguments[0])
    with interpreter.interpret(), planner.forced(fused), planner.forced(plan(backward_shape), "backward"):
        input, h_0, c_0, *weights = arguments
        stack = (weights, 1, True, False)
        expected = forward.scan_forward(input, h_0.unsqueeze(0), c_0.unsqueeze(0), *stack, True, True, ())
        if which == "input":
            actual = forward.scan_forward(far, h_0.unsqueeze(0), c_0.unsqueeze(0), *stack, True, True, ())
        else:
            _, _, cell, gates, _, _ = expected
            others = (None, None, *stack, cell, gates, (), 1)
            expected = backward.scan_backward(far.contiguous(), *others)
            actual = backward.scan_backward(far, *others)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)  # unused rows hold sentinels


def test_strides_of_any_kind() -> None:
    layer = LaneCase(4, 3, 5, 21)
    arguments = layer.tensors()
    spaced = torch.randn(3, 4, 10).transpose(0, 1)[:, :, ::2]
    transposed = [arguments[3].t().contiguous().t(), arguments[4].t().contiguous().t()]
    with interpreter.interpret():
        actual = scan_layer(spaced, arguments[1], arguments[2], *transposed, *arguments[5:], reverse=False)
        contiguous = scan_layer(spaced.contiguous(), *arguments[1:], reverse=False)
    for one, other in zip(actual, contiguous, strict=True):
        assert torch.equal(one, other)


def test_outputs_are_contiguous() -> None:
    for hidden_size in (16, 21):
        with interpreter.interpret():
            output, _, _ = scan_layer(*LaneCase(4, 3, 5, hidden_size).tensors(), reverse=False)
        assert output.is_contiguous()


def test_interpretable_plans_keep_everything_else() -> None:
    gpu = Device("GPU", "sm_90", 132, 232448)
    chosen = plan(ScanShape("forward", 16, 64, 64, torch.float16, gpu, allow_tf32=False))
    assert chosen.packed
    assert chosen.thread_elements > 0
    same = {name: getattr(chosen, name) for name in ("packed", "thread_elements", "dot_precision")}
    assert replace(interpretable(chosen), **same) == chosen


def test_weights_are_aligned_and_copied_only_for_that() -> None:
    weight = torch.randn(64 * 16 + 1)[1:].view(64, 16)  # a view into the memory of something larger
    narrow = torch.randn(64, 13)
    aligned = torch.randn(64, 16)
    found = alignment.aligned([weight, narrow, aligned], 16)
    assert all(each.data_ptr() % 16 == 0 and each.shape == (64, 16) and each.is_contiguous() for each in found)
    assert torch.equal(found[0], weight)
    assert torch.equal(found[1][:, :13], narrow)
    assert found[1][:, 13:].count_nonzero() == 0
    assert found[2] is aligned

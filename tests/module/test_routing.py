"""Which path a call takes, and why."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_triton
from lstm_triton import checks, triton_package
from lstm_triton.call import Call
from lstm_triton.routing import Choice, choose
from tests.support.comparing import assert_same, run, twins
from tests.support.fake_gpu import FakeGPU

OBSTACLE = triton_package.obstacle.__wrapped__  # which a fake GPU hides


def call_of(module: nn.RNNBase, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None) -> Call:
    return checks.call_of_module(module, input, hx)


# --- Names ---


def test_backend_holds_inside_the_block_only() -> None:
    ours, stock = twins(3, 4)
    input = torch.randn(5, 2, 3)

    def on_triton() -> None:
        with pytest.raises(RuntimeError, match="the kernels run on NVIDIA GPUs, not on 'cpu' tensors"):
            ours(input)

    with lstm_triton.backend("triton"):
        on_triton()
        with lstm_triton.backend("aten"):
            assert_same(ours(input), stock(input))
            with lstm_triton.backend("auto"):
                assert_same(ours(input), stock(input))
        on_triton()
    assert_same(ours(input), stock(input))
    with pytest.raises(KeyError), lstm_triton.backend("triton"):
        raise KeyError
    assert_same(ours(input), stock(input))


def test_argument_wins() -> None:
    weights = [torch.zeros(16, 3), torch.zeros(16, 4), torch.zeros(16), torch.zeros(16)]
    input = torch.zeros(5, 2, 3)
    with lstm_triton.backend("triton"):
        lstm_triton.functional.lstm(input, None, weights, backend="aten")
        lstm_triton.functional.lstm(input, None, weights, backend="auto")
        with pytest.raises(RuntimeError, match='the backend "triton" was asked for'):
            lstm_triton.functional.lstm(input, None, weights)
    with lstm_triton.backend("aten"), pytest.raises(RuntimeError, match='the backend "triton" was asked for'):
        lstm_triton.functional.lstm(input, None, weights, backend="triton")


@pytest.mark.parametrize("name", ["cuda", "", "AUTO", None, 1])
def test_unknown_backend(name: Any) -> None:
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'aten', got "):
        lstm_triton.backend(name).__enter__()
    lstm_triton.LSTM(3, 4)(torch.zeros(5, 2, 3))


# --- The choice ---


def test_cpu() -> None:
    choice = choose(None, call_of(lstm_triton.LSTM(3, 4), torch.zeros(5, 2, 3)))
    assert choice == Choice("aten", "the kernels run on NVIDIA GPUs, not on 'cpu' tensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}])
def test_gpu(gpu: FakeGPU, dtype: torch.dtype, options: dict[str, Any]) -> None:
    call = call_of(gpu.lstm(3, 4, dtype=dtype, **options), gpu.tensor(5, 2, 3, dtype=dtype))
    assert choose(None, call).path == choose("triton", call).path == "triton"
    assert choose("aten", call) == Choice("aten", 'the backend "aten" was asked for')


def assert_aten(call: Call, reason: str) -> None:
    """By default; and an error if the kernels were asked for."""
    choice = choose(None, call)
    assert choice.path == "aten"
    assert reason in choice.reason
    with pytest.raises(RuntimeError) as caught:
        choose("triton", call)
    assert str(caught.value) == f'the backend "triton" was asked for, but cannot take this call: {choice.reason}'


def test_arguments_the_kernels_do_not_take(gpu: FakeGPU) -> None:
    input, state = gpu.tensor(5, 2, 3), gpu.tensor(1, 2, 4)
    packed = pack_padded_sequence(torch.zeros(5, 2, 3), torch.tensor([5, 5]))
    assert choose(None, call_of(gpu.lstm(3, 4), packed._replace(data=gpu.tensor(10, 3)))).path == "triton"
    assert choose(None, call_of(gpu.lstm(3, 4, proj_size=2), input)).path == "triton"
    assert_aten(call_of(gpu.lstm(3, 4), gpu.tensor(5, 0, 3)), "the batch is empty")
    float64 = call_of(gpu.lstm(3, 4, dtype=torch.float64), gpu.tensor(5, 2, 3, dtype=torch.float64))
    assert_aten(float64, "the kernels take float32, float16 and bfloat16, not torch.float64")
    assert_aten(call_of(lstm_triton.LSTM(3, 4), input), "several devices, cuda:0 and cpu")
    assert_aten(call_of(gpu.lstm(3, 4), input, (state, torch.zeros(1, 2, 4))), "several devices, cuda:0 and cpu")
    mixed = call_of(gpu.lstm(3, 4), input, (state, state.half()))
    assert_aten(mixed, "several dtypes, torch.float32 and torch.float16")
    assert_aten(call_of(gpu.lstm(3, 100_000), input), "no plan for hidden_size 100000")
    on_meta = lstm_triton.LSTM(3, 4, device="meta")
    assert_aten(call_of(on_meta, torch.zeros(5, 2, 3, device="meta")), "not on 'meta' tensors")


def test_autocast_makes_dtypes_one(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    state = gpu.tensor(1, 2, 4)
    module, input = gpu.lstm(3, 4), gpu.tensor(5, 2, 3, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    monkeypatch.setattr(torch._C, "_is_any_autocast_enabled", lambda: True)
    assert choose(None, call_of(module, input, (state, state.half()))).path == "triton"
    assert_aten(call_of(module, input, (state, state.double())), "several dtypes, torch.bfloat16 and ")


def test_old_gpu(gpu: FakeGPU) -> None:
    gpu.name, gpu.major, gpu.minor = "Tesla T4", 7, 5
    assert_aten(call_of(gpu.lstm(3, 4), gpu.tensor(5, 2, 3)), "compute capability 8.0 or later, Tesla T4 has 7.5")


def test_amd_gpu(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert_aten(call_of(gpu.lstm(3, 4), gpu.tensor(5, 2, 3)), "the kernels do not run on AMD GPUs yet")


def test_interpreted_triton_is_kept_off_gpus(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_aten(call_of(gpu.lstm(3, 4), gpu.tensor(5, 2, 3)), "one after another")


def test_no_gpu(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_aten(call_of(gpu.lstm(3, 4), gpu.tensor(5, 2, 3)), "there is no GPU")


def test_no_triton(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_package, "obstacle", OBSTACLE)
    monkeypatch.setattr(triton_package, "installed", lambda: False)
    assert_aten(call_of(gpu.lstm(3, 4), gpu.tensor(5, 2, 3)), "Triton is not installed")


@pytest.mark.interpreted
def test_kernels_in_one_compiled_graph() -> None:
    """The choice asks the planner, which torch.compile need not understand."""
    from lstm_triton.interpreter import interpret

    ours, stock = twins(3, 4, num_layers=2, bidirectional=True)
    input = torch.randn(2, 3, 3)
    expected = run(stock, input)
    ours.compile(fullgraph=True, backend="aot_eager")
    with interpret(), warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # caches, or what cannot be traced
        actual = run(ours, input)
    torch.testing.assert_close(actual, expected)


@pytest.mark.interpreted
def test_traced_without_the_kernels() -> None:
    """torch.jit.trace would record neither of them nor of what follows from sizes."""
    from lstm_triton.interpreter import interpret

    module, input = lstm_triton.LSTM(3, 16), torch.randn(5, 2, 3)
    with interpret(), torch.no_grad():
        traced = torch.jit.trace(module, (input,), check_trace=False)
        assert "lstm_triton::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(input + 1), module(input + 1))

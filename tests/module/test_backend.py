"""Which path a call takes, and what `explain` says of it beforehand."""

import dataclasses
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_triton
from lstm_triton import planner
from lstm_triton.backend import Choice, _found_obstacle_of_device, choose
from lstm_triton.functional import Call
from tests.support.comparing import assert_same, run, twins

backend_module = importlib.import_module("lstm_triton.backend")  # the package has the function under this name


def call_of(module: nn.RNNBase, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None) -> Call:
    return backend_module.call_of(module, input, hx)


class OnGPU(Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda:0"))  # type: ignore[assignment]


@dataclasses.dataclass
class FakeGPU:
    """The properties of a GPU that is not there, to be changed at will."""

    name: str = "NVIDIA H100"
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 132
    shared_memory_per_block_optin: int = 227 * 1024
    gcnArchName: str = "gfx942:sramecc+"

    def tensor(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros((), dtype=dtype).expand(sizes).as_subclass(OnGPU)  # type: ignore[return-value]

    def lstm(self, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> lstm_triton.LSTM:
        module = lstm_triton.LSTM(*args, device="meta", **kwargs)
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(self.tensor(*parameter.shape, dtype=dtype)))
        return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    properties = FakeGPU()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(backend_module, "_triton_installed", True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    caches = (_found_obstacle_of_device, planner._of_gpu)
    for function in caches:
        function.cache_clear()
    yield properties
    for function in caches:
        function.cache_clear()


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
    monkeypatch.setattr(backend_module, "_triton_installed", False)
    assert_aten(call_of(gpu.lstm(3, 4), gpu.tensor(5, 2, 3)), "Triton is not installed")


# --- explain ---


@pytest.mark.parametrize("cls", [lstm_triton.LSTM, nn.LSTM])
def test_explained_on_the_cpu(cls: type[nn.RNNBase]) -> None:
    explanation = lstm_triton.explain(cls(3, 4, num_layers=2, bidirectional=True), torch.zeros(5, 2, 3))
    assert [(each.layer, each.direction) for each in explanation.layers] == [
        (0, "forward"),
        (0, "reverse"),
        (1, "forward"),
        (1, "reverse"),
    ]
    for each in explanation.layers:
        assert each.path == "aten"
        assert each.reason == "the kernels run on NVIDIA GPUs, not on 'cpu' tensors"
    assert (explanation.scans, explanation.launches) == ((), 0)
    assert (explanation.device, explanation.dtype) == ("cpu", torch.float32)
    assert (explanation.time_steps, explanation.batch_size) == (5, 2)
    assert str(explanation).splitlines() == [
        "LSTM(3, 4, num_layers=2, bidirectional=True) on cpu, torch.float32, T=5, B=2",
        "layer  direction  path    why",
        "    0  forward    aten    the kernels run on NVIDIA GPUs, not on 'cpu' tensors",
        "    0  reverse    aten    the kernels run on NVIDIA GPUs, not on 'cpu' tensors",
        "    1  forward    aten    the kernels run on NVIDIA GPUs, not on 'cpu' tensors",
        "    1  reverse    aten    the kernels run on NVIDIA GPUs, not on 'cpu' tensors",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.layers[0].path = "triton"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "input", "time_steps", "batch_size"),
    [
        ({}, torch.zeros(5, 2, 3), 5, 2),
        ({"batch_first": True}, torch.zeros(5, 2, 3), 2, 5),
        ({}, torch.zeros(5, 3), 5, 1),
        ({"batch_first": True}, torch.zeros(5, 3), 5, 1),
        ({"batch_first": True}, pack_padded_sequence(torch.zeros(5, 2, 3), torch.tensor([5, 3])), 5, 2),
    ],
)
def test_explained_sizes(
    options: dict[str, Any], input: Tensor | PackedSequence, time_steps: int, batch_size: int
) -> None:
    explanation = lstm_triton.explain(lstm_triton.LSTM(3, 4, **options), input)
    assert (explanation.time_steps, explanation.batch_size) == (time_steps, batch_size)


def test_explained_on_a_gpu(gpu: FakeGPU) -> None:
    module = gpu.lstm(3, 768, num_layers=2, bidirectional=True, dtype=torch.float16)
    input = gpu.tensor(1000, 16, 3, dtype=torch.float16)
    explanation = lstm_triton.explain(module, input)
    assert explanation.device == "cuda:0"
    assert {each.path for each in explanation.layers} == {"triton"}
    sizes = {"batch_size": 16, "hidden_size": 768, "dtype": torch.float16, "allow_tf32": True}
    device = planner.Device("NVIDIA H100", "sm_90", 132, 227 * 1024)
    kinds: tuple[planner.Kind, planner.Kind] = ("forward", "backward")
    expected = [
        (kind, launch.plan, tuple(launch.lanes))
        for kind in kinds
        for launch in planner.launches(kind, num_layers=2, directions=2, input_size=3, device=device, **sizes)
    ]
    assert [(scan.kind, scan.plan, scan.lanes) for scan in explanation.scans] == expected
    assert explanation.launches == 4  # of either scan, one for each layer, with both of its directions
    for number, scan in enumerate(explanation.scans):
        line = f"launch {number + 1}: {scan.kind} scan of layer {number % 2} in both directions: {scan.plan}"
        assert line in str(explanation).splitlines()
    in_sizes_only = torch.zeros(1000, 16, 3, dtype=torch.float16, device="meta")
    assert lstm_triton.explain(module, in_sizes_only) == explanation
    with lstm_triton.backend("aten"):
        assert {each.reason for each in lstm_triton.explain(module, input).layers} == {
            'the backend "aten" was asked for'
        }


@pytest.mark.interpreted
def test_explained_plans_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from lstm_triton.interpreter import interpret

    plans: list[tuple[str, planner.Plan]] = []

    def recorded(kind: planner.Kind, **sizes: Any) -> planner.Plan:
        plans.append((kind, plan(kind, **sizes)))
        return plans[-1][1]

    module, input = lstm_triton.LSTM(3, 20, num_layers=2, bidirectional=True), torch.randn(2, 3, 3)
    with interpret():
        explanation = lstm_triton.explain(module, input)
        plan = planner.plan
        monkeypatch.setattr(planner, "plan", recorded)
        run(module, input)
    assert plans == [(scan.kind, scan.plan) for scan in explanation.scans]
    assert explanation.launches == len(plans)


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


def test_explain_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, input = lstm_triton.LSTM(3, 4, num_layers=2, dropout=0.5), torch.zeros(5, 2, 3)
    before = torch.get_rng_state()
    monkeypatch.setattr(torch, "lstm", None)
    lstm_triton.explain(module, input)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(TypeError):
        module(input)


@pytest.mark.parametrize("module", [nn.GRU(3, 4), nn.Linear(3, 4), None])
def test_explain_takes_lstms_only(module: Any) -> None:
    with pytest.raises(TypeError, match=r"explain takes an LSTM or an LSTMCell, of lstm_triton or of torch\.nn, got "):
        lstm_triton.explain(module, torch.zeros(5, 2, 3))


def test_explain_raises_what_the_call_would() -> None:
    module = lstm_triton.LSTM(3, 4)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 7"):
        lstm_triton.explain(module, torch.zeros(5, 2, 7))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        lstm_triton.explain(module, torch.zeros(5, 2, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)))
    with lstm_triton.backend("triton"), pytest.raises(RuntimeError, match="cannot take this call"):
        lstm_triton.explain(module, torch.zeros(5, 2, 3))

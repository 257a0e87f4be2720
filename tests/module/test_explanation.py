"""What `explain` says of a call beforehand."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_triton
from lstm_triton.interpreter import interpret
from lstm_triton.scan import planner, windows
from lstm_triton.scan.plan import Kind, ScanShape
from lstm_triton.target import Device
from tests.support.fake_gpu import FakeGPU
from tests.support.launches import recorded_launches


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
    gpu_device = Device("NVIDIA H100", "sm_90", 132, 227 * 1024)
    kinds: tuple[Kind, Kind] = ("forward", "backward")
    shapes = [ScanShape(kind, 16, 3, 768, torch.float16, gpu_device, allow_tf32=True) for kind in kinds]
    expected = [
        (shape.kind, launch.plan, tuple(launch.lanes))
        for shape in shapes
        for launch in planner.launches(shape, num_layers=2, directions=2)
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


RUNS: dict[str, dict[str, Any]] = {
    "both directions": {"bidirectional": True},
    "layers": {},
    "low memory": {"memory": "low"},
    "projections": {"proj_size": 5},
}


@pytest.mark.interpreted
@pytest.mark.parametrize("windows_of_time", [False, True], ids=["all steps at once", "in windows"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_explained_launches_are_those_that_run(
    options: dict[str, Any], trains: bool, windows_of_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if windows_of_time:
        monkeypatch.setattr(windows, "PREACTIVATION_BYTES", 1)
        monkeypatch.setattr(windows, "LOW_MEMORY_STEPS", 3)
    module, input = lstm_triton.LSTM(3, 20, num_layers=2, **options), torch.randn(5, 3, 3)
    hx = (torch.randn(module.num_layers * (1 + module.bidirectional), 3, options.get("proj_size", 20)),)
    hx = (*hx, torch.randn(*hx[0].shape[:2], 20))
    with interpret(), torch.set_grad_enabled(trains), recorded_launches() as launches:
        explanation = lstm_triton.explain(module, input, hx)
        assert not launches
        output, _ = module(input, hx)
        if trains:
            output.sum().backward()
    for kind in ("forward", "backward"):
        told = [scan for scan in explanation.scans if scan.kind == kind]
        ran = [each.plan for each in launches if each.kernel == f"{kind}_scan"]
        assert len(ran) == sum(scan.times for scan in told)
        assert {dataclasses.replace(plan, lanes=1) for plan in ran} == {
            dataclasses.replace(scan.plan, lanes=1) for scan in told
        }
        if all(scan.times == 1 for scan in told):
            assert ran[:: 1 if kind == "forward" else -1] == [scan.plan for scan in told]


@pytest.mark.interpreted
@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "dropout": 0.5}, {"dropout": 0.5}, {"proj_size": 5}], ids=str
)
def test_explained_launches_of_a_single_step(options: dict[str, Any], states: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout of one layer has no effect
        module = lstm_triton.LSTM(3, 20, **options)
    hx = (torch.randn(module.num_layers, 3, options.get("proj_size", 20)), torch.randn(module.num_layers, 3, 20))
    with interpret(), torch.no_grad(), recorded_launches() as launches:
        explanation = lstm_triton.explain(module, torch.randn(1, 3, 3), hx if states else None)
        module(torch.randn(1, 3, 3), hx if states else None)
    names = {"cell": "cell_forward", "forward": "forward_scan"}
    assert launches.kernels == [names[scan.kind] for scan in explanation.scans]


def test_a_notebook_shows_what_print_prints() -> None:
    explanation = lstm_triton.explain(lstm_triton.LSTM(3, 4), torch.zeros(5, 2, 3))
    for each in (explanation, lstm_triton.replace_lstm(nn.LSTM(3, 4)), lstm_triton.accelerate()):
        assert repr(each) == str(each)


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

"""Where nn.LSTM was measured to be faster, "auto" takes it, and says why."""

import json
from pathlib import Path

import pytest
import torch

import lstm_triton
from bench import measure, results
from bench import routes as bench_routes
from bench.cases import BenchCase
from lstm_triton import routes, routing, target
from lstm_triton.checks import call_of_module as call_of
from lstm_triton.routes import Measured
from lstm_triton.routing import choose
from lstm_triton.scan import launch
from lstm_triton.target import Device

GPU = Device("NVIDIA Test 9000", "sm_90", 132, 232448)
ROWS = (
    Measured("training", "float16", 2048, 256, 2.4),
    Measured("training", "float16", 768, 16, 0.6),
    Measured("training", "float16", 768, 256, 1.01),
    Measured("inference", "float16", 2048, 256, 0.9),
    Measured("training", "tf32", 64, 16, 1.5),
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "measured_on", lambda device: ROWS if device == GPU else ())
    routes.why_stock.cache_clear()
    yield
    routes.why_stock.cache_clear()


@pytest.mark.parametrize(
    ("mode", "dtype", "allow_tf32", "hidden_size", "batch_size", "faster"),
    [
        ("training", torch.float16, True, 2048, 256, True),
        ("inference", torch.float16, True, 2048, 256, False),  # the kernels are faster there
        ("training", torch.float16, True, 1500, 300, True),  # the nearest size speaks
        ("training", torch.float16, True, 2048, 100, False),  # more than a factor of two away
        ("training", torch.float16, True, 768, 256, False),  # no slower than two measurements differ
        ("training", torch.bfloat16, True, 2048, 256, False),  # never measured
        ("training", torch.float32, True, 64, 16, True),
        ("training", torch.float32, False, 64, 16, False),
    ],
)
def test_the_nearest_size_speaks(
    measured: None,
    mode: str,
    dtype: torch.dtype,
    allow_tf32: bool,
    hidden_size: int,
    batch_size: int,
    faster: bool,
) -> None:
    why = routes.why_stock(mode, dtype, allow_tf32, hidden_size, batch_size, GPU)
    assert (why is not None) == faster
    if why is not None:
        assert why.startswith("nn.LSTM was measured to be")
        assert GPU.name in why
    assert (
        routes.why_stock(mode, dtype, allow_tf32, hidden_size, batch_size, target.Device.of(torch.device("cpu")))
        is None
    )


def test_auto_takes_the_faster_path(measured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only where the call is a plain one; "triton" means the kernels all the same."""
    monkeypatch.setattr(routing, "_obstacle", lambda call: None)
    monkeypatch.setattr(routing, "_is_gpu", lambda tensor: True)
    monkeypatch.setattr(Device, "of", staticmethod(lambda device: GPU))
    lstm = lstm_triton.LSTM(8, 64)
    assert launch.allows_tf32()

    def path(time_steps: int = 5, **sequences: object) -> tuple[str, str]:
        call = call_of(lstm, torch.empty(time_steps, 16, 8), None, **sequences)
        return choose(None, call)

    assert path() == (
        "aten",
        "nn.LSTM was measured to be 1.50 times as fast in training on NVIDIA Test 9000 (tf32, H = 64, B = 16)",
    )
    with torch.no_grad():  # as where checkpointing computes something for the first time
        assert path().path == "aten"
    lstm.eval()
    assert path().path == "triton"
    lstm.train()
    assert path(resets=torch.zeros(5, 16, dtype=torch.bool)).path == "triton"
    assert path(lengths=torch.full((16,), 5)).path == "triton"
    assert path(time_steps=1).path == "triton"
    with lstm_triton.backend("triton"):
        assert path().path == "triton"
    with torch.backends.cudnn.flags(enabled=False):
        assert path().path == "triton"
    for others in ({"num_layers": 2}, {"bidirectional": True}, {"memory": "low"}):
        lstm = lstm_triton.LSTM(8, 64, **others)
        assert path().path == "triton"
    lstm = lstm_triton.LSTM(8, 64)
    taken = []

    def loss(data: torch.Tensor) -> torch.Tensor:
        taken.append(choose(None, call_of(lstm, data, None)).path)
        return data.sum()

    torch.func.grad(loss)(torch.empty(5, 16, 8))
    assert taken == ["triton"]


def test_the_table_comes_from_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(case: BenchCase, ours: float, theirs: float) -> list[dict[str, object]]:
        found = []
        for system, time in (("lstm_triton", ours), ("nn.LSTM", theirs)):
            row = measure.new_row("full", case, system, "ok", "")
            row |= {"median_us": time, "p20_us": time, "p80_us": time}
            found.append(row)
        return found

    short = BenchCase("forward+backward", "float16", T=256, B=16, I=512, H=512)
    long = BenchCase("forward+backward", "float16", T=1024, B=16, I=512, H=512)
    origin = {**dict.fromkeys(results.PROVENANCE_KEYS, ""), "gpu": "NVIDIA Test 9000"}
    found = results.Results(origin)
    found.add(rows(short, 30.0, 10.0) + rows(long, 15.0, 10.0))
    found.add(rows(BenchCase("inference", "bfloat16", T=256, B=1, I=64, H=64), 5.0, 10.0))
    found.add(rows(BenchCase("inference", "bfloat16", T=256, B=1, I=64, H=64, layers=2), 50.0, 10.0))
    found.write(tmp_path / "results.json")
    target = tmp_path / "table.json"
    assert bench_routes.main(["--results", str(tmp_path / "results.json"), "--out", str(target)]) == 0
    assert json.loads(target.read_text()) == [
        ["inference", "bfloat16", 64, 1, 0.5],
        ["training", "float16", 512, 16, 1.5],
    ]
    assert "2 sizes, the kernels slower in 1:" in capsys.readouterr().out

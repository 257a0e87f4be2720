"""What a call costs beside the kernels (bench/overhead.py): launches and compilations on a pretended GPU, and times."""

import json
import math
from typing import Any

import pytest

from tests.support.processes import output_of_python

pytest.importorskip("triton")

Rows = dict[str, dict[str, Any]]  # by the name of the call


def overhead(*arguments: str) -> Any:
    return json.loads(output_of_python("-m", "bench.overhead", "--json", *arguments))


@pytest.fixture(scope="module")
def rows() -> Rows:
    return {row["call"]: row for row in overhead("--seconds", "0.001")["rows"]}


def is_time(microseconds: float) -> bool:
    return 0 < microseconds < math.inf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_compilation_for_each_plan(dtype: str) -> None:
    """Neither the numbers of steps and sequences nor how an input lies in memory cause another one."""
    [found] = overhead("--compilations", "64", "--dtype", dtype).values()
    assert found.keys() == {"forward_scan", "backward_scan", "cell_forward"}
    for kernel in found.values():
        assert kernel["compiled"] == kernel["constants"]
    # In training and in inference, a few plans each, for all batch sizes up to 256.
    assert found["forward_scan"]["constants"] <= 10
    assert found["backward_scan"]["constants"] <= 3
    assert found["cell_forward"]["constants"] <= 4


def test_what_a_call_launches(rows: Rows) -> None:
    """The kernels; and of PyTorch's operators as few as were once needed."""
    found = {name: (sum(row["operators"].values()), sum(row["launches"].values())) for name, row in rows.items()}
    assert found.pop("one step") == (0, 1)
    assert found.pop("one step, with states") == (0, 1)
    assert found.pop("one step, 2 layers, both directions") == (0, 4)
    most = {
        "one step, training": (17, 2),
        "inference": (5, 1),
        "inference, with states": (5, 1),
        "training": (17, 2),
        "inference, 2 layers, both directions": (12, 2),
        "training, 2 layers, both directions": (49, 4),
        "training, 4 layers, both directions": (97, 8),
    }
    assert found.keys() == most.keys()
    for name, (operators, launches) in found.items():
        assert operators <= most[name][0], rows[name]["operators"]
        assert launches == most[name][1]


def test_how_much_python_a_call_runs(rows: Rows) -> None:
    """As many functions as were once needed, and a tenth more: PyTorch's own differ from version to version."""
    most = {
        "one step": 70,
        "one step, with states": 71,
        "one step, 2 layers, both directions": 124,
        "inference": 133,
        "inference, with states": 140,
        "training": 446,
        "inference, 2 layers, both directions": 203,
        "training, 2 layers, both directions": 786,
    }
    for name, functions in most.items():
        assert rows[name]["functions"] <= 1.1 * functions


def test_times_beside_those_of_nn_lstm(rows: Rows) -> None:
    for row in rows.values():
        assert row["functions"] > 0
        assert is_time(row["us"])
        assert is_time(row["nn_lstm_us"])
        assert is_time(row["empty_backward_us"]) if row["trains"] else row["empty_backward_us"] is None


def test_times_without_kernels() -> None:
    """Whole calls on the CPU, of this library and of nn.LSTM."""
    rows = {row["call"]: row for row in overhead("--fallback", "--seconds", "0.001")["rows"]}
    assert rows.keys() == {"one step", "one step, with states", "inference", "training"}
    for row in rows.values():
        assert is_time(row["us"])
        assert is_time(row["nn_lstm_us"])

"""What a call costs beside the kernels, on a pretended GPU (bench/overhead.py): launches, and compilations."""

import json
from typing import Any

import pytest

from tests.support.processes import output_of_python

pytest.importorskip("triton")


def overhead(*arguments: str) -> Any:
    return json.loads(output_of_python("-m", "bench.overhead", "--json", *arguments))


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


def test_what_a_call_launches() -> None:
    """The kernels; and of PyTorch's operators as few as were once needed."""
    rows = {row["name"]: row for row in overhead("--seconds", "0.001")}
    found = {name: (sum(row["operators"].values()), sum(row["launches"].values())) for name, row in rows.items()}
    assert found.pop("one step") == (0, 1)
    assert found.pop("one step, with states") == (0, 1)
    assert found.pop("one step, 2 layers, both directions") == (0, 4)
    most = {
        "one step, training": (17, 2),
        "inference": (6, 1),
        "inference, with states": (6, 1),
        "training": (17, 2),
        "inference, 2 layers, both directions": (22, 2),
        "training, 2 layers, both directions": (65, 4),
    }
    assert found.keys() == most.keys()
    for name, (operators, launches) in found.items():
        assert operators <= most[name][0], rows[name]["operators"]
        assert launches == most[name][1]

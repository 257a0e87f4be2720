"""Input projections in windows of time, and what inference keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lstm_triton.scan import forward, layers, products, windows
from tests.support.comparing import assert_same
from tests.support.launches import recorded_launches
from tests.support.stacks import LAYOUTS, StackCase

pytestmark = pytest.mark.interpreted


def project_rows_alike(rows: Tensor, weight_ih: Tensor, projected: Tensor) -> None:
    """ops.project, but a row's last digits do not depend on how many rows there are, as those of torch.mm may."""
    projected.copy_(rows.double() @ weight_ih.double().t())


@pytest.mark.parametrize(
    ("layout", "cells"), [("dense", False), ("packed", False), ("resets", False), ("resets", True)]
)
@pytest.mark.parametrize(
    ("bidirectional", "lanes", "several_tiles"), [(False, 1, False), (False, 2, True), (True, 2, False)]
)
def test_windows_change_nothing(
    monkeypatch: pytest.MonkeyPatch, bidirectional: bool, lanes: int, several_tiles: bool, layout: str, cells: bool
) -> None:
    """Bit by bit: steps in windows whose input projections fit, the states handed on from one to the next."""
    monkeypatch.setattr(products, "project", project_rows_alike)
    stack = StackCase(2, bidirectional, layout=layout, time_steps=5, batch_size=9 if several_tiles else 5, dropout=0.5)
    stack = replace(stack.launched(lanes, several_tiles), cells=cells and layout != "packed")
    with recorded_launches() as launches:
        expected = stack.infer()
    assert len(launches.scans) == 2 // (1 if bidirectional else lanes)
    steps_at_a_time = 2
    row_bytes = 4 * stack.hidden_size * 4 * stack.batch_size
    for directions in {1, stack.directions}:  # whose projections are paid for: a launch of both needs twice as much
        monkeypatch.setattr(windows, "PREACTIVATION_BYTES", steps_at_a_time * row_bytes * directions)
        with recorded_launches() as in_windows:
            actual = stack.infer()
        assert_same(actual, expected)
        assert max(scan.arguments["gates_ptr"].nbytes for scan in in_windows.scans) <= windows.PREACTIVATION_BYTES
        window_steps = steps_at_a_time * directions // stack.directions
        assert len(in_windows.scans) == len(launches.scans) * -(-stack.steps // window_steps) * stack.directions


@pytest.mark.parametrize("layout", ["dense", "resets"])
def test_windows_with_projections(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """The shares of initial states go to the window, or the windows, where sequences start from them."""
    stack = StackCase(2, bidirectional=True, layout=layout, time_steps=5, proj_size=6).launched(2)
    monkeypatch.setattr(products, "project", project_rows_alike)
    expected = stack.infer()
    monkeypatch.setattr(windows, "PREACTIVATION_BYTES", 1)
    assert_same(stack.infer(), expected)


def test_training_is_not_cut_into_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps all gates anyway."""
    monkeypatch.setattr(windows, "PREACTIVATION_BYTES", 1)
    with recorded_launches() as launches:
        StackCase(2).launched(2).run()
    assert len(launches.scans) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("bidirectional", "lanes"), [(False, 1), (False, 3), (True, 2)], ids=["layer by layer", "chained", "directions"]
)
def test_inference_keeps_nothing(bidirectional: bool, lanes: int, layout: str) -> None:
    """Neither gates nor cells, nor the h of layers that are done; the results are those of training, bit by bit."""
    stack = StackCase(3, bidirectional, torch.bfloat16, layout, dropout=0.5).launched(lanes)
    found: list[tuple[Tensor, ...]] = []
    call = layers.invoke

    def watched(operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
        assert operator is forward.scan_forward
        found.append(call(operator, *arguments))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        patch.setattr(layers, "invoke", watched)
        results = stack.infer()
    for scan in launches.scans:
        assert not scan.arguments["KEEP_GATES"]
        assert not scan.arguments["KEEP_CELLS"]
        assert scan.arguments["cell_ptr"].shape[1] == stack.batch_size * (1 if layout == "dense" else 2)
    (hidden, hidden_dropped, cell, gates, _, _), *others = found
    assert not others
    assert hidden.shape[0] == hidden.untyped_storage().nbytes() // hidden[0].nbytes == stack.directions
    assert hidden_dropped.numel() == cell.numel() == gates.numel() == 0
    trained = stack.run()
    assert_same(results, {name: trained[name] for name in results})


def test_every_cell_in_inference_without_the_gates() -> None:
    stack = StackCase(2, layout="resets", cells=True).launched(2)
    with recorded_launches() as launches:
        results = stack.infer()
    assert [(scan.arguments["KEEP_CELLS"], scan.arguments["KEEP_GATES"]) for scan in launches.scans] == [(True, False)]
    trained = stack.run()
    assert_same(results, {name: trained[name] for name in results})


@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_streaming_step_by_step(bidirectional: bool) -> None:
    """T = 1 calls that hand the states on: in one direction, what the whole gives, but for the order of sums."""
    stack = StackCase(2, bidirectional, hidden_size=9).launched(2)
    input, hx, _ = stack.arguments()
    module = stack.ours()
    assert isinstance(input, Tensor)
    with stack.kernels(), torch.inference_mode():
        outputs, state = [], hx
        for step in input.split(1):
            output, state = module(step, state)
            outputs.append(output)
        whole, states = module(input, hx)
    if bidirectional:
        assert torch.cat(outputs).shape == whole.shape
    else:
        torch.testing.assert_close((torch.cat(outputs), state), (whole, states))

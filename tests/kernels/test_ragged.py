"""The kernels of sequences that end at different steps, or start anew on the way; and their tables."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_triton import ragged
from lstm_triton.reference import lstm_layer
from lstm_triton.scan.plan import Kind, ScanShape
from lstm_triton.scan.planner import candidates
from lstm_triton.target import Device
from tests.support.lanes import DTYPES, LaneCase, lane_cases, scan_layer, streamed

SEEDS = (0, 1, 2)

interpreted = pytest.mark.interpreted


@interpreted
@settings(max_examples=20)
@given(lane_cases(ragged=True), st.integers(0, 2**32))
def test_any_ragged_layer_with_any_plan(layer: LaneCase, seed: int) -> None:
    layer.check(seed)


KINDS: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": (0, 4, 1, 3, 4, 0, 2)},
    "packed": {"lengths": (4, 4, 3, 2, 1, 1, 1), "packed": True},
    "resets": {"resets": True},
    "lengths, resets and cells": {"lengths": (0, 4, 1, 3, 4, 0, 2), "resets": True, "cells": True},
    "cells alone": {"cells": True},
}


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward in time", "reversed"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, reverse: bool, dtype: torch.dtype) -> None:
    LaneCase(4, 7, 3, 21, dtype, reverse, **KINDS[kind]).check()


def streamed_layer(reverse: bool, **options: Any) -> LaneCase:
    """Weights that do not all fit on the device, and several batch tiles of very different lengths for each program."""
    lengths = (2, 1, 0, 0, 0, 0, 0, 0) + (0,) * 8 + (3, 3, 2, 0, 1, 3, 2, 1) + (1, 1, 0)
    device = Device("few", "interpreter", 12, 64 * 1024)
    plans = {}
    kinds: tuple[Kind, Kind] = ("forward", "backward")
    for kind in kinds:
        shape = ScanShape(kind, 27, 5, 90, torch.float16, device, allow_tf32=False)
        several_tiles = next(each for each in candidates(shape) if each.batch_tiles > each.groups == 1)
        plans[kind] = streamed(several_tiles, shape.depth)
    return LaneCase(3, 27, 5, 90, torch.float16, reverse, lengths=lengths, **plans, **options)


@interpreted
@pytest.mark.parametrize("reverse", [False, True], ids=["forward in time", "reversed"])
def test_streamed_weights_and_several_tiles(reverse: bool) -> None:
    streamed_layer(reverse, resets=True, cells=not reverse).check()


@interpreted
@pytest.mark.parametrize("kind", ["packed", "lengths, resets and cells"])
def test_the_order_of_programs_changes_nothing(kind: str) -> None:
    layer = LaneCase(4, 7, 3, 21, reverse=kind == "packed", **KINDS[kind])
    runs = [layer.run(scan_layer, seed=seed) for seed in SEEDS]
    for other in runs[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, runs[0][name]), name


@interpreted
@pytest.mark.parametrize("table", ["sources", "successors"])
def test_negative_control_with_a_wrong_row_in_a_table(monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    right = getattr(ragged.Ragged, table)

    def wrong(self: ragged.Ragged, reverse: bool) -> Tensor:
        rows = right(self, reverse).clone()
        # A step of another sequence: one that is over, so that nothing hangs.
        rows[4] = 0
        return rows

    # Forward in time, the successors are the table of the other direction's sources.
    layer = LaneCase(3, 3, 3, 21, reverse=table == "successors", lengths=(3, 3, 3))
    layer.check()
    monkeypatch.setattr(ragged.Ragged, table, wrong)
    with pytest.raises(AssertionError):
        layer.check()


@interpreted
def test_negative_control_without_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from lstm_triton.kernels import exchange

    layer = LaneCase(4, 3, 3, 37, lengths=(4, 2, 3), resets=True)
    monkeypatch.setattr(exchange, "any_missing", lambda chunks, packed: False)
    for seed in SEEDS:
        with pytest.raises(AssertionError):
            layer.check(seed)


@interpreted
@pytest.mark.parametrize("scan", ["forward", "backward"])
def test_tiles_whose_sequences_have_all_ended_stop(monkeypatch: pytest.MonkeyPatch, scan: str) -> None:
    """A turn of a program is one tile it publishes: as many as its tiles have steps, not T for each."""
    from lstm_triton.kernels import backward, forward

    layer = streamed_layer(False)
    plan = {"forward": layer.forward, "backward": layer.backward}[scan]
    assert plan is not None
    module = {"forward": forward, "backward": backward}[scan]
    publish, turns = module.publish, 0

    def counted(*arguments: Any) -> None:
        nonlocal turns
        turns += 1
        publish(*arguments)

    monkeypatch.setattr(module, "publish", counted)
    layer.run(scan_layer)
    starts = range(0, layer.batch_size, plan.block_batch)
    assert layer.lengths is not None
    longest = [max(layer.lengths[start : start + plan.block_batch]) for start in starts]
    assert len(longest) == plan.batch_tiles
    assert sum(longest) < layer.seq_len * plan.batch_tiles
    assert turns == plan.slices * sum(longest)


# --- Tables and formula ---


@pytest.mark.parametrize("reverse", [False, True], ids=["forward in time", "reversed"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cells alone"])
def test_formula_is_the_step_loop(kind: str, reverse: bool) -> None:
    layer = LaneCase(4, 7, 3, 5, torch.float64, reverse, **KINDS[kind])
    torch.testing.assert_close(layer.run(lstm_layer), layer.run(layer.stock))


def test_packed_tables_are_those_of_the_lengths() -> None:
    lengths = torch.tensor([5, 4, 4, 1])
    packing = pack_padded_sequence(torch.arange(20).view(5, 4, 1), lengths)
    places = packing.data.squeeze(1)  # of each packed row, in the padded batch
    cpu = torch.device("cpu")
    padded, packed = ragged.dense(lengths, None, 5, 4, cpu), ragged.packed(packing.batch_sizes, cpu)
    assert torch.equal(packed.lengths, padded.lengths)
    state_row = torch.full((20,), -1, dtype=torch.int32)
    state_row[places] = packed.own_rows().int()
    of_padded = torch.cat([torch.arange(4), state_row, 4 + packed.rows() + torch.arange(8)]).int()
    for field in ("before", "after"):
        assert torch.equal(getattr(packed, field), of_padded[getattr(padded, field)[places].long()])

"""Whole stacks, interpreted: layers chained in one launch, and both directions side by side."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lstm_triton import interpreter
from lstm_triton.scan import alignment, launch, windows
from lstm_triton.scan.plan import Kind
from tests.support.comparing import assert_same
from tests.support.lanes import DTYPES
from tests.support.launches import recorded_launches
from tests.support.stacks import BOTH, LAYOUTS, StackCase, stack_cases

pytestmark = pytest.mark.interpreted

SEEDS = (0, 1, 2)


@settings(max_examples=8)
@given(stack_cases(), st.integers(0, 2**32))
def test_any_stack_with_any_plans(stack: StackCase, seed: int) -> None:
    stack.check(seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_in_one_launch(dtype: torch.dtype, layout: str) -> None:
    stack = StackCase(3, dtype=dtype, layout=layout, cells=layout == "resets").launched(3)
    with recorded_launches() as launches:
        stack.check()
    assert launches.plans == [stack.plans["forward"], stack.plans["backward"]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_directions_in_one_launch(dtype: torch.dtype, layout: str) -> None:
    stack = StackCase(2, bidirectional=True, dtype=dtype, layout=layout, cells=layout == "resets").launched(2)
    with recorded_launches() as launches:
        stack.check()
    assert [plan.lanes for plan in launches.plans] == [2, 2, 2, 2]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_several_tiles_a_program(bidirectional: bool) -> None:
    """The tiles take turns within a step, in every lane."""
    stack = StackCase(2, bidirectional, torch.float16, "resets", batch_size=9, cells=True)
    stack = stack.launched(2, several_tiles=True)
    assert all(plan.batch_tiles > plan.groups for plan in stack.plans.values())
    stack.check()


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_chains_of_any_length(lanes: int) -> None:
    """Four layers one by one, two by two, and all in one launch."""
    stack = StackCase(4, layout="resets").launched(lanes)
    with recorded_launches() as launches:
        stack.check()
    assert [plan.lanes for plan in launches.plans] == [lanes] * (8 // lanes)


@pytest.mark.parametrize("hidden_size", [11, 16, 20])
@pytest.mark.parametrize("input_size", [3, 17, 40])
def test_layers_in_one_launch_read_rows_of_several_widths(input_size: int, hidden_size: int) -> None:
    """The first layer's input may be wider than a state, whose rows are padded, or narrower."""
    StackCase(3, input_size=input_size, hidden_size=hidden_size).launched(3).check()


def test_the_first_layer_is_the_same_in_every_chain() -> None:
    """Bit by bit: it reads its input as it would alone.

    The layers above are not: within a chain, the share of the layer below is added up in float32 together with that of
    the own state; between launches it comes from a matrix product of its own, rounded to the dtype of the buffers.
    """
    stack = StackCase(3, dtype=torch.bfloat16, layout="resets")
    chained = stack.launched(3)
    alone = {kind: replace(plan, lanes=1, chained=False) for kind, plan in chained.plans.items()}
    one, other = chained.infer(), replace(stack, plans=alone).infer()
    assert_same((one["h_n"][0], one["c_n"][0]), (other["h_n"][0], other["c_n"][0]))
    assert not torch.equal(one["h_n"][2], other["h_n"][2])


@pytest.mark.parametrize("layout", ["dense", "resets"])
def test_directions_are_the_same_in_one_launch_and_in_two(layout: str) -> None:
    """Bit by bit, in values and gradients: they share nothing."""
    together = StackCase(2, bidirectional=True, layout=layout, dropout=0.5).launched(2)
    alone = {kind: replace(plan, lanes=1) for kind, plan in together.plans.items()}
    assert_same(together.run(), replace(together, plans=alone).run())


@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_the_order_of_programs_changes_nothing(bidirectional: bool) -> None:
    several_tiles = not bidirectional
    stack = StackCase(2, bidirectional, layout="resets", dropout=0.5, batch_size=9).launched(2, several_tiles)
    runs = [stack.run(seed) for seed in SEEDS]
    for other in runs[1:]:
        assert_same(other, runs[0])


@pytest.mark.parametrize("layout", ["dense", "resets"])
@pytest.mark.parametrize("scan", BOTH)
def test_negative_control_of_a_layer_that_does_not_wait_for_its_neighbour(
    monkeypatch: pytest.MonkeyPatch, scan: Kind, layout: str
) -> None:
    """For the one below, and backward for the one above; it does wait for its own step before."""
    from lstm_triton.kernels import backward, forward

    kernel = {"forward": forward, "backward": backward}[scan]
    add_received, weights_between_layers = kernel.add_received, []

    def hasty(*arguments: Any) -> Any:
        sums, chunks, state_pointers, ks, wait, weights, *others = arguments
        place = int(weights.pointers.handle.data.min())
        if any(weight.data_ptr() <= place < weight.data_ptr() + weight.nbytes for weight in weights_between_layers):
            wait = False
        return add_received(sums, chunks, state_pointers, ks, wait, weights, *others)

    monkeypatch.setattr(kernel, "add_received", hasty)
    # Of this size, weights are read where they are, not in a copy.
    stack = StackCase(2, layout=layout, hidden_size=32).launched(2)
    stack.check()
    contiguous, transposed = alignment.contiguous, alignment.transposed

    def watched(weights: Any) -> Any:
        found = contiguous(weights)
        weights_between_layers.extend(found[::4])  # of each lane, the weight of what it reads
        return found

    def watched_copies(weights: Any, stride: int) -> Any:  # backward reads copies
        weights = list(weights)
        found = transposed(weights, stride)
        if {weight.data_ptr() for weight in weights} & {each.data_ptr() for each in weights_between_layers}:
            weights_between_layers.extend(found)
        return found

    monkeypatch.setattr("lstm_triton.scan.forward.contiguous", watched)
    monkeypatch.setattr("lstm_triton.scan.backward.transposed", watched_copies)
    for seed in SEEDS:
        with pytest.raises(AssertionError):
            stack.check(seed)


@contextmanager
def checked_addresses() -> Iterator[None]:
    """Every load and store has to lie within a tensor that the launch was given."""
    from triton.runtime import interpreter as triton_interpreter

    builder = triton_interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    @functools.lru_cache(maxsize=1)
    def spans(number: int) -> numpy.ndarray:
        """(tensors, 2): where the tensors of the launch with this number begin and end."""
        arguments = launches[number].arguments.values()
        groups = [each if isinstance(each, tuple) else (each,) for each in arguments]
        tensors = [each for group in groups for each in group if isinstance(each, Tensor) and each.numel() > 0]
        extents = [1 + sum((n - 1) * k for n, k in zip(each.shape, each.stride(), strict=True)) for each in tensors]
        return numpy.array(
            [(t.data_ptr(), t.data_ptr() + n * t.itemsize) for t, n in zip(tensors, extents, strict=True)]
        )

    def check(pointers: Any, mask: Any) -> None:
        starts, ends = spans(len(launches) - 1).T
        places = pointers.data[mask.data][:, None]
        assert ((starts <= places) & (places < ends)).any(1).all()

    def checked_load(pointers: Any, mask: Any, *others: Any, **keywords: Any) -> Any:
        check(pointers, mask)
        return load(pointers, mask, *others, **keywords)

    def checked_store(pointers: Any, value: Any, mask: Any, *others: Any, **keywords: Any) -> None:
        check(pointers, mask)
        store(pointers, value, mask, *others, **keywords)

    with pytest.MonkeyPatch.context() as patch, recorded_launches() as launches:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_no_access_past_the_tensors(monkeypatch: pytest.MonkeyPatch, bidirectional: bool, layout: str) -> None:
    """In training, and in inference in windows, with a batch that leaves most of its last tile empty."""
    stack = StackCase(2, bidirectional, layout=layout, dropout=0.5, batch_size=9).launched(2)
    with interpreter.interpret(), checked_addresses():
        stack.run()
        monkeypatch.setattr(windows, "PREACTIVATION_BYTES", 1)
        stack.infer()


def test_layers_that_wait_for_each_other_run_at_the_same_time() -> None:
    """The driver is asked for it: also where each of them is a single program."""
    found = StackCase(2, hidden_size=4).candidates("forward", 2)
    chained = next(plan for plan in found if plan.slices == 1)
    assert launch.launch_options(chained)["launch_cooperative_grid"]
    assert not launch.launch_options(replace(chained, chained=False))["launch_cooperative_grid"]

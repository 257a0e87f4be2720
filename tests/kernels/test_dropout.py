"""Dropout between the layers of a stack, inside the launch: its masks, and what follows from them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lstm_triton import interpreter
from lstm_triton.scan import dropout
from tests.support.comparing import assert_same, run
from tests.support.lanes import DTYPES
from tests.support.stacks import LAYOUTS, LENGTHS, StackCase, stack_cases

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_fraction_that_it_should(probability: float) -> None:
    """Within four standard errors, and what is kept grows by 1 / (1 - probability)."""
    seed, count = torch.tensor([2**62 + 12345]), 100_000
    with interpreter.interpret():
        scale = dropout.dropout_scale(seed, 1, probability, torch.empty(count))
    kept = scale > 0
    standard_error = (probability * (1 - probability) / count) ** 0.5
    assert abs(kept.double().mean().item() - (1 - probability)) < 4 * standard_error
    torch.testing.assert_close(scale[kept], torch.full_like(scale[kept], 1 / (1 - probability)))


def test_dropout_is_independent() -> None:
    """Of lanes, of seeds, and of neighbouring units, rows and steps: no correlation beyond four standard errors."""
    steps, rows, units = 32, 16, 64
    like = torch.empty(steps, rows, units)
    with interpreter.interpret():
        masks = [
            dropout.dropout_scale(torch.tensor([seed]), lane, 0.5, like) - 1  # -1 or 1
            for seed, lane in ((5, 0), (5, 1), (5, 2), (6, 0), (5 + 2**32, 0))
        ]
    first = masks[0]
    pairs = [(first, other) for other in masks[1:]]
    pairs += [
        (first.narrow(axis, 1, size - 1), first.narrow(axis, 0, size - 1)) for axis, size in enumerate(like.shape)
    ]
    pairs.append((first[:, :, 16:], first[:, :, :-16]))
    for one, other in pairs:
        assert abs((one * other).mean().item()) < 4 * one.numel() ** -0.5


@settings(max_examples=6)
@given(stack_cases(dropouts=True), st.integers(0, 2**32))
def test_any_stack_with_dropout(stack: StackCase, seed: int) -> None:
    stack.check(seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("lanes", "bidirectional"), [(1, False), (3, False), (2, True)])
def test_masks_are_the_same_in_every_grouping(lanes: int, bidirectional: bool, layout: str) -> None:
    """Those of dropout.dropout_scale, forward and backward, whichever layers or directions share a launch."""
    layers = 2 if bidirectional else 3
    stack = StackCase(layers, bidirectional, layout=layout, dropout=0.4, cells=layout == "resets")
    # Backward in other groups than forward: it finds the masks by itself.
    other_lanes = 2 if lanes == 1 else 1
    plans = stack.launched(lanes, kinds=("forward",)).plans | stack.launched(other_lanes, kinds=("backward",)).plans
    replace(stack, plans=plans).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_dropout_in_one_launch(bidirectional: bool, dtype: torch.dtype) -> None:
    StackCase(2, bidirectional, dtype, dropout=0.3).launched(2).check()


def test_dropout_follows_the_seed() -> None:
    """The same after torch.manual_seed, another at every call; none in evaluation."""
    stack = StackCase(2, dropout=0.5)
    module, (input, *_) = stack.ours(), stack.arguments()
    with stack.kernels():
        torch.manual_seed(3)
        first, second = module(input)[0], module(input)[0]
        torch.manual_seed(3)
        again = module(input)[0]
        evaluated = [module.eval()(input)[0] for _ in range(2)]
        without = replace(stack, dropout=0.0).ours()(input)[0]
    assert torch.equal(again, first)
    assert not torch.equal(second, first)
    assert_same(evaluated, [without, without])


def test_no_random_number_is_drawn_without_dropout() -> None:
    stack = StackCase(2)
    state = torch.get_rng_state()
    with stack.kernels():
        stack.ours().train()(stack.arguments()[0])
    # The weights' initialisation draws some: what is drawn is the same with nn.LSTM.
    found = torch.get_rng_state()
    torch.set_rng_state(state)
    nn.LSTM(**stack.options())
    assert torch.equal(found, torch.get_rng_state())


@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last")
def test_the_last_layer_is_never_dropped(bidirectional: bool) -> None:
    """With p = 1 nothing reaches a layer from the one below, and its output is what it computes of that."""
    stack = StackCase(2, bidirectional, layout="resets", dropout=1.0, cells=True).launched(2)
    found = stack.run()
    assert found["output"].isfinite().all()
    assert (found["output"][0, LENGTHS.index(2)] != 0).all()
    unread = replace(stack, dropout=0.0)
    input, hx, extra = unread.arguments()
    stock = unread.stock()
    with torch.no_grad():  # as if it had no weights for the layer below
        for name, weight in stock.named_parameters():
            if name.startswith("weight_ih_l1"):
                weight.zero_()
    expected = run(stock, input, hx, **extra)
    for name, tensor in found.items():
        if "weight_ih_l1" in name:
            assert not tensor.any(), name
        else:
            torch.testing.assert_close(tensor, expected[name], msg=name)
    single = replace(stack, num_layers=1, plans={})
    assert_same(single.run(), replace(single, dropout=0.0).run())

"""Stacks with projections, interpreted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lstm_triton
from tests.support.comparing import assert_results_as_accurate, assert_same
from tests.support.launches import recorded_launches
from tests.support.stacks import StackCase, stack_cases

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


@settings(max_examples=6)
@given(stack_cases(projections=True), st.integers(0, 2**32))
def test_any_stack_with_projections(stack: StackCase, seed: int) -> None:
    stack.check(seed)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "dense"), (torch.float32, "lengths"), (torch.float32, "packed"), (torch.float32, "resets"),
     (torch.float16, "resets"), (torch.bfloat16, "packed")],
)  # fmt: skip
def test_projections(dtype: torch.dtype, layout: str) -> None:
    """Of two layers in both directions; once without biases and states."""
    plain = layout == "lengths"
    StackCase(2, True, dtype, layout, proj_size=6, cells=layout == "resets", bias=not plain, states=not plain).check()


def test_projections_where_the_plan_would_fuse_the_input() -> None:
    """The share of h_0 needs input projections that are in memory; without h_0 they stay fused."""
    stack = StackCase(1, proj_size=6, hidden_size=11)
    fused = next(plan for plan in stack.candidates("forward", 1) if plan.fuse_input)
    for states in (True, False):
        stack = replace(stack, states=states, plans={"forward": fused})
        with recorded_launches() as launches:
            stack.check()
        with stack.kernels():
            scans = lstm_triton.explain(stack.ours(), *stack.arguments()[:2]).scans
        assert [scan.plan for scan in scans] == launches.plans
        assert scans[0].plan.fuse_input != states


def test_projected_sequences_without_steps_end_as_they_began() -> None:
    stack = StackCase(2, bidirectional=True, layout="lengths", proj_size=6)
    found, (_, hx, _) = stack.run(), stack.arguments()
    assert hx is not None
    empty = stack.lengths == 0
    assert empty.any()
    assert torch.equal(found["h_n"][:, empty], hx[0][:, empty])
    assert torch.equal(found["c_n"][:, empty], hx[1][:, empty])


def test_projected_layers_with_dropout_between_them() -> None:
    """p = 1 as nn.LSTM has it; p = 0.5 follows the seed."""
    stack = StackCase(2, proj_size=6, dropout=1.0)
    stock = nn.LSTM(**stack.options(), dropout=1.0)
    stock.load_state_dict(stack.ours().state_dict())
    input, hx, extra = stack.arguments()
    assert_results_as_accurate(stack.run(), stock, input, hx, **extra)
    half = replace(stack, dropout=0.5)
    assert_same(half.run(), half.run())
    assert not torch.equal(half.run()["output"], replace(stack, dropout=0.0).run()["output"])

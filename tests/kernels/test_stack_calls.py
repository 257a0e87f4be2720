"""What a call of a whole stack does, for any of a module's options: launches, and second derivatives."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstm_triton
from tests.support.launches import recorded_launches
from tests.support.stacks import BOTH, StackCase

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


@pytest.mark.parametrize(
    "stack",
    [
        StackCase(3),
        StackCase(3).launched(3),
        StackCase(4).launched(2),
        StackCase(2, bidirectional=True),
        StackCase(2, bidirectional=True).launched(1),
        StackCase(2, bidirectional=True, proj_size=6),
        StackCase(3, proj_size=6, dropout=0.5),
        StackCase(3, dropout=0.5),
    ],
    ids=["layers", "chained", "chains", "bidirectional", "apart", "projected", "projected, dropout", "dropout"],
)
def test_explain_tells_the_launches(stack: StackCase) -> None:
    with stack.kernels():
        explanation = lstm_triton.explain(stack.ours(), *stack.arguments()[:2])
    with recorded_launches() as launches:
        stack.run()
    assert {layer.path for layer in explanation.layers} == {"triton"}
    forward, backward = ([scan for scan in explanation.scans if scan.kind == kind] for kind in BOTH)
    assert [scan.plan for scan in [*forward, *reversed(backward)]] == launches.plans
    for scans in (forward, backward):
        assert [lane for scan in scans for lane in scan.lanes] == list(range(len(explanation.layers)))
    assert explanation.launches == len(launches.scans)


def penalty(module: nn.LSTM | lstm_triton.LSTM, input: Any, hx: Any, **options: Any) -> tuple[Tensor, ...]:
    """Derivatives of the squared length of all first derivatives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output, (h_n, c_n) = module(input, hx, **options)
    of = [*hx, *module.parameters()]
    grads = torch.autograd.grad(output.square().sum() + (h_n.sin() * c_n[..., :1]).sum(), of, create_graph=True)
    return torch.autograd.grad(torch.stack([grad.square().sum() for grad in grads]).sum(), of)


@pytest.mark.parametrize("options", [{"dropout": 0.4}, {"proj_size": 3}, {}], ids=["dropout", "projections", "plain"])
@pytest.mark.parametrize("layout", ["dense", "lengths"])
def test_second_derivatives(layout: str, options: dict[str, Any]) -> None:
    stack = StackCase(2, bidirectional=True, layout=layout, hidden_size=5, batch_size=3, **options)
    input, hx, extra = stack.arguments()
    assert hx is not None
    del extra["cells"]
    stock = copy.deepcopy(stack.stock()).double()
    states = [tuple(state.to(dtype).requires_grad_() for state in hx) for dtype in (torch.float32, torch.float64)]
    with stack.kernels():
        actual = penalty(stack.ours(), input, states[0], **extra)
    assert isinstance(input, Tensor)
    for one, other in zip(actual, penalty(stock, input.double(), states[1], **extra), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)

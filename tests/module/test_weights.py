"""Which weights a call computes with: those of the attributes, or those of `_flat_weights`, as in nn.LSTM."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lstm_triton
from lstm_triton.interpreter import interpret
from tests.support.comparing import assert_same, run, twins

PATHS = [
    pytest.param(nullcontext, id="fallback"),
    pytest.param(interpret, id="kernels", marks=pytest.mark.interpreted),
]
INPUT = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))


def replaced(module: nn.LSTM) -> nn.LSTM:
    lstm_triton.replace_lstm(module)
    assert isinstance(module, lstm_triton.LSTM)
    return module


# --- What users write ---


def hand_over(module: Any) -> None:
    """As a subclass does before it calls nn.LSTM's forward."""
    module._flat_weights = [2 * getattr(module, name) for name in module._flat_weights_names]


def hand_over_one(module: Any) -> None:
    module._flat_weights[1] = 2 * module.weight_hh_l0


def delete_and_set(module: Any) -> None:
    """As fastai's and torchnlp's wrappers do: the parameter is elsewhere, a tensor has its name."""
    raw = module._parameters.pop("weight_hh_l0")
    module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
    module.weight_hh_l0 = 2 * module.weight_hh_l0_raw


def set_among_the_parameters(module: Any) -> None:
    """As the older fastai does."""
    module.register_parameter("weight_hh_l0_raw", nn.Parameter(module.weight_hh_l0.data))
    module._parameters["weight_hh_l0"] = 2 * module.weight_hh_l0_raw


def delete(module: Any) -> None:
    del module._parameters["weight_hh_l0"]


def hand_over_after_a_call(module: Any) -> None:
    module.weight_hh_l0 = nn.Parameter(3 * module.weight_hh_l0.detach())
    module(INPUT)
    hand_over(module)


def hand_over_before_a_call(module: Any) -> None:
    """nn.LSTM does not take the list then: a parameter was exchanged after the last call."""
    module.weight_hh_l0 = nn.Parameter(3 * module.weight_hh_l0.detach())
    hand_over(module)


def hand_over_beside_a_buffer(module: Any) -> None:
    weight = module._parameters.pop("weight_hh_l0")
    module.register_buffer("weight_hh_l0", weight.detach())
    module(INPUT)
    hand_over(module)


WAYS = [
    hand_over,
    hand_over_one,
    delete_and_set,
    set_among_the_parameters,
    delete,
    hand_over_after_a_call,
    hand_over_before_a_call,
    hand_over_beside_a_buffer,
]


def values_and_gradients(module: Any) -> Any:
    output, (_, c_n) = module(INPUT)
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    loss = output.square().sum() + c_n.sum()
    gradients = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return output, c_n, gradients


@pytest.mark.parametrize("kind", ["ours", "replaced", "accelerated"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("way", WAYS)
def test_as_nn_lstm(way: Callable[[Any], None], path: Callable[[], AbstractContextManager[Any]], kind: str) -> None:
    """Also a second time, and in everything else that runs a module."""
    ours, stock = twins(3, 4)
    module: Any = {"ours": lambda: ours, "replaced": lambda: replaced(twins(3, 4)[1])}.get(
        kind, lambda: twins(3, 4)[1]
    )()
    accelerated = lstm_triton.accelerate if kind == "accelerated" else nullcontext
    for each in (module, stock):
        each(INPUT)
        way(each)
    expected = values_and_gradients(stock)
    with path(), accelerated():
        for _ in range(2):
            torch.testing.assert_close(values_and_gradients(module), expected)
        torch.testing.assert_close(lstm_triton.trace(module, INPUT).output, expected[0].detach())
        if kind == "ours":
            torch.testing.assert_close(module.with_cells(INPUT)[0], expected[0])
        assert lstm_triton.explain(module, INPUT).batch_size == 2


class DropInList(lstm_triton.LSTM):
    """A subclass that hands over other weights for one call."""

    def forward(self, input: Any, hx: Any = None, **sequences: Any) -> Any:
        kept = self._flat_weights
        self._flat_weights = [2 * getattr(self, name) for name in self._flat_weights_names]
        results = super().forward(input, hx, **sequences)
        self._flat_weights = kept
        return results


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_subclass_that_hands_over_weights(compiled: bool, path: Callable[[], AbstractContextManager[Any]]) -> None:
    _, stock = twins(3, 4)
    module = DropInList(3, 4)
    module.load_state_dict(stock.state_dict())
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(2)
    if compiled:
        module.compile(fullgraph=True, backend="eager")
    with path(), torch.no_grad():
        torch.testing.assert_close(module(INPUT), stock(INPUT))
        torch.testing.assert_close(module(INPUT), stock(INPUT))


class WeightDrop(nn.Module):
    """fastai's, in short."""

    def __init__(self, module: nn.Module, p: float) -> None:
        super().__init__()
        self.module, self.p = module, p
        weight = module.weight_hh_l0
        del module.weight_hh_l0
        self.raw = nn.Parameter(weight.data)
        module.weight_hh_l0 = weight.clone()
        module.flatten_parameters = lambda: None  # type: ignore[assignment]

    def forward(self, *arguments: Any) -> Any:
        self.module.weight_hh_l0 = nn.functional.dropout(self.raw, self.p, self.training)
        return self.module(*arguments)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["ours", "replaced before", "replaced after", "accelerated"])
def test_weight_drop(kind: str, path: Callable[[], AbstractContextManager[Any]]) -> None:
    ours, stock = twins(3, 4)
    module: nn.Module = ours if kind == "ours" else copy.deepcopy(stock)
    if kind == "replaced before":
        module = replaced(module)  # type: ignore[arg-type]
    wrapped, expected = WeightDrop(module, 0.5), WeightDrop(stock, 0.5)
    if kind == "replaced after":
        lstm_triton.replace_lstm(wrapped)
    accelerated = lstm_triton.accelerate if kind == "accelerated" else nullcontext
    found = []
    for each, context in ((wrapped, path), (expected, nullcontext)):
        torch.manual_seed(0)
        with context(), accelerated():
            for _ in range(2):
                each(INPUT)[0].sum().backward()
            output, _ = each.eval()(INPUT)
        found.append((output, each.raw.grad))
    torch.testing.assert_close(*found)


# --- Any order of changes ---


def functional_call_with_graph(module: Any) -> None:
    """One of the tensors has a graph behind it, which the module must not keep."""
    with torch.enable_grad():
        torch.func.functional_call(module, {"bias_ih_l0": 2 * torch.ones(16, requires_grad=True)}, (INPUT,))


STEPS: dict[str, Callable[[Any], Any]] = {
    "call": lambda m: m(INPUT),
    "hand over": hand_over,
    "hand over one": hand_over_one,
    "exchange": lambda m: setattr(m, "weight_ih_l0", nn.Parameter(m.weight_ih_l0.detach() + 1)),
    "exchange silently": lambda m: m._parameters.update(bias_ih_l0=nn.Parameter(m.bias_ih_l0.detach() + 1)),
    "delete": lambda m: m._parameters.pop("bias_hh_l0", None),
    "tensor": lambda m: (m._parameters.pop("weight_hh_l0", None), setattr(m, "weight_hh_l0", torch.ones(16, 4))),
    "to": lambda m: m.double().float(),
    "load": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "functional graph": lambda m: functional_call_with_graph(m),
    "functional": lambda m: torch.func.functional_call(m, {"bias_ih_l0": torch.ones(16)}, (INPUT,)),
}


def outcome(module: Any, step: str) -> Any:
    try:
        result = STEPS[step](module)
    except Exception as error:
        return type(error)
    return result[0] if step == "call" else None


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=6))
def test_any_order_of_changes(steps: list[str]) -> None:
    """Without kernels, bit by bit."""
    modules: tuple[Any, Any] = twins(3, 4)
    with torch.no_grad():
        for step in [*steps, "call", "call"]:
            outcomes = [outcome(module, step) for module in modules]
            if isinstance(outcomes[0], Tensor):
                assert_same(*outcomes)
            elif outcomes[0] is outcomes[1] is None:
                continue
            else:
                assert all(isinstance(outcome, type) for outcome in outcomes), (step, outcomes)
                return


# --- One layer to nn.LSTM and from it ---


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_twin_has_the_weights_of_a_call(way: Callable[[Any], None]) -> None:
    ours, stock = twins(3, 4)
    for each in (ours, stock):
        each(INPUT)
        way(each)
    assert_same(ours.to_torch_lstm()(INPUT), stock(INPUT))
    if way is hand_over_before_a_call:  # it changed nothing
        assert_same(lstm_triton.LSTM.from_torch_lstm(stock)(INPUT), stock(INPUT))
        return
    with pytest.raises(ValueError, match="must be a parameter, but is computed from others"):
        lstm_triton.LSTM.from_torch_lstm(stock)


# --- Nothing of a call is kept that should not be ---


def test_a_call_keeps_no_graph_and_no_copy() -> None:
    module, _ = twins(3, 4)
    stacked = {name: torch.stack([weight.detach()] * 2) for name, weight in module.named_parameters()}
    torch.func.vmap(lambda weights: torch.func.functional_call(module, weights, (INPUT,))[0])(stacked)
    parametrized = nn.utils.parametrizations.weight_norm(copy.deepcopy(module), "weight_hh_l0")
    parametrized(INPUT)
    for each in (module, parametrized):
        assert all(weight.is_leaf for weight in each._flat_weights)
        twin = copy.deepcopy(each)
        assert_same(run(twin, INPUT), run(each, INPUT))

"""NaN and infinity where they have no influence: they reach no result and no gradient, on any path.

Such places are padded steps, states of sequences without steps, states that a reset replaces, rows of reset_state that
no step starts from, and gradients of padded outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton import interpreter
from lstm_triton.aten import exported
from lstm_triton.ragged import dense
from lstm_triton.scan import windows
from lstm_triton.scan.layers import folded
from lstm_triton.stack import LaneWeights, Start
from tests.support.comparing import twins

interpreted = pytest.mark.interpreted
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy's, of what is not finite
]

TIME_STEPS, BATCH_SIZE, INPUT_SIZE, HIDDEN_SIZE = 3, 4, 2, 3
LENGTHS = torch.tensor([2, 0, 3, 3])
EMPTY = LENGTHS == 0
ABSENT = torch.arange(TIME_STEPS).unsqueeze(1) >= LENGTHS
RESETS = torch.zeros(TIME_STEPS, BATCH_SIZE, dtype=torch.bool)
RESETS[0, 2] = RESETS[2, 3] = True
RESETS[2, 0] = True  # past the end of its sequence
REPLACED = 2  # this sequence does not start from its initial state, in the forward direction
NEVER_RESET = [[0, 1], [0, 1, 2]]  # sequences without a step that starts from reset_state: forward, reverse
STATES = ("h_0", "c_0", "h_reset", "c_reset")

Tensors = dict[str, Tensor]


@pytest.fixture(params=[pytest.param("triton", marks=interpreted), "aten"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(windows, "LOW_MEMORY_STEPS", 2)  # several windows
    with ExitStack() as stack:
        if request.param == "triton":
            stack.enter_context(interpreter.interpret())
        stack.enter_context(lstm_triton.backend(request.param))
        yield request.param


def module_of(proj_size: int = 0, memory: str = "full", dtype: torch.dtype = torch.float32) -> lstm_triton.LSTM:
    torch.manual_seed(0)
    return lstm_triton.LSTM(
        INPUT_SIZE,
        HIDDEN_SIZE,
        bidirectional=True,
        proj_size=proj_size,
        memory=memory,
        dtype=dtype,  # type: ignore[arg-type]
    )


def arguments(module: lstm_triton.LSTM, poisoned: bool) -> tuple[Tensors, list[Tensor]]:
    """Input and states by name, and gradients of output, h_n, c_n and cells: not finite, or 0, without influence."""
    generator = torch.Generator().manual_seed(1)
    output_size = module.proj_size or HIDDEN_SIZE

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(module.weight_hh_l0.dtype)

    def without_influence(part: Tensor) -> Tensor:
        values = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, part.shape, generator=generator)]
        return values.to(part.dtype) if poisoned else torch.zeros_like(part)

    sizes = {"h_0": output_size, "c_0": HIDDEN_SIZE, "h_reset": output_size, "c_reset": HIDDEN_SIZE}
    given = {"input": random(TIME_STEPS, BATCH_SIZE, INPUT_SIZE)}
    given |= {name: random(2, BATCH_SIZE, size) for name, size in sizes.items()}
    grads = [random(TIME_STEPS, BATCH_SIZE, 2 * output_size)]
    grads += [random(2, BATCH_SIZE, size) for size in (output_size, HIDDEN_SIZE)]
    grads += [random(2, TIME_STEPS, BATCH_SIZE, HIDDEN_SIZE)]
    given["input"][ABSENT] = without_influence(given["input"][ABSENT])
    grads[0][ABSENT] = without_influence(grads[0][ABSENT])
    grads[3][:, ABSENT] = without_influence(grads[3][:, ABSENT])
    for name in STATES:
        state = given[name]
        if name.endswith("0"):
            state[:, EMPTY] = without_influence(state[:, EMPTY])
            state[0, REPLACED] = without_influence(state[0, REPLACED])
        else:
            for direction, sequences in enumerate(NEVER_RESET):
                state[direction, sequences] = without_influence(state[direction, sequences])
    return given, grads


def called(module: lstm_triton.LSTM, cells: bool, input: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """Output, h_n, c_n, and cells if asked for."""
    call = module.with_cells if cells else module
    output, ends, *every_c = call(input, states[:2], lengths=LENGTHS, resets=RESETS, reset_state=states[2:])
    return output, *ends, *every_c


def first_gradients(module: lstm_triton.LSTM, given: Tensors, grads: list[Tensor], cells: bool = False) -> Tensors:
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()} | dict(module.named_parameters())
    results = called(module, cells, *given.values())
    found = torch.autograd.grad(results, list(leaves.values()), grads[: len(results)])
    return results_by_name(results) | dict(zip(leaves, found, strict=True))


def cells_gradients(module: lstm_triton.LSTM, given: Tensors, grads: list[Tensor]) -> Tensors:
    return first_gradients(module, given, grads, cells=True)


def second_gradients(module: lstm_triton.LSTM, given: Tensors, grads: list[Tensor]) -> Tensors:
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()} | dict(module.named_parameters())
    results = called(module, False, *given.values())
    grads = [grad.requires_grad_() for grad in grads[: len(results)]]
    found = torch.autograd.grad(results, list(leaves.values()), grads, create_graph=True)
    generator = torch.Generator().manual_seed(2)
    weighted = [(each * torch.randn(each.shape, generator=generator).to(each.dtype)).sum() for each in found]
    again = torch.autograd.grad(torch.stack(weighted).sum(), [*leaves.values(), *grads])
    names = [*leaves, "grad of output", "grad of h_n", "grad of c_n"]
    return {f"second {name}": grad for name, grad in zip(names, again, strict=True)}


def forward_derivatives(module: lstm_triton.LSTM, given: Tensors, grads: list[Tensor]) -> Tensors:
    weights = {name: weight.detach() for name, weight in module.named_parameters()}

    def function(weights: Tensors, *tensors: Tensor) -> tuple[Tensor, ...]:
        with nn.utils.stateless._reparametrize_module(module, weights):
            return called(module, True, *tensors)

    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    primals, tangents = tuple(given.values()), tuple(given.values())  # tangents without influence, too
    results, found = torch.func.jvp(function, (weights, *primals), (ones, *tangents))
    return results_by_name(results) | {f"tangent of {name}": t for name, t in results_by_name(found).items()}


def mapped_gradients(module: lstm_triton.LSTM, given: Tensors, grads: list[Tensor]) -> Tensors:
    """torch.vmap over two equal entries; of the second one's gradients."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()}

    def pulled(tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Any:
        def function(weights: Tensors, *tensors: Tensor) -> tuple[Tensor, ...]:
            with nn.utils.stateless._reparametrize_module(module, weights):
                return called(module, False, *tensors)

        results, pull_back = torch.func.vjp(function, weights, *tensors)
        return results, pull_back(grads)

    doubled = [tuple(torch.stack([each, each]) for each in each_of) for each_of in (given.values(), grads[:3])]
    results, (of_weights, *others) = torch.func.vmap(pulled)(*doubled)
    found = results_by_name(results) | of_weights | dict(zip(given, others, strict=True))
    return {name: tensor[1] for name, tensor in found.items()}


def results_by_name(results: tuple[Tensor, ...]) -> Tensors:
    return dict(zip(("output", "h_n", "c_n", "cells"), results, strict=False))


DERIVATIVES: dict[str, Callable[[lstm_triton.LSTM, Tensors, list[Tensor]], Tensors]] = {
    "first": first_gradients,
    "with cells": cells_gradients,
    "second": second_gradients,
    "forward": forward_derivatives,
    "vmap": mapped_gradients,
}


def assert_same_as_with_zeros(
    derivatives: str, proj_size: int, memory: str = "full", dtype: torch.dtype = torch.float32
) -> None:
    found = []
    for poisoned in (False, True):
        module = module_of(proj_size, memory, dtype)
        given, grads = arguments(module, poisoned)
        found.append(DERIVATIVES[derivatives](module, given, grads))
        ends = {name: given[name].detach() for name in ("h_0", "c_0")}
    expected, actual = found
    for name in [name for name in expected if name.endswith(("h_n", "c_n")) and "grad of" not in name]:
        # The final state of a sequence without steps is its initial state.
        expected[name] = expected[name].detach().clone()
        expected[name][:, EMPTY] = ends["h_0" if name.endswith("h_n") else "c_0"][:, EMPTY]
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("proj_size", [0, 2], ids=["", "projected"])
@pytest.mark.parametrize("derivatives", DERIVATIVES)
def test_results_and_derivatives(path: str, derivatives: str, proj_size: int) -> None:
    assert_same_as_with_zeros(derivatives, proj_size)


@interpreted
@pytest.mark.parametrize("path", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("memory", "dtype"),
    [("low", torch.float32), ("full", torch.float16), ("full", torch.bfloat16), ("low", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("proj_size", [0, 2], ids=["", "projected"])
def test_memory_and_dtypes(path: str, memory: str, dtype: torch.dtype, proj_size: int) -> None:
    assert_same_as_with_zeros("first", proj_size, memory, dtype)


@pytest.mark.parametrize(
    ("weight", "value", "memory"),
    [
        ("weight_ih_l0", torch.inf, "full"),
        ("weight_hh_l0", torch.nan, "full"),
        ("weight_hr_l0", torch.nan, "full"),
        ("weight_hr_l0", torch.inf, "low"),
        ("weight_hh_l0", torch.inf, "low"),
    ],
)
def test_weights_that_are_not_finite(path: str, weight: str, value: float, memory: str) -> None:
    """They have no influence where there is no step, and none on states that no step starts from."""
    module = module_of(proj_size=2, memory=memory)
    with torch.no_grad():
        getattr(module, weight)[0, 0] = value
    given, grads = arguments(module, poisoned=False)
    found = first_gradients(module, given, grads)
    assert found["output"][ABSENT].count_nonzero() == 0
    assert torch.equal(found["h_n"][:, EMPTY], given["h_0"][:, EMPTY])
    assert found["input"][ABSENT].count_nonzero() == 0
    assert torch.equal(found["h_0"][:, EMPTY], grads[1][:, EMPTY])
    for name in STATES[:2]:
        assert found[name][0, REPLACED].count_nonzero() == 0, name
    for name in STATES[2:]:
        for direction, sequences in enumerate(NEVER_RESET):
            assert found[name][direction, sequences].count_nonzero() == 0, name


def test_projected_sequences_without_steps_and_states(path: str) -> None:
    """h_n is 0 there, whatever W_hr is."""
    module = module_of(proj_size=2)
    with torch.no_grad():
        module.weight_hr_l0.fill_(torch.nan)
    _, (h_n, _) = module(torch.zeros(TIME_STEPS, BATCH_SIZE, INPUT_SIZE), lengths=LENGTHS)
    assert h_n[:, EMPTY].count_nonzero() == 0


@interpreted
@pytest.mark.parametrize("path", ["triton"], indirect=True)
@pytest.mark.parametrize("proj_size", [0, 2], ids=["", "projected"])
def test_gradients_on_one_side_of_a_reset(path: str, proj_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN does not pass to the steps on the other side, in no window of memory="low", in neither direction."""
    monkeypatch.setattr(windows, "LOW_MEMORY_STEPS", 1)
    found = []
    for memory in ("full", "low"):
        module = module_of(proj_size, memory)
        given, grads = arguments(module, poisoned=False)
        grads[0][2, 3, : grads[0].shape[2] // 2] = torch.nan  # sequence 3 is reset at step 2; forward
        grads[0][0, 3, grads[0].shape[2] // 2 :] = torch.nan  # reverse
        gradients = first_gradients(module, given, grads)
        found.append([gradients[name].isnan().any(-1) for name in ("h_0", "c_0", "h_reset", "c_reset")])
        assert not found[-1][0].any()
        assert found[-1][2][:, 3].all()
    assert all(torch.equal(full, low) for full, low in zip(*found, strict=True))


def test_exported_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula that torch.export records. A program may train it where this library is not installed."""

    def scan(step: Callable[..., Any], states: Any, given: Any, reverse: bool) -> Any:  # PyTorch's compiles the step
        outputs = []
        for each in zip(*given, strict=True):
            states, shown = step(states, each)
            outputs.append(shown)
        return states, [torch.stack(each) for each in zip(*outputs, strict=True)]

    monkeypatch.setattr(exported, "scan", scan)
    found = []
    for poisoned in (False, True):
        module = module_of()
        given, grads = arguments(module, poisoned)
        weights = LaneWeights(*list(module.parameters())[:4])
        leaves = [given["input"].flatten(0, 1), *(given[name][0] for name in STATES)]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        tables = dense(LENGTHS, RESETS, TIME_STEPS, BATCH_SIZE, torch.device("cpu"))
        output, *_ = exported.exported_lane(
            leaves[0], Start(*leaves[1:]), weights, reverse=False, ragged=tables, return_cells=True
        )
        grad = grads[0][..., :HIDDEN_SIZE].flatten(0, 1)
        found.append((output, torch.autograd.grad(output, [*leaves, *weights.given()], grad)))
    torch.testing.assert_close(*found)


# --- float16 with projections: W_hh W_hr beyond its range ---


@interpreted
@pytest.mark.parametrize("path", ["triton"], indirect=True)
@pytest.mark.parametrize("signs", ["one", "both"])
@pytest.mark.parametrize("size", [400.0, 3000.0])
def test_finite_weights_whose_product_overflows(path: str, size: float, signs: str) -> None:
    """What nn.LSTM computes in float64: such gates are open or shut."""
    ours, stock = twins(5, 9, proj_size=4, dtype=torch.float64)
    with torch.no_grad():
        for name in ("weight_hh_l0", "weight_hr_l0"):
            random = torch.rand_like(getattr(ours, name)) if signs == "one" else torch.randn_like(getattr(ours, name))
            for module in (ours, stock):
                getattr(module, name).copy_((random * size).half())
    assert (ours.weight_hh_l0 @ ours.weight_hr_l0).abs().max() > torch.finfo(torch.float16).max
    ours.half()
    input = torch.randn(4, 3, 5).half()
    _, (_, c_n) = ours(input)
    _, (_, expected) = stock(input.double())
    torch.testing.assert_close(c_n.double(), expected, rtol=0.02, atol=0.02)
    gradients = torch.autograd.grad(c_n.float().sum(), [ours.weight_ih_l0, ours.weight_hh_l0])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_weights_within_the_range_are_folded_as_they_are() -> None:
    hh, hr = torch.randn(12, 2).half(), torch.randn(2, 3).half()
    weights, _ = folded(LaneWeights(torch.zeros(12, 2).half(), hh, hr=hr), Start(), False, None)
    assert torch.equal(weights.hh, hh @ hr)

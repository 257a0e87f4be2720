"""What is remembered of calls (lstm_triton/prepared_call.py): how much, and what happens if it does not hold.

That it is never stale, test_prepared.py shows.
"""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lstm_triton
from lstm_triton import interpreter, prepared_call, refusal, target
from lstm_triton.failure import KernelFailed
from tests.support.comparing import assert_same, twins
from tests.support.refusing import Refusing

interpreted = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    prepared_call.forget()
    yield
    prepared_call.forget()


def test_as_much_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_call, "REMEMBERED", 4)
    module, most = lstm_triton.LSTM(3, 4), 0
    for batch_size in range(1, 10):
        module(torch.zeros(2, batch_size, 3))
        most = max(most, len(prepared_call.known))
    assert most == 4


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=interpreted)])
def test_no_tensor_is_kept(kernels: bool) -> None:
    with interpreter.interpret() if kernels else lstm_triton.backend("aten"):
        for steps in (1, 2):
            module = lstm_triton.LSTM(3, 4)
            input, states = torch.zeros(steps, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
            module(input, states)[0].sum().backward()
            with torch.no_grad():
                module(input, states)
            gone = [weakref.ref(tensor) for tensor in (input, *states, *module.parameters())]
            del module, input, states
            gc.collect()
            assert [each() for each in gone] == [None] * len(gone)
    assert len(prepared_call.known) == 4


def test_a_call_that_fails_is_not_remembered() -> None:
    module = lstm_triton.LSTM(3, 4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="input_size"):
            module(torch.zeros(2, 2, 5))
        with pytest.raises(ValueError, match="2D or 3D"):
            module(torch.zeros(3))
    assert not prepared_call.known


@interpreted
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("trains", [False, True])
def test_kernels_that_are_refused_later(steps: int, trains: bool) -> None:
    """PyTorch's own function computes the call, with the same dropout as if the kernels had never been there."""

    with interpreter.interpret():  # installs the interpreter
        pass
    ours, stock = twins(3, 4)
    input, where = torch.randn(steps, 2, 3), Refusing(None)
    try:
        with target.running_on(where), torch.set_grad_enabled(trains):
            for _ in range(2):
                ours(input)
            assert len(prepared_call.known) == 1
            where.error = lambda: RuntimeError("Failed to find C compiler")
            with pytest.warns(RuntimeWarning, match="finds no working C compiler"):
                found = ours(input)
            assert_same(found, stock(input))
            assert_same(ours(input), stock(input))
            with lstm_triton.backend("triton"), pytest.raises(refusal.LaunchRefused):
                ours(input)
    finally:
        refusal.forget()


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=interpreted)])
def test_all_ways_to_call_share_what_is_remembered(kernels: bool) -> None:
    ours, stock = twins(3, 4)
    input, states = torch.randn(2, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    with interpreter.interpret() if kernels else lstm_triton.backend("auto"):
        expected = ours(input, states)
        for _ in range(2):
            with lstm_triton.accelerate() as acceleration:
                found = stock(input, states)
            assert acceleration.taken_over == kernels
            assert_same(found, expected)
        weights = list(ours.parameters())
        assert_same(lstm_triton.functional.lstm(input, states, weights, training=True), expected)
        assert len(prepared_call.known) == 1


@interpreted
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"batch_first": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_accelerated_calls_are_remembered(options: dict[str, Any], steps: int) -> None:
    """And again computed by the kernels, with gradients."""
    module, input = nn.LSTM(3, 4, **options), torch.randn(steps, 2, 3)
    expected = module(input)
    with interpreter.interpret(), lstm_triton.accelerate() as acceleration:
        for _ in range(3):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    found = module(input)
                torch.testing.assert_close(found, expected)
                if grad:
                    found[0].sum().backward()
    assert acceleration.taken_over == 6
    assert len(prepared_call.known) == 2


@interpreted
def test_the_gradients_of_the_biases_share_no_memory() -> None:
    with interpreter.interpret():
        for needed in ({"bias_ih_l0", "bias_hh_l0"}, {"bias_ih_l0"}, {"bias_hh_l0"}, set[str]()):
            module = lstm_triton.LSTM(3, 4)
            for name in ("bias_ih_l0", "bias_hh_l0"):
                getattr(module, name).requires_grad_(name in needed)
            module(torch.randn(2, 2, 3))[0].sum().backward()
            grads = {name: parameter.grad for name, parameter in module.named_parameters() if "bias" in name}
            assert {name for name, grad in grads.items() if grad is not None} == needed
            found = [grad for grad in grads.values() if grad is not None]
            assert all(grad.untyped_storage().nbytes() == grad.nbytes for grad in found)
            assert len({grad.data_ptr() for grad in found}) == len(found)
            assert all(torch.equal(grad, found[0]) for grad in found)


@interpreted
@pytest.mark.parametrize("steps", [1, 3])
def test_a_kernel_that_fails_in_an_accelerated_call(steps: int) -> None:
    with interpreter.interpret():  # installs the interpreter
        pass
    module, input, where = nn.LSTM(3, 4), torch.zeros(steps, 1, 3), Refusing(None)
    with torch.no_grad(), target.running_on(where), lstm_triton.accelerate():
        for _ in range(2):
            module(input)
        where.error = lambda: RuntimeError("CUDA error: unspecified launch failure")
        with pytest.raises(KernelFailed, match="unspecified launch failure"):
            module(input)


def test_a_nested_tensor_is_refused_as_ever() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])
    with pytest.raises(RuntimeError, match="Expected 4 weights, got 0"):
        lstm_triton.functional.lstm(nested, None, [])
    arguments = (nested, (nested, nested), [torch.zeros(4, 4)] * 2, False, 1, 0.0, False, False, False)
    with pytest.raises(RuntimeError) as by_torch:
        torch._VF.lstm(*arguments)
    with lstm_triton.accelerate(), pytest.raises(type(by_torch.value)) as accelerated:
        torch._VF.lstm(*arguments)
    assert str(accelerated.value) == str(by_torch.value)

"""The user's default device and default dtype decide nothing in a call: no tensor of this library is made by them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_triton
from lstm_triton import interpreter
from tests.support.comparing import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

PATHS = [
    pytest.param(nullcontext, id="fallback"),
    pytest.param(interpreter.interpret, id="kernels", marks=pytest.mark.interpreted),
]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


Call = Callable[[], Any]


def packed(sorted: bool) -> PackedSequence:
    order = None if sorted else torch.tensor([1, 0])
    return PackedSequence(torch.randn(3, 2), torch.tensor([2, 1]), order, order)


def gradients(results: Any, of: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    output = results[0].data if isinstance(results[0], PackedSequence) else results[0]
    return torch.autograd.grad(output.square().sum(), of, **options)


def second_gradients(results: Any, of: list[Tensor]) -> tuple[Tensor, ...]:
    first = gradients(results, of, create_graph=True)
    return torch.autograd.grad(first[0].square().sum(), of)


def calls() -> dict[str, Call]:
    """Calls of every kind. What they take is made here, before a default is set."""
    plain = lstm_triton.LSTM(2, 3, num_layers=2, bidirectional=True, dropout=0.5)
    low, projected = lstm_triton.LSTM(2, 3, memory="low"), lstm_triton.LSTM(2, 3, proj_size=2)
    cell, stock = lstm_triton.LSTMCell(2, 3), nn.LSTM(2, 3, num_layers=2)
    input, resets = torch.randn(2, 2, 2), torch.tensor([[False, False], [False, True]])
    ragged = {"lengths": torch.tensor([1, 2]), "resets": resets}
    of_projected = {**ragged, "hx": (torch.randn(1, 2, 2), torch.randn(1, 2, 3))}
    of_projected["reset_state"] = (torch.randn(1, 2, 2), torch.randn(1, 2, 3))
    step, tangent = torch.randn(2, 2), torch.randn(2, 2, 2)
    in_order, in_disorder = packed(sorted=True), packed(sorted=False)

    def accelerated() -> Any:
        with lstm_triton.accelerate():
            results = stock(in_disorder)
            return results, gradients(results, list(stock.parameters()))

    def inside(trace: lstm_triton.Trace[Any]) -> list[Tensor]:
        return [value for value in vars(trace.layers[-1]).values() if isinstance(value, Tensor)]

    def weights(module: nn.Module) -> list[Tensor]:
        return list(module.parameters())

    return {
        "dropout": lambda: gradients(plain(input), weights(plain)),
        "lengths and resets": lambda: gradients(plain(input, **ragged), weights(plain)),
        "packed": lambda: gradients(plain(in_order), weights(plain)),
        "packed in disorder": lambda: gradients(plain(in_disorder), weights(plain)),
        "cells": lambda: torch.no_grad()(plain.with_cells)(input, **ragged),
        "low memory": lambda: gradients(low(in_order), weights(low)),
        "projections": lambda: gradients(projected(input, **of_projected), weights(projected)),
        "projections twice": lambda: second_gradients(projected(input, **of_projected), weights(projected)),
        "forward mode": lambda: torch.func.jvp(lambda x: projected(x, **of_projected)[0], (input,), (tangent,)),
        "vmap": lambda: torch.vmap(lambda x: low(x)[0])(torch.stack([input, tangent])),
        "cell": lambda: gradients(cell(step), weights(cell), allow_unused=True),
        "trace": lambda: inside(lstm_triton.trace(projected, input, **of_projected)),
        "trace of a packed batch": lambda: inside(lstm_triton.trace(plain, in_disorder)),
        "accelerated": accelerated,
    }


@pytest.mark.parametrize("path", PATHS)
def test_defaults_decide_nothing(path: Any) -> None:
    for name, call in calls().items():
        with path():
            torch.manual_seed(0)
            expected = call()
            torch.manual_seed(0)
            with torch.device("meta"), default_dtype(torch.float16):
                try:
                    actual = call()
                except Exception as error:
                    raise AssertionError(f"with other defaults, this call fails: {name}") from error
        assert_same(actual, expected)


def test_a_new_layer_takes_the_defaults() -> None:
    """As nn.LSTM does."""
    with torch.device("meta"), default_dtype(torch.float64):
        for module in (lstm_triton.LSTM(2, 3), lstm_triton.LSTMCell(2, 3)):
            assert {(weight.device.type, weight.dtype) for weight in module.parameters()} == {("meta", torch.float64)}

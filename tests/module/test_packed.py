"""Packed sequences that are not well-formed are refused before anything is launched: the kernels would wait for ever.

nn.LSTM refuses some of them, and the class of the exception is then the same. It computes garbage for others.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lstm_triton
from lstm_triton import functional, interpreter
from tests.support.comparing import assert_same, twins


def numbers(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def packed(
    batch_sizes: Any = (2, 1), data: Any = 3, sorted_indices: Any = None, unsorted_indices: Any = None
) -> PackedSequence:
    """A PackedSequence of 5 features as it is given, past its constructor. It is well-formed without arguments."""
    if isinstance(batch_sizes, tuple):
        batch_sizes = numbers(*batch_sizes)
    data = torch.ones(data, 5) if isinstance(data, int) else data
    fields = (data, batch_sizes, sorted_indices, unsorted_indices)
    return tuple.__new__(PackedSequence, fields)  # type: ignore[arg-type]


class Bad(NamedTuple):
    """A packed sequence, the exceptions without and with initial states, and what the message names."""

    packed: PackedSequence
    without_states: type[Exception]
    with_states: type[Exception]
    message: str


def bad(message: str, sequences: PackedSequence, *errors: type[Exception]) -> Bad:
    return Bad(sequences, *(errors if len(errors) == 2 else errors * 2 or (RuntimeError, RuntimeError)), message)


ORDER = numbers(1, 0)
BAD = {
    "growing": bad("batch_sizes must not grow, got 2 at time step 1 after 1", packed((1, 2))),
    "growing at the end": bad("batch_sizes must not grow, got 3 at time step 3 after 2", packed((3, 2, 2, 3), 10)),
    "growing again": bad("batch_sizes must not grow, got 2 at time step 2 after 1", packed((2, 1, 2), 5)),
    "zero at the end": bad("batch_sizes must be positive, got 0 at time step 1", packed((2, 0), 2)),
    "zero inside": bad("batch_sizes must be positive, got 0 at time step 1", packed((2, 0, 1))),
    "zero": bad("batch_sizes must be positive, got 0 at time step 0", packed((0,), 0)),
    "negative": bad("batch_sizes must be positive, got -1 at time step 1", packed((2, -1), 1)),
    "all negative": bad("batch_sizes must be positive, got -1 at time step 0", packed((-1,), 0)),
    "empty": bad("batch_sizes must have one number for each time step", packed(numbers()), IndexError),
    "a number": bad("batch_sizes must have one number for each time step", packed(torch.tensor(3)), IndexError),
    "too few rows": bad("batch_sizes must add up to the number of rows of the data, 2, got 3", packed(data=2)),
    "too many rows": bad("batch_sizes must add up to the number of rows of the data, 9, got 3", packed(data=9)),
    "no rows": bad("batch_sizes must add up to the number of rows of the data, 0, got 3", packed(data=0)),
    "far too large": bad("batch_sizes must add up to the number of rows of the data, 3, got", packed((2**31,))),
    "overflow": bad("batch_sizes must add up to the number of rows of the data, 3, got", packed((2**63 - 1, 2**62))),
    "two dimensions": bad(
        "batch_sizes must have 1 dimension, got 2", packed(numbers(2, 1)[None]), TypeError, RuntimeError
    ),
    "a column": bad(
        "batch_sizes must have 1 dimension, got 2", packed(numbers(2, 1)[:, None]), TypeError, RuntimeError
    ),
    "not contiguous": bad("batch_sizes must be contiguous", packed(numbers(2, 9, 1)[::2])),
    "meta": bad("batch_sizes must be on the CPU, got meta", packed(numbers(2, 1).to("meta"))),
    "floats": bad(
        "batch_sizes must have the dtype torch.int64, got torch.float32",
        packed(torch.tensor([2.0, 1.0])),
        TypeError,
        RuntimeError,
    ),
    **{
        str(dtype): bad(f"batch_sizes must have the dtype torch.int64, got {dtype}", packed(numbers(2, 1, dtype=dtype)))
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool)
    },
    "a list": bad("batch_sizes must be a Tensor, got list", packed([2, 1]), TypeError),
    "an array": bad("batch_sizes must be a Tensor, got ndarray", packed(np.array([2, 1])), TypeError),
    "None": bad("batch_sizes must be a Tensor, got NoneType", packed(None), TypeError),
    "1-D data": bad("input must have 2 dimensions, got 1", packed(data=torch.zeros(3))),
    "3-D data": bad("input must have 2 dimensions, got 3", packed(data=torch.zeros(3, 1, 5))),
    "data of a list": bad(
        "the data of a PackedSequence must be a Tensor, got list",
        packed(data=[[0.0] * 5] * 3),
        AttributeError,
        TypeError,
    ),
    "short order": bad(
        "sorted_indices must have one number for each of the 2 sequences, got 1",
        packed(sorted_indices=numbers(0), unsorted_indices=ORDER),
    ),
    "long order": bad(
        "unsorted_indices must have one number for each of the 2 sequences, got 3",
        packed(sorted_indices=ORDER, unsorted_indices=numbers(0, 1, 2)),
    ),
    "twice the same": bad(
        r"sorted_indices must have each number from 0 to 1 once, got \[0, 0\]",
        packed(sorted_indices=numbers(0, 0), unsorted_indices=ORDER),
    ),
    "out of range": bad(
        r"unsorted_indices must have each number from 0 to 1 once, got \[0, 5\]", packed(unsorted_indices=numbers(0, 5))
    ),
    "negative index": bad(
        r"unsorted_indices must have each number from 0 to 1 once, got \[-1, 0\]",
        packed(sorted_indices=ORDER, unsorted_indices=numbers(-1, 0)),
    ),
    "no inverse": bad(
        r"unsorted_indices must be the inverse of sorted_indices, \[1, 2, 0\], got \[1, 2, 0\]",
        packed((3,), 3, numbers(1, 2, 0), numbers(1, 2, 0)),
    ),
    "order of floats": bad(
        "sorted_indices must have the dtype torch.int64, got torch.float32",
        packed(sorted_indices=torch.tensor([1.0, 0.0])),
    ),
    "order of bytes": bad(
        "unsorted_indices must have the dtype torch.int64, got torch.uint8",
        packed(unsorted_indices=ORDER.to(torch.uint8)),
    ),
    "order elsewhere": bad(
        "sorted_indices must be on the data's device, cpu, got meta", packed(sorted_indices=ORDER.to("meta"))
    ),
    "2-D order": bad(
        "unsorted_indices must be a dense vector, got 2 dimensions", packed(unsorted_indices=ORDER[None]), IndexError
    ),
    "order of a list": bad("unsorted_indices must be a Tensor, got list", packed(unsorted_indices=[1, 0]), TypeError),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_before_a_path_is_chosen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(functional, "choose", lambda *arguments: pytest.fail("a path was chosen"))
    sequences, *errors, message = BAD[name]
    module = lstm_triton.LSTM(5, 7, bidirectional=True)
    weights = list(module.parameters())
    calls: tuple[Callable[..., Any], ...] = (
        module,
        module.with_cells,
        partial(functional.lstm, weights=weights, bidirectional=True),
        partial(lstm_triton.explain, module),
        partial(lstm_triton.trace, module),
    )
    for hx, error in zip((None, (torch.zeros(2, 2, 7), torch.zeros(2, 2, 7))), errors, strict=True):
        for call in calls:
            with pytest.raises(error, match=f"^{message}") as caught:
                call(sequences, hx)
            assert caught.type is error


LEAVES_NN_LSTM_READING_OTHER_MEMORY = {"too few rows", "not contiguous", "meta", "far too large", "overflow"}


@pytest.mark.parametrize("name", sorted(set(BAD) - LEAVES_NN_LSTM_READING_OTHER_MEMORY))
def test_nn_lstm_raises_no_other_class(name: str) -> None:
    """Where nn.LSTM raises at all."""
    raised = BAD[name].without_states
    try:
        nn.LSTM(5, 7)(BAD[name].packed)
    except Exception as error:
        raised = type(error)
    assert raised is BAD[name].without_states


@pytest.mark.interpreted
def test_unchanged_models_do_not_hang() -> None:
    """Under `accelerate` PyTorch's own function says what it says, and replaced modules refuse."""
    stock = nn.LSTM(5, 7)
    growing = BAD["growing"].packed
    with pytest.raises(RuntimeError) as expected:
        stock(growing)
    with interpreter.interpret():
        with lstm_triton.accelerate(), pytest.raises(RuntimeError) as caught:
            stock(growing)
        assert str(caught.value) == str(expected.value)
        lstm_triton.replace_lstm(stock)
        with pytest.raises(RuntimeError, match=r"^batch_sizes must not grow"):
            stock(growing)


@pytest.mark.parametrize("name", ["growing", "zero inside", "too many rows"])
def test_compiled_programs_refuse(name: str) -> None:
    compiled = torch.compile(lstm_triton.LSTM(5, 7), backend="eager")
    assert compiled(packed())[0].data.shape == (3, 7)
    with pytest.raises(RuntimeError, match="batch_sizes must"):
        compiled(BAD[name].packed)


@pytest.mark.parametrize("path", [nullcontext, pytest.param(interpreter.interpret, marks=pytest.mark.interpreted)])
def test_well_formed_ones_are_taken(path: Any) -> None:
    """With indices of int32, with either order alone, of a single sequence, under torch.func, and of a subclass."""
    ours, stock = twins(5, 7)
    data = torch.randn(3, 5)
    well_formed = [
        packed((2, 1), data),
        packed((1, 1, 1), data),
        packed((3,), data, numbers(2, 0, 1), numbers(1, 2, 0)),
        packed((2, 1), data, ORDER.int(), ORDER.int()),
        packed((2, 1), data, None, ORDER),
        packed((2, 1), data, ORDER, None),
    ]
    for sequences in well_formed:
        with path():
            found = ours(sequences)
        torch.testing.assert_close(tuple(found[0][:1]) + found[1], tuple(stock(sequences)[0][:1]) + stock(sequences)[1])
    with path():
        grad = torch.func.grad(lambda rows: ours(packed((2, 1), rows, ORDER, ORDER))[0].data.sum())(data)
    leaf = data.clone().requires_grad_()
    stock(packed((2, 1), leaf))[0].data.sum().backward()
    torch.testing.assert_close(grad, leaf.grad)
    assert_same(ours(pack_sequence([data]))[0].batch_sizes, numbers(1, 1, 1))

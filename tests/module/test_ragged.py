"""The module with sequences of different lengths, packed, or starting anew on the way; every c; and streaming."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton import functional, interpreter
from lstm_triton.checks import check_arguments
from tests.support.comparing import (
    CallCase,
    LoopLSTM,
    assert_results_as_accurate,
    assert_same,
    call_cases,
    run,
    twins,
)
from tests.support.lanes import DTYPES

interpreted = pytest.mark.interpreted


def test_step_loop_is_nn_lstm() -> None:
    """The yardstick itself, where nn.LSTM can say something: lengths from 1 on, no resets."""
    stock = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    loop = LoopLSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    loop.load_state_dict(stock.state_dict())
    input, lengths = torch.randn(3, 5, 3, dtype=torch.float64), torch.tensor([2, 5, 3])
    hx = tuple(torch.randn(4, 3, 4, dtype=torch.float64) for _ in range(2))
    packed = pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False)
    output, states = stock(packed, hx)
    torch.testing.assert_close(loop(input, hx, lengths=lengths), (pad_packed_sequence(output, True)[0], states))


@interpreted
@settings(max_examples=12)
@given(
    call_cases(
        dtypes=DTYPES,
        layouts=("packed", "packed unsorted"),
        projections=False,
        dropouts=(0.0, 1.0),
        smallest_hidden=4,  # of fewer numbers, a gradient that cancels has no typical error
    ),
    st.integers(0, 1000),
)
def test_packed_sequences(case: CallCase, seed: int) -> None:
    """Layers, directions, states in any order: as accurate as nn.LSTM, in the order that nn.LSTM has."""
    ours, stock = case.twins()
    with interpreter.interpret(seed), lstm_triton.backend("triton"):
        assert {layer.path for layer in lstm_triton.explain(ours, case.input, case.hx).layers} == {"triton"}
        actual = run(ours, case.input, case.hx)
    assert_results_as_accurate(actual, stock, case.input, case.hx)


@interpreted
def test_structure_of_packed_results() -> None:
    ours, stock = twins(3, 4, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(5, 3, 3), torch.tensor([2, 5, 3]), enforce_sorted=False)
    hx = torch.randn(2, 3, 4), torch.randn(2, 3, 4)  # in the order of the sequences, not of their lengths
    with interpreter.interpret(), lstm_triton.backend("triton"):
        output, states, cells = ours.with_cells(packed, hx)
    expected, expected_states = stock(packed, hx)
    assert isinstance(output, PackedSequence)
    assert_same(output[1:], expected[1:])
    torch.testing.assert_close((output.data, states), (expected.data, expected_states))
    padded, _ = pad_packed_sequence(output._replace(data=cells[0]))
    torch.testing.assert_close(padded[1, 0], states[1][0, 0])  # c of the last step of the sequence of 2 steps


@interpreted
@pytest.mark.parametrize("size", [(2, 3, 4), (1, 2, 4), (1, 3, 5)])
def test_states_of_a_wrong_size_beside_packed_input(size: tuple[int, ...]) -> None:
    packed = pack_padded_sequence(torch.randn(5, 3, 3), torch.tensor([5, 3, 2]))
    for path in ("triton", "aten"):
        with (
            interpreter.interpret(),
            lstm_triton.backend(path),
            pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 3, 4\), got"),
        ):
            lstm_triton.LSTM(3, 4)(packed, (torch.zeros(1, 3, 4), torch.zeros(size)))


def padded_case(
    dtype: torch.dtype = torch.float32,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    bias: bool = True,
    hidden_size: int = 5,
    lengths: tuple[int, ...] | None = (2, 0, 5, 4),
    resets: bool = False,
    states: bool = True,
    cells: bool = False,
) -> tuple[lstm_triton.LSTM, LoopLSTM, Tensor, Any, dict[str, Any]]:
    """Ours, the step loop, an input with NaN as padding, states, and what else `run` takes; T=5, B=4."""
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    ours = lstm_triton.LSTM(3, hidden_size, dtype=dtype, **options)
    loop = LoopLSTM(3, hidden_size, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.copy_(torch.rand(weight.shape, generator=generator) - 0.5)
    loop.load_state_dict(ours.state_dict())

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    input, extra = random(5, 4, 3), {"cells": cells}
    if lengths is not None:
        extra["lengths"] = torch.tensor(lengths)
        input = torch.where((torch.arange(5).unsqueeze(1) < extra["lengths"]).unsqueeze(2), input, torch.nan)
    size = num_layers * (2 if bidirectional else 1), 4, hidden_size
    if resets:
        anew = torch.rand(5, 4, generator=generator) < 0.3
        anew[2, 3] = True  # at least this one
        extra["resets"] = anew.t() if batch_first else anew
        if states:
            extra["reset_state"] = (random(*size), random(*size))
    hx = (random(*size), random(*size)) if states else None
    return ours, loop, input.transpose(0, 1) if batch_first else input, hx, extra


@st.composite
def padded_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> tuple[Any, ...]:
    flags = ("bidirectional", "batch_first", "bias", "resets", "states", "cells")
    lengths = draw(st.none() | st.tuples(*[st.integers(0, 5)] * 4))
    return padded_case(
        dtype=draw(st.sampled_from(dtypes)),
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(4, 9)),  # of fewer numbers, a gradient that cancels has no typical error
        lengths=lengths,
        **{name: draw(st.booleans()) for name in flags},
    )


@interpreted
@settings(max_examples=15)
@given(padded_cases(), st.integers(0, 1000))
def test_lengths_and_resets_are_the_step_loop(case: tuple[Any, ...], seed: int) -> None:
    """In results, every c, and every gradient, those of reset_state among them; NaN as padding reaches none of them."""
    ours, loop, input, hx, extra = case
    with interpreter.interpret(seed), lstm_triton.backend("triton"):
        actual = run(ours, input, hx, **extra)
    assert_results_as_accurate(actual, loop, input, hx, **extra)


@settings(max_examples=30)
@given(padded_cases(dtypes=(torch.float64,)))
def test_fallback_is_the_step_loop(case: tuple[Any, ...]) -> None:
    ours, loop, input, hx, extra = case
    with lstm_triton.backend("aten"):
        actual = run(ours, input, hx, **extra)
    torch.testing.assert_close(actual, run(loop, input, hx, **extra))


@pytest.fixture(params=[pytest.param("triton", marks=interpreted), "aten"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test with this runs once through the interpreted kernels, once through PyTorch's own function."""
    with ExitStack() as stack:
        if request.param == "triton":
            stack.enter_context(interpreter.interpret())
        stack.enter_context(lstm_triton.backend(request.param))
        yield request.param


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("lengths", [None, (2, 0, 5, 4)])
def test_resets_of_a_stack_in_both_directions(path: str, lengths: tuple[int, ...] | None, cells: bool) -> None:
    ours, loop, input, hx, extra = padded_case(
        num_layers=2, bidirectional=True, batch_first=True, lengths=lengths, resets=True, cells=cells
    )
    torch.testing.assert_close(run(ours, input, hx, **extra), run(loop, input, hx, **extra), rtol=1e-4, atol=1e-5)


def test_lengths_give_what_a_packed_sequence_gives(path: str) -> None:
    """For every layer and direction, with the gradients of all that both have."""
    lengths = (2, 1, 5, 4)
    ours, _, input, hx, extra = padded_case(num_layers=2, bidirectional=True, lengths=lengths)

    def results(packed: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        data = torch.nan_to_num(input).requires_grad_()
        states = tuple(state.detach().requires_grad_() for state in hx)
        if packed:
            output, (h_n, c_n) = ours(pack_padded_sequence(data, extra["lengths"], enforce_sorted=False), states)
            output, _ = pad_packed_sequence(output)
        else:
            output, (h_n, c_n) = ours(data, states, lengths=extra["lengths"])
        found = [output, h_n, c_n]
        loss = torch.stack([(tensor * tensor.detach().cos()).sum() for tensor in found]).sum()
        return found, torch.autograd.grad(loss, [data, *states, *ours.parameters()])

    torch.testing.assert_close(results(packed=False), results(packed=True))


def test_sequences_without_steps_end_as_they_began(path: str) -> None:
    ours, _, input, hx, extra = padded_case(num_layers=2, bidirectional=True, lengths=(0, 3, 0, 5), resets=True)
    output, (h_n, c_n) = ours(input, hx, lengths=extra["lengths"], resets=extra["resets"])
    assert output[:, [0, 2]].count_nonzero() == output[3:, 1].count_nonzero() == 0
    assert torch.equal(h_n[:, [0, 2]], hx[0][:, [0, 2]])
    assert torch.equal(c_n[:, [0, 2]], hx[1][:, [0, 2]])


def test_no_sequence_with_a_step(path: str) -> None:
    ours, loop, input, hx, extra = padded_case(bidirectional=True, lengths=(0, 0, 0, 0), resets=True, cells=True)
    assert_same(run(ours, input, hx, **extra), run(loop, input, hx, **extra))


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch(batch_first: bool) -> None:
    ours = lstm_triton.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
    shape = (0, 5) if batch_first else (5, 0)
    nothing = torch.zeros(0, dtype=torch.int64)
    found = run(ours, torch.zeros(*shape, 3), cells=True, lengths=nothing, resets=torch.zeros(shape, dtype=torch.bool))
    assert found["output"].shape == (*shape, 8)
    assert found["cells"].shape == (4, *shape, 4)
    assert not any(found[f"gradient of {name}"].any() for name, _ in ours.named_parameters())


@pytest.mark.parametrize("batch_first", [False, True])
def test_without_a_batch(path: str, batch_first: bool) -> None:
    """As the only sequence of a batch."""
    ours, *_ = padded_case(batch_first=batch_first, bidirectional=True)
    input, starts = torch.randn(5, 3), torch.tensor([False, False, True, False, False])
    batch_axis = 0 if batch_first else 1
    hx, reset_state = (tuple(torch.randn(2, 5) for _ in range(2)) for _ in range(2))
    options = {"lengths": torch.tensor(4), "resets": starts, "reset_state": reset_state}
    output, states, cells = ours.with_cells(input, hx, **options)
    batched = {
        "lengths": torch.tensor([4]),
        "resets": starts.unsqueeze(batch_axis),
        "reset_state": tuple(state.unsqueeze(1) for state in reset_state),
    }
    expected = ours.with_cells(input.unsqueeze(batch_axis), tuple(state.unsqueeze(1) for state in hx), **batched)
    assert cells.shape == (2, 5, 5)
    assert_same(output, expected[0].squeeze(batch_axis))
    assert_same(states, tuple(state.squeeze(1) for state in expected[1]))
    assert_same(cells, expected[2].squeeze(batch_axis + 1))


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_lengths_of_any_integer_dtype(path: str, dtype: torch.dtype) -> None:
    ours, _, input, hx, extra = padded_case(resets=True)
    expected = ours(input, hx, lengths=extra["lengths"], resets=extra["resets"])
    assert_same(ours(input, hx, lengths=extra["lengths"].to(dtype), resets=extra["resets"]), expected)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("time_steps", [127, 128, 255, 256, 300, 65535, 65536, 65540])
def test_lengths_of_a_dtype_that_cannot_hold_the_number_of_steps(dtype: torch.dtype, time_steps: int) -> None:
    """A comparison in the dtype of the lengths would refuse right ones, or take wrong ones."""
    weights = [parameter.detach() for parameter in nn.LSTM(1, 1, bias=False).parameters()]
    options: dict[str, Any] = dict.fromkeys(("bias", "batch_first", "training", "bidirectional"), False)
    options |= {"num_layers": 1, "proj_size": 0, "dropout": 0.0}
    check = partial(check_arguments, torch.zeros(time_steps, 2, 1), None, weights, **options)
    largest = min(time_steps, torch.iinfo(dtype).max)
    call = check(lengths=torch.tensor([largest, 3], dtype=dtype))
    assert call.lengths is not None
    assert call.lengths.tolist() == [largest, 3]
    ragged = call.ragged()
    assert ragged is not None
    assert ragged.lengths.tolist() == [largest, 3]
    wrong = [-1] if dtype.is_signed else []
    wrong += [time_steps + 1, torch.iinfo(dtype).max] if largest < torch.iinfo(dtype).max else []
    for length in wrong:
        with pytest.raises(ValueError, match=rf"^lengths must be from 0 to {time_steps}, .*, got \[3, "):
            check(lengths=torch.tensor([3, length], dtype=dtype))


def test_more_steps_than_the_dtype_of_the_lengths_can_hold(path: str) -> None:
    ours, input = lstm_triton.LSTM(1, 1), torch.randn(300, 2, 1) if path == "aten" else torch.randn(130, 1, 1)
    lengths = torch.tensor([200, 3]) if path == "aten" else torch.tensor([100])
    dtype = torch.uint8 if path == "aten" else torch.int8
    with torch.no_grad():
        assert_same(ours(input, lengths=lengths.to(dtype)), ours(input, lengths=lengths))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(path: str, dtype: torch.dtype) -> None:
    """What a module in that dtype computes, with gradients in the dtype of the weights."""
    ours, _, input, hx, extra = padded_case(num_layers=2, resets=True, cells=True)
    with torch.autocast("cpu", dtype):
        actual = run(ours, input, hx, **extra)
    low = copy.deepcopy(ours).to(dtype)
    extra["reset_state"] = tuple(state.to(dtype) for state in extra["reset_state"])
    expected = run(low, input.to(dtype), tuple(state.to(dtype) for state in hx), **extra)
    for name, tensor in expected.items():
        assert actual[name].dtype == (torch.float32 if name.startswith("gradient") else dtype), name
        torch.testing.assert_close(actual[name], tensor, check_dtype=False, rtol=0.05, atol=0.05)


def test_the_same_dropout_with_and_without_lengths(path: str) -> None:
    ours = lstm_triton.LSTM(3, 4, num_layers=3, dropout=0.5)
    input = torch.randn(5, 2, 3)
    results = []
    for extra in ({}, {"lengths": torch.tensor([5, 5])}, {"resets": torch.zeros(5, 2, dtype=torch.bool)}):
        torch.manual_seed(0)
        results.append(ours(input, **extra))
    if path == "aten":  # without lengths, PyTorch's own function drops what it likes
        results = results[1:]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_projections_on_the_fallback() -> None:
    ours = lstm_triton.LSTM(3, 5, num_layers=2, proj_size=2, bidirectional=True, dtype=torch.float64)
    stock = nn.LSTM(3, 5, num_layers=2, proj_size=2, bidirectional=True, dtype=torch.float64)
    stock.load_state_dict(ours.state_dict())
    input, lengths = torch.randn(5, 3, 3, dtype=torch.float64), torch.tensor([2, 5, 3])
    output, states = stock(pack_padded_sequence(input, lengths, enforce_sorted=False))
    expected = pad_packed_sequence(output)[0], states
    torch.testing.assert_close(ours(input, lengths=lengths), expected)
    *results, cells = ours.with_cells(input, lengths=lengths)
    torch.testing.assert_close(tuple(results), expected)
    assert cells.shape == (4, 5, 3, 5)


# --- Every c ---


def test_cells_alone_carry_gradients(path: str) -> None:
    """A loss on a single c_t in the middle, and none on anything else."""
    ours, loop, input, hx, _ = padded_case(num_layers=2, bidirectional=True, lengths=None)
    gradients = []
    for module in (ours, loop):
        _, _, cells = module.with_cells(input, hx)
        gradients.append(torch.autograd.grad(cells[2, 2, 1].square().sum(), module.parameters(), allow_unused=True))
    for name, one, other in zip(dict(ours.named_parameters()), *gradients, strict=True):
        if other is None:
            assert one is None or not one.any(), name
        else:
            torch.testing.assert_close(one, other, msg=name)


def test_cells_do_not_change_the_rest(path: str) -> None:
    ours, _, input, hx, extra = padded_case(num_layers=2, resets=True, cells=True)
    with_cells = run(ours, input, hx, **extra)
    assert with_cells.pop("cells").shape == (2, 5, 4, 5)
    ours.zero_grad()
    del extra["cells"]
    without = ours(input, hx, **extra)
    torch.testing.assert_close((with_cells["output"], with_cells["h_n"], with_cells["c_n"]), (without[0], *without[1]))


# --- Derivatives ---


@pytest.mark.parametrize("cells", [False, True])
def test_gradients_by_finite_differences(cells: bool) -> None:
    ours, _, input, hx, extra = padded_case(
        torch.float64, bidirectional=True, hidden_size=2, resets=True, lengths=(2, 0, 5, 4)
    )

    def results(input: Tensor, h_0: Tensor, c_0: Tensor, *reset_state: Tensor) -> tuple[Tensor, ...]:
        call = ours.with_cells if cells else ours
        options = {"lengths": extra["lengths"], "resets": extra["resets"], "reset_state": reset_state}
        output, states, *every_c = call(input, (h_0, c_0), **options)
        return output, *states, *every_c

    leaves = [torch.nan_to_num(input), *hx, *extra["reset_state"]]
    assert torch.autograd.gradcheck(results, [leaf.requires_grad_() for leaf in leaves])


def test_second_derivatives(path: str) -> None:
    ours, loop, input, hx, extra = padded_case(resets=True, lengths=(2, 0, 3, 4))
    del extra["cells"]
    found = []
    for module in (ours, copy.deepcopy(loop).double()):
        dtype = module.weight_hh_l0.dtype
        data, *states = (tensor.to(dtype).requires_grad_() for tensor in (torch.nan_to_num(input), *hx))
        options = {**extra, "reset_state": tuple(state.to(dtype).requires_grad_() for state in extra["reset_state"])}
        leaves = [data, *states, *options["reset_state"], *module.parameters()]
        output, (h_n, c_n), cells = module.with_cells(data, states, **options)
        loss = output.square().sum() + (h_n * c_n).sum() + cells.sin().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
        found.append([grad.double() for grad in torch.autograd.grad(penalty, leaves)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# --- Streaming ---


CHUNKS = [(0, 1), (1, 2), (2, 5)]


@pytest.mark.parametrize("kind", ["dense", "lengths", "resets", "lengths and resets"])
def test_chunks_are_the_whole(path: str, kind: str) -> None:
    """With the states handed on, and gradients through them."""
    lengths = (2, 0, 5, 4) if "lengths" in kind else None
    ours, _, input, hx, extra = padded_case(num_layers=2, lengths=lengths, resets="resets" in kind)
    del extra["cells"]
    whole, last = ours(input, hx, **extra)
    expected = torch.autograd.grad(whole.square().sum() + last[0].sum(), ours.parameters())
    parts, states = [], hx
    for start, end in CHUNKS:
        chunk = dict(extra)
        if "lengths" in kind:
            chunk["lengths"] = (extra["lengths"] - start).clamp(0, end - start)
        if "resets" in kind:
            chunk["resets"] = extra["resets"][start:end]
        part, states = ours(input[start:end], states, **chunk)
        parts.append(part)
    output = torch.cat(parts)
    torch.testing.assert_close((output, states), (whole, last))
    found = torch.autograd.grad(output.square().sum() + states[0].sum(), ours.parameters())
    torch.testing.assert_close(found, expected)


# --- Bad arguments ---


def states(*sizes: tuple[int, ...], **options: Any) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(size, **options) for size in sizes)


NEVER = torch.zeros(5, 2, dtype=torch.bool)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lengths as a list": ({"lengths": [5, 3]}, TypeError, "lengths must be a tensor of integers, got list"),
    "lengths of floats": (
        {"lengths": torch.ones(2)}, TypeError, "lengths must be a tensor of integers, got torch.float32",
    ),
    "lengths of bools": (
        {"lengths": torch.ones(2, dtype=torch.bool)}, TypeError, "lengths must be a tensor of integers, got torch.bool",
    ),
    "lengths of too many": (
        {"lengths": torch.ones(3, dtype=torch.long)}, ValueError,
        "lengths must have one number for each sequence, shape (2,), got (3,)",
    ),
    "one length": (
        {"lengths": torch.tensor(3)}, ValueError, "lengths must have one number for each sequence, shape (2,), got ()"
    ),
    "lengths elsewhere": (
        {"lengths": torch.ones(2, dtype=torch.long, device="meta")}, ValueError,
        "lengths must be on the input's device, cpu, got meta",
    ),
    "too long": (
        {"lengths": torch.tensor([5, 6])}, ValueError,
        "lengths must be from 0 to 5, the number of time steps, got [5, 6]",
    ),
    "negative": (
        {"lengths": torch.tensor([-1, 5])}, ValueError,
        "lengths must be from 0 to 5, the number of time steps, got [-1, 5]",
    ),
    "resets as a list": ({"resets": [[True]]}, TypeError, "resets must be a tensor of torch.bool, got list"),
    "resets of integers": (
        {"resets": NEVER.int()}, TypeError, "resets must be a tensor of torch.bool, got torch.int32"
    ),
    "resets of another shape": (
        {"resets": NEVER.t()}, ValueError,
        "resets must be shaped as the input without its features, (5, 2), got (2, 5)",
    ),
    "resets elsewhere": (
        {"resets": NEVER.to("meta")}, ValueError, "resets must be on the input's device, cpu, got meta"
    ),
    "reset_state alone": (
        {"reset_state": states((1, 2, 4), (1, 2, 4))}, ValueError,
        "reset_state is given without resets: expected resets, which say where to start anew from it",
    ),
    "one reset_state": (
        {"resets": NEVER, "reset_state": torch.zeros(2, 1, 2, 4)}, TypeError,
        "reset_state must be a pair (h, c) of tensors, got Tensor",
    ),
    "reset_state of numbers": (
        {"resets": NEVER, "reset_state": (0.0, 0.0)}, TypeError,
        "reset_state must be a pair (h, c) of tensors, got float in it",
    ),
    "reset_state of three": (
        {"resets": NEVER, "reset_state": states((1, 2, 4), (1, 2, 4), (1, 2, 4))}, TypeError,
        "reset_state must be a pair (h, c) of tensors, got 3 of them",
    ),
    "reset_state of another shape": (
        {"resets": NEVER, "reset_state": states((1, 2, 4), (1, 1, 4))}, ValueError,
        "reset_state[1] must have the shape (1, 2, 4), as in hx, got (1, 1, 4)",
    ),
    "reset_state of another dtype": (
        {"resets": NEVER, "reset_state": states((1, 2, 4), (1, 2, 4), dtype=torch.float64)}, ValueError,
        "reset_state[0] must have the input's dtype, torch.float32, got torch.float64",
    ),
    "reset_state elsewhere": (
        {"resets": NEVER, "reset_state": states((1, 2, 4), (1, 2, 4), device="meta")}, ValueError,
        "reset_state[0] must be on the input's device, cpu, got meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Named, with what was expected and what was given; and nothing is computed, on no path."""
    options, error, message = BAD[name]
    monkeypatch.setattr(functional, "choose", lambda *arguments: pytest.fail("a path was chosen"))
    ours = lstm_triton.LSTM(3, 4)
    for call in (ours, ours.with_cells):
        with pytest.raises(error) as caught:
            call(torch.zeros(5, 2, 3), **options)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "value"),
    [("lengths", torch.tensor([5, 3])), ("resets", NEVER), ("reset_state", states((1, 2, 4), (1, 2, 4)))],
)
def test_a_packed_sequence_has_lengths_of_its_own(name: str, value: Any) -> None:
    packed = pack_padded_sequence(torch.zeros(5, 2, 3), torch.tensor([5, 3]))
    with pytest.raises(ValueError, match=f"^{name} cannot be given with a PackedSequence: pass the padded input"):
        lstm_triton.LSTM(3, 4)(packed, **{name: value})


def test_shapes_with_batch_first_and_without_a_batch() -> None:
    ours = lstm_triton.LSTM(3, 4, batch_first=True)
    with pytest.raises(ValueError, match=r"resets must be shaped .*, \(2, 5\), got \(5, 2\)"):
        ours(torch.zeros(2, 5, 3), resets=NEVER)
    with pytest.raises(ValueError, match=r"resets must be shaped .*, \(5,\), got \(5, 2\)"):
        ours(torch.zeros(5, 3), resets=NEVER)
    with pytest.raises(ValueError, match=r"lengths must have one number .*, shape \(\), got \(1,\)"):
        ours(torch.zeros(5, 3), lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match=r"reset_state\[0\] must have the shape \(1, 4\), as in hx, got \(1, 1, 4\)"):
        ours(torch.zeros(5, 3), resets=NEVER[:, 0], reset_state=states((1, 1, 4), (1, 1, 4)))


# --- torch.compile ---


def test_compiled_in_one_graph() -> None:
    """The fallback with lengths, resets and cells: twice at most for inputs of any length."""
    ours, loop, *_ = padded_case(num_layers=2, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(input: Tensor, **options: Any) -> Any:
        return ours.with_cells(input, **options)

    for size in (5, 6, 7):
        input = torch.randn(size, size, 3)
        lengths, resets = torch.arange(size), torch.rand(size, size) < 0.3
        results = []
        for module, call in ((ours, compiled), (loop, loop.with_cells)):
            module.zero_grad()
            output, (h_n, c_n), cells = call(input, lengths=lengths, resets=resets)
            (output.square().sum() + h_n.sum() + c_n.sin().sum() + cells.cos().sum()).backward()
            results.append((output, h_n, c_n, cells, [parameter.grad for parameter in module.parameters()]))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


def test_compiled_with_lengths_alone() -> None:
    """Without cells: through PyTorch's own function, whose stretches are not looked into."""
    ours, _, input, hx, extra = padded_case(num_layers=2, resets=True)
    del extra["cells"]
    expected = ours(input, hx, **extra)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, hx, **extra), expected)


def test_wrong_lengths_are_found_in_compiled_code() -> None:
    compiled = torch.compile(lstm_triton.LSTM(3, 4), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="lengths must be from 0 to T, the number of time steps"):
        compiled(torch.zeros(5, 2, 3), lengths=torch.tensor([5, 6]))

"""Whole stacks, interpreted: layers chained in one launch, both directions side by side, dropout inside the launch,
projections, and input projections in windows of time.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton import interpreter, ops, planner, transforms
from lstm_triton.planner import Device, Kind, Plan, candidates

from .comparing import LoopLSTM, assert_results_as_accurate, assert_same, run
from .kernel_cases import DTYPES, interpretable

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

SEEDS = (0, 1, 2)
BOTH: tuple[Kind, Kind] = ("forward", "backward")
LAYOUTS = ("dense", "packed", "resets")  # the last one with lengths, too
LENGTHS = (2, 0, 3, 1, 3)


@dataclass
class Stack:
    """A stack of layers, an input for it, and the plans that its scans are to run with (else: the planner's own).

    With "lengths", "packed" and "resets", sequences differ in length, and the input holds NaN past their ends.
    """

    num_layers: int = 1
    bidirectional: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "dense"
    hidden_size: int = 11
    input_size: int = 3
    time_steps: int = 3
    batch_size: int = 5
    proj_size: int = 0
    bias: bool = True
    states: bool = True
    cells: bool = False  # every c is asked for; not of packed sequences
    dropout: float = 0.0
    plans: dict[Kind, Plan] = field(default_factory=dict)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def steps(self) -> int:
        """Of the longest sequence of a packed batch, of all others T."""
        return int(self.lengths.max()) if self.layout == "packed" else self.time_steps

    @property
    def lengths(self) -> Tensor:
        repeated = (LENGTHS * self.batch_size)[: self.batch_size]
        shortest = 1 if self.layout == "packed" else 0
        return torch.tensor(repeated).clamp(shortest, self.time_steps)

    def ours(self) -> lstm_triton.LSTM:
        module = lstm_triton.LSTM(**self.options(), dropout=self.dropout)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * self.hidden_size**-0.5)
        return module

    def options(self) -> dict[str, Any]:
        names = ("input_size", "hidden_size", "num_layers", "bidirectional", "bias", "proj_size", "dtype")
        return {name: getattr(self, name) for name in names}

    def stock(self) -> nn.LSTM:
        """nn.LSTM with the same weights, step by step where it has no other way."""
        plain = self.layout in ("dense", "packed") and not self.cells and not self.dropout
        module = (nn.LSTM if plain else Loop)(**self.options())
        module.load_state_dict(self.ours().state_dict())
        if self.dropout:
            module.masks = [self.mask(lane) for lane in range((self.num_layers - 1) * self.directions)]
        return module

    def mask(self, lane: int) -> Tensor:
        """(steps, B, H) float64, 0 or 1 / (1 - dropout): what `run` makes the scan multiply a lane's output with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            seed = torch.randint(2**63 - 1, (1,))
        shape = (self.steps, self.batch_size)
        rows = int(self.lengths.sum()) if self.layout == "packed" else self.steps * self.batch_size
        with interpreter.interpret():
            kept = ops.dropout_scale(seed, lane, self.dropout, torch.empty(rows, self.hidden_size)) > 0
        if self.layout == "packed":
            kept, _ = pad_packed_sequence(self.packed(torch.zeros(*shape, 1))._replace(data=kept))
        return kept.view(*shape, -1).double() / (1 - self.dropout)

    def packed(self, padded: Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, self.lengths, enforce_sorted=False)

    def arguments(self) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor] | None, dict[str, Any]]:
        """Input, states, and what else `run` takes."""
        generator = torch.Generator().manual_seed(1)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(self.dtype)

        def states() -> tuple[Tensor, Tensor]:
            sizes = (self.num_layers * self.directions, self.batch_size)
            return random(*sizes, self.proj_size or self.hidden_size), random(*sizes, self.hidden_size)

        input = random(self.time_steps, self.batch_size, self.input_size)
        hx = states() if self.states else None
        extra: dict[str, Any] = {"cells": self.cells}
        if self.layout != "dense":
            is_step = torch.arange(self.time_steps).unsqueeze(1) < self.lengths
            input = torch.where(is_step.unsqueeze(2), input, torch.nan)
        if self.layout == "packed":
            return self.packed(input), hx, extra
        if self.layout != "dense":
            extra["lengths"] = self.lengths
        if self.layout == "resets":
            extra["resets"] = torch.rand(self.time_steps, self.batch_size, generator=generator) < 1 / 3
            extra |= {"reset_state": states()} if self.states else {}
        return input, hx, extra

    @contextmanager
    def kernels(self, seed: int = 0) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(interpreter.interpret(seed))
            stack.enter_context(lstm_triton.backend("triton"))
            for kind, plan in self.plans.items():
                stack.enter_context(planner.forced(plan, kind))
            yield

    def run(self, seed: int = 0) -> dict[str, Tensor]:
        """Results and gradients by name."""
        input, hx, extra = self.arguments()
        with self.kernels(seed):
            return run(self.ours(), input, hx, **extra)

    def infer(self, seed: int = 0) -> dict[str, Tensor]:
        """Results alone, where no gradient is asked for."""
        input, hx, extra = self.arguments()
        module = self.ours()
        call: Any = module.with_cells if extra.pop("cells") else module
        with self.kernels(seed), torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output, (h_n, c_n), *cells = call(input, hx, **extra)
        found = {"output": output.data if isinstance(output, PackedSequence) else output, "h_n": h_n, "c_n": c_n}
        return found | dict(zip(("cells",), cells, strict=False))

    def check(self, seed: int = 0) -> None:
        """As accurate as nn.LSTM, in every result and gradient."""
        print(self)
        input, hx, extra = self.arguments()
        assert_results_as_accurate(self.run(seed), self.stock(), input, hx, **extra)

    def candidates(
        self, kind: Kind, lanes: int, multiprocessors: int = 16, shared_bytes: int = 64 * 1024
    ) -> list[Plan]:
        """Every plan for launches of so many lanes on such a device."""
        found = candidates(
            kind,
            batch_size=self.batch_size,
            input_size=max(self.input_size, self.directions * (self.proj_size or self.hidden_size)),
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            device=Device("small", "interpreter", multiprocessors, shared_bytes),
            allow_tf32=False,
            lanes=lanes,
            chained=lanes > 1 and not self.bidirectional,
        )
        return [interpretable(each) for each in found]

    def launched(self, lanes: int, several_tiles: bool = False, kinds: tuple[Kind, ...] = BOTH) -> "Stack":
        """The same with so many lanes in every launch; `several_tiles`: one program takes all batch tiles of a lane."""
        plans = {}
        for kind in kinds:
            found = self.candidates(kind, lanes)
            if several_tiles:
                found = [replace(each, groups=1) for each in found if each.batch_tiles > 1]
            plans[kind] = next(each for each in found if not each.fuse_input and each.slices > 1)
        return replace(self, plans=plans)


class Loop(LoopLSTM):
    """nn.LSTM step by step, also of packed sequences."""

    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        if not isinstance(input, PackedSequence):
            return super().forward(input, hx, **options)
        padded, lengths = pad_packed_sequence(input)
        output, states = super().forward(padded, hx, lengths=lengths)
        return pack_padded_sequence(output, lengths, enforce_sorted=False), states


@contextmanager
def counted_launches() -> Iterator[list[dict[str, Any]]]:
    """The arguments of every launch of a scan: `plan`, and the kernel's own."""
    calls: list[dict[str, Any]] = []
    launch = ops._launch

    def counted(kernel: Any, plan: Plan, device: torch.device, **arguments: Any) -> None:
        calls.append({"plan": plan, **arguments})
        launch(kernel, plan, device, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_launch", counted)
        yield calls


# --- Chains of layers, and both directions ---


@st.composite
def stacks(draw: st.DrawFn, projections: bool = False, dropouts: bool = False) -> Stack:
    """Any stack with any plans that fit a small device: chained, in groups or not, one batch tile or several."""
    bidirectional = draw(st.booleans())
    num_layers = draw(st.integers(1, 2 if bidirectional else 4))
    # Of fewer numbers, a gradient that cancels has no typical error.
    hidden_size = draw(st.integers(6, 24))
    layout = draw(st.sampled_from((*LAYOUTS, "lengths")))
    stack = Stack(
        num_layers,
        bidirectional,
        dtype=draw(st.sampled_from(DTYPES)),
        layout=layout,
        hidden_size=hidden_size,
        input_size=draw(st.integers(4, 20)),
        time_steps=draw(st.integers(1, 4)),
        batch_size=draw(st.integers(4, 18)),
        proj_size=draw(st.integers(2, hidden_size - 1)) if projections else 0,
        bias=draw(st.booleans()),
        states=draw(st.booleans()),
        cells=layout != "packed" and draw(st.booleans()),
        dropout=draw(st.sampled_from((0.2, 0.5))) if dropouts and num_layers > 1 else 0.0,
    )
    for kind in BOTH:
        lanes = draw(st.integers(1, 2 if bidirectional else 1 if projections else num_layers))
        device = {
            "multiprocessors": lanes * draw(st.integers(1, 6)),
            "shared_bytes": draw(st.sampled_from((32, 64, 200))) * 1024,
        }
        if found := stack.candidates(kind, lanes, **device):
            stack.plans[kind] = draw(st.sampled_from(found))
    return stack


@settings(max_examples=8)
@given(stacks(), st.integers(0, 2**32))
def test_any_stack_with_any_plans(stack: Stack, seed: int) -> None:
    stack.check(seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_in_one_launch(dtype: torch.dtype, layout: str) -> None:
    stack = Stack(3, dtype=dtype, layout=layout, cells=layout == "resets").launched(3)
    with counted_launches() as calls:
        stack.check()
    assert [call["plan"] for call in calls] == [stack.plans["forward"], stack.plans["backward"]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_directions_in_one_launch(dtype: torch.dtype, layout: str) -> None:
    stack = Stack(2, bidirectional=True, dtype=dtype, layout=layout, cells=layout == "resets").launched(2)
    with counted_launches() as calls:
        stack.check()
    assert [call["plan"].lanes for call in calls] == [2, 2, 2, 2]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_several_tiles_a_program(bidirectional: bool) -> None:
    """The tiles take turns within a step, in every lane."""
    stack = Stack(2, bidirectional, torch.float16, "resets", batch_size=9, cells=True).launched(2, several_tiles=True)
    assert all(plan.batch_tiles > plan.groups for plan in stack.plans.values())
    stack.check()


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_chains_of_any_length(lanes: int) -> None:
    """Four layers one by one, two by two, and all in one launch."""
    stack = Stack(4, layout="resets").launched(lanes)
    with counted_launches() as calls:
        stack.check()
    assert [call["plan"].lanes for call in calls] == [lanes] * (8 // lanes)


def test_the_first_layer_is_the_same_in_every_chain() -> None:
    """Bit by bit: it reads its input as it would alone.

    The layers above are not: within a chain, the share of the layer below is added up in float32 together with that of
    the own state; between launches it comes from a matrix product of its own, rounded to the dtype of the buffers.
    """
    stack = Stack(3, dtype=torch.bfloat16, layout="resets")
    chained = stack.launched(3)
    alone = {kind: replace(plan, lanes=1, chained=False) for kind, plan in chained.plans.items()}
    one, other = chained.infer(), replace(stack, plans=alone).infer()
    assert_same((one["h_n"][0], one["c_n"][0]), (other["h_n"][0], other["c_n"][0]))
    assert not torch.equal(one["h_n"][2], other["h_n"][2])


@pytest.mark.parametrize("layout", ["dense", "resets"])
def test_directions_are_the_same_in_one_launch_and_in_two(layout: str) -> None:
    """Bit by bit, in values and gradients: they share nothing."""
    together = Stack(2, bidirectional=True, layout=layout, dropout=0.5).launched(2)
    alone = {kind: replace(plan, lanes=1) for kind, plan in together.plans.items()}
    assert_same(together.run(), replace(together, plans=alone).run())


@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_the_order_of_programs_changes_nothing(bidirectional: bool) -> None:
    several_tiles = not bidirectional
    stack = Stack(2, bidirectional, layout="resets", dropout=0.5, batch_size=9).launched(2, several_tiles)
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
    stack = Stack(2, layout=layout, hidden_size=32).launched(2)  # weights that are read where they are, not in a copy
    stack.check()
    named = ops.Stack.named

    def watched(self: ops.Stack, name: str) -> Any:
        found = named(self, name)
        weights_between_layers.extend(found if name == "weight_ih" else ())
        return found

    transposed = ops._transposed

    def watched_copies(weights: Any, layout: Any) -> Any:  # backward reads copies
        found = transposed(weights, layout)
        if any(weight is each for weight in weights for each in weights_between_layers):
            weights_between_layers.extend(found)
        return found

    monkeypatch.setattr(ops.Stack, "named", watched)
    monkeypatch.setattr(ops, "_transposed", watched_copies)
    for seed in SEEDS:
        with pytest.raises(AssertionError):
            stack.check(seed)


@contextmanager
def checked_addresses() -> Iterator[None]:
    """Every load and store has to lie within a tensor that the launch was given."""
    from triton.runtime import interpreter as triton_interpreter

    launch, spans = ops._launch, numpy.empty((0, 2))
    builder = triton_interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def watched(kernel: Any, plan: Plan, device: torch.device, **arguments: Any) -> None:
        nonlocal spans
        groups = [each if isinstance(each, tuple) else (each,) for each in arguments.values()]
        tensors = [each for group in groups for each in group if isinstance(each, Tensor) and each.numel() > 0]
        extents = [1 + sum((n - 1) * k for n, k in zip(each.shape, each.stride(), strict=True)) for each in tensors]
        spans = numpy.array(
            [(t.data_ptr(), t.data_ptr() + n * t.itemsize) for t, n in zip(tensors, extents, strict=True)]
        )
        launch(kernel, plan, device, **arguments)

    def check(pointers: Any, mask: Any) -> None:
        places = pointers.data[mask.data][:, None]
        assert ((spans[:, 0] <= places) & (places < spans[:, 1])).any(1).all()

    def checked_load(pointers: Any, mask: Any, *others: Any, **keywords: Any) -> Any:
        check(pointers, mask)
        return load(pointers, mask, *others, **keywords)

    def checked_store(pointers: Any, value: Any, mask: Any, *others: Any, **keywords: Any) -> None:
        check(pointers, mask)
        store(pointers, value, mask, *others, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_launch", watched)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_no_access_past_the_tensors(monkeypatch: pytest.MonkeyPatch, bidirectional: bool, layout: str) -> None:
    """In training, and in inference in windows, with a batch that leaves most of its last tile empty."""
    stack = Stack(2, bidirectional, layout=layout, dropout=0.5, batch_size=9).launched(2)
    with interpreter.interpret(), checked_addresses():
        stack.run()
        monkeypatch.setattr(ops, "PREACTIVATION_BYTES", 1)
        stack.infer()


def test_layers_that_wait_for_each_other_run_at_the_same_time() -> None:
    """The driver is asked for it: also where each of them is a single program."""
    found = Stack(2, hidden_size=4).candidates("forward", 2)
    chained = next(plan for plan in found if plan.slices == 1)
    assert ops.launch_options(chained)["launch_cooperative_grid"]
    assert not ops.launch_options(replace(chained, chained=False))["launch_cooperative_grid"]


# --- Dropout ---


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_fraction_that_it_should(probability: float) -> None:
    """Within four standard errors, and what is kept grows by 1 / (1 - probability)."""
    seed, count = torch.tensor([2**62 + 12345]), 100_000
    with interpreter.interpret():
        scale = ops.dropout_scale(seed, 1, probability, torch.empty(count))
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
            ops.dropout_scale(torch.tensor([seed]), lane, 0.5, like) - 1  # -1 or 1
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
@given(stacks(dropouts=True), st.integers(0, 2**32))
def test_any_stack_with_dropout(stack: Stack, seed: int) -> None:
    stack.check(seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("lanes", "bidirectional"), [(1, False), (3, False), (2, True)])
def test_masks_are_the_same_in_every_grouping(lanes: int, bidirectional: bool, layout: str) -> None:
    """Those of ops.dropout_scale, forward and backward, whichever layers or directions share a launch."""
    layers = 2 if bidirectional else 3
    stack = Stack(layers, bidirectional, layout=layout, dropout=0.4, cells=layout == "resets")
    # Backward in other groups than forward: it finds the masks by itself.
    other_lanes = 2 if lanes == 1 else 1
    plans = stack.launched(lanes, kinds=("forward",)).plans | stack.launched(other_lanes, kinds=("backward",)).plans
    replace(stack, plans=plans).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_dropout_in_one_launch(bidirectional: bool, dtype: torch.dtype) -> None:
    Stack(2, bidirectional, dtype, dropout=0.3).launched(2).check()


def test_dropout_follows_the_seed() -> None:
    """The same after torch.manual_seed, another at every call; none in evaluation."""
    stack = Stack(2, dropout=0.5)
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
    stack = Stack(2)
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
    stack = Stack(2, bidirectional, layout="resets", dropout=1.0, cells=True).launched(2)
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
    stack = Stack(2, bidirectional=True, layout=layout, hidden_size=5, batch_size=3, **options)
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


# --- Projections ---


@settings(max_examples=6)
@given(stacks(projections=True), st.integers(0, 2**32))
def test_any_stack_with_projections(stack: Stack, seed: int) -> None:
    stack.check(seed)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "dense"), (torch.float32, "lengths"), (torch.float32, "packed"), (torch.float32, "resets"),
     (torch.float16, "resets"), (torch.bfloat16, "packed")],
)  # fmt: skip
def test_projections(dtype: torch.dtype, layout: str) -> None:
    """Of two layers in both directions; once without biases and states."""
    plain = layout == "lengths"
    Stack(2, True, dtype, layout, proj_size=6, cells=layout == "resets", bias=not plain, states=not plain).check()


def test_projections_where_the_plan_would_fuse_the_input() -> None:
    """The share of h_0 needs input projections that are in memory; without h_0 they stay fused."""
    stack = Stack(1, proj_size=6, hidden_size=11)
    fused = next(plan for plan in stack.candidates("forward", 1) if plan.fuse_input)
    for states in (True, False):
        stack = replace(stack, states=states, plans={"forward": fused})
        with counted_launches() as calls:
            stack.check()
        with stack.kernels():
            scans = lstm_triton.explain(stack.ours(), *stack.arguments()[:2]).scans
        assert [scan.plan for scan in scans] == [call["plan"] for call in calls]
        assert scans[0].plan.fuse_input != states


def test_projected_sequences_without_steps_end_as_they_began() -> None:
    stack = Stack(2, bidirectional=True, layout="lengths", proj_size=6)
    found, (_, hx, _) = stack.run(), stack.arguments()
    assert hx is not None
    empty = stack.lengths == 0
    assert empty.any()
    assert torch.equal(found["h_n"][:, empty], hx[0][:, empty])
    assert torch.equal(found["c_n"][:, empty], hx[1][:, empty])


def test_projected_layers_with_dropout_between_them() -> None:
    """p = 1 as nn.LSTM has it; p = 0.5 follows the seed."""
    stack = Stack(2, proj_size=6, dropout=1.0)
    stock = nn.LSTM(**stack.options(), dropout=1.0)
    stock.load_state_dict(stack.ours().state_dict())
    input, hx, extra = stack.arguments()
    assert_results_as_accurate(stack.run(), stock, input, hx, **extra)
    half = replace(stack, dropout=0.5)
    assert_same(half.run(), half.run())
    assert not torch.equal(half.run()["output"], replace(stack, dropout=0.0).run()["output"])


@pytest.mark.parametrize(
    "stack",
    [
        Stack(3),
        Stack(3).launched(3),
        Stack(4).launched(2),
        Stack(2, bidirectional=True),
        Stack(2, bidirectional=True).launched(1),
        Stack(2, bidirectional=True, proj_size=6),
        Stack(3, proj_size=6, dropout=0.5),
        Stack(3, dropout=0.5),
    ],
    ids=["layers", "chained", "chains", "bidirectional", "apart", "projected", "projected, dropout", "dropout"],
)
def test_explain_tells_the_launches(stack: Stack) -> None:
    with stack.kernels():
        explanation = lstm_triton.explain(stack.ours(), *stack.arguments()[:2])
    with counted_launches() as calls:
        stack.run()
    assert {layer.path for layer in explanation.layers} == {"triton"}
    forward, backward = ([scan for scan in explanation.scans if scan.kind == kind] for kind in BOTH)
    assert [scan.plan for scan in [*forward, *reversed(backward)]] == [call["plan"] for call in calls]
    for scans in (forward, backward):
        assert [lane for scan in scans for lane in scan.lanes] == list(range(len(explanation.layers)))
    assert explanation.launches == len(calls)


# --- Windows of time, and what inference keeps ---


def project_rows_alike(rows: Tensor, weight_ih: Tensor, projected: Tensor) -> None:
    """ops.project, but a row's last digits do not depend on how many rows there are, as those of torch.mm may."""
    projected.copy_(rows.double() @ weight_ih.double().t())


@pytest.mark.parametrize(
    ("layout", "cells"), [("dense", False), ("packed", False), ("resets", False), ("resets", True)]
)
@pytest.mark.parametrize(
    ("bidirectional", "lanes", "several_tiles"), [(False, 1, False), (False, 2, True), (True, 2, False)]
)
def test_windows_change_nothing(
    monkeypatch: pytest.MonkeyPatch, bidirectional: bool, lanes: int, several_tiles: bool, layout: str, cells: bool
) -> None:
    """Bit by bit: steps in windows whose input projections fit, the states handed on from one to the next."""
    monkeypatch.setattr(ops, "project", project_rows_alike)
    stack = Stack(2, bidirectional, layout=layout, time_steps=5, batch_size=9 if several_tiles else 5, dropout=0.5)
    stack = replace(stack.launched(lanes, several_tiles), cells=cells and layout != "packed")
    with counted_launches() as calls:
        expected = stack.infer()
    assert len(calls) == 2 // (1 if bidirectional else lanes)
    steps_at_a_time = 2
    row_bytes = 4 * stack.hidden_size * 4 * stack.batch_size
    for directions in {1, stack.directions}:  # whose projections are paid for: a launch of both needs twice as much
        monkeypatch.setattr(ops, "PREACTIVATION_BYTES", steps_at_a_time * row_bytes * directions)
        with counted_launches() as windows:
            actual = stack.infer()
        assert_same(actual, expected)
        assert max(call["gates_ptr"].nbytes for call in windows) <= ops.PREACTIVATION_BYTES
        window_steps = steps_at_a_time * directions // stack.directions
        assert len(windows) == len(calls) * -(-stack.steps // window_steps) * stack.directions


@pytest.mark.parametrize("layout", ["dense", "resets"])
def test_windows_with_projections(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """The shares of initial states go to the window, or the windows, where sequences start from them."""
    stack = Stack(2, bidirectional=True, layout=layout, time_steps=5, proj_size=6).launched(2)
    monkeypatch.setattr(ops, "project", project_rows_alike)
    expected = stack.infer()
    monkeypatch.setattr(ops, "PREACTIVATION_BYTES", 1)
    assert_same(stack.infer(), expected)


def test_training_is_not_cut_into_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps all gates anyway."""
    monkeypatch.setattr(ops, "PREACTIVATION_BYTES", 1)
    with counted_launches() as calls:
        Stack(2).launched(2).run()
    assert len(calls) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("bidirectional", "lanes"), [(False, 1), (False, 3), (True, 2)], ids=["layer by layer", "chained", "directions"]
)
def test_inference_keeps_nothing(bidirectional: bool, lanes: int, layout: str) -> None:
    """Neither gates nor cells, nor the h of layers that are done; the results are those of training, bit by bit."""
    stack = Stack(3, bidirectional, torch.bfloat16, layout, dropout=0.5).launched(lanes)
    found: list[tuple[Tensor, ...]] = []
    call = transforms.call

    def watched(operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
        assert operator is ops.scan_forward
        found.append(call(operator, *arguments))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch, counted_launches() as calls:
        patch.setattr(transforms, "call", watched)
        results = stack.infer()
    for call in calls:
        assert not call["KEEP_GATES"]
        assert not call["KEEP_CELLS"]
        assert call["cell_ptr"].shape[1] == stack.batch_size * (1 if layout == "dense" else 2)
    (hidden, passed, cell, gates, _, _), *others = found
    assert not others
    assert hidden.shape[0] == hidden.untyped_storage().nbytes() // hidden[0].nbytes == stack.directions
    assert passed.numel() == cell.numel() == gates.numel() == 0
    trained = stack.run()
    assert_same(results, {name: trained[name] for name in results})


def test_every_cell_in_inference_without_the_gates() -> None:
    stack = Stack(2, layout="resets", cells=True).launched(2)
    with counted_launches() as calls:
        results = stack.infer()
    assert [(call["KEEP_CELLS"], call["KEEP_GATES"]) for call in calls] == [(True, False)]
    trained = stack.run()
    assert_same(results, {name: trained[name] for name in results})


@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_streaming_step_by_step(bidirectional: bool) -> None:
    """T = 1 calls that hand the states on: in one direction, what the whole gives, but for the order of sums."""
    stack = Stack(2, bidirectional, hidden_size=9).launched(2)
    input, hx, _ = stack.arguments()
    module = stack.ours()
    assert isinstance(input, Tensor)
    with stack.kernels(), torch.inference_mode():
        outputs, state = [], hx
        for step in input.split(1):
            output, state = module(step, state)
            outputs.append(output)
        whole, states = module(input, hx)
    if bidirectional:
        assert torch.cat(outputs).shape == whole.shape
    else:
        torch.testing.assert_close((torch.cat(outputs), state), (whole, states))

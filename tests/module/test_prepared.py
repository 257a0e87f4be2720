"""One module changes a thousand times between its calls. Each call answers as a module that was made for it alone.

What a call decides may be remembered and taken over by later calls. If such a memory forgets to ask for one thing that
the decision depends on, a walk through the mutations below finds the call that is answered wrongly. All questions are
recorded first and judged later, so that judging does not disturb what the module remembers.
"""

import copy
import pickle
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize

import lstm_triton
from tests.support import ways
from tests.support.comparing import twins
from tests.support.walk import Mutation, Settings, Undo, Walk, assert_close
from tests.support.ways import LAYOUTS, MISTAKES, plain

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

EXAMPLES = settings.default.max_examples  # type: ignore[attr-defined]
SIZES = ((3, 2), (1, 1), (2, 3))  # T, B
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)

# --- Mutations. What one returns undoes it after some calls ---

MUTATIONS: dict[str, Mutation] = {}
MISTAKEN: dict[str, Mutation] = {}  # most calls refuse them


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__] = function
    return function


# Weights


@mutation
def state_dict_loaded(walk: Walk) -> None:
    state = {name: walk.values(weight) for name, weight in walk.module.state_dict().items()}
    walk.module.load_state_dict(state, assign=walk.choice((False, True)))


@mutation
def dtype_changed(walk: Walk) -> None:
    walk.module.to(walk.choice(DTYPES))


@mutation
def dtype_of_data_changed(walk: Walk) -> None:
    """The parameters are the same objects."""
    dtype = walk.choice(DTYPES)
    for parameter in walk.module.parameters():
        parameter.data = parameter.data.to(dtype)


@mutation
def data_exchanged(walk: Walk) -> None:
    parameter = walk.parameter()
    layouts = ("contiguous", "transposed", "misaligned", "every second")
    parameter.data = LAYOUTS[walk.choice(layouts)](walk.values(parameter))


@mutation
def changed_in_place(walk: Walk) -> None:
    with torch.no_grad():
        walk.parameter().mul_(-0.5).add_(0.1)


@mutation
def parameter_replaced(walk: Walk) -> None:
    if name := walk.plain_weight():
        values = walk.values(getattr(walk.module, name))
        if walk.choice((False, True)):
            delattr(walk.module, name)
        setattr(walk.module, name, nn.Parameter(values))


@mutation
def frozen_or_not(walk: Walk) -> None:
    parameter = walk.parameter()
    parameter.requires_grad_(not parameter.requires_grad)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(walk: Walk, register: Callable[[nn.Module, str], object]) -> Undo | None:
    name = walk.plain_weight()
    if name is None:
        return None
    register(walk.module, name)

    def undo() -> None:
        parametrize.remove_parametrizations(walk.module, name)
        weight = getattr(walk.module, name)  # a plain tensor, if it had no gradient
        setattr(walk.module, name, nn.Parameter(weight.detach(), weight.requires_grad))

    return undo


MUTATIONS["weight_norm"] = lambda walk: parametrized(walk, parametrizations.weight_norm)
MUTATIONS["weight doubled"] = lambda walk: parametrized(
    walk, lambda module, name: parametrize.register_parametrization(module, name, Doubled())
)


def with_other_data(walk: Walk, change: Callable[[Tensor], Tensor]) -> Undo | None:
    name = walk.plain_weight()
    if name is None:
        return None
    parameter = getattr(walk.module, name)
    data = parameter.data
    parameter.data = change(data)

    def undo() -> None:
        parameter.data = data

    return undo


OTHER_DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda data: data[:-1],
    "empty": lambda data: data[:0],
    "of more dimensions": lambda data: data[None],
    **{f"in {dtype}": lambda data, dtype=dtype: data.to(dtype) for dtype in DTYPES},  # type: ignore[misc]
}
for name, change in OTHER_DATA.items():
    MISTAKEN[f"a weight {name}"] = partial(with_other_data, change=change)


# Attributes


@mutation
def train_or_eval(walk: Walk) -> None:
    walk.module.train(not walk.module.training)


def contradicted(walk: Walk, name: str, value: Any) -> Undo:
    back = {**walk.architecture, "dropout": 0.0}[name]
    setattr(walk.module, name, value)
    return lambda: setattr(walk.module, name, back)


MUTATIONS["layers lowered"] = partial(contradicted, name="num_layers", value=1)
CONTRADICTIONS: dict[str, tuple[Any, ...]] = {
    "hidden_size": (5, 4.0),
    "input_size": (1,),
    "proj_size": (0, 1, 99, -1),
    "num_layers": (1.0, True, 0, 9, "1"),
    "bias": (True, False, 1),
    "bidirectional": (True, False, None),
    "batch_first": (None, 1),
    "dropout": (1.5, "0", None, float("nan")),
}
for name, values in CONTRADICTIONS.items():
    for value in values:
        MISTAKEN[f"{name} = {value!r}"] = partial(contradicted, name=name, value=value)


# Arguments and settings


ARGUMENTS = {
    "sizes": SIZES,
    "kind": ("batched", "batched", "unbatched", "packed", "packed unsorted"),
    "layout": LAYOUTS,
    "states": (None, tuple, list),
    "sequences": ((), (), ("lengths",), ("resets",), ("lengths", "resets", "reset_state")),
    "requires_grad": (False, True),
}
OPTIONS = {"dropout": (0.0, 0, 0.5, 1.0, 1, True), "memory": ("low", "full"), "batch_first": (False, True)}
SETTINGS = {
    "autocast": (False, False, True),
    "grad": ("enable_grad", "enable_grad", "no_grad", "inference_mode"),
    "backend": ("auto", "aten"),
    "precision": ("ieee", "tf32"),
}


def with_other(part: str, name: str, values: Iterable[Any]) -> Mutation:
    def mutate(walk: Walk) -> None:
        value, owner = walk.choice(values), getattr(walk, part)
        if part == "module":
            setattr(owner, name, value)
        else:
            setattr(walk, part, replace(owner, **{name: value}))

    return mutate


for part, table in (("module", OPTIONS), ("arguments", ARGUMENTS), ("settings", SETTINGS)):
    MUTATIONS |= {f"other {name}": with_other(part, name, values) for name, values in table.items()}
MUTATIONS["other sizes again"] = MUTATIONS["other sizes"]  # twice as often


def wrong_arguments(walk: Walk, **changes: Any) -> Undo:
    kept = walk.arguments

    def undo() -> None:
        walk.arguments = kept

    walk.arguments = replace(kept, kind="batched", **changes)
    return undo


MISTAKEN["empty batch"] = partial(wrong_arguments, sizes=(2, 0))
for name in MISTAKES:
    MISTAKEN[name] = partial(wrong_arguments, mistake=name)


@mutation
def other_way(walk: Walk) -> Undo:
    def undo() -> None:
        walk.way = plain

    walk.way = walk.choice(ways.WAYS)
    return undo


def kernels_asked_for(walk: Walk) -> Undo:
    kept = walk.settings

    def undo() -> None:
        walk.settings = kept

    walk.settings = replace(kept, backend="triton")
    return undo


MISTAKEN["kernels asked for"] = kernels_asked_for


# The module as a whole, and what else uses it


@mutation
def copied(walk: Walk) -> None:
    if hasattr(walk.module, "parametrizations"):  # PyTorch cannot pickle it, nor always copy it
        return
    pickled = not walk.module._load_state_dict_pre_hooks and walk.choice((False, True))  # weight_norm leaves such hooks
    walk.module = pickle.loads(pickle.dumps(walk.module)) if pickled else copy.deepcopy(walk.module)


def negated(module: nn.Module, arguments: Any, results: Any) -> Any:
    return results[0], (-results[1][0], results[1][1])


@mutation
def hooked(walk: Walk) -> Undo | None:
    if walk.hooks:
        return None

    def undo() -> None:
        walk.module._forward_hooks.clear()
        walk.hooks.clear()

    walk.module.register_forward_hook(negated)
    walk.hooks.append(negated)
    return undo


def own_input(walk: Walk, *sizes: int) -> Tensor:
    return torch.zeros(*sizes, walk.architecture["input_size"], dtype=walk.module.weight_ih_l0.dtype)


@mutation
def fake_tensors(walk: Walk) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        walk.module(mode.from_tensor(own_input(walk, *walk.arguments.sizes)))


@mutation
def traced_by_jit(walk: Walk) -> None:
    torch.jit.trace(walk.module, own_input(walk, *walk.arguments.sizes), check_trace=False)


@mutation
def explained_and_traced(walk: Walk) -> None:
    lstm_triton.explain(walk.module, own_input(walk, *walk.arguments.sizes))
    lstm_triton.trace(walk.module, own_input(walk, *walk.arguments.sizes))


@mutation
def another_module(walk: Walk) -> None:
    """It takes the same sizes, and goes away: its address may be another's soon."""
    other = lstm_triton.LSTM(**walk.architecture, dtype=walk.choice(DTYPES), memory=walk.choice(("low", "full")))
    with walk.settings.entered():
        other.eval()(own_input(walk, *walk.arguments.sizes).to(other.weight_ih_l0.dtype))


# --- Walks ---


def walked(mutations: int, interpreted: bool, **architecture: Any) -> Walk:
    seed = 0 if settings.default.derandomize else random.randrange(2**32)  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    walk = Walk(seed, interpreted, MUTATIONS, MISTAKEN, **architecture)
    walk.go(mutations)
    return walk


TWO_LAYERS = {"input_size": 3, "hidden_size": 4, "num_layers": 2}
PROJECTED = {"input_size": 2, "hidden_size": 5, "bidirectional": True, "proj_size": 2, "bias": False}


def assert_most_computed(walk: Walk) -> None:
    """Exceptions hide what a call remembers."""
    computed = [question for question in walk.questions if not isinstance(question.actual, str)]
    assert len(computed) > 0.6 * len(walk.questions)


ARCHITECTURES = pytest.mark.parametrize("architecture", [TWO_LAYERS, PROJECTED], ids=["two layers", "projected"])


@ARCHITECTURES
def test_without_kernels(architecture: dict[str, Any]) -> None:
    assert_most_computed(walked(100 * EXAMPLES, False, **architecture))


@pytest.mark.interpreted
@ARCHITECTURES
def test_interpreted_kernels(architecture: dict[str, Any]) -> None:
    assert_most_computed(walked(8 * EXAMPLES, True, **architecture))


@pytest.mark.parametrize("interpreted", [False, pytest.param(True, marks=pytest.mark.interpreted)], ids=["", "kernels"])
def test_threads_share_a_module(interpreted: bool) -> None:
    """Eight threads call it with sizes and copies of other dtypes in turn, while another copy changes its dtype."""
    rounds = 2 if interpreted else 25
    ours, stock = twins(3, 4, num_layers=2)
    modules = {dtype: copy.deepcopy(ours).to(dtype) for dtype in (torch.float64, torch.bfloat16)}
    modules[torch.float32] = ours
    inputs = [torch.randn(*sizes, 3) for sizes in SIZES]
    cases = [(dtype, input.to(dtype)) for dtype in modules for input in inputs]
    # Rounded as the weights are, the reference has nothing else to round.
    expected = [copy.deepcopy(stock).to(dtype).double()(input.double())[0] for dtype, input in cases]
    failures: list[str] = []
    begin, done = threading.Barrier(9, timeout=60), threading.Event()

    def called(number: int) -> None:
        for turn in range(rounds * len(cases)):
            at = (turn * (number % 2 + 1) + number) % len(cases)  # neighbours go through the cases at another pace
            dtype, input = cases[at]
            with torch.no_grad() if turn % 3 else torch.enable_grad():
                output = modules[dtype](input)[0]
            if output.dtype != dtype or output.requires_grad == bool(turn % 3):
                failures.append(f"thread {number}: {output.dtype} of {dtype}")
            assert_close({"output": output.detach()}, {"output": expected[at]}, torch.finfo(dtype).eps)

    def changed() -> None:
        own = copy.deepcopy(ours)
        while not done.is_set():
            for dtype, input in cases:
                own.to(dtype)(input)

    def work(function: Callable[..., None], *arguments: int) -> None:
        begin.wait()
        try:
            with Settings(interpreted).entered():
                function(*arguments)
        except BaseException as error:
            failures.append(f"{arguments}: {type(error).__name__}: {error}")
            raise

    threads = [threading.Thread(target=work, args=(called, number)) for number in range(8)]
    other = threading.Thread(target=work, args=(changed,))
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    assert not failures

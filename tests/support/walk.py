"""One module that changes from call to call, and what a module that was made for a single call answers instead.

A `Question` is a call with all that its answer depends on. It shares no tensor with the module that was asked.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton import interpreter, prepared_call
from lstm_triton.scan import prepared as scan_prepared
from tests.support import ways
from tests.support.comparing import LoopLSTM, assert_same
from tests.support.ways import GIVING_WEIGHTS, Arguments, Made, Tensors, direction, plain

Answer = dict[str, Tensor | None] | str  # results and gradients by name, or the exception
Undo = Callable[[], object]
Mutation = Callable[["Walk"], Undo | None]  # what it returns undoes it after some calls
ATTRIBUTES = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
FORGETTERS: list[Callable[[], object]] = [  # functions that clear what calls leave to later calls
    prepared_call.forget,
    scan_prepared.forget,
]
SHOWN = 12  # calls in the message of a failure


def same_layout(tensor: Tensor) -> Tensor:
    """A copy with the same strides and the same offset in its memory."""
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = torch.zeros(tensor.storage_offset() + max(length, 0), dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor.detach())


def shown(record: Any) -> str:
    """The fields that are not as they are by default."""
    values = {each.name: getattr(record, each.name) for each in fields(record) if each.name != "seed"}
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if value != getattr(type(record), name))


# --- Questions ---


@dataclass(frozen=True)
class Settings:
    """What holds around a call."""

    interpreted: bool = False
    backend: str = "auto"
    autocast: bool = False
    grad: str = "enable_grad"
    precision: str = "ieee"

    @contextmanager
    def entered(self) -> Iterator[None]:
        before = torch._C._get_fp32_precision_getter("cuda", "rnn")
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if self.interpreted:
                stack.enter_context(interpreter.interpret())
            stack.enter_context(lstm_triton.backend(self.backend))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=self.autocast))
            stack.enter_context(getattr(torch, self.grad)())
            stack.callback(torch._C._set_fp32_precision_setter, "cuda", "rnn", before)
            torch._C._set_fp32_precision_setter("cuda", "rnn", self.precision)
            yield


@dataclass
class Question:
    """A call, with all that its answer depends on."""

    architecture: dict[str, Any]  # of which the module was made
    attributes: dict[str, Any]  # which it has now, and which may contradict that
    weights: Tensors
    computed: dict[str, nn.Module]  # parametrizations of weights
    hooks: list[Callable[..., Any]]
    training: bool
    memory: str
    arguments: Arguments
    settings: Settings
    way: Callable[[Any, Made, Tensors], dict[str, Any]]
    said: str = ""  # what the module was asked, and what happened to it before
    actual: Answer = field(default_factory=dict)

    def layers(self) -> int:
        """How many layers are in use."""
        made, now = self.architecture["num_layers"], self.attributes["num_layers"]
        return min(made, now) if type(now) is int and now > 0 else made

    def dtype(self) -> torch.dtype:
        return self.weights["weight_ih_l0"].dtype

    def make(self) -> Made:
        options = {"num_layers": self.layers(), "batch_first": self.attributes["batch_first"]}
        return self.arguments.make({**self.architecture, **options}, self.dtype())

    def answer(self, module: Any, weights: Tensors, way: Callable[..., dict[str, Any]]) -> Answer:
        with self.settings.entered():
            torch.manual_seed(self.arguments.seed)
            try:
                found = way(module, self.make(), weights)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return {name: None if each is None else each.detach().clone() for name, each in found.items()}

    def fresh(self, cls: Any, convert: Callable[[Tensor], Tensor] = same_layout) -> Any:
        """A module of this call's options and weights, which nobody has called."""
        ours = cls is lstm_triton.LSTM
        # nn.LSTM in float64 does not take more weights than it has layers.
        module = cls(**self.architecture if ours else {**self.architecture, "num_layers": self.layers()}, device="meta")
        for name in module._flat_weights_names:
            weight = self.weights[name]
            setattr(module, name, nn.Parameter(convert(weight), weight.requires_grad))
        for name, value in self.attributes.items():
            setattr(module, name, value)
        if ours:
            module.memory = self.memory
        for hook in self.hooks:
            module.register_forward_hook(hook)
        return module.train(self.training)

    def expected(self) -> Answer:
        """What a fresh module answers."""
        for forget in FORGETTERS:
            forget()
        module = self.fresh(lstm_triton.LSTM)
        way = plain if self.way in GIVING_WEIGHTS else self.way
        answer = self.answer(module, {name: getattr(module, name) for name in self.weights}, way)
        if isinstance(answer, str):
            return answer
        for name, parametrization in self.computed.items():
            if f"gradient of {name}" in answer:
                grad, originals = answer.pop(f"gradient of {name}"), dict(parametrization.named_parameters())
                wanted = {key: original for key, original in originals.items() if original.requires_grad}
                unused = [None] * len(wanted)
                found = unused if grad is None else torch.autograd.grad(parametrization(), list(wanted.values()), grad)
                answer |= {
                    f"gradient of parametrizations.{name}.{key}": g for key, g in zip(wanted, found, strict=True)
                }
        return answer

    def yardstick(self) -> Tensors | None:
        """Results and gradients of nn.LSTM in float64, as far as it knows such calls, or None."""
        arguments, attributes = self.arguments, self.attributes
        # By their texts, since nn.LSTM does not take 4.0 for 4.
        contradicted = [name for name, value in self.architecture.items() if repr(attributes[name]) != repr(value)]
        if not {"num_layers", "batch_first"}.issuperset(contradicted):
            return None
        dropout = attributes["dropout"] if self.training and self.layers() > 1 else 0
        if dropout not in (0, 1) or 0 in arguments.sizes:
            return None
        if arguments.sequences and (arguments.kind == "unbatched" or dropout):
            return None
        in_steps = arguments.sequences and arguments.kind == "batched"
        module = self.fresh(LoopLSTM if in_steps else nn.LSTM, lambda weight: weight.detach().double().contiguous())
        made = self.make().mapped(lambda leaf: leaf.detach().as_subclass(Tensor).double().requires_grad_())
        found = plain(module.requires_grad_(), made, dict(module.named_parameters()))
        if isinstance(made.input, Tensor):
            found["derivative"] = (found["gradient of input"] * direction(made.input)).sum()
        return {name: each.detach() for name, each in found.items() if each is not None}

    def check(self) -> None:
        """The answer is that of a fresh module, bit by bit, and that of nn.LSTM, but for rounding."""
        expected = self.expected()
        if isinstance(expected, str) or isinstance(self.actual, str):
            found, wanted = (each if isinstance(each, str) else "computed" for each in (self.actual, expected))
            assert self.actual == expected, f"{found}; of a fresh module: {wanted}"
            return
        dtypes = {weight.dtype for weight in self.weights.values()}
        dtypes |= {torch.bfloat16} if self.settings.autocast else set()
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        eps = max(eps, 2**-10) if self.settings.precision == "tf32" else eps
        assert self.actual.keys() == expected.keys()
        if self.computed:  # these weights, and what autocast keeps of them, may be rounded otherwise at each call
            assert_close(self.actual, expected, eps)
        else:
            assert_same(self.actual, expected)
        if yardstick := self.yardstick():
            assert_close(self.actual, yardstick, eps)


def assert_close(actual: dict[str, Any], reference: dict[str, Any], eps: float) -> None:
    """Half of the digits are right: who takes over what was decided for another call is wrong by more."""
    for name in actual.keys() & reference.keys():
        one, other = actual[name], reference[name]
        if one is None or other is None:
            assert one is other, name
            continue
        assert one.shape == other.shape, name
        difference = (one.double() - other).norm() / max(other.norm(), 1)
        assert difference <= eps**0.5, f"{name}: {difference:.1e} from its reference"


# --- The walk ---


class Walk:
    """The module, the call that comes next, and the questions that were asked."""

    def __init__(
        self,
        seed: int,
        interpreted: bool,
        table: dict[str, Mutation],
        mistakes: dict[str, Mutation],
        **architecture: Any,
    ) -> None:
        """`mistakes`: mutations that most calls refuse. They come one at a time, for a single call."""
        self.table, self.mistakes = table, mistakes
        self.seed, self.random = seed, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.module: Any = lstm_triton.LSTM(**architecture)
        self.architecture = {name: getattr(self.module, name) for name in ATTRIBUTES if name != "dropout"}
        self.hooks: list[Callable[..., Any]] = []
        self.arguments, self.settings, self.way = Arguments(), Settings(interpreted), plain
        self.mutations, self.said = 0, []  # type: int, list[str]
        self.passing: list[tuple[int, str, Undo]] = []  # with the number of calls until a mutation is undone
        self.mistake: Undo | None = None
        self.questions: list[Question] = []

    def choice(self, choices: Any) -> Any:
        return self.random.choice(list(choices))

    def parameter(self) -> nn.Parameter:
        return self.choice(self.module.parameters())

    def plain_weight(self) -> str | None:
        """The name of a weight that is a parameter."""
        names = [name for name in self.module._flat_weights_names if name in self.module._parameters]
        return self.choice(names) if names else None

    def values(self, like: Tensor) -> Tensor:
        return (torch.rand(like.shape, generator=self.generator) - 0.5).to(like.dtype)

    def mutate(self) -> None:
        is_mistake = self.random.random() < 0.2
        name, mutation = self.choice((self.mistakes if is_mistake else self.table).items())
        undo = mutation(self)
        self.mutations += 1
        self.said.append(name)
        if is_mistake:
            self.mistake = undo
        elif undo is not None:
            self.passing.append((self.random.randint(1, 4), name, undo))

    def step(self) -> None:
        """None, one or two mutations, then a call. Nothing comes between a mistake and its call."""
        for _ in range(self.choice((0, 1, 1, 2))):
            if self.mistake is None:
                self.mutate()
        self.arguments = replace(self.arguments, seed=len(self.questions))
        self.questions.append(self.ask())
        if self.mistake is not None:
            self.mistake()
            self.mistake = None
        left, self.passing = [(calls - 1, name, undo) for calls, name, undo in self.passing], []
        for calls, name, undo in left:
            if calls:
                self.passing.append((calls, name, undo))
            else:
                undo()
                self.said.append(f"{name} undone")

    def ask(self) -> Question:
        module, computed = self.module, getattr(self.module, "parametrizations", {})
        way = self.way
        packed, inference = self.arguments.kind.startswith("packed"), self.settings.grad == "inference_mode"
        if way in ways.TRANSFORMS and (packed or inference or self.arguments.mistake):
            way = plain
        if (computed and way not in (plain, ways.profiled)) or (self.hooks and way is ways.with_cells):
            way = plain
        weights = {name: getattr(module, name) for name in module._flat_weights_names}
        leaves = dict(module.named_parameters())
        leaves |= {name: weight for name, weight in weights.items() if name not in computed}
        if way in ways.GIVING_WEIGHTS:
            leaves = weights = {n: (1.5 * w).detach().requires_grad_(w.requires_grad) for n, w in weights.items()}
        question = Question(
            self.architecture,
            {name: getattr(module, name) for name in ATTRIBUTES},
            {name: same_layout(weight).requires_grad_(weight.requires_grad) for name, weight in weights.items()},
            {name: copy.deepcopy(computed[name]) for name in computed},
            list(self.hooks),
            module.training,
            module.memory,
            self.arguments,
            self.settings,
            way,
        )
        question.actual = question.answer(module, leaves, way)
        answer = question.actual if isinstance(question.actual, str) else "computed"
        asked = f"{way.__name__}({shown(self.arguments)}) by LSTM({module.extra_repr()}) in {question.dtype()}"
        question.said = (
            f"{', '.join(self.said) or 'unchanged'}; {shown(self.settings) or 'no settings'}; {asked}: {answer}"
        )
        self.said = []
        return question

    def go(self, mutations: int) -> None:
        """Walk until the module has changed so often, then judge every answer."""
        error: Exception | None = None
        try:
            while self.mutations < mutations:
                self.step()
        except Exception as failed:  # perhaps a mutation, after a wrong answer that tells more
            error = failed
        at = 0
        try:
            for at, question in enumerate(self.questions):  # noqa: B007
                question.check()
            if error is not None:
                raise error
        except Exception as failed:
            history = "\n".join(f"  {i}: {self.questions[i].said}" for i in range(max(0, at - SHOWN), at + 1))
            after = f"\n  after it: {', '.join(self.said)}" if failed is error else ""
            pytest.fail(f"call {at} of the walk with seed {self.seed}: {failed}\n\nCalls until then:\n{history}{after}")

"""Run unchanged models in the kernels: replace the functions that `nn.LSTM` and `nn.LSTMCell` call."""

from collections import Counter
from collections.abc import Callable
from threading import local
from typing import Any

import torch

from . import prepared_call
from .cell import call_of_vf_lstm_cell, compute_cell
from .checks import call_of_vf_lstm
from .functional import compute
from .refusal import LaunchRefused
from .routing import choose, fall_back
from .settings import Block, ForkLock, Setting

_lock = ForkLock()
_active: "Setting[Acceleration | None]" = Setting("acceleration", None)


class Acceleration(Block):
    """The context that `accelerate` returns. It counts the calls inside the `with` block; `print` it.

    Attributes:
        taken_over: how many calls went to the kernels.
        taken: the same, by the function of `torch._VF`: "lstm" or "lstm_cell".
        left: how many calls went to PyTorch's own function, by reason.
    """

    def __init__(self, *, all_threads: bool = False) -> None:
        super().__init__("acceleration", self, all_threads=all_threads)
        self.taken: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def __enter__(self) -> "Acceleration":
        for takeover in TAKEOVERS:
            takeover.begin()
        return super().__enter__()

    def _end(self) -> bool:
        ended = super()._end()
        if ended:
            for takeover in TAKEOVERS:
                takeover.end()
        return ended

    @property
    def taken_over(self) -> int:
        return sum(self.taken.values())

    def count(self, function: str, path: str, reason: str) -> None:
        """Count a call.

        Args:
            function: of `torch._VF`, "lstm" or "lstm_cell".
            path, reason: which way the call went, and why.
        """
        with _lock:  # threads may share an acceleration
            if path == "triton":
                self.taken[function] += 1
            else:
                self.left[reason] += 1

    def __str__(self) -> str:
        names = [takeover.name for takeover in TAKEOVERS if takeover.name == "lstm" or self.taken[takeover.name]]
        lines = [f"calls of torch._VF.{name} taken over by the kernels: {self.taken[name]}" for name in names]
        lines += [f"left to PyTorch: {count} ({reason})" for reason, count in self.left.items()]
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(*, all_threads: bool = False) -> Acceleration:
    """Inside `with lstm_triton.accelerate():`, `torch.nn.LSTM` and `LSTMCell` run in the Triton kernels where they can.

    It is for models of other people: nothing in a model changes, and subclasses of `nn.LSTM` and `nn.LSTMCell` are
    served, too. It replaces `torch._VF.lstm` and `torch._VF.lstm_cell`, the functions that these modules call, and
    leaves the rest to the modules. PyTorch's own functions still compute the calls that the kernels do not take.
    `lstm_triton.backend` chooses here as well.

    It holds in the thread or asyncio task that enters the block, as `lstm_triton.backend` does. `backward` may run
    inside or after the `with` block. With activation checkpointing `backward` must run inside, since checkpointing
    computes the forward pass again. Layers compiled by TorchScript are not accelerated, nor is an `nn.LSTMCell` that
    `torch.compile` compiles, or an `nn.LSTM` that it compiles with `torch._dynamo.config.allow_rnn = True`.
    `torch.jit.script` cannot compile these modules inside the block. If another library replaces `torch._VF.lstm` or
    `torch._VF.lstm_cell` inside the block, its replacement stays when the block ends.

    Args:
        all_threads: whether the block holds in every thread that has no block of its own, too. `nn.DataParallel` needs
            that.

    Returns:
        The context. In `with accelerate() as acceleration:`, `acceleration` counts the calls. Of nested contexts, only
        the inner one counts.

    >>> from torch import nn
    >>> with accelerate() as acceleration:
    ...     output, _ = nn.LSTM(3, 4)(torch.randn(5, 2, 3))
    >>> print(acceleration)
    calls of torch._VF.lstm taken over by the kernels: 0
    left to PyTorch: 1 (the kernels run on NVIDIA GPUs, not on 'cpu' tensors)
    """
    return Acceleration(all_threads=all_threads)


Function = Callable[..., Any]
TakeOver = Callable[[Acceleration, Function, tuple[Any, ...], dict[str, Any]], Any]


class Takeover:
    """Replaces a function of `torch._VF` while any acceleration is open, in the whole process.

    The replacement asks the settings of its thread. Without an acceleration there, it calls the original.

    Args:
        name: the function's name.
        take_over: computes a call inside an acceleration, from (acceleration, original, arguments, arguments by name).
        traced: whether `torch.compile` looks into the module that calls the function, without being told to. Then it
            compiles the original, since a compiled program outlives the block.
    """

    def __init__(self, name: str, take_over: TakeOver, *, traced: bool) -> None:
        self.name, self.take_over, self.traced = name, take_over, traced
        self.users = 0
        self.before = [getattr(torch._VF, name)]  # PyTorch's own, and what the last replacement replaced
        self.calling = local()  # `original`: whether this thread is inside an original of ours

    def begin(self) -> None:
        with _lock:
            function = getattr(torch._VF, self.name)
            # Inside a block another library may have put its own function there, which calls ours. Or it may have put
            # back what was there before ours.
            if not self._is_ours(function) and (self.users == 0 or function in self.before):
                self.before[1:] = [function]
                setattr(torch._VF, self.name, self._replacement(function))
            self.users += 1

    def end(self) -> None:
        with _lock:
            self.users -= 1
            function = getattr(torch._VF, self.name)
            if self.users == 0 and self._is_ours(function):
                setattr(torch._VF, self.name, function.original)

    def _is_ours(self, function: Any) -> bool:
        return getattr(function, "takeover", None) is self

    def _replacement(self, original: Function) -> Any:
        calling, traced = self.calling, self.traced

        def call_original(*arguments: Any, **by_name: Any) -> Any:
            # The original may be another library's function that calls an earlier replacement of ours.
            outer, calling.original = getattr(calling, "original", False), True
            try:
                return original(*arguments, **by_name)
            finally:
                calling.original = outer

        def replacement(*arguments: Any, **by_name: Any) -> Any:
            if torch.compiler.is_dynamo_compiling() and (traced or torch._dynamo.config.allow_rnn):
                return original(*arguments, **by_name)
            acceleration = None if getattr(calling, "original", False) else _active.now
            if acceleration is None:
                return original(*arguments, **by_name)
            return self.take_over(acceleration, call_original, arguments, by_name)

        replacement.takeover = self  # type: ignore[attr-defined]
        replacement.original = original  # type: ignore[attr-defined]
        return replacement


def _lstm(acceleration: Acceleration, original: Function, arguments: tuple[Any, ...], by_name: dict[str, Any]) -> Any:
    key = None if by_name else prepared_call.key_of_vf_lstm(arguments)
    prepared = prepared_call.known.get(key)
    if prepared is not None:
        acceleration.count("lstm", *prepared.choice)
        if prepared.choice.path == "aten":
            return original(*arguments)
        if prepared.run is not None:
            try:
                output, states = prepared.run(*arguments[:3])
                return output, *states
            except LaunchRefused as error:
                refused = prepared.call(*arguments[:3])
                fall_back(error, refused, None)
                return compute(refused, "aten")[:3]
        return compute(prepared.call(*arguments[:3]), "triton")[:3]
    call = None if by_name else call_of_vf_lstm(arguments)
    if call is None:
        acceleration.count("lstm", "aten", "the arguments are not those of nn.LSTM")
        return original(*arguments, **by_name)
    choice = choose(None, call)
    acceleration.count("lstm", *choice)
    results = original(*arguments) if choice.path == "aten" else compute(call, choice.path)[:3]
    if key is not None:
        prepared_call.remember(key, prepared_call.prepare(call, choice, arguments[0]))
    return results


def _lstm_cell(
    acceleration: Acceleration, original: Function, arguments: tuple[Any, ...], by_name: dict[str, Any]
) -> Any:
    call = None if by_name else call_of_vf_lstm_cell(arguments)
    path, reason = ("aten", "the arguments are not those of nn.LSTMCell") if call is None else choose(None, call)
    acceleration.count("lstm_cell", path, reason)
    if call is None or path == "aten":
        return original(*arguments, **by_name)
    return compute_cell(call, path)


TAKEOVERS = (Takeover("lstm", _lstm, traced=False), Takeover("lstm_cell", _lstm_cell, traced=True))

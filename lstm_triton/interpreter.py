"""The kernels on the CPU: Triton's interpreter, with all programs of a launch taking turns.

Triton's own interpreter runs one program to its end before the next one starts, so programs that wait for each other
would hang. Here each program is a greenlet. It yields before every load for which it may have to wait, and after every
store. A random schedule chooses the program that goes on. The same seed gives the same schedule.

Needs TRITON_INTERPRET=1 in the environment before Triton is first imported, Triton 3.6 or later, and the package
greenlet.
"""

import functools
import inspect
import math
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any

import torch

from . import target, triton_package
from .settings import ForkLock
from .target import Gpus

OUR_KERNELS = f"{__package__}.kernels."
_installing = ForkLock()  # a function that is cached runs twice if two threads call it at once


class Interpreted(Gpus):
    """GPUs, and also the CPU, on which Triton's interpreter runs the kernels.

    Attributes:
        seed: of the schedule in which the programs of a launch take turns.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu" or super().takes(device)

    def may_refuse(self, device: torch.device) -> bool:
        return device.type != "cpu"


SET_BEFORE = "the kernels can be interpreted only with TRITON_INTERPRET=1 set before Triton is imported"


def active() -> bool:
    """Whether CPU tensors take the Triton path now."""
    return isinstance(target.current(), Interpreted)


class Deadlock(RuntimeError):
    """All programs wait, and none of them has stored anything for a long time."""


def interpret(seed: int = 0, *, all_threads: bool = False) -> AbstractContextManager[object]:
    """Route CPU tensors through the Triton kernels inside the `with` block.

    It holds in the thread or asyncio task that enters the block, as `lstm_triton.backend` does. Launches of several
    threads run one after another. Backward runs in the kernels wherever it is called, also after the block and in
    another thread, there by schedule number 0.

    Args:
        seed: the seed of the random schedule in which a launch's programs take turns.
        all_threads: whether the block holds in every thread that has no block of its own, too.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not set before Triton was imported, Triton is too old, or greenlet is
            missing.

    Inside, a kernel whose programs wait for values that never come raises Deadlock.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(SET_BEFORE)
    with _installing:
        _install()
    return target.running_on(Interpreted(seed), all_threads=all_threads)


@functools.cache
def _install() -> None:
    """Teach Triton's interpreter to take turns, and to compute in bfloat16, which it stores as raw integers."""
    if not triton_package.installed():
        raise RuntimeError(
            "interpreting the kernels needs Triton, which is not installed: pip install 'lstm-triton[interpreter]'"
        )
    try:
        import greenlet
    except ImportError:
        raise RuntimeError(
            "interpreting the kernels needs the package greenlet: pip install 'lstm-triton[demo]'"
        ) from None
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    from . import shortcuts

    if not hasattr(interpreter.InterpretedFunction, "run"):
        raise RuntimeError("interpreting the kernels needs Triton 3.6 or later")
    if not isinstance(tl.cdiv, interpreter.InterpretedFunction):  # a function of Triton's own library
        raise RuntimeError(f"{SET_BEFORE}: Triton was imported before it was set. Set it in the shell")
    shortcuts.install()
    builder = interpreter.interpreter_builder
    schedule = _Schedule(builder, greenlet.greenlet, greenlet.getcurrent)
    launching = ForkLock()  # the interpreter keeps the launch that it runs in the whole process's memory

    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(*arguments: Any, **keywords: Any) -> Any:
        is_volatile = keywords.get("is_volatile", arguments[-1])  # the last parameter, in all versions
        if is_volatile is True:
            schedule.take_turns(stored=False)
        return plain_load(*arguments, **keywords)

    def create_masked_store(*arguments: Any, **keywords: Any) -> None:
        plain_store(*arguments, **keywords)
        schedule.take_turns(stored=True)

    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store

    plain_dot = builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)

    def create_dot(left: Any, right: Any, *others: Any, **keywords: Any) -> Any:
        return plain_dot(widened(left), widened(right), *others, **keywords)

    builder.create_dot = create_dot

    plain_truncation = builder.create_fp_trunc

    def create_fp_trunc(handle: Any, dtype: Any) -> Any:
        if handle.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return plain_truncation(handle, dtype)
        bits = handle.data.view(numpy.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # ties to even; Triton's interpreter cuts digits off
        nearest = numpy.where(numpy.isnan(handle.data), 0x7FFF, nearest)
        return interpreter.TensorHandle(nearest.astype(numpy.uint16), tl.bfloat16)

    builder.create_fp_trunc = create_fp_trunc

    plain_patch = interpreter._patch_lang
    prepared: set[str] = set()

    def patch_lang(function: Any) -> Any:
        # Triton patches triton.language again for every function that a program calls. Once in a launch is enough, for
        # each of the two modules under which functions know the language.
        if schedule.scheduler is None:
            prepared.clear()
        elif function.__module__ in prepared:
            return None
        languages = {each.__name__ for each in function.__globals__.values() if each is tl or each is tl.core}
        is_prepared = bool(languages) and languages <= prepared
        prepared.update(languages, {function.__module__})
        return None if is_prepared else plain_patch(function)

    interpreter._patch_lang = patch_lang

    plain_run = interpreter.InterpretedFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        # Programs of this library wait for each other, so they always take turns: backward may run after the block.
        if warmup or not (active() or self.fn.__module__.startswith(OUR_KERNELS)):
            return plain_run(self, *arguments, grid=grid, warmup=warmup, **keywords)
        if schedule.thread == get_ident():
            raise RuntimeError("an interpreted kernel cannot launch another kernel, nor can what a debugger runs in it")
        with launching:
            executor = interpreter.GridExecutor(self.rewrite(), self.arg_names, grid, self.pre_run_hooks)
            return schedule.launch(executor, arguments, keywords)

    interpreter.InterpretedFunction.run = run


class _Program:
    """Replaces a kernel in Triton's executor, which calls it once for each program. `run` gets these calls."""

    def __init__(self, kernel: Callable[..., None], run: Callable[[Callable[[], None]], None]) -> None:
        self.kernel = kernel
        self.run = run
        # The attributes that the executor reads from a function.
        self.__name__ = kernel.__name__
        self.__globals__ = kernel.__globals__
        self.__signature__ = inspect.signature(kernel)

    def __call__(self, **arguments: Any) -> None:
        self.run(lambda: self.kernel(**arguments))


class _Schedule:
    """The programs of one launch, each in a greenlet of its own."""

    def __init__(self, builder: Any, greenlet: Callable[..., Any], current_greenlet: Callable[[], Any]) -> None:
        self.builder = builder
        self.greenlet = greenlet
        self.current_greenlet = current_greenlet
        self.scheduler: Any = None  # the greenlet that chooses; None outside a launch
        self.thread: int | None = None  # the thread that launches
        self.switches_since_store = 0

    def take_turns(self, stored: bool) -> None:
        """A program calls this method where other programs may go on."""
        if self.scheduler is not None:
            self.switches_since_store = 0 if stored else self.switches_since_store + 1
            self.scheduler.switch()

    def launch(self, executor: Any, arguments: Any, keywords: Any) -> None:
        programs: list[tuple[tuple[int, int, int], Any]] = []

        def add(program: Callable[[], None]) -> None:
            programs.append((self.builder.grid_idx, self.greenlet(program)))
            if len(programs) == math.prod(self.builder.grid_dim):
                self.run_all(programs)

        executor.fn = _Program(executor.fn, add)
        self.thread = get_ident()
        try:
            executor(*arguments, **keywords)
        finally:
            self.thread = None

    def run_all(self, programs: list[tuple[tuple[int, int, int], Any]]) -> None:
        where = target.current()
        chooser = random.Random(where.seed if isinstance(where, Interpreted) else 0)
        patience = 1000 * len(programs)
        self.scheduler, self.switches_since_store = self.current_greenlet(), 0
        try:
            while programs:
                chosen = chooser.randrange(len(programs))
                grid_index, program = programs[chosen]
                self.builder.set_grid_idx(*grid_index)
                program.switch()
                if program.dead:
                    programs.pop(chosen)
                if self.switches_since_store > patience:
                    raise Deadlock(f"{len(programs)} programs wait for values that none of them writes")
        finally:
            self.scheduler = None

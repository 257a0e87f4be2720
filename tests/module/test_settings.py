"""What `with` blocks set ends with them: in threads, tasks and generators, in any order of endings."""

import asyncio
import contextvars
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import lstm_triton
from lstm_triton import acceleration, interpreter, preference, target
from lstm_triton.settings import ForkLock

Block = AbstractContextManager[Any]


class BlockCase(NamedTuple):
    """A kind of block: how to make one of a number, and which number holds here; 0: none does."""

    make: Callable[..., Block]
    holds: Callable[[], int]


BACKENDS = ("auto", "triton", "aten")


def numbered(number: int, **options: Any) -> Block:
    accelerated = lstm_triton.accelerate(**options)
    accelerated.number = number  # type: ignore[attr-defined]
    return accelerated


CASES = [
    pytest.param(
        BlockCase(
            lambda number, **options: lstm_triton.backend(BACKENDS[number], **options),
            lambda: BACKENDS.index(preference.current_backend()),
        ),
        id="backend",
    ),
    pytest.param(BlockCase(numbered, lambda: getattr(acceleration._active.now, "number", 0)), id="accelerate"),
    pytest.param(
        BlockCase(
            lambda number, **options: interpreter.interpret(number, **options),
            lambda: getattr(target.current(), "seed", 0),
        ),
        marks=pytest.mark.interpreted,
        id="interpret",
    ),
]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[BlockCase]:
    found: BlockCase = request.param
    assert found.holds() == 0
    plain = torch._VF.lstm
    yield found
    assert found.holds() == 0
    assert torch._VF.lstm is plain


def end(block: Block) -> None:
    block.__exit__(None, None, None)


def in_a_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(timeout=60)
    assert results, "the thread raised, or hangs"
    return results[0]


def test_any_order_of_endings(case: BlockCase) -> None:
    first, second = case.make(1), case.make(2)
    first.__enter__()
    second.__enter__()
    assert case.holds() == 2
    end(first)
    assert case.holds() == 2
    end(second)


def test_ended_twice(case: BlockCase) -> None:
    with case.make(1):
        inner = case.make(2)
        inner.__enter__()
        end(inner)
        end(inner)
        assert case.holds() == 1
    end(case.make(1))  # never entered


def test_entered_again(case: BlockCase) -> None:
    block = case.make(1)
    for _ in range(2):
        with block, case.make(2), block:
            assert case.holds() == 1
        assert case.holds() == 0


def test_as_a_decorator(case: BlockCase) -> None:
    holds = case.make(1)(case.holds)  # type: ignore[operator]
    assert (holds(), case.holds(), holds()) == (1, 0, 1)


def test_an_exception_ends_it(case: BlockCase) -> None:
    with pytest.raises(ZeroDivisionError), case.make(1):
        raise ZeroDivisionError


def test_threads_that_overlap(case: BlockCase) -> None:
    """Each thread has its own, and the main thread none; the first to enter is the first to end."""
    numbers, entered, ended = (1, 2), threading.Barrier(3, timeout=60), [threading.Event() for _ in range(3)]
    seen: dict[int, list[int]] = {}

    def work(number: int) -> None:
        seen[number] = [case.holds()]
        with case.make(number):
            entered.wait()
            seen[number].append(case.holds())
            ended[number - 1].wait(60)
            seen[number].append(case.holds())
        seen[number].append(case.holds())
        ended[number].set()

    threads = [threading.Thread(target=work, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    entered.wait()
    assert case.holds() == 0
    ended[0].set()
    for thread in threads:
        thread.join(60)
    assert seen == {number: [0, number, number, 0] for number in numbers}


def test_tasks_that_overlap(case: BlockCase) -> None:
    async def work(number: int, steps: int) -> list[int]:
        seen = [case.holds()]
        with case.make(number):
            for _ in range(steps):
                await asyncio.sleep(0)
                seen.append(case.holds())
        return [*seen, case.holds()]

    async def main() -> None:
        plain = asyncio.create_task(asyncio.sleep(0, result=case.holds()))
        found = await asyncio.gather(work(1, 2), work(2, 4), work(1, 1))
        assert found == [[0, 1, 1, 0], [0, 2, 2, 2, 2, 0], [0, 1, 0]]
        assert (await plain, case.holds()) == (0, 0)

    asyncio.run(main())


def test_generators_that_are_suspended(case: BlockCase) -> None:
    def generate(number: int) -> Iterator[int]:
        with case.make(number):
            yield case.holds()
            yield case.holds()

    first, second = generate(1), generate(2)
    assert (next(first), next(second)) == (1, 2)
    first.close()
    assert case.holds() == 2  # the block of the second is open
    assert list(second) == [2]
    assert case.holds() == 0
    left = generate(1)
    assert in_a_thread(lambda: next(left)) == 1
    assert case.holds() == 0
    left.close()  # in another thread than it was entered in


def test_taken_along_until_the_end(case: BlockCase) -> None:
    async def look(wait: asyncio.Event | None = None) -> int:
        if wait is not None:
            await wait.wait()
        return case.holds()

    async def main() -> None:
        event = asyncio.Event()
        with case.make(1):
            assert await asyncio.create_task(look()) == 1
            assert await asyncio.to_thread(case.holds) == 1
            late = asyncio.create_task(look(event))
            context = contextvars.copy_context()
            assert in_a_thread(lambda: context.run(case.holds)) == 1
            assert in_a_thread(case.holds) == 0
        event.set()
        assert (await late, context.run(case.holds)) == (0, 0)

    asyncio.run(main())


def test_all_threads(case: BlockCase) -> None:
    def own() -> int:
        with case.make(2):
            return case.holds()

    with case.make(1, all_threads=True):
        assert (case.holds(), in_a_thread(case.holds), in_a_thread(own)) == (1, 1, 2)
        with case.make(2):
            assert (case.holds(), in_a_thread(case.holds)) == (2, 1)
    assert in_a_thread(case.holds) == 0


class Nested(torch.autograd.Function):
    """Its backward calls backward, so often that autograd goes on in another thread, as it does for a GPU."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, depth: int, look: Callable[[], None]) -> Tensor:
        ctx.depth, ctx.look = depth, look
        return input.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.depth == 0:
            ctx.look()
        else:
            with torch.enable_grad():
                leaf = torch.zeros((), requires_grad=True)
                Nested.apply(leaf, ctx.depth - 1, ctx.look).backward()
        return grad, None, None


def backward_in_another_thread(look: Callable[[], Any]) -> Any:
    found: list[Any] = []
    output = Nested.apply(
        torch.zeros((), requires_grad=True), 65, lambda: found.append((threading.get_ident(), look()))
    )
    output.backward()
    [(thread, result)] = found
    assert thread != threading.get_ident()
    return result


def test_autograds_threads_see_the_caller_of_backward(case: BlockCase) -> None:
    def inside() -> tuple[int, int, int]:
        before = case.holds()
        with case.make(2):
            within = case.holds()
        return before, within, case.holds()

    assert backward_in_another_thread(inside) == (0, 2, 0)
    with case.make(1):
        assert backward_in_another_thread(inside) == (1, 2, 1)
        assert in_a_thread(lambda: backward_in_another_thread(inside)) == (0, 2, 0)
    assert backward_in_another_thread(inside) == (0, 2, 0)


def test_autograds_threads_see_the_task_that_calls_backward(case: BlockCase) -> None:
    async def suspended(event: asyncio.Event) -> None:
        with case.make(1):
            await event.wait()

    async def main() -> None:
        event = asyncio.Event()
        other = asyncio.create_task(suspended(event))
        await asyncio.sleep(0)
        assert case.holds() == 0  # as the forward pass asks
        assert backward_in_another_thread(case.holds) == 0
        event.set()
        await other

    asyncio.run(main())


@pytest.mark.parametrize("name", ["cuda", "", "AUTO", None, 1])
def test_an_unknown_backend_is_refused_at_once(name: Any) -> None:
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'aten', got "):
        lstm_triton.backend(name)


# --- torch.compile ---


def test_compiled_code_follows_the_blocks() -> None:
    """Of every thread, and without compiling again for settings that it has met."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    layer, input = lstm_triton.LSTM(3, 4), torch.zeros(5, 2, 3)
    compiled = torch.compile(
        lambda input: (input + (1 if preference.current_backend() == "auto" else 2), layer(input)), backend=counter
    )

    def path() -> int:
        return int(compiled(input)[0][0, 0, 0].item())

    with lstm_triton.backend("aten", all_threads=True):
        assert path() == 2
    assert path() == 1
    with lstm_triton.backend("aten"):
        assert (path(), in_a_thread(path)) == (2, 1)
    assert counter.frame_count == 2
    layer.compile(backend="eager")
    with lstm_triton.backend("triton"), pytest.raises(Exception, match="not on 'cpu' tensors"):
        layer(input)


def test_a_block_in_compiled_code() -> None:
    layer, input = lstm_triton.LSTM(3, 4), torch.zeros(5, 2, 3)

    @torch.compile(backend="eager", fullgraph=True)
    def call(input: Tensor) -> Tensor:
        with lstm_triton.backend("triton"), lstm_triton.backend("aten"):
            output: Tensor = layer(input)[0]
        return output

    with lstm_triton.backend("triton"):
        call(input)
    assert preference.current_backend() == "auto"


# --- fork ---


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("by_other", [True, False])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_a_lock_is_held(by_other: bool) -> None:
    """The thread that holds it is not in the child, which must not wait for it."""
    layer, input, release = torch.nn.LSTM(3, 4), torch.zeros(5, 2, 3), threading.Event()
    with ExitStack() as stack:
        held = threading.Event()

        def hold() -> None:
            with acceleration._lock:
                held.set()
                release.wait(60)

        if by_other:
            thread = threading.Thread(target=hold)
            thread.start()
            stack.callback(thread.join)
            stack.callback(release.set)
            held.wait(60)
        else:
            stack.enter_context(acceleration._lock)
        child = os.fork()
        if child == 0:
            try:
                with lstm_triton.accelerate() as accelerated, torch.no_grad():
                    layer(input)
                os._exit(0 if sum(accelerated.left.values()) == 1 else 2)
            finally:
                os._exit(3)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0


def test_a_lock_excludes_others() -> None:
    lock, entered = ForkLock(), threading.Event()

    def enter() -> None:
        with lock:
            entered.set()

    with lock:
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(60)
    thread.join(60)

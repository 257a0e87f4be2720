"""The cooperative interpreter: programs take turns, schedules repeat, deadlocks are found."""

import itertools
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import lstm_triton
from lstm_triton import interpreter
from tests.support.comparing import twins

pytestmark = pytest.mark.interpreted


def relay(length: int, seed: int) -> torch.Tensor:
    """Program n waits for its left neighbour's value and stores one more: only taking turns gets anywhere."""
    import triton
    import triton.language as tl

    @triton.jit
    def pass_on(values_ptr):  # type: ignore[no-untyped-def]
        me = tl.num_programs(0) - 1 - tl.program_id(0)
        value = tl.load(values_ptr + me, volatile=True)
        while value == -1:
            value = tl.load(values_ptr + me, volatile=True)
        tl.store(values_ptr + me + 1, value + 1)

    values = torch.full((length + 1,), -1, dtype=torch.int32)
    values[0] = 0
    with interpreter.interpret(seed):
        pass_on[(length,)](values)
    return values


@pytest.mark.parametrize("seed", range(3))
def test_programs_wait_for_each_other(seed: int) -> None:
    assert relay(6, seed).tolist() == list(range(7))


def test_deadlock_is_reported() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def wait(values_ptr):  # type: ignore[no-untyped-def]
        value = tl.load(values_ptr, volatile=True)
        while value == 0:
            value = tl.load(values_ptr, volatile=True)

    with interpreter.interpret(), pytest.raises(Exception, match="3 programs wait for values that none of them writes"):
        wait[(3,)](torch.zeros(1, dtype=torch.int32))


def order(seed: int) -> list[int]:
    """Who stored when: each program appends its number to a list, element by element."""
    import triton
    import triton.language as tl

    @triton.jit
    def sign(log_ptr, count_ptr):  # type: ignore[no-untyped-def]
        for _ in range(2):
            place = tl.load(count_ptr)
            tl.store(log_ptr + place, tl.program_id(0))
            tl.store(count_ptr, tl.load(count_ptr) + 1)

    log, count = torch.full((64,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with interpreter.interpret(seed):
        sign[(4,)](log, count)
    return log.tolist()


def test_a_seed_is_a_schedule() -> None:
    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(4)}) > 1


def test_bfloat16_rounds_to_nearest() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def round_off(values_ptr, result_ptr):  # type: ignore[no-untyped-def]
        offsets = tl.arange(0, 64)
        tl.store(result_ptr + offsets, tl.load(values_ptr + offsets).to(tl.bfloat16))

    values = torch.cat([torch.randn(61), torch.tensor([float("nan"), float("inf"), 1 + 2**-8])])
    result = torch.empty(64, dtype=torch.bfloat16)
    with interpreter.interpret():
        round_off[(1,)](values, result)
    torch.testing.assert_close(result, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


OPERATIONS: dict[str, tuple[Any, ...]] = {
    "add": (False,), "sub": (False,), "truediv": (), "floordiv": (), "and_": (), "less_than": (),
    "broadcast_impl_value": (),
}  # fmt: skip


def operands() -> list[Any]:
    """Numbers, and tensors of all kinds of elements and of shapes that fit each other or do not."""
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    found: list[Any] = [0, -1, 2**40, 0.0, -0.0, 2.5, False]
    kinds = (tl.int1, tl.int32, tl.uint32, tl.bfloat16, tl.float32, tl.pointer_type(tl.float32))
    for dtype, shape in itertools.product(kinds, ((), (4, 1), (1, 2), (4, 2))):
        values = numpy.arange(1, 1 + math.prod(shape)).astype(triton_interpreter._get_np_dtype(dtype))
        handle = triton_interpreter.TensorHandle(values.reshape(shape or 1), dtype)
        found.append(tl.tensor(handle, tl.block_type(dtype, list(shape)) if shape else dtype))
    return found


def outcome(semantic: Any, name: str, left: Any, right: Any) -> list[Any]:
    """Types, shapes and bits of an operation's results, or its error."""
    try:
        results = getattr(semantic, name)(left, right, *OPERATIONS[name])
    except Exception as error:
        return [type(error), str(error)]
    found = []
    for each in results if isinstance(results, tuple) else (results,):
        data = each.handle.data
        found += [each.type, each.handle.dtype, data.shape, data.dtype, data.tobytes()]
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # divisions by 0, and numbers that are too large
@pytest.mark.parametrize("name", OPERATIONS)
def test_shortcuts_lead_to_what_triton_gives(name: str) -> None:
    """Results and errors, at the first time and where types are known already."""
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    from lstm_triton.kernels import gates

    with interpreter.interpret():
        ours = triton_interpreter.interpreter_semantic
    triton_own = tl.semantic.TritonSemantic(triton_interpreter.interpreter_builder)
    assert type(ours) is not type(triton_own)
    language = triton_interpreter._patch_lang(gates.tanh.fn)  # as it is while a kernel runs
    try:
        for left, right in itertools.product(operands(), operands()):
            expected = outcome(triton_own, name, left, right)
            for _ in range(2):
                assert outcome(ours, name, left, right) == expected, (left, right)
    finally:
        language.restore()


# --- Threads ---


def in_threads(count: int, function: Callable[[int], object]) -> None:
    errors: list[BaseException] = []

    def call(number: int) -> None:
        try:
            function(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def call_a_layer() -> None:
    with interpreter.interpret():  # a kernel does not see the block around its launch
        lstm_triton.LSTM(3, 4)(torch.randn(2, 2, 3))


def test_a_launch_inside_a_kernel_is_refused() -> None:
    """It would wait for the launch that it belongs to."""
    import triton
    import triton.language as tl

    @triton.jit
    def nested(values_ptr):  # type: ignore[no-untyped-def]
        call_a_layer()
        tl.store(values_ptr, 1.0)

    with interpreter.interpret(), pytest.raises(Exception, match="cannot launch another kernel"):
        nested[(2,)](torch.zeros(1))
    call_a_layer()


def test_several_threads_at_once() -> None:
    """Each in a block of its own, forward and backward."""
    ours, stock = twins(3, 20)
    input = torch.randn(2, 2, 3)
    expected = torch.autograd.grad(stock(input)[0].sum(), list(stock.parameters()))

    def train(seed: int) -> None:
        with interpreter.interpret(seed):
            output, _ = ours(input)
            actual = torch.autograd.grad(output.sum(), list(ours.parameters()))
        torch.testing.assert_close(actual, expected)

    in_threads(3, train)


@pytest.mark.parametrize("where", ["after the block", "in another thread", "in another thread, inside"])
def test_backward_elsewhere(where: str) -> None:
    """Its programs take turns there, too: one after another they would wait for ever."""
    ours, stock = twins(3, 20)
    input = torch.randn(2, 2, 3)
    expected = torch.autograd.grad(stock(input)[0].sum(), list(stock.parameters()))
    found = []

    def differentiate(_: int = 0) -> None:
        found.append(torch.autograd.grad(output.sum(), list(ours.parameters())))

    with interpreter.interpret(1):
        output, _ = ours(input)
        if where == "in another thread, inside":
            in_threads(1, differentiate)
    if where == "in another thread":
        in_threads(1, differentiate)
    if where == "after the block":
        differentiate()
    torch.testing.assert_close(found[0], expected)


def test_off_by_default_and_nested() -> None:
    assert not interpreter.active()
    with interpreter.interpret():
        with interpreter.interpret(1):
            assert interpreter.active()
        assert interpreter.active()
    assert not interpreter.active()


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("", "TRITON_INTERPRET=1 set before Triton is imported"),
        ("import os, triton; os.environ['TRITON_INTERPRET'] = '1'", "Triton was imported before it was set"),
    ],
    ids=["not set", "set too late"],
)
def test_needs_the_environment_variable(before: str, message: str) -> None:
    program = f"{before}\nimport lstm_triton.interpreter as i\nwith i.interpret(): print('entered')"
    environment = {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stdout == ""

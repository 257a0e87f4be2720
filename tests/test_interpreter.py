"""The cooperative interpreter: programs take turns, schedules repeat, deadlocks are found."""

import os
import subprocess
import sys

import pytest
import torch

from lstm_triton import interpreter

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


def test_off_by_default_and_nested() -> None:
    assert not interpreter.active()
    with interpreter.interpret():
        with interpreter.interpret(1):
            assert interpreter.active()
        assert interpreter.active()
    assert not interpreter.active()


def test_needs_the_environment_variable() -> None:
    program = "import lstm_triton.interpreter as i\nwith i.interpret(): pass"
    environment = {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1" in done.stderr

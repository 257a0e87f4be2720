"""The compiled kernels, emulated (tests/emulator): what Triton makes of them, with all threads of several programs.

Tests marked `emulated` compile, which a process that interprets kernels cannot do: there, one test runs them all in a
process of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lstm_triton import interpreter
from lstm_triton.reference import lstm_layer
from lstm_triton.scan import buffers, launch, planner
from lstm_triton.scan.plan import Kind, Plan, ScanShape
from lstm_triton.target import Device, Gpus, KernelLaunch, running_on
from tests.conftest import INTERPRETED
from tests.emulator import Deadlock, Fault, Race, driver, emulated
from tests.support.cells import cell_arguments, check_cell
from tests.support.comparing import error, floor_of, nudged, to_nearest_tf32
from tests.support.lanes import DTYPES, LaneCase, scan_layer, streamed
from tests.support.processes import ROOT
from tests.support.stacks import StackCase

ARCHS = ("sm_80", "sm_90")


@pytest.mark.skipif(not INTERPRETED, reason="the emulated tests run in this process")
def test_the_emulated_ones() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "emulated", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout


# --- Matrix products, by every instruction that there is for them ---


@pytest.mark.emulated
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrix_products(dtype: torch.dtype, arch: str) -> None:
    """Every layout in shared memory that operands of these sizes have, swizzles among them."""
    import triton
    import triton.language as tl

    @triton.jit
    def multiply(
        left_ptr, right_ptr, product_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr
    ):  # type: ignore[no-untyped-def]
        rows, columns, ks = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
        left = tl.load(left_ptr + rows * K + ks[None, :])
        right = tl.load(right_ptr + (ks[:, None] * N + columns if ROWS else ks[:, None] + columns * K))
        tl.store(product_ptr + rows * N + columns, tl.dot(left, right))

    generator = torch.Generator().manual_seed(0)
    for rows, columns, depth in ((64, 16, 64), (64, 32, 32)):
        # Whole numbers: products and sums are exact.
        left, right = (
            torch.randint(-8, 9, size, generator=generator).to(dtype) for size in ((rows, depth), (depth, columns))
        )
        for by_columns in (False, True):
            product, given = torch.empty(rows, columns), right.t().contiguous() if by_columns else right
            with emulated(int(arch[3:])):
                multiply[(1,)](left, given, product, rows, columns, depth, not by_columns)
            assert torch.equal(product, left.float() @ right.float())


# --- The scans ---


@contextmanager
def compiled_for(
    arch: str,
    multiprocessors: int = 6,
    tf32: bool = False,
    change: Callable[[str], str] = lambda text: text,
) -> Iterator[list[str]]:
    """What would be interpreted inside the `with` block is planned and compiled for a GPU, and emulated: its PTX."""
    device = Device("emulated", arch, multiprocessors, 160 * 1024)
    launched: list[str] = []
    emulate = driver.launch

    class Emulated(Gpus):
        def takes(self, device: torch.device) -> bool:
            return device.type == "cpu"

        def describe(self, _: torch.device) -> Device:
            return device

        def run(self, launch: KernelLaunch) -> None:
            options = {name: value for name, value in launch.options.items() if name != "launch_cooperative_grid"}
            launch.kernel[launch.grid](*launch.values, **options)

    @contextmanager
    def emulating(seed: int = 0) -> Iterator[None]:
        with emulated(device.capability, seed=seed):
            yield

    def counted(text: str, *arguments: Any) -> None:
        launched.append(text)
        emulate(change(text), *arguments)

    with pytest.MonkeyPatch.context() as patch, running_on(Emulated()):
        patch.setattr(interpreter, "interpret", emulating)
        patch.setattr(launch, "allows_tf32", lambda: tf32)
        patch.setattr(driver, "launch", counted)
        yield launched


def plans_of(layer: LaneCase, **wanted: int) -> dict[Kind, Plan]:
    """Of each scan the best plan with these fields, on the device that `compiled_for` has put in place."""
    found: dict[Kind, Plan] = {}
    kinds: tuple[Kind, Kind] = ("forward", "backward")
    for kind in kinds:
        sizes = (layer.batch_size, layer.input_size, layer.hidden_size)
        device = Device.of(torch.device("cpu"))
        candidates = planner.candidates(ScanShape(kind, *sizes, layer.dtype, device, launch.allows_tf32()))
        found[kind] = next(
            plan for plan in candidates if all(getattr(plan, name) == value for name, value in wanted.items())
        )
    return found


@pytest.mark.emulated
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_scans(dtype: torch.dtype, arch: str) -> None:
    """Slices that wait for each other, and more tiles than one."""
    layer = LaneCase(2, 9, 10, 32, dtype)
    with compiled_for(arch, multiprocessors=4):
        layer = replace(layer, **plans_of(layer, block_batch=8, block_hidden=16, slices=2, batch_tiles=2))
        layer.check(seed=0)


@pytest.mark.emulated
def test_the_order_of_warps_changes_nothing() -> None:
    layer = LaneCase(3, 9, 10, 32, torch.float16)
    with compiled_for("sm_80", multiprocessors=4):
        layer = replace(layer, **plans_of(layer, block_batch=8, block_hidden=16, slices=2, batch_tiles=2))
        one, *others = (layer.run(scan_layer, seed=seed) for seed in range(3))
    for other in others:
        for name, tensor in other.items():
            assert torch.equal(tensor, one[name]), name


@pytest.mark.emulated
@pytest.mark.parametrize("arch", ARCHS)
def test_tf32(arch: str) -> None:
    """It has as many digits as float16: so much is allowed."""
    layer = LaneCase(2, 9, 10, 32)
    with compiled_for(arch, tf32=True) as launched:
        actual = layer.run(scan_layer)
    assert all(".tf32" in text for text in launched)
    reference = layer.run(lstm_layer, Tensor.double)
    sensitive = layer.run(lstm_layer, lambda tensor: nudged(tensor.double(), torch.float16))
    for name, tensor in actual.items():
        found, allowed = error(tensor, reference[name]), floor_of(sensitive[name], reference[name], torch.float16)
        print(f"{name}: {found:.2e} of {allowed:.2e}")
        assert found <= allowed, name


@pytest.mark.emulated
@pytest.mark.parametrize("arch", ARCHS)
def test_tf32_is_rounded_to_nearest(arch: str) -> None:
    """A step is that of rounded weights and states; cut off, they would be smaller every time."""
    layer = LaneCase(1, 9, 10, 32)
    with compiled_for(arch, tf32=True):
        plans = {kind: replace(plan, fuse_input=False) for kind, plan in plans_of(layer, fuse_input=0).items()}
        layer = replace(layer, **plans)
        actual = layer.run(scan_layer)
    assert plans["forward"].tf32_rounding == {"sm_80": "rna", "sm_90": "rn"}[arch]
    input, h_0, c_0, weight_ih, weight_hh, *biases = (tensor for tensor in layer.tensors() if tensor is not None)
    states = to_nearest_tf32(h_0), c_0, weight_ih, to_nearest_tf32(weight_hh)
    exact = [tensor.double() for tensor in (input, *states, *biases)]
    output, h_n, c_n = lstm_layer(*exact)
    for name, reference in (("output", output), ("h_n", h_n), ("c_n", c_n)):
        assert error(actual[name], reference) < 2e-6, name


@pytest.mark.emulated
def test_a_wait_in_vain_ends() -> None:
    """With a trap, after so many polls that on a GPU they take seconds; here after the first."""
    layer = LaneCase(2, 9, 10, 32, torch.float16)

    def impatient(text: str) -> str:
        changed = text.replace("setp.gt.u32 late, polls, 16777216;", "setp.gt.u32 late, polls, 0;")
        assert changed != text
        return changed

    with compiled_for("sm_90", change=impatient), pytest.raises(Deadlock, match="trap after too many polls"):
        layer.run(scan_layer)


@pytest.mark.emulated
def test_a_portable_wait_in_vain_ends() -> None:
    """With a store to the address 0, after as many looks; here after the first."""
    layer = LaneCase(2, 9, 10, 32, torch.float16)

    def impatient(text: str) -> str:
        changed = re.sub(r"(setp\.\w+\.[su]32\s+%p\d+, %r\d+), 1677721[67];", r"\1, 0;", text)
        assert changed != text
        return changed

    plans = {kind: replace(plan, thread_elements=0) for kind, plan in plans_of(layer).items()}
    layer = replace(layer, **plans)
    with compiled_for("sm_90", change=impatient), pytest.raises(Fault, match="address 0x0 is in no buffer"):
        layer.run(scan_layer)


@pytest.mark.emulated
def test_two_programs_hand_a_number_back_and_forth() -> None:
    """bench.handoff, which a GPU is timed with."""
    from bench.handoff import ping_pong

    with emulated(90, seed=3):
        for partner in (1, 2):
            numbers = torch.zeros(2, dtype=torch.int32)
            ping_pong[(3,)](numbers, partner, 4, num_warps=1)
            assert numbers.tolist() == [4, 4]


@pytest.mark.emulated
def test_holding_back_changes_no_value() -> None:
    layer = LaneCase(3, 9, 10, 32, torch.float16)
    with compiled_for("sm_90", multiprocessors=4) as launched:
        layer = replace(layer, **plans_of(layer, block_batch=8, block_hidden=16, slices=2, batch_tiles=2, groups=2))
        assert layer.forward is not None
        assert layer.backward is not None
        at_once = layer.run(scan_layer)
        assert not any("%clock" in text for text in launched)
        layer = replace(layer, forward=replace(layer.forward, hold=640), backward=replace(layer.backward, hold=640))
        held = layer.run(scan_layer)
        assert "%clock" in launched[-1]
        layer.check()
    for name, tensor in held.items():
        assert torch.equal(tensor, at_once[name]), name


@pytest.mark.emulated
@pytest.mark.parametrize("batch_size", [16, 20], ids=["one tile", "several tiles a program"])
def test_asynchronous_tensor_cores(batch_size: int) -> None:
    """16 units, that is 64 rows of weights, a program, and 16 batch rows."""
    layer = LaneCase(3, batch_size, 10, 64, torch.float16, reverse=True)
    with compiled_for("sm_90") as launched:
        layer.forward = replace(plans_of(layer, block_batch=16, block_hidden=16)["forward"], groups=1)
        layer.check()
    assert "wgmma.mma_async.sync.aligned.m64n16k16" in launched[0]


@pytest.mark.emulated
def test_weights_that_are_streamed() -> None:
    layer = LaneCase(2, 9, 16, 70, torch.bfloat16)
    with compiled_for("sm_80", multiprocessors=7):
        plans = plans_of(layer)
        forward, backward = streamed(plans["forward"], 70), streamed(plans["backward"], 4 * 70)
        replace(layer, forward=forward, backward=backward).check()


@pytest.mark.emulated
def test_lengths_and_resets() -> None:
    layer = LaneCase(3, 9, 5, 40, torch.float16, lengths=(3, 0, 2, 3, 1, 3, 3, 2, 3), resets=True, cells=True)
    with compiled_for("sm_90"):
        replace(layer, **plans_of(layer, groups=1, block_batch=8)).check()


@pytest.mark.emulated
@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "directions"])
def test_stacks_in_one_launch(bidirectional: bool) -> None:
    """With dropout between the layers, and steps that start anew."""
    layout = "dense" if bidirectional else "resets"
    sizes = {"hidden_size": 32, "input_size": 8, "time_steps": 2, "batch_size": 9}
    stack = StackCase(2, bidirectional, torch.float16, layout, dropout=0.5, **sizes)  # type: ignore[arg-type]
    with compiled_for("sm_90", multiprocessors=8):
        stack.check()


@pytest.mark.emulated
@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", torch.float32), ("sm_90", torch.float16)], ids=str)
def test_cells(arch: str, dtype: torch.dtype) -> None:
    with compiled_for(arch):
        check_cell(cell_arguments(9, 16, 24, dtype), 24)


# --- That it finds what it is for ---


def output_of(layer: LaneCase, seed: int = 0) -> Tensor:
    """Of the forward scan alone."""
    assert layer.forward is not None
    with torch.no_grad(), interpreter.interpret(seed), planner.forced(layer.forward):
        return scan_layer(*layer.tensors(), reverse=layer.reverse)[0]


def asynchronous_layer() -> LaneCase:
    """Four programs of four warps, on sm_90."""
    layer = LaneCase(3, 16, 10, 64, torch.float16)
    return replace(layer, forward=plans_of(layer, block_batch=16, block_hidden=16, slices=4)["forward"])


@pytest.mark.emulated
def test_negative_control_without_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros where sentinels should be are values that nobody waits for."""
    with compiled_for("sm_90"):
        layer = asynchronous_layer()
        expected = output_of(layer)
        monkeypatch.setattr(buffers, "sentinels", lambda shape, like: like.new_zeros(shape))
        for seed in range(3):
            assert not torch.equal(output_of(layer, seed), expected)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("instruction", "instead", "finding"),
    [
        ("ld.volatile.global", "ld.global", Race),
        ("st.global.cg", None, Deadlock),
        ("bar.sync", None, Race),
        ("fence.proxy.async", None, Race),
        ("wgmma.wait_group", None, AssertionError),
    ],
)
def test_negative_control_with_other_instructions(
    instruction: str, instead: str | None, finding: type[Exception]
) -> None:
    """Changed, or left out (None), wherever it stands."""
    pattern = re.escape(instruction) if instead else rf"(@!?%\w+ )?{re.escape(instruction)}[^;]*;"

    def change(text: str) -> str:
        changed, count = re.subn(pattern, instead or "", text)
        assert count > 0
        return changed

    with compiled_for("sm_90"):
        layer = asynchronous_layer()
        expected = output_of(layer)
    with compiled_for("sm_90", change=change), pytest.raises(finding):
        assert torch.equal(output_of(layer), expected)


@pytest.mark.emulated
def test_negative_control_with_two_threads_for_an_element() -> None:
    """256 threads for 128 elements of a state tile: one may see the sentinel and the other the value.

    The warps then disagree on whether something is missing: about what they write into shared memory to find out.
    """
    layer = LaneCase(4, 8, 5, 16, torch.float16)
    with compiled_for("sm_80"):
        plan = plans_of(layer, block_batch=8, block_hidden=8, slices=2, num_warps=2)["forward"]
        plan = replace(plan, block_k=16, split_k=1, register_chunks=0, thread_elements=2)
        for seed in range(5):
            assert output_of(replace(layer, forward=plan), seed).isfinite().all()
        layer.forward = replace(plan, num_warps=8, thread_elements=0)
        with pytest.raises(Race):
            [output_of(layer, seed) for seed in range(20)]

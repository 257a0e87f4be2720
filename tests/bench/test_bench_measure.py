"""bench.measure, bench.systems and bench.floor: values come before times, and everyone is measured by the same rule."""

import copy
import importlib.util
import math
import os
import re
import subprocess
import sys
import time
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench import devices, floor, measure, systems
from bench.cases import FLOOR, GRIDS, SYSTEMS, BenchCase, Block, Grid
from bench.results import ROOT
from lstm_triton.reference import lstm_layer
from tests.support.launches import Launches, recorded_launches

CASE = BenchCase("forward+backward", "float32", T=5, B=3, I=4, H=6)
TIMED = Grid("a test's", (Block((CASE,)),))
CPU = devices.Cpu()


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that take turns on busy processors would take most of the tests' time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake(monkeypatch):
    """Put a system of the test's own in the place of a peer: fake(name, change of nn.LSTM's runner)."""

    def put(name: str, change, **fields) -> None:
        def runners(problem):
            return [change(runner) for runner in systems.baseline(problem)]

        monkeypatch.setitem(systems.REGISTRY, name, systems.System(name, runners, **fields))

    return put


def measured(names, case=CASE, grid=TIMED, device=CPU, **options) -> dict:
    rows = measure.measure("test", grid, case, names, device, seconds=0.01, **options)
    assert [one.row["system"] for one in rows] == list(names)
    return {one.row["system"]: one.row for one in rows}


def calling(function):
    """A runner whose call goes through the function: function(call, leaf)."""
    return lambda runner: replace(runner, call=lambda leaf: function(runner.call, leaf))


def test_a_right_system_gets_times_and_its_error_beside_the_baselines() -> None:
    rows = measured(["lstm_triton", "nn.LSTM"])
    for row in rows.values():
        assert row["status"] == "ok"
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert 0 < row["error"] < 1e-6
        assert row["floor_us"] > 0
    assert rows["lstm_triton"]["message"].startswith("not the kernels: ")


@pytest.mark.parametrize("mode", ["forward", "inference", "forward+backward"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": "bfloat16"},
        {"layers": 2, "bidirectional": True},
        {"layout": "packed"},
        {"layout": "lengths", "layers": 2, "bidirectional": True},
        {"layout": "resets", "layers": 2},
        {"proj_size": 2},
        {"T": 1, "B": 1},
    ],
    ids=str,
)
def test_every_kind_of_case_is_measured(mode: str, change: dict) -> None:
    rows = measured(["lstm_triton", "nn.LSTM"], replace(CASE, mode=mode, **change))
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_resets_come_with_our_time_without_them() -> None:
    """In the message; the row's own time and error are those with resets."""
    rows = measured(["lstm_triton", "nn.LSTM"], replace(CASE, layout="resets"))
    assert re.search(r"without resets: [0-9.]+ us", rows["lstm_triton"]["message"])
    assert 0 < rows["lstm_triton"]["error"] < 1e-6
    assert rows["nn.LSTM"]["message"] == "step by step"


def test_resets_and_lengths_are_looked_at(monkeypatch) -> None:
    """Ours without them is wrong."""
    plain = systems.REGISTRY["lstm_triton"]

    def forgetful(problem):
        other = copy.copy(problem)
        other.lengths = other.resets = None
        return plain.runners(other)

    monkeypatch.setitem(systems.REGISTRY, "flashrnn-cuda", systems.System("flashrnn-cuda", forgetful))
    for layout in ("lengths", "resets"):
        case = replace(CASE, layout=layout)
        assert measured(["nn.LSTM", "flashrnn-cuda"], case)["flashrnn-cuda"]["status"] == "wrong"


def test_a_wrong_output_gets_its_error_and_no_time(fake) -> None:
    fake("flashrnn-cuda", calling(lambda call, leaf: (call(leaf)[0] * 1.001, *call(leaf)[1:])))
    seen = []
    rows = measured(["nn.LSTM", "flashrnn-cuda"], progress=lambda phase, system: seen.append((phase, system)))
    row = rows["flashrnn-cuda"]
    assert ("times", "nn.LSTM") in seen
    assert ("times", "flashrnn-cuda") not in seen
    assert row["status"] == "wrong"
    assert row["error"] == pytest.approx(0.001, rel=0.2)
    assert row["median_us"] is row["p20_us"] is row["kept_bytes"] is None
    assert "allowed" in row["message"]


def test_a_wrong_gradient_alone_is_found(fake) -> None:
    def twisted(call, leaf):
        output, h_n, c_n = call(leaf)
        output.register_hook(lambda gradient: gradient * 1.01)
        return output, h_n, c_n

    fake("flashrnn-cuda", calling(lambda call, leaf: twisted(call, leaf) if leaf.requires_grad else call(leaf)))
    assert measured(["flashrnn-cuda"])["flashrnn-cuda"]["status"] == "wrong"
    assert measured(["flashrnn-cuda"], replace(CASE, mode="inference"))["flashrnn-cuda"]["status"] == "ok"


def test_a_nan_is_wrong_even_if_it_is_nn_lstms(fake) -> None:
    fake("nn.LSTM", calling(lambda call, leaf: (call(leaf)[0] * math.nan, *call(leaf)[1:])))
    rows = measured(["lstm_triton", "nn.LSTM"])
    assert rows["nn.LSTM"]["status"] == "wrong"
    assert rows["nn.LSTM"]["error"] is None  # JSON has no NaN
    assert rows["lstm_triton"]["status"] == "ok"


def test_a_wrong_shape_and_an_exception_are_rows_with_their_error(fake) -> None:
    def broken(call, leaf):
        raise RuntimeError("out of shared memory\nand a long explanation")

    fake("flashrnn-cuda", calling(lambda call, leaf: (call(leaf)[0][:-1], *call(leaf)[1:])))
    fake("flashrnn-triton", calling(broken))
    rows = measured(["lstm_triton", "nn.LSTM", "flashrnn-cuda", "flashrnn-triton"])
    assert {name: row["status"] for name, row in rows.items()} == {
        "lstm_triton": "ok",
        "nn.LSTM": "ok",
        "flashrnn-cuda": "error",
        "flashrnn-triton": "error",
    }
    assert rows["flashrnn-triton"]["message"] == "RuntimeError: out of shared memory"
    assert "shape" in rows["flashrnn-cuda"]["message"]


def test_a_system_that_fails_only_while_it_is_timed_has_no_time(fake) -> None:
    calls = 0

    def tiring(call, leaf):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise RuntimeError("tired")
        return call(leaf)

    fake("torchrl-triton", calling(tiring))
    rows = measured(["nn.LSTM", "torchrl-triton"])
    assert (rows["torchrl-triton"]["status"], rows["torchrl-triton"]["median_us"]) == ("error", None)
    assert rows["nn.LSTM"]["status"] == "ok"


def test_values_are_checked_before_any_time_is_taken_and_systems_take_turns(fake) -> None:
    fake("flashrnn-cuda", lambda runner: runner)
    seen = []
    measured(["nn.LSTM", "flashrnn-cuda"], progress=lambda phase, system: seen.append((phase, system)))
    phases = [phase for phase, _ in seen]
    assert phases.index("times") > max(number for number, phase in enumerate(phases) if phase == "values")
    times = [system for phase, system in seen if phase == "times"]
    assert len(times) >= 10
    pairs = [set(times[number : number + 2]) for number in range(0, len(times), 2)]
    assert all(pair == {"nn.LSTM", "flashrnn-cuda"} for pair in pairs)
    assert {times[0], times[2]} == {"nn.LSTM", "flashrnn-cuda"}  # who goes first changes


def test_a_slow_system_is_measured_as_slow(fake, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])

    def slow(call, leaf):
        clock[0] += 0.25
        return call(leaf)

    fake("flashrnn-cuda", calling(slow))
    fake("torchrl-triton", calling(lambda call, leaf: (clock.__setitem__(0, clock[0] + 0.1), call(leaf))[1]))
    rows = measured(["flashrnn-cuda", "torchrl-triton"], replace(CASE, mode="inference"))
    assert rows["flashrnn-cuda"]["median_us"] == pytest.approx(250_000)
    assert rows["torchrl-triton"]["p80_us"] == pytest.approx(100_000)


def test_the_fastest_right_variant_speaks_for_its_system(monkeypatch) -> None:
    def runners(problem):
        right, wrong = systems.baseline(problem)[0], systems.baseline(problem)[0]
        right.label, wrong.label = "careful", "careless"
        call = wrong.call
        wrong.call = lambda leaf: (call(leaf)[0] + 1, *call(leaf)[1:])
        return [wrong, right]

    monkeypatch.setitem(systems.REGISTRY, "nn.LSTM+compile", systems.System("nn.LSTM+compile", runners))
    row = measured(["nn.LSTM+compile"])["nn.LSTM+compile"]
    assert row["status"] == "ok"
    assert row["message"].startswith("careful; careless: error ")


def test_a_grid_of_values_takes_no_times() -> None:
    row = measured(["lstm_triton"], grid=GRIDS["accuracy"])["lstm_triton"]
    assert row["status"] == "ok"
    assert row["error"] > 0
    assert row["median_us"] is row["floor_us"] is None


def test_the_first_call_is_reported_where_the_grid_asks() -> None:
    assert "first call" in measured(["nn.LSTM"], grid=replace(TIMED, first_call=True))["nn.LSTM"]["message"]
    assert "first call" not in measured(["nn.LSTM"])["nn.LSTM"]["message"]


def test_a_missing_system_says_so_and_costs_nothing() -> None:
    def never(phase: str, system: str) -> None:
        raise AssertionError(f"{phase} of {system}, although nobody is there")

    rows = measured(SYSTEMS[3:], progress=never)
    assert {row["status"] for row in rows.values()} == {"missing"}
    assert all(row["message"] for row in rows.values())
    assert measured(["nn.LSTM"], replace(CASE, dtype="tf32"))["nn.LSTM"]["message"] == "a CPU has no TF32"


def test_a_package_that_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setattr(systems.importlib.util, "find_spec", lambda name: None)
    gpu = types.SimpleNamespace(name="cuda", torch_device=torch.device("cuda"))
    assert systems.REGISTRY["flashrnn-cuda"].why_missing(CASE, gpu) == "the package flashrnn is not installed"
    stacked = replace(CASE, layers=2)
    assert "one dense layer" in systems.REGISTRY["flashrnn-cuda"].why_missing(stacked, gpu)
    assert "float32 or bfloat16" in systems.REGISTRY["torchrl-triton"].why_missing(replace(CASE, dtype="float16"), gpu)


class Lost(devices.Cpu):
    """A device that answers nothing any more after the first error."""

    def alive(self) -> bool:
        return False


def test_a_lost_device_ends_the_case_with_the_guilty_systems_row(fake) -> None:
    def crash(call, leaf):
        raise RuntimeError("an illegal memory access was encountered")

    fake("flashrnn-cuda", calling(crash))
    with pytest.raises(measure.DeviceLost) as lost:
        measured(["lstm_triton", "nn.LSTM", "flashrnn-cuda"], device=Lost())
    assert [(row["system"], row["status"]) for row in lost.value.rows] == [("flashrnn-cuda", "error")]
    assert "illegal memory access" in lost.value.rows[0]["message"]


def test_no_reference_no_verdict(monkeypatch) -> None:
    def too_large(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "distance", too_large)
    monkeypatch.setattr(measure.nn, "LSTM", too_large)
    rows = measured(["lstm_triton", "nn.LSTM"])
    assert {row["status"] for row in rows.values()} == {"error"}


def test_tf32_is_let_loose_for_its_cases_only() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for allowed in (True, False):
        with devices.tf32(allowed):
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# The adapters, against stand-ins written from the peers' own documentation


def stand_in_for_flashrnn(Wx, R, b, states=None, function="lstm", config=None, backend="cuda_fused", dtype="bfloat16"):
    """Wx (B, T, gates, heads, D), R (gates, heads, D, D_prev), b (gates, heads, D) -> (2, B, T, heads, D), the last."""
    assert (function, dtype) == ("lstm", "float32")
    batch, length, gates, heads, width = Wx.shape
    assert R.shape == (gates, heads, width, width)
    h = c = Wx.new_zeros(batch, heads, width)
    found = []
    for step in range(length):
        preact = Wx[:, step] + torch.einsum("gndp,bnp->bgnd", R, h) + b
        i, f, z, o = preact.unbind(1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        h = torch.sigmoid(o) * torch.tanh(c)
        found.append(torch.stack([h, c]))
    states = torch.stack(found, 2)
    return states, states[:, :, -1:]


def stand_in_for_torchrl(
    x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, compute_dtype=torch.float32, *, input_precision
):
    """x (B, T, I), hidden and cell (B, T, H), is_init (B, T) -> all h, all c, h_n, c_n."""
    assert not is_init.any()
    assert is_init.shape == x.shape[:2] == hidden.shape[:2] == cell.shape[:2]
    assert (compute_dtype, input_precision) == (torch.float32, "ieee")
    h, c, output, cells = hidden[:, 0], cell[:, 0], [], []
    for step in range(x.shape[1]):
        i, f, g, o = (F.linear(x[:, step], w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        output.append(h)
        cells.append(c)
    return torch.stack(output, 1), torch.stack(cells, 1), h, c


def check_adapter(make_runners) -> None:
    problem = systems.Problem(CASE, CPU)
    entries = [measure.Entry(systems.REGISTRY["flashrnn-cuda"], runner) for runner in make_runners(problem)]
    measure.check_values(problem, entries, lambda phase, system: None)
    for entry in entries:
        assert not entry.failure
        assert entry.error is not None
        assert entry.error < 5e-7


def test_the_adapter_of_flashrnn_speaks_its_layouts(monkeypatch) -> None:
    module = types.ModuleType("flashrnn")
    module.flashrnn = stand_in_for_flashrnn
    monkeypatch.setitem(sys.modules, "flashrnn", module)
    check_adapter(systems.flashrnn("cuda_fused"))


def test_the_adapter_of_torchrl_speaks_its_layouts(monkeypatch) -> None:
    name = "torchrl.modules.tensordict_module._rnn_triton"
    for parent in ("torchrl", "torchrl.modules", "torchrl.modules.tensordict_module", name):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    sys.modules[name].lstm_triton = stand_in_for_torchrl
    check_adapter(systems.torchrl)


@pytest.mark.parametrize("change", [{}, {"layers": 2, "bidirectional": True}], ids=str)
def test_the_compiled_step_loop_computes_an_lstm(monkeypatch, change: dict) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)  # its own business
    case = replace(CASE, **change)
    problem = systems.Problem(case, CPU)
    loop = systems.module_runner(problem, systems.step_loop(problem), list(problem.module.parameters()))
    entry = measure.Entry(systems.REGISTRY["nn.LSTM+compile"], loop)
    measure.check_values(problem, [entry], lambda phase, system: None)
    assert not entry.failure
    assert entry.error < 1e-6


# The floor


def test_work_counts_products_and_bytes() -> None:
    case = BenchCase("inference", "bfloat16", T=10, B=2, I=3, H=4)
    weights = 16 * (3 + 4)
    assert floor.work(case) == (2 * 20 * weights, 2 * (20 * (3 + 4) + weights))
    flop, moved = floor.work(case)
    assert floor.work(replace(case, mode="forward+backward")) == (3 * flop, 3 * moved)
    assert floor.work(replace(case, bidirectional=True))[0] == 2 * flop
    second = 16 * (4 + 4)
    assert floor.work(replace(case, layers=2))[0] == flop + 2 * 20 * second


def test_the_floor_is_the_largest_of_its_parts(monkeypatch) -> None:
    monkeypatch.setattr(floor, "product_rate", lambda device, dtype: floor.work(CASE)[0] / 7.0)
    monkeypatch.setattr(floor, "copy_rate", lambda device: floor.work(CASE)[1] / 5.0)
    assert floor.lower_bound(CASE, CPU, None) == 7.0
    assert floor.lower_bound(CASE, CPU, 9.0) == 9.0
    monkeypatch.setattr(floor, "copy_rate", lambda device: floor.work(CASE)[1] / 8.0)
    assert floor.lower_bound(CASE, CPU, 3.0) == 8.0


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("hidden_size", "batch_size", "stack"), [(20, 3, {}), (9, 20, {"layers": 3}), (9, 3, {"bidirectional": True})]
)
def test_the_exchange_only_kernel_hands_everything_around(
    dtype: str, hidden_size: int, batch_size: int, stack: dict[str, Any]
) -> None:
    case = replace(CASE, dtype=dtype, T=3, H=hidden_size, B=batch_size, **stack)
    device = devices.open_device("interpreter")
    with device.active():
        for kind, copies in (("forward", 1), ("backward", 4)):
            for state in floor.exchange(systems.Problem(case, device), kind):
                assert (state[..., : copies * hidden_size] == 0).all()  # no sentinel is left


@pytest.mark.interpreted
def test_the_exchange_only_kernel_waits_for_its_peers(monkeypatch) -> None:
    """A peer that publishes nothing is waited for: the interpreter finds that nobody can go on."""
    from bench import exchange_only
    from lstm_triton.interpreter import Deadlock

    monkeypatch.setattr(exchange_only, "publish", lambda pointers, value, mask: None)
    device = devices.open_device("interpreter")
    with device.active(), pytest.raises(Exception, match="wait for values that none of them writes") as stuck:
        floor.exchange(systems.Problem(replace(CASE, T=2, H=9), device), "forward")
    assert isinstance(stuck.value, Deadlock) or isinstance(stuck.value.__cause__, Deadlock)


COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from bench.exchange_only import exchange_scan
from lstm_triton.scan import launch, planner
from lstm_triton.scan.plan import ScanShape
from lstm_triton.target import Device

device = Device("H200", "sm_90", 132, 232448)
for kind in ("forward", "backward"):
    plan = planner.plan(ScanShape(kind, 16, 768, 768, torch.bfloat16, device, allow_tf32=False))
    constants = {"HIDDEN": 768, "INPUT": 768, "STATE_STRIDE": 768, "COPIES": 1 if kind == "forward" else 4}
    constants |= {"SAVE": kind == "forward", "FUSE_INPUT": plan.fuse_input, "BLOCK_INPUT": plan.block_input}
    constants |= {"CHUNKS": plan.chunks, **launch.constants_of(plan)}
    constants = {name: value for name, value in constants.items() if name in exchange_scan.arg_names}
    types = {"cell_ptr": "*fp32"} | dict.fromkeys(("seq_len", "batch_size", "batch_tiles"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*bf16") for name in exchange_scan.arg_names}
    source = triton.compiler.ASTSource(exchange_scan, signature, constants)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": plan.num_warps})
    assert binary.asm["ptx"].count("ld.volatile") > 8
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
def test_the_exchange_only_kernel_compiles_for_a_gpu() -> None:
    """Its loads are still there, although nobody uses what they load."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.interpreted
@pytest.mark.parametrize("mode", ["forward+backward", "inference"])
def test_compiling_ahead_launches_what_the_case_launches(mode: str) -> None:
    """The same kernels with the same compile-time arguments, two steps long."""
    case = replace(CASE, mode=mode, dtype="bfloat16", T=3)
    device = devices.open_device("interpreter")
    measured(["lstm_triton", FLOOR], case, device=device)

    def compiled(launches: Launches) -> set[str]:
        """The kernels, each with its compile-time arguments."""
        return {
            str((each.kernel, sorted((name, value) for name, value in each.arguments.items() if name.isupper())))
            for each in launches
        }

    with recorded_launches() as launches:
        assert measure.compile_kernels(case, device)
    ahead = compiled(launches)
    with recorded_launches() as launches:
        measured(["lstm_triton", FLOOR], case, device=device)
    assert ahead == compiled(launches)
    assert any("exchange_scan" in one for one in ahead)
    assert any("forward_scan" in one for one in ahead)
    assert any("backward_scan" in one for one in ahead) == (mode == "forward+backward")


def test_compiling_ahead_swallows_what_the_case_will_tell(monkeypatch) -> None:
    monkeypatch.setattr(measure, "Problem", None)
    assert not measure.compile_kernels(CASE, CPU)


@pytest.mark.interpreted
def test_the_interpreter_is_a_device_like_the_others() -> None:
    case = replace(CASE, T=2, B=2)
    rows = measured(["lstm_triton", "nn.LSTM", FLOOR], case, device=devices.open_device("interpreter"))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["lstm_triton"]["message"] == ""  # the kernels, not the fallback
    assert rows[FLOOR]["error"] is None
    assert rows["lstm_triton"]["floor_us"] >= rows[FLOOR]["median_us"]


def test_the_reference_is_the_formula() -> None:
    """The float64 nn.LSTM that everyone is compared with agrees with the formula written out."""
    problem = systems.Problem(CASE, CPU)
    module = problem.module.double()
    leaf = problem.new_leaf().double()
    output, h_n, c_n = lstm_layer(leaf, None, None, *module.parameters())
    found, (found_h, found_c) = module(leaf)
    assert measure.distance([found, found_h[0], found_c[0]], [output, h_n, c_n]) < 1e-15


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["forward+backward", "inference"])
def test_a_gpu_gives_times_memory_and_a_floor(mode: str) -> None:
    case = BenchCase(mode, "bfloat16", T=64, B=16, I=256, H=256)
    rows = measured(["lstm_triton", "nn.LSTM", FLOOR], case, device=devices.open_device("cuda"))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["lstm_triton"]["message"] == ""  # the kernels, not the fallback
    for name in ("lstm_triton", "nn.LSTM"):
        output_bytes = case.T * case.B * case.H * 2
        assert rows[name]["peak_bytes"] >= output_bytes
        assert (rows[name]["kept_bytes"] or output_bytes) >= output_bytes
        assert (rows[name]["kept_bytes"] is None) == (mode == "inference")
        assert rows[name]["floor_us"] >= rows[FLOOR]["median_us"] > 0


@pytest.mark.gpu
def test_a_gpus_clock_measures_the_device_and_not_the_host() -> None:
    device = devices.open_device("cuda")
    spin = round(1000 * device.cycles_per_us)  # a millisecond

    def slow_to_ask() -> None:
        time.sleep(0.002)
        torch.cuda._sleep(spin)

    assert device.time(lambda: torch.cuda._sleep(spin)) == pytest.approx(1000, rel=0.3)
    assert device.time(slow_to_ask, host_us=4000) == pytest.approx(1000, rel=0.3)
    assert device.wall_time(slow_to_ask) > 2500

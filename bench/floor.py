"""The floor under a case's time: the least that the device has to do. Each part is measured in the same run.

A scan needs at least the time of
- its exchange: h_t is handed around T times. `exchange` launches the scans without their arithmetic.
- its products, at the rate of a large matrix product.
- moving its tensors, at the rate of a copy.
The floor is the largest of the three.
"""

from __future__ import annotations

import functools
import statistics
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cases import BenchCase
from .devices import Call, Cpu, tf32
from .plans import planned_launches
from .problem import TORCH_DTYPES, Outputs, Problem, Runner

if TYPE_CHECKING:
    from lstm_triton.scan.plan import Kind


@functools.cache
def product_rate(device: Cpu, dtype: str) -> float:
    """FLOP per microsecond of a large square product of random matrices. Whether TF32 is used is set outside."""
    size = 8192 if device.name == "cuda" else 256
    left, right = (torch.randn(size, size, device=device.torch_device, dtype=TORCH_DTYPES[dtype]) for _ in range(2))
    return 2 * size**3 / _median_us(device, lambda: left @ right)


@functools.cache
def copy_rate(device: Cpu) -> float:
    """Bytes read and written per microsecond by a copy that is far larger than the cache."""
    size = 2**30 if device.name == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.int8, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * size / _median_us(device, lambda: target.copy_(source))


def _median_us(device: Cpu, call: Call) -> float:
    call()
    return statistics.median(device.time(call) for _ in range(5))


def work(case: BenchCase) -> tuple[int, int]:
    """The least (FLOP, bytes) of a case: its products, and every tensor read or written once."""
    directions = 2 if case.bidirectional else 1
    rows = sum(case.lengths)
    weights = products = 0
    for layer in range(case.layers):
        input_size = case.I if layer == 0 else directions * case.output_size
        layer_weights = directions * (4 * case.H * (input_size + case.output_size) + case.proj_size * case.H)
        weights += layer_weights
        products += 2 * rows * layer_weights
    numbers = rows * (case.I + directions * case.output_size) + weights
    # Backward has two products for each of forward's: for the gradients of the input and of the weights.
    times = 3 if case.backward else 1
    return times * products, times * numbers * TORCH_DTYPES[case.dtype].itemsize


def lower_bound(case: BenchCase, device: Cpu, exchange_us: float | None) -> float:
    """The floor of a case in microseconds. exchange_us: the time of the exchange alone, where it was measured."""
    flop, moved = work(case)
    bounds = flop / product_rate(device, case.dtype), moved / copy_rate(device), exchange_us or 0.0
    return round(max(bounds), 3)


def rates(device: Cpu) -> dict[str, object]:
    """Both rates, for the provenance in a results file."""
    tera = {}
    for dtype in TORCH_DTYPES:
        if dtype == "tf32" and device.name != "cuda":
            continue
        with tf32(dtype == "tf32"):
            tera[dtype] = float(f"{product_rate(device, dtype) / 1e6:.3g}")
    return {"product_tflops": tera, "copy_gbps": float(f"{copy_rate(device) / 1e3:.3g}")}


def exchange_runner(problem: Problem) -> Runner:
    """The exchange alone, launched as lstm_triton launches its scans."""

    def call(leaf: Tensor) -> Outputs:
        exchange(problem, "forward")
        if problem.case.backward:
            exchange(problem, "backward")
        return leaf, leaf, leaf

    return Runner(call, [], checked=False)


def exchange(problem: Problem, kind: Kind) -> list[Tensor]:
    """Launch the exchange of a scan, with the scan's plans. Returns the states that the programs have published."""
    from lstm_triton.scan import buffers, launch
    from lstm_triton.scan.plan import state_stride

    from .exchange_only import exchange_scan

    case, device = problem.case, problem.device.torch_device
    directions = 2 if case.bidirectional else 1
    stride = state_stride(case.H)
    copies = 1 if kind == "forward" else 4
    states = []
    for planned in planned_launches(kind, case, problem.device):
        plan = planned.plan
        input_size = case.I if planned.first < directions else directions * case.H
        like = torch.empty(case.T, case.B, input_size, dtype=problem.dtype, device=device)
        state = buffers.sentinels((plan.lanes, case.T + 1, case.B, copies * stride), like)
        state[:, 0] = 0
        arguments = {
            "state_ptr": state,
            "gates_ptr": torch.empty(plan.lanes, case.T, case.B, 4 * case.H, dtype=problem.dtype, device=device),
            "cell_ptr": torch.empty(plan.lanes, case.T + 1, case.B, stride, device=device),
            "input_ptr": like,
            "seq_len": case.T,
            "batch_size": case.B,
            "batch_tiles": plan.batch_tiles,
            "hold": plan.hold,
        }
        prepared = launch.prepared_scan(
            exchange_scan,
            plan,
            HIDDEN=case.H,
            INPUT=input_size,
            STATE_STRIDE=stride,
            COPIES=copies,
            SAVE=kind == "forward" and case.mode != "inference",
            FUSE_INPUT=plan.fuse_input,
            BLOCK_INPUT=plan.block_input,
            CHUNKS=plan.chunks,
        )
        launch.run(prepared, device, arguments)
        states.append(state)
    return states

"""Turn a plan into the launch of a kernel. Every launch of this library goes through this file."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import target
from ..prepared_kernel import PreparedKernel
from ..target import KernelLaunch
from .layout import Layout, Window
from .plan import MIN_DOT_DEPTH, Plan

PREPARED_KERNELS = 1024  # as many calls as the planner remembers


def allows_tf32() -> bool:
    """Whether PyTorch's settings let cuDNN compute a float32 LSTM in TF32."""
    # The setting torch.backends.cudnn.rnn.fp32_precision. Some versions of PyTorch hide it behind a module `rnn`.
    return bool(torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32")


def lookups(layout: Layout, plan: Plan, window: Window, unused: Tensor) -> dict[str, object]:
    """The arguments with which both kernels find the rows of a window's steps."""
    time_steps, ragged = window.steps.stop - window.steps.start, layout.ragged
    if ragged is None:
        before = after = offsets = tile_steps = unused
    else:
        before, after, offsets = ragged.before, ragged.after, ragged.offsets[window.steps.start :]
        tile_steps = ragged.tile_steps(plan.block_batch, plan.batch_tiles) - window.steps.start
        tile_steps = tile_steps.clamp(0, time_steps)
    return {
        "before_ptr": before,
        "after_ptr": after,
        "offsets_ptr": offsets,
        "tile_steps_ptr": tile_steps,
        "seq_len": time_steps,
        "row_count": layout.rows,
        "batch_size": layout.batch_size,
        "batch_tiles": plan.batch_tiles,
    }


def constants_of(plan: Plan) -> dict[str, object]:
    """The compile-time arguments that both kernels take from a plan."""
    return {
        "LANES": plan.lanes,
        "CHAINED": plan.chained,
        "SEVERAL_TILES": plan.batch_tiles > plan.groups,
        "BLOCK_BATCH": plan.block_batch,
        "BLOCK_HIDDEN": plan.block_hidden,
        "BLOCK_K": plan.block_k,
        "SPLIT_K": plan.split_k,
        "RESIDENT_CHUNKS": plan.resident_chunks,
        "REGISTER_CHUNKS": plan.register_chunks,
        "GROUP_CHUNKS": plan.group_chunks,
        "ACCUMULATORS": plan.accumulators,
        "DOT_PRECISION": plan.dot_precision,
        "TF32_ROUNDING": plan.tf32_rounding,
        "THREAD_ELEMENTS": plan.thread_elements,
        "PACKED": plan.packed,
        "HOLDS": plan.hold > 0,
    }


def input_constants_of(plan: Plan, input_size: int, stride_unit: int) -> dict[str, object]:
    """The forward kernel's compile-time arguments for its input. Without fusion all input sizes share one kernel."""
    fused = plan.fuse_input
    return {
        "FUSE_INPUT": fused,
        "INPUT": input_size if fused else 1,
        "BLOCK_INPUT": plan.block_input if fused else MIN_DOT_DEPTH,
        "INPUT_STRIDE_UNIT": stride_unit if fused else 1,
    }


def compiler_options(plan: Plan, is_nvidia: bool) -> dict[str, object]:
    """The options of Triton's compiler for a plan."""
    options: dict[str, object] = {"num_warps": plan.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if is_nvidia:
        options["maxnreg"] = 255  # a multiprocessor runs one program, so fewer registers gain nothing
    return options


def launch_options(plan: Plan) -> dict[str, object]:
    """The options of a launch on a GPU for a plan."""
    options = compiler_options(plan, is_nvidia=torch.version.hip is None)
    # The slices of a batch tile wait for each other, and so do chained layers. A cooperative launch runs all programs
    # at the same time, or the driver refuses the launch.
    return {**options, "launch_cooperative_grid": plan.slices > 1 or plan.chained}


def prepared_scan(kernel: Any, plan: Plan, **constants: object) -> PreparedKernel:
    """A scan's kernel. `constants`: the compile-time arguments that are not the plan's."""
    return _prepared_scan(kernel, plan, launch_options, tuple(constants.items()))


@lru_cache(maxsize=PREPARED_KERNELS)
def _prepared_scan(
    kernel: Any,
    plan: Plan,
    options_of: Callable[[Plan], Mapping[str, object]],
    constants: tuple[tuple[str, object], ...],
) -> PreparedKernel:
    values = {**dict(constants), **constants_of(plan)}
    return PreparedKernel(kernel, (plan.programs,), values, options_of(plan), plan)


def prepared(
    kernel: Any, grid: tuple[int, ...], constants: Mapping[str, object], options: Mapping[str, object]
) -> PreparedKernel:
    """A kernel that is no scan."""
    return _prepared(kernel, grid, tuple(constants.items()), tuple(options.items()))


@lru_cache(maxsize=PREPARED_KERNELS)
def _prepared(
    kernel: Any,
    grid: tuple[int, ...],
    constants: tuple[tuple[str, object], ...],
    options: tuple[tuple[str, object], ...],
) -> PreparedKernel:
    return PreparedKernel(kernel, grid, dict(constants), dict(options))


def run(
    prepared: PreparedKernel,
    device: torch.device,
    arguments: Mapping[str, object],
    on: target.Target | None = None,
) -> None:
    """Launch a kernel. Every kernel of this library is launched here.

    Args:
        arguments: of the kernel, by name, without its compile-time arguments.
        on: the target; None: the current one (target.py).
    """
    target.run(KernelLaunch(prepared, device, prepared.values(arguments)), on)

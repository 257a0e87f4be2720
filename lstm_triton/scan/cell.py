"""One step of an LSTM layer and its derivative as PyTorch operators: they ask the planner and launch the kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import flops
from ..stack import LaneWeights, Stack, Start
from ..target import Device
from . import planner
from .alignment import with_aligned_rows
from .dispatch import named
from .launch import prepared, run
from .plan import CELL_BACKWARD_BLOCK, CELL_BACKWARD_WARPS, CellPlan, divide_up

BACKWARD_OPTIONS: dict[str, object] = {"num_warps": CELL_BACKWARD_WARPS, "enable_fp_fusion": True}


def plan_of_cell(input: Tensor, hidden_size: int, precision_of: str) -> CellPlan:
    """The plan of a step for an input (B, I). `precision_of`: as in `cell_forward`."""
    return planner.plan_cell(
        batch_size=input.shape[0],
        input_size=input.shape[1],
        hidden_size=hidden_size,
        dtype=input.dtype,
        device=Device.of(input.device),
        # torch.backends.cuda.matmul.fp32_precision, or torch.backends.cudnn.rnn.fp32_precision
        allow_tf32=bool(torch._C._get_fp32_precision_getter("cuda", precision_of) == "tf32"),
    )


@torch.library.custom_op("lstm_triton::cell_forward", mutates_args=())
def cell_forward(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    keep_gates: bool,
    precision_of: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step, in one launch.

    Args:
        input: (B, I), of any strides.
        h_0, c_0: (B, H), or both None for zeros.
        weight_ih, weight_hh: (4H, I) and (4H, H), gates in the order i, f, g, o.
        bias_ih, bias_hh: (4H,), or both None.
        keep_gates: whether to return the gates, which `cell_backward` needs.
        precision_of: "matmul" or "rnn": which setting of PyTorch decides whether float32 is computed in TF32.

    Returns:
        h_1, c_1: (B, H).
        gates: (B, 4H), activated gates, if `keep_gates`; otherwise empty.

    All tensors have the input's dtype.
    """
    hidden_size = weight_hh.shape[1]
    hidden, cell, gates = _results(input, hidden_size, keep_gates)
    plan = plan_of_cell(input, hidden_size, precision_of)
    weights = LaneWeights(weight_ih, weight_hh, bias_ih, bias_hh)
    _launch_step(plan, input, Start(h_0, c_0), weights, hidden, cell, gates if keep_gates else None)
    return hidden, cell, gates


@cell_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = named(cell_forward, arguments)
    return _results(given.input, given.weight_hh.shape[1], given.keep_gates)


@flops.counts("lstm_triton::cell_forward")
def _(*arguments: Any) -> int:
    given = named(cell_forward, arguments)
    return flops.products(given.input.shape[0], [given.weight_ih, given.weight_hh])


@torch.library.custom_op("lstm_triton::single_step", mutates_args=())
def single_step(
    input: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Sequence[Tensor], directions: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a stack of layers, in one launch for each of its lanes.

    Args:
        input: (B, I), of any strides.
        h_0, c_0: (lanes, B, H), or both None for zeros.
        weights, directions, bias: see `Stack`.

    Returns:
        output: (B, directions * H).
        h_n, c_n: (lanes, B, H).
    """
    stack = Stack.of(weights, directions, bias)
    output, h_n, c_n = _results_of_stack(input, stack)
    hidden_size, below = stack.hidden_size(), input
    for lane, own in enumerate(stack.weights):
        at = lane % directions
        if lane > 0 and at == 0:  # a new layer: it reads the output of the layer before
            below, output = output, torch.empty_like(output)
        _launch_step(
            plan_of_cell(below, hidden_size, "rnn"),
            below,
            Start(h_0, c_0).of(lane),
            own,
            h_n[lane],
            c_n[lane],
            output=output[:, at * hidden_size : (at + 1) * hidden_size],
        )
    return output, h_n, c_n


@single_step.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = named(single_step, arguments)
    return _results_of_stack(given.input, Stack.of(given.weights, given.directions, given.bias))


@flops.counts("lstm_triton::single_step")
def _(*arguments: Any) -> int:
    given = named(single_step, arguments)
    return flops.products(given.input.shape[0], given.weights)


def _results_of_stack(input: Tensor, stack: Stack) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the output, h_n and c_n."""
    states = (stack.lanes(), input.shape[0], stack.hidden_size())
    output = input.new_empty((input.shape[0], stack.directions * stack.hidden_size()))
    return output, input.new_empty(states), input.new_empty(states)


def _launch_step(
    plan: CellPlan,
    input: Tensor,
    start: Start,
    weights: LaneWeights,
    h_1: Tensor,
    c_1: Tensor,
    gates: Tensor | None = None,
    output: Tensor | None = None,
) -> None:
    """Launch one step. It writes h_1 and c_1, and if they are given, `gates`, and h once more into `output`."""
    from ..kernels.cell import cell_forward

    weight_ih, weight_hh, bias_ih, bias_hh = (None if each is None else each.contiguous() for each in weights[:4])
    assert weight_hh is not None
    input, stride_unit = with_aligned_rows(input)
    arguments = {
        "input_ptr": input,
        "input_stride": input.stride(0) // stride_unit,
        "hidden_ptr": input if start.h is None else start.h.contiguous(),
        "cell_ptr": input if start.c is None else start.c.contiguous(),
        "weight_ih_ptr": weight_ih,
        "weight_hh_ptr": weight_hh,
        "bias_ih_ptr": weight_hh if bias_ih is None else bias_ih,
        "bias_hh_ptr": weight_hh if bias_hh is None else bias_hh,
        "hidden_next_ptr": h_1,
        "cell_next_ptr": c_1,
        "output_ptr": h_1 if output is None else output,
        "output_stride": 0 if output is None else output.stride(0),
        "gates_ptr": h_1 if gates is None else gates,
        "batch_size": input.shape[0],
    }
    constants = {
        "INPUT": input.shape[1],
        "INPUT_STRIDE_UNIT": stride_unit,
        "HIDDEN": weight_hh.shape[1],
        "HAS_STATE": start.h is not None,
        "HAS_BIAS": bias_ih is not None,
        "HAS_OUTPUT": output is not None,
        "KEEP_GATES": gates is not None,
        **cell_constants_of(plan),
    }
    kernel = prepared(cell_forward, (plan.programs,), constants, cell_compiler_options(plan))
    run(kernel, input.device, arguments)


@torch.library.custom_op("lstm_triton::cell_backward", mutates_args=())
def cell_backward(
    grad_h_1: Tensor, grad_c_1: Tensor, c_0: Tensor | None, c_1: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of a step's pre-activations (B, 4H) and of c_0 (B, H), from the gradients of its results.

    Args:
        grad_h_1, grad_c_1: (B, H).
        c_0: (B, H), or None for zeros.
        c_1, gates: as `cell_forward` returned them.
    """
    from ..kernels.cell import cell_backward as kernel

    grad_gates, grad_cell = torch.empty_like(gates), torch.empty_like(c_1)
    arguments = {
        "grad_hidden_ptr": grad_h_1.contiguous(),
        "grad_cell_next_ptr": grad_c_1.contiguous(),
        "gates_ptr": gates,
        "cell_ptr": c_1 if c_0 is None else c_0.contiguous(),
        "cell_next_ptr": c_1,
        "grad_gates_ptr": grad_gates,
        "grad_cell_ptr": grad_cell,
        "batch_size": c_1.shape[0],
    }
    block = CELL_BACKWARD_BLOCK
    constants = {"HIDDEN": c_1.shape[1], "HAS_STATE": c_0 is not None, "BLOCK": block}
    grid = (divide_up(c_1.numel(), block),)
    run(prepared(kernel, grid, constants, BACKWARD_OPTIONS), gates.device, arguments)
    return grad_gates, grad_cell


@cell_backward.register_fake
def _(grad_h_1: Tensor, grad_c_1: Tensor, c_0: Tensor | None, c_1: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gates), torch.empty_like(c_1)


def _results(input: Tensor, hidden_size: int, keep_gates: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for h, c and the gates."""
    shape = (input.shape[0], hidden_size)
    return (
        input.new_empty(shape),
        input.new_empty(shape),
        input.new_empty((shape[0], 4 * shape[1]) if keep_gates else 0),
    )


def cell_constants_of(plan: CellPlan) -> dict[str, object]:
    """The compile-time arguments that the forward kernel takes from a plan."""
    return {
        "BLOCK_BATCH": plan.block_batch,
        "BLOCK_HIDDEN": plan.block_hidden,
        "BLOCK_INPUT": plan.block_input,
        "BLOCK_K": plan.block_k,
        "DOT_PRECISION": plan.dot_precision,
        "TF32_ROUNDING": plan.tf32_rounding,
    }


def cell_compiler_options(plan: CellPlan) -> dict[str, object]:
    """The options of Triton's compiler for a plan."""
    return {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "enable_fp_fusion": True}

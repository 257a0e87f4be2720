"""One step of an LSTM layer and its derivative as PyTorch operators: they ask the planner and launch the kernels."""

from typing import Any

import torch
from torch import Tensor

from . import planner
from .planner import CellPlan, Device

BACKWARD_OPTIONS: dict[str, object] = {"num_warps": planner.CELL_BACKWARD_WARPS, "enable_fp_fusion": True}


def plan_of(input: Tensor, hidden_size: int, precision_of: str) -> CellPlan:
    """The plan of a step for an input (B, I)."""
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
        keep_gates: whether `cell_backward` will need them.
        precision_of: whose setting says whether float32 is computed in TF32, "matmul" or "rnn".

    Returns:
        h_1, c_1: (B, H).
        gates: (B, 4H), activated gates, if `keep_gates`; otherwise empty.

    All in the input's dtype.
    """
    from .kernels.cell import cell_forward as kernel

    batch_size, hidden_size = input.shape[0], weight_hh.shape[1]
    plan = plan_of(input, hidden_size, precision_of)
    hidden, cell, gates = _results(input, hidden_size, keep_gates)
    if input.stride(1) != 1:
        input = input.contiguous()
    _launch(
        kernel,
        plan.programs,
        compiler_options(plan),
        input_ptr=input,
        input_stride=input.stride(0),
        hidden_ptr=input if h_0 is None else h_0.contiguous(),
        cell_ptr=input if c_0 is None else c_0.contiguous(),
        weight_ih_ptr=weight_ih.contiguous(),
        weight_hh_ptr=weight_hh.contiguous(),
        bias_ih_ptr=weight_hh if bias_ih is None else bias_ih.contiguous(),
        bias_hh_ptr=weight_hh if bias_hh is None else bias_hh.contiguous(),
        hidden_next_ptr=hidden,
        cell_next_ptr=cell,
        gates_ptr=gates,
        batch_size=batch_size,
        INPUT=input.shape[1],
        HIDDEN=hidden_size,
        HAS_STATE=h_0 is not None,
        HAS_BIAS=bias_ih is not None,
        KEEP_GATES=keep_gates,
        **constants_of(plan),
    )
    return hidden, cell, gates


@cell_forward.register_fake
def _(
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
    return _results(input, weight_hh.shape[1], keep_gates)


@torch.library.custom_op("lstm_triton::cell_backward", mutates_args=())
def cell_backward(
    grad_h_1: Tensor, grad_c_1: Tensor, c_0: Tensor | None, c_1: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gradients of a step's results to those of its gates' pre-activations (B, 4H) and of c_0 (B, H).

    Args:
        grad_h_1, grad_c_1: (B, H).
        c_0: (B, H), or None for zeros.
        c_1, gates: as `cell_forward` returned them.
    """
    from .kernels.cell import cell_backward as kernel

    grad_gates, grad_cell = torch.empty_like(gates), torch.empty_like(c_1)
    _launch(
        kernel,
        -(-c_1.numel() // planner.CELL_BACKWARD_BLOCK),
        BACKWARD_OPTIONS,
        grad_hidden_ptr=grad_h_1.contiguous(),
        grad_cell_next_ptr=grad_c_1.contiguous(),
        gates_ptr=gates,
        cell_ptr=c_1 if c_0 is None else c_0.contiguous(),
        cell_next_ptr=c_1,
        grad_gates_ptr=grad_gates,
        grad_cell_ptr=grad_cell,
        batch_size=c_1.shape[0],
        HIDDEN=c_1.shape[1],
        HAS_STATE=c_0 is not None,
        BLOCK=planner.CELL_BACKWARD_BLOCK,
    )
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


def constants_of(plan: CellPlan) -> dict[str, object]:
    """A plan as compile-time arguments of the forward kernel."""
    return {
        "BLOCK_BATCH": plan.block_batch,
        "BLOCK_HIDDEN": plan.block_hidden,
        "BLOCK_INPUT": plan.block_input,
        "BLOCK_K": plan.block_k,
        "DOT_PRECISION": plan.dot_precision,
    }


def compiler_options(plan: CellPlan) -> dict[str, object]:
    """A plan as options of Triton's compiler."""
    return {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "enable_fp_fusion": True}


def _launch(kernel: Any, programs: int, options: dict[str, object], **arguments: Any) -> None:
    device = arguments["gates_ptr"].device
    if device.type == "cpu":  # interpreted
        kernel[(programs,)](**arguments)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](**arguments, **options)

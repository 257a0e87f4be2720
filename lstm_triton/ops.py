"""The two scans as PyTorch operators: they allocate the buffers, ask the planner, and launch the kernels.

Buffers have state rows (kernels/forward.py): T + 2 blocks of B rows, the first one for the initial states of the
forward direction, the last one for those of the reverse direction; a row has `state_stride(H)` elements, those past H
are padding. Whole blocks are addressed by their step: `STEPS` are the steps' own, and see `initial_block`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import planner
from .planner import MIN_DOT_DEPTH, Device, Kind, Plan, state_stride

STEPS = slice(1, -1)


def initial_block(reverse: bool) -> int:
    """The block of state rows that holds the initial state."""
    return -1 if reverse else 0


def previous_blocks(reverse: bool) -> slice:
    """The blocks of the states that the steps start from, in the order of STEPS."""
    return slice(2, None) if reverse else slice(None, -2)


def final_block(reverse: bool) -> int:
    """The block of state rows that holds the final state."""
    return 1 if reverse else -2


def allows_tf32() -> bool:
    """Whether cuDNN would be let compute a float32 LSTM in TF32."""
    # torch.backends.cudnn.rnn.fp32_precision, which some versions of PyTorch hide behind a module of that name.
    return bool(torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32")


def plan_of(kind: Kind, input: Tensor, hidden_size: int) -> Plan:
    """The plan of one scan over an input (T, B, I)."""
    return planner.plan(
        kind,
        batch_size=input.shape[1],
        input_size=input.shape[2],
        hidden_size=hidden_size,
        dtype=input.dtype,
        device=Device.of(input.device),
        allow_tf32=allows_tf32(),
    )


@torch.library.custom_op("lstm_triton::scan_forward", mutates_args=())
def scan_forward(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one layer in one direction.

    Args:
        input: (T, B, I).
        h_0, c_0: (B, H), or None for zeros.
        weight_ih, weight_hh: (4H, I) and (4H, H), gates in the order i, f, g, o.
        bias_ih, bias_hh: (4H,), or both None.
        reverse: walk from the last step to the first.
        save: keep what `scan_backward` needs.

    Returns:
        hidden: (T + 2, B, state_stride(H)) state rows of h, in the input's dtype.
        cell: float32 c: (T + 2, B, state_stride(H)) state rows if `save`, otherwise (1, B, ...) with the last c.
        gates: (T, B, 4H) activated gates, in the input's dtype, if `save`; otherwise empty.
    """
    from .kernels.forward import forward_scan

    seq_len, batch_size, input_size = input.shape
    hidden_size = weight_hh.shape[1]
    stride = state_stride(hidden_size)
    plan = plan_of("forward", input, hidden_size)

    hidden = sentinels((seq_len + 2, batch_size, stride), input)
    cell = torch.empty((seq_len + 2 if save else 1, batch_size, stride), dtype=torch.float32, device=input.device)
    for buffer, state in ((hidden, h_0), (cell, c_0)):
        initial = buffer[initial_block(reverse)]
        if state is None:
            initial.zero_()
        else:
            initial[:, :hidden_size] = state
            initial[:, hidden_size:] = 0
    if plan.fuse_input:
        gates = torch.empty(
            (seq_len, batch_size, 4 * hidden_size) if save else 0, dtype=input.dtype, device=input.device
        )
        input, stride_unit = _with_aligned_rows(input)
    else:
        with torch.autocast(input.device.type, enabled=False):
            gates = matmul(input.reshape(-1, input_size), weight_ih.t()).view(seq_len, batch_size, 4 * hidden_size)
        stride_unit = 1

    _launch(
        forward_scan,
        plan,
        input.device,
        gates_ptr=gates,
        input_ptr=input if plan.fuse_input else gates,
        input_stride_step=input.stride(0) // stride_unit,
        input_stride_batch=input.stride(1) // stride_unit,
        weight_ih_ptr=weight_ih.contiguous(),
        weight_hh_ptr=weight_hh.contiguous(),
        bias_ih_ptr=weight_hh if bias_ih is None else bias_ih.contiguous(),
        bias_hh_ptr=weight_hh if bias_hh is None else bias_hh.contiguous(),
        hidden_ptr=hidden,
        cell_ptr=cell,
        seq_len=seq_len,
        batch_size=batch_size,
        batch_tiles=plan.batch_tiles,
        reverse=int(reverse),
        HIDDEN=hidden_size,
        STATE_STRIDE=stride,
        HAS_BIAS=bias_ih is not None,
        SAVE=save,
        **input_constants_of(plan, input_size, stride_unit),
    )
    return hidden, cell, gates if save else gates.new_empty(0)


@scan_forward.register_fake
def _(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    seq_len, batch_size, _ = input.shape
    hidden_size = weight_hh.shape[1]
    rows = (seq_len + 2, batch_size, state_stride(hidden_size))
    hidden = input.new_empty(rows)
    cell = input.new_empty(rows if save else (1, *rows[1:]), dtype=torch.float32)
    return hidden, cell, input.new_empty((seq_len, batch_size, 4 * hidden_size) if save else 0)


@torch.library.custom_op("lstm_triton::scan_backward", mutates_args=())
def scan_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weight_hh: Tensor,
    cell: Tensor,
    gates: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """From the gradients of a layer's results to those of its gates' pre-activations.

    Args:
        grad_output: (T, B, H), or None for zeros.
        grad_h_n, grad_c_n: (B, H), or None for zeros.
        weight_hh: (4H, H).
        cell, gates: as `scan_forward` returned them.
        reverse: as `scan_forward` had it.

    Returns:
        grad_gates: (T + 2, B, 4 * state_stride(H)) state rows, gate-minor: column 4 * unit + gate, padded past 4H.
        grad_cell: (B, state_stride(H)) float32, the gradient of c_0.
    """
    from .kernels.backward import backward_scan

    seq_len, batch_size, _ = gates.shape
    hidden_size = weight_hh.shape[1]
    stride = state_stride(hidden_size)
    plan = plan_of("backward", gates, hidden_size)

    grad_gates = sentinels((seq_len + 2, batch_size, 4 * stride), gates)
    grad_gates[initial_block(not reverse)].zero_()  # nothing comes after the last step
    grad_cell = torch.zeros((batch_size, stride), dtype=torch.float32, device=gates.device)
    if grad_c_n is not None:
        grad_cell[:, :hidden_size] = grad_c_n
    if grad_output is None:
        grad_output = gates.new_zeros(hidden_size).expand(seq_len, batch_size, hidden_size)
    elif grad_output.stride(2) != 1:
        grad_output = grad_output.contiguous()
    grad_h_n = gates.new_zeros((batch_size, hidden_size)) if grad_h_n is None else grad_h_n.contiguous()

    _launch(
        backward_scan,
        plan,
        gates.device,
        grad_output_ptr=grad_output,
        grad_output_stride_step=grad_output.stride(0),
        grad_output_stride_batch=grad_output.stride(1),
        grad_hidden_ptr=grad_h_n,
        grad_cell_ptr=grad_cell,
        gates_ptr=gates,
        cell_ptr=cell,
        weight_hh_ptr=weight_hh.contiguous(),
        grad_gates_ptr=grad_gates,
        seq_len=seq_len,
        batch_size=batch_size,
        batch_tiles=plan.batch_tiles,
        reverse=int(reverse),
        HIDDEN=hidden_size,
        STATE_STRIDE=stride,
    )
    return grad_gates, grad_cell


@scan_backward.register_fake
def _(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weight_hh: Tensor,
    cell: Tensor,
    gates: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    seq_len, batch_size, _ = gates.shape
    stride = state_stride(weight_hh.shape[1])
    return gates.new_empty((seq_len + 2, batch_size, 4 * stride)), cell.new_empty((batch_size, stride))


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in TF32 where cuDNN would use it for an LSTM: torch.matmul's own setting is off at first."""
    if left.dtype == torch.float32 and left.is_cuda:
        product: Tensor = _cuda_matmul(left, right)
        return product
    return left @ right


@torch.library.custom_op("lstm_triton::matmul", mutates_args=())
def _cuda_matmul(left: Tensor, right: Tensor) -> Tensor:
    # An operator, because torch.compile cannot change the setting within a graph.
    with _matmul_precision("tf32" if allows_tf32() else "ieee"):
        return left @ right


@_cuda_matmul.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


_matmul_precision_lock = threading.Lock()


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    # The setting is the whole process's, and backward runs in a thread for each device.
    with _matmul_precision_lock:
        previous = settings.fp32_precision
        if previous == precision or {previous, precision} <= {"none", "ieee"}:
            yield
            return
        settings.fp32_precision = precision
        try:
            yield
        finally:
            settings.fp32_precision = "none"  # inherited from torch.backends.fp32_precision, as it may have been
            if settings.fp32_precision != previous:
                settings.fp32_precision = previous


def sentinels(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An exchange buffer in which nothing has been published (kernels/exchange.py)."""
    buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
    buffer.view(torch.int32 if like.dtype.itemsize == 4 else torch.int16).fill_(-1)
    return buffer


def _with_aligned_rows(input: Tensor) -> tuple[Tensor, int]:
    """An input whose rows are contiguous, aligned if their length allows it; and the unit of its strides."""
    unit = 16 if input.shape[2] % 16 == 0 else 1
    if input.stride(2) != 1 or input.stride(0) % unit or input.stride(1) % unit:
        input = input.contiguous()
    return input, unit


def constants_of(plan: Plan) -> dict[str, object]:
    """A plan as the compile-time arguments that both kernels share."""
    return {
        "SEVERAL_TILES": plan.batch_tiles > plan.groups,
        "BLOCK_BATCH": plan.block_batch,
        "BLOCK_HIDDEN": plan.block_hidden,
        "BLOCK_K": plan.block_k,
        "SPLIT_K": plan.split_k,
        "RESIDENT_CHUNKS": plan.resident_chunks,
        "GROUP_CHUNKS": plan.group_chunks,
        "ACCUMULATORS": plan.accumulators,
        "DOT_PRECISION": plan.dot_precision,
        "PACKED": plan.packed,
    }


def input_constants_of(plan: Plan, input_size: int, stride_unit: int) -> dict[str, object]:
    """The compile-time arguments of the forward kernel for its input: without fusion all inputs share one kernel."""
    fused = plan.fuse_input
    return {
        "FUSE_INPUT": fused,
        "INPUT": input_size if fused else 1,
        "BLOCK_INPUT": plan.block_input if fused else MIN_DOT_DEPTH,
        "INPUT_STRIDE_UNIT": stride_unit if fused else 1,
    }


def compiler_options(plan: Plan, is_nvidia: bool) -> dict[str, object]:
    """A plan as options of Triton's compiler."""
    options: dict[str, object] = {"num_warps": plan.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if is_nvidia:
        options["maxnreg"] = 255  # a multiprocessor runs one program: nothing is gained by using fewer registers
    return options


def launch_options(plan: Plan) -> dict[str, object]:
    """A plan as options of a launch on a GPU."""
    options = compiler_options(plan, is_nvidia=torch.version.hip is None)
    # Programs that share a batch tile wait for each other: all run at the same time, or the driver refuses.
    return {**options, "launch_cooperative_grid": plan.slices > 1}


def _launch(kernel: Any, plan: Plan, device: torch.device, **arguments: object) -> None:
    grid = (plan.programs,)
    if device.type == "cpu":  # interpreted
        kernel[grid](**arguments, **constants_of(plan))
        return
    with torch.cuda.device(device):
        kernel[grid](**arguments, **constants_of(plan), **launch_options(plan))

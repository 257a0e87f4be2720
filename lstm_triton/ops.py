"""The two scans as PyTorch operators: they allocate the buffers, ask the planner, and launch the kernels.

Buffers have state rows (kernels/forward.py): T + 2 blocks of B rows, the first one for the initial states of the
forward direction, the last one for those of the reverse direction; a row has `state_stride(H)` elements, those past H
are padding. Whole blocks are addressed by their step: `STEPS` are the steps' own, and see `initial_block`. Of a ragged
batch (ragged.py), whose steps may be any number of rows, rows are numbered one by one.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import planner
from .planner import MIN_DOT_DEPTH, Device, Kind, Plan, state_stride
from .ragged import Ragged

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


def plan_of(kind: Kind, input: Tensor, hidden_size: int, batch_size: int | None = None) -> Plan:
    """The plan of one scan over an input (T, B, I), or (rows, I) of a batch of B sequences."""
    return planner.plan(
        kind,
        batch_size=input.shape[1] if batch_size is None else batch_size,
        input_size=input.shape[-1],
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
    keep_cells: bool,
    keep_gates: bool,
    tables: Sequence[Tensor],
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one layer in one direction.

    Args:
        input: (T, B, I), or of a ragged batch (rows, I).
        h_0, c_0: (B, H), or None for zeros.
        weight_ih, weight_hh: (4H, I) and (4H, H), gates in the order i, f, g, o.
        bias_ih, bias_hh: (4H,), or both None.
        reverse: walk from the last step to the first.
        keep_cells, keep_gates: what to keep; `scan_backward` needs both.
        tables: the fields of `Ragged`, empty if the batch is not ragged.
        h_reset, c_reset: (B, H), where sequences start anew from, or None for zeros.

    Returns:
        hidden: (T + 2, B, state_stride(H)) state rows of h, in the input's dtype; ragged (3B + rows, ...), where rows
            without a step hold zeros.
        cell: float32 c: shaped as `hidden` if `keep_cells`, otherwise (1, B, ...), ragged (2B, ...), with the last c
            in the first B rows.
        gates: (T, B, 4H), ragged (rows, 4H), activated gates in the input's dtype, if `keep_gates`; otherwise empty.
    """
    from .kernels.forward import forward_scan

    ragged = Ragged(*tables) if tables else None
    batch_size = input.shape[1] if ragged is None else ragged.batch_size
    input_size, hidden_size = input.shape[-1], weight_hh.shape[1]
    stride = state_stride(hidden_size)
    plan = plan_of("forward", input, hidden_size, batch_size)
    states, kept = _state_rows(input, batch_size, stride, ragged is not None, keep_cells)

    hidden = sentinels(states, input)
    cell = torch.empty(kept, dtype=torch.float32, device=input.device)
    if ragged is None:
        for buffer, state in ((hidden, h_0), (cell, c_0)):
            _fill(buffer[initial_block(reverse)], state)
    else:
        blocks = {"initial": slice(batch_size), "reverse": slice(-2 * batch_size, -batch_size)}
        if reverse:
            blocks = dict(zip(blocks, reversed(blocks.values()), strict=True))
        # NaNs as all NaNs are: here too nobody must mistake one for a sentinel.
        _fill(hidden[blocks["initial"]], h_0, canonical=True)
        _fill(hidden[blocks["reverse"]], None)
        _fill(hidden[-batch_size:], h_reset, canonical=True)
        hidden[batch_size : batch_size + ragged.rows].masked_fill_(~ragged.is_step().unsqueeze(1), 0)
        _fill(cell[blocks["initial"] if keep_cells else slice(batch_size)], c_0)
        _fill(cell[-batch_size:], c_reset)
        input = input.contiguous()
    if plan.fuse_input:
        shape = (*input.shape[:-1], 4 * hidden_size)
        gates = torch.empty(shape if keep_gates else 0, dtype=input.dtype, device=input.device)
        input, stride_unit = _with_aligned_rows(input)
    else:
        with torch.autocast(input.device.type, enabled=False):
            gates = matmul(input.reshape(-1, input_size), weight_ih.t()).view(*input.shape[:-1], 4 * hidden_size)
        stride_unit = 1

    _launch(
        forward_scan,
        plan,
        input.device,
        gates_ptr=gates,
        input_ptr=input if plan.fuse_input else gates,
        input_stride_step=input.stride(0) // stride_unit,
        input_stride_batch=input.stride(-2) // stride_unit,
        weight_ih_ptr=weight_ih.contiguous(),
        weight_hh_ptr=weight_hh.contiguous(),
        bias_ih_ptr=weight_hh if bias_ih is None else bias_ih.contiguous(),
        bias_hh_ptr=weight_hh if bias_hh is None else bias_hh.contiguous(),
        hidden_ptr=hidden,
        cell_ptr=cell,
        sources_ptr=hidden if ragged is None else ragged.sources(reverse),
        **_lookups(ragged, plan, input, hidden),
        batch_size=batch_size,
        batch_tiles=plan.batch_tiles,
        reverse=int(reverse),
        HIDDEN=hidden_size,
        STATE_STRIDE=stride,
        HAS_BIAS=bias_ih is not None,
        KEEP_CELLS=keep_cells,
        KEEP_GATES=keep_gates,
        **input_constants_of(plan, input_size, stride_unit),
    )
    return hidden, cell, gates if keep_gates else gates.new_empty(0)


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
    keep_cells: bool,
    keep_gates: bool,
    tables: Sequence[Tensor],
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size = Ragged(*tables).batch_size if tables else input.shape[1]
    hidden_size = weight_hh.shape[1]
    states, kept = _state_rows(input, batch_size, state_stride(hidden_size), bool(tables), keep_cells)
    gates = input.new_empty((*input.shape[:-1], 4 * hidden_size) if keep_gates else 0)
    return input.new_empty(states), input.new_empty(kept, dtype=torch.float32), gates


@torch.library.custom_op("lstm_triton::scan_backward", mutates_args=())
def scan_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weight_hh: Tensor,
    cell: Tensor,
    gates: Tensor,
    reverse: bool,
    tables: Sequence[Tensor],
    grad_cells: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From the gradients of a layer's results to those of its gates' pre-activations.

    Args:
        grad_output: (T, B, H), of a ragged batch (rows, H), or None for zeros.
        grad_h_n, grad_c_n: (B, H), or None for zeros.
        weight_hh: (4H, H).
        cell, gates: as `scan_forward` returned them.
        reverse, tables: as `scan_forward` had them.
        grad_cells: gradients of every c, shaped as `grad_output`, or None for zeros.

    Returns:
        grad_gates: (T + 2, B, 4 * state_stride(H)) state rows, ragged (3B + rows, ...), gate-minor: column
            4 * unit + gate, padded past 4H; rows that are none of a step hold zeros where they are read.
        grad_cell: (B, state_stride(H)) float32, the gradient of c_0; ragged (2B, ...), then that of c_reset.
    """
    from .kernels.backward import backward_scan

    ragged = Ragged(*tables) if tables else None
    batch_size = gates.shape[1] if ragged is None else ragged.batch_size
    hidden_size = weight_hh.shape[1]
    stride = state_stride(hidden_size)
    plan = plan_of("backward", gates, hidden_size, batch_size)

    states, _ = _state_rows(gates, batch_size, 4 * stride, ragged is not None, True)
    grad_gates = sentinels(states, gates)
    if ragged is None:
        grad_gates[initial_block(not reverse)].zero_()  # nothing comes after the last step
    else:
        grad_gates[:batch_size].zero_()
        grad_gates[-2 * batch_size :].zero_()
        grad_gates[batch_size : batch_size + ragged.rows].masked_fill_(~ragged.is_step().unsqueeze(1), 0)
    grad_cell = cell.new_zeros((batch_size if ragged is None else 2 * batch_size, stride))
    if grad_c_n is not None:
        grad_cell[:batch_size, :hidden_size] = grad_c_n
    if grad_output is None:
        grad_output = gates.new_zeros(hidden_size).expand(*gates.shape[:-1], hidden_size)
    elif grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    grad_h_n = gates.new_zeros((batch_size, hidden_size)) if grad_h_n is None else grad_h_n.contiguous()

    _launch(
        backward_scan,
        plan,
        gates.device,
        grad_output_ptr=grad_output,
        grad_output_stride_step=grad_output.stride(0),
        grad_output_stride_batch=grad_output.stride(-2),
        grad_hidden_ptr=grad_h_n,
        grad_cells_ptr=grad_h_n if grad_cells is None else grad_cells.contiguous(),
        grad_cell_ptr=grad_cell,
        gates_ptr=gates,
        cell_ptr=cell,
        weight_hh_ptr=weight_hh.contiguous(),
        grad_gates_ptr=grad_gates,
        sources_ptr=gates if ragged is None else ragged.sources(reverse),
        successors_ptr=gates if ragged is None else ragged.successors(reverse),
        **_lookups(ragged, plan, gates, gates),
        batch_size=batch_size,
        batch_tiles=plan.batch_tiles,
        reverse=int(reverse),
        HIDDEN=hidden_size,
        STATE_STRIDE=stride,
        GRAD_CELLS=grad_cells is not None,
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
    tables: Sequence[Tensor],
    grad_cells: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch_size = Ragged(*tables).batch_size if tables else gates.shape[1]
    stride = state_stride(weight_hh.shape[1])
    states, _ = _state_rows(gates, batch_size, 4 * stride, bool(tables), True)
    return gates.new_empty(states), cell.new_empty((2 * batch_size if tables else batch_size, stride))


def _state_rows(
    steps: Tensor, batch_size: int, stride: int, ragged: bool, keep: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a buffer of state rows for steps (T, B, ...) or (rows, ...); and of one that need not keep them."""
    if ragged:
        shape: tuple[int, ...] = (3 * batch_size + steps.shape[0], stride)
        return shape, shape if keep else (2 * batch_size, stride)
    shape = (steps.shape[0] + 2, batch_size, stride)
    return shape, shape if keep else (1, batch_size, stride)


def _fill(rows: Tensor, state: Tensor | None, canonical: bool = False) -> None:
    """Write a state (B, H) into its state rows."""
    if state is None:
        rows.zero_()
        return
    hidden_size = state.shape[1]
    rows[:, :hidden_size] = torch.where(state.isnan(), torch.nan, state) if canonical else state
    rows[:, hidden_size:] = 0


def _lookups(ragged: Ragged | None, plan: Plan, steps: Tensor, unused: Tensor) -> dict[str, object]:
    """What both kernels need to find the rows of steps (T, B, ...) or (rows, ...)."""
    if ragged is None:
        return {
            "offsets_ptr": unused,
            "tile_steps_ptr": unused,
            "seq_len": steps.shape[0],
            "row_count": steps.shape[0] * steps.shape[1],
            "RAGGED": False,
        }
    return {
        "offsets_ptr": ragged.offsets,
        "tile_steps_ptr": ragged.tile_steps(plan.block_batch, plan.batch_tiles),
        "seq_len": ragged.offsets.shape[0] - 1,
        "row_count": ragged.rows,
        "RAGGED": True,
    }


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in TF32 where cuDNN would use it for an LSTM: torch.matmul's own setting is off at first."""
    if left.dtype == torch.float32 and left.is_cuda:
        product: Tensor = _cuda_matmul(left, right)
        return product
    return left @ right


@torch.library.custom_op("lstm_triton::matmul", mutates_args=())
def _cuda_matmul(left: Tensor, right: Tensor) -> Tensor:
    # An operator, because torch.compile cannot change the setting within a graph.
    return batched_matmul(left, right)


@_cuda_matmul.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


def batched_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`matmul` on a GPU, of any batch of matrices."""
    with _matmul_precision("tf32" if allows_tf32() else "ieee"):
        return left @ right


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
    unit = 16 if input.shape[-1] % 16 == 0 else 1
    if input.stride(-1) != 1 or any(stride % unit for stride in input.stride()[:-1]):
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

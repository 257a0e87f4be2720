"""One step of an LSTM layer and its derivative as PyTorch operators: they ask the planner and launch the kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import flops, target
from ..failure import explained
from ..prepared_kernel import PreparedKernel
from ..stack import States
from ..target import Device
from . import planner
from .alignment import unit_of_rows, with_aligned_rows
from .dispatch import named
from .launch import prepared, run
from .plan import CELL_BACKWARD_BLOCK, CELL_BACKWARD_WARPS, CellPlan, divide_up

BACKWARD_OPTIONS: dict[str, object] = {"num_warps": CELL_BACKWARD_WARPS, "enable_fp_fusion": True}


def plan_of_cell(input: Tensor, hidden_size: int, precision_of: str, input_size: int | None = None) -> CellPlan:
    """The plan of a step.

    Args:
        input: (B, I).
        precision_of: as in `cell_forward`.
        input_size: another I.
    """
    return planner.plan_cell(
        batch_size=input.shape[0],
        input_size=input.shape[1] if input_size is None else input_size,
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
    weights = [weight_ih, weight_hh]
    if bias_ih is not None and bias_hh is not None:
        weights += bias_ih, bias_hh
    kernel = _kernel(
        plan_of_cell(input, hidden_size, precision_of),
        INPUT=input.shape[1],
        INPUT_STRIDE_UNIT=unit_of_rows(input.shape[1]),
        HIDDEN=hidden_size,
        HAS_STATE=h_0 is not None,
        HAS_BIAS=bias_ih is not None,
        HAS_OUTPUT=False,
        KEEP_GATES=keep_gates,
    )
    _launch(kernel, input, h_0, c_0, weights, hidden, cell, gates=gates if keep_gates else None)
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
    return StackStep.of(input, weights, directions, bias, h_0 is not None).run(input, h_0, c_0, weights)


class StackStep:
    """One step of a stack of layers, prepared for its sizes: the kernel of each lane."""

    def __init__(
        self, kernels: Sequence[PreparedKernel], directions: int, bias: bool, batch_size: int, hidden_size: int
    ) -> None:
        self.kernels, self.directions, self.hidden_size = kernels, directions, hidden_size
        self.weights_of_lane = 4 if bias else 2
        self.output_sizes = (batch_size, directions * hidden_size)
        self.state_sizes = (len(kernels), batch_size, hidden_size)

    @staticmethod
    def of(input: Tensor, weights: Sequence[Tensor], directions: int, bias: bool, has_state: bool) -> "StackStep":
        """For an input (B, I) and weights of these sizes, in this dtype, on this device and on the current target."""
        kernels, hidden_size = [], weights[0].shape[0] // 4
        for weight_ih in weights[:: 4 if bias else 2]:
            input_size = weight_ih.shape[1]
            kernel = _kernel(
                plan_of_cell(input, hidden_size, "rnn", input_size),
                INPUT=input_size,
                INPUT_STRIDE_UNIT=unit_of_rows(input_size),
                HIDDEN=hidden_size,
                HAS_STATE=has_state,
                HAS_BIAS=bias,
                HAS_OUTPUT=True,
                KEEP_GATES=False,
            )
            kernels.append(kernel)
        return StackStep(kernels, directions, bias, input.shape[0], hidden_size)

    def call(
        self, time_axis: int, on: target.Target, input: Tensor, hx: States | None, weights: Sequence[Tensor]
    ) -> tuple[Tensor, States]:
        """What `functional.lstm` returns for an input (1, B, I) or (B, 1, I), where nothing observes operators."""
        h_0, c_0 = (None, None) if hx is None else hx
        batch_size, features = self.output_sizes
        sizes = (batch_size, 1, features) if time_axis == 1 else (1, batch_size, features)
        row = input.select(time_axis, 0)
        try:
            if torch._C._autograd._profiler_enabled():
                with torch.profiler.record_function("lstm_triton::single_step"):
                    output, h_n, c_n = self.run(row, h_0, c_0, weights, on, sizes)
            else:
                output, h_n, c_n = self.run(row, h_0, c_0, weights, on, sizes)
        except RuntimeError as error:
            if (failed := explained(error)) is None:
                raise
            raise failed from error
        return output, (h_n, c_n)

    def run(
        self,
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        on: target.Target | None = None,
        output_sizes: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `single_step`.

        Args:
            on: the target, if it is known already.
            output_sizes: of the output, which may have an axis for its one time step.
        """
        h_n, c_n = input.new_empty(self.state_sizes), input.new_empty(self.state_sizes)
        output = input.new_empty(output_sizes or self.output_sizes)
        kernels, hidden_size, size = self.kernels, self.hidden_size, self.weights_of_lane
        stride = self.output_sizes[1]
        if self.state_sizes[0] == 1:
            _launch(kernels[0], input, h_0, c_0, weights, h_n, c_n, output=output, output_stride=stride, on=on)
            return output, h_n, c_n
        nothing = [None] * self.state_sizes[0]
        lanes = zip(
            kernels,
            h_n.unbind(),
            c_n.unbind(),
            nothing if h_0 is None else h_0.unbind(),
            nothing if c_0 is None else c_0.unbind(),
            strict=True,
        )
        below = input
        for lane, (kernel, h_1, c_1, h, c) in enumerate(lanes):
            at = lane % self.directions
            if lane > 0 and at == 0:  # a new layer: it reads the output of the layer before
                below, output = output, input.new_empty(output_sizes or self.output_sizes)
            own = output[..., at * hidden_size : (at + 1) * hidden_size] if at > 0 else output
            own_weights = weights[lane * size : (lane + 1) * size]
            _launch(kernel, below, h, c, own_weights, h_1, c_1, output=own, output_stride=stride, on=on)
        return output, h_n, c_n


@single_step.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = named(single_step, arguments)
    input, hidden_size = given.input, given.weights[0].shape[0] // 4
    states = (len(given.weights) // (4 if given.bias else 2), input.shape[0], hidden_size)
    output = input.new_empty((input.shape[0], given.directions * hidden_size))
    return output, input.new_empty(states), input.new_empty(states)


@flops.counts("lstm_triton::single_step")
def _(*arguments: Any) -> int:
    given = named(single_step, arguments)
    return flops.products(given.input.shape[0], given.weights)


def _kernel(plan: CellPlan, **constants: object) -> PreparedKernel:
    """The kernel of a step. `constants`: the compile-time arguments that are not the plan's."""
    from ..kernels.cell import cell_forward

    constants = {**constants, **cell_constants_of(plan)}
    return prepared(cell_forward, (plan.programs,), constants, cell_compiler_options(plan))


def _launch(
    kernel: PreparedKernel,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
    h_1: Tensor,
    c_1: Tensor,
    *,
    gates: Tensor | None = None,
    output: Tensor | None = None,
    output_stride: int = 0,
    on: target.Target | None = None,
) -> None:
    """Launch one step. It writes h_1 and c_1, and what its kernel is for: `gates`, and h once more into `output`."""
    tensors = weights if h is None or c is None else (*weights, h, c)
    if not all(map(Tensor.is_contiguous, tensors)):
        weights = [weight.contiguous() for weight in weights]
        h, c = (None if state is None else state.contiguous() for state in (h, c))
    input, (*_, stride) = with_aligned_rows(input)
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (weight_hh, weight_hh)
    arguments = {
        "input_ptr": input,
        "input_stride": stride,
        "hidden_ptr": input if h is None else h,
        "cell_ptr": input if c is None else c,
        "weight_ih_ptr": weight_ih,
        "weight_hh_ptr": weight_hh,
        "bias_ih_ptr": bias_ih,
        "bias_hh_ptr": bias_hh,
        "hidden_next_ptr": h_1,
        "cell_next_ptr": c_1,
        "output_ptr": h_1 if output is None else output,
        "output_stride": output_stride,
        "gates_ptr": h_1 if gates is None else gates,
        "batch_size": h_1.shape[-2],
    }
    run(kernel, input.device, arguments, on)


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

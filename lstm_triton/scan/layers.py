"""The door to the kernels: a stack of layers, with projections folded into its weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import transforms
from ..ragged import Ragged
from ..stack import Stack
from .autograd import Scan
from .buffers import cells_of, output_of
from .cell import single_step
from .dispatch import invoke
from .formula import stack_by_formula
from .forward import scan_forward
from .gradients import Options, Saved
from .schedule import is_single_step


def scan_layers(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    directions: int = 1,
    bias: bool = True,
    reverse: bool = False,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    preact_0: Tensor | None = None,
    preact_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    dropout: float = 0.0,
    low_memory: bool = False,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """All steps of a stack of layers, through the Triton kernels.

    Args:
        input: (T, B, I), of any strides; of a ragged batch (rows, I).
        h_0, c_0: (lanes, B, H), or both None for zeros. A lane is one direction of one layer, layer after layer.
        weights: of each lane weight_ih (4H, I; from the second layer on 4H, directions * H) and weight_hh (4H, H),
            gates in the order i, f, g, o; with `bias` also bias_ih and bias_hh (4H,).
        directions: 1 or 2: forward and reverse.
        reverse: of one direction: walk from the last step to the first.
        h_reset, c_reset: (lanes, B, H), where sequences start anew from, or both None for zeros.
        preact_0, preact_reset: (lanes, B, 4H), or None: the share that initial states and those to start anew from
            have in the pre-activations, where they are no h of this layer. For a single layer.
        ragged: which step follows on which; None: all steps of all sequences in turn.
        dropout: the probability of dropout on the output of every layer but the last.
        low_memory: keep little for backward, which then takes longer (low_memory.py); not with `return_cells`, which
            asks for what would not be kept.
        return_cells: whether every c_t is asked for.

    Returns:
        output (T, B, directions * H), h_n and c_n (lanes, B, H), and with `return_cells` cells (lanes, T, B, H); of a
        ragged batch, output (rows, ...) and cells (lanes, rows, H), zeros where there is no step. The output may be a
        view of a buffer.

    All tensors have one dtype (float32, float16 or bfloat16) and one device: a GPU, or the CPU while
    lstm_triton.interpreter.interpret() is on. The caller has checked the arguments. Every tensor gets gradients, of any
    order: those above the first, and forward-mode ones, come from the step-by-step formula (reference.py), in the same
    dtype.
    """
    stack = Stack(weights, directions, bias, reverse)
    states = (input, h_0, c_0, h_reset, c_reset, preact_0, preact_reset)
    tables = () if ragged is None else tuple(ragged)
    dropout = float(dropout) if stack.num_layers > 1 else 0.0  # an integer would be another type to a kernel
    seed = torch.randint(2**63 - 1, (1,), device=input.device) if dropout > 0 else None
    options = Options(directions, bias, reverse, dropout, low_memory and not return_cells, return_cells, len(tables))
    if transforms.in_forward_mode():
        unkept = (input,) * 4  # of no use to the formula
        results = stack_by_formula(Saved(options, states, seed, *unkept, tables, weights))
        return results if return_cells else results[:3]
    if torch.is_grad_enabled() and (transforms.active() or _any_requires_grad(*states, *weights)):
        results = Scan.apply(*states, seed, *options, *tables, *weights)  # type: ignore[no-untyped-call]
        return tuple(results[: 4 if return_cells else 3])
    if is_single_step(input.shape[0], ragged is not None, dropout > 0, fuse_input=preact_0 is None):
        output, h_n, c_n = invoke(single_step, input[0], h_0, c_0, weights, directions, bias)
        results = (output.unsqueeze(0), h_n, c_n)
        return (*results, c_n.unsqueeze(1)) if return_cells else results
    hidden, _, cell, _, h_n, c_n = invoke(
        scan_forward, input, h_0, c_0, weights, directions, bias, reverse, return_cells, False, tables, h_reset,
        c_reset, dropout, seed, preact_0, preact_reset,
    )  # fmt: skip
    output = output_of(hidden, stack, input, ragged)
    return (output, h_n, c_n, cells_of(cell, stack, input, ragged)) if return_cells else (output, h_n, c_n)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def scan_projected_layers(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    directions: int = 1,
    bias: bool = True,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    dropout: float = 0.0,
    low_memory: bool = False,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """`scan_layers` with projections: the last weight of a lane is its weight_hr (P, H), and h has P elements.

    In h_t = W_hr y_t, y_t = o_t * tanh(c_t), the scan works with y: W_hh h_{t-1} = (W_hh W_hr) y_{t-1}, one product
    beforehand, and a step has one exchange instead of two. Only the states that are given have to be multiplied with
    W_hh themselves. All outputs are projected at once.
    """
    size = 5 if bias else 3
    lanes = len(weights) // size
    ends: list[tuple[Tensor, ...]] = []
    for first in range(0, lanes, directions):
        of_lanes, folded, preacts = range(first, first + directions), [], []
        for lane in of_lanes:
            weight_ih, weight_hh, *biases, weight_hr = weights[size * lane : size * (lane + 1)]
            folded += [weight_ih, weight_hh @ weight_hr, *biases]
            preacts.append([None if each is None else each[lane] @ weight_hh.t() for each in (h_0, h_reset)])
        preact_0, preact_reset = (None if each[0] is None else torch.stack(each) for each in zip(*preacts, strict=True))
        lane_slice = slice(first, first + directions)
        output, y_n, *others = scan_layers(
            input,
            None,
            None if c_0 is None else c_0[lane_slice],
            folded,
            directions=directions,
            bias=bias,
            c_reset=None if c_reset is None else c_reset[lane_slice],
            preact_0=preact_0,
            preact_reset=preact_reset,
            ragged=ragged,
            low_memory=low_memory,
            return_cells=return_cells,
        )
        projections = [weights[size * lane + size - 1].t() for lane in of_lanes]
        parts = output.unflatten(-1, (directions, -1)).unbind(-2)
        input = torch.cat([part @ weight for part, weight in zip(parts, projections, strict=True)], dim=-1)
        h_n = torch.stack([y @ weight for y, weight in zip(y_n, projections, strict=True)])
        if ragged is not None and h_0 is not None:  # sequences without steps end where they begin
            h_n = torch.where(ragged.lengths.unsqueeze(1) > 0, h_n, h_0[lane_slice])
        ends.append((h_n, *others))
        if dropout > 0 and first + directions < lanes:
            input = torch.nn.functional.dropout(input, dropout)
    return input, *(torch.cat(each) for each in zip(*ends, strict=True))


def scan_lane(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reverse: bool,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """`scan_layers` of one layer in one direction: states (B, H), and cells without an axis for lanes."""
    states = {"h_0": h_0, "c_0": c_0, "h_reset": h_reset, "c_reset": c_reset}
    output, *others = scan_layers(
        input,
        weights=[weight for weight in (weight_ih, weight_hh, bias_ih, bias_hh) if weight is not None],
        bias=bias_ih is not None,
        reverse=reverse,
        ragged=ragged,
        return_cells=return_cells,
        **{name: None if state is None else state.unsqueeze(0) for name, state in states.items()},  # type: ignore[arg-type]
    )
    return output, *(other.squeeze(0) for other in others)

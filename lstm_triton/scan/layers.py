"""Entry points of the path through the kernels: a stack of layers, without and with projections."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..ragged import Ragged
from ..stack import NO_STATES, LaneResults, LaneWeights, Options, Stack, Start, States
from .autograd import LSTMScan
from .cell import single_step
from .dispatch import apply, invoke
from .formula import stack_by_formula
from .forward import scan_forward
from .gradients import stacked
from .layout import Layout, output_of
from .saved import Fixed, Inputs, Static
from .schedule import is_single_step


def scan_layers(input: Tensor, start: Start, stack: Stack, options: Options) -> LaneResults:
    """All steps of a stack of layers without projections, through the Triton kernels.

    Args:
        input: (T, B, I), of any strides; ragged: (rows, I).
        start: the states that sequences start from, (lanes, B, ...); h and c are both given, or both None.

    Returns:
        output (T, B, directions * H), h_n and c_n (lanes, B, H), and with `return_cells` cells (lanes, T, B, H).
        Ragged: output (rows, directions * H) and cells (lanes, rows, H), with zeros where there is no step.

    All tensors have one dtype (float32, float16 or bfloat16) and one device, on which kernels run (target.py). The
    caller has checked the arguments. Every tensor gets gradients of any order. The kernels compute first derivatives.
    Higher derivatives and forward-mode derivatives come from the step-by-step formula (formula.py), in the dtype of the
    tensors.
    """
    static = static_of(options, stack.lanes(), stack.directions, stack.bias(), stack.reverse)
    seed = seed_of(static, input)
    fixed = Fixed(seed) if options.ragged is None else Fixed(seed, *options.ragged)
    inputs = Inputs(input, start, stack.arguments()[0])
    if transforms.in_forward_mode():
        return stack_by_formula(inputs, static, fixed)[: 4 if static.return_cells else 3]
    if torch.is_grad_enabled() and (transforms.active() or requires_grad(inputs)):
        return train(inputs, static, fixed)
    return infer(inputs, static, fixed)


def static_of(options: Options, lanes: int, directions: int, bias: bool, reverse: bool = False) -> Static:
    low_memory = options.low_memory and not options.return_cells
    return Static(
        directions,
        bias,
        reverse,
        float(options.dropout) if lanes > directions else 0.0,  # an int would be another type to a kernel
        low_memory,
        options.return_cells,
        # With low_memory, a single lane keeps little more than its h: a copy of the output would double it.
        options.shared_output or (low_memory and lanes == 1),
    )


def seed_of(static: Static, input: Tensor) -> Tensor | None:
    """A new seed of dropout; None: there is no dropout."""
    return torch.randint(2**63 - 1, (1,), device=input.device) if static.dropout > 0 else None


def requires_grad(inputs: Inputs) -> bool:
    """Whether a gradient of one of these tensors is needed."""
    return True in [tensor.requires_grad for tensor in inputs.flat() if tensor is not None]


def train(inputs: Inputs, static: Static, fixed: Fixed) -> LaneResults:
    """`scan_layers` where a gradient is needed, and none in forward mode."""
    results = apply(LSTMScan, *static, *fixed, inputs.input, *inputs.start, *inputs.weights)
    return tuple(results[: 4 if static.return_cells else 3])


def infer(inputs: Inputs, static: Static, fixed: Fixed) -> LaneResults:
    """`scan_layers` where no gradient is needed."""
    input, start, weights = inputs
    directions, is_ragged = static.directions, fixed.before is not None
    if is_single_step(input.shape[0], is_ragged, static.dropout > 0, fuse_input=start.preact is None):
        output, h_n, c_n = invoke(single_step, input[0], start.h, start.c, weights, directions, static.bias)
        results = (output.unsqueeze(0), h_n, c_n)
        return (*results, c_n.unsqueeze(1).clone()) if static.return_cells else results
    hidden, _, cell, _, h_n, c_n = invoke(
        scan_forward,
        input,
        start.h,
        start.c,
        weights,
        directions,
        static.bias,
        static.reverse,
        static.return_cells,
        False,
        fixed.tables(),
        start.h_reset,
        start.c_reset,
        static.dropout,
        fixed.seed,
        start.preact,
        start.preact_reset,
    )
    shape = input.shape[:-1]
    results = (output_of(hidden, h_n, directions, shape, shared=True), h_n, c_n)
    if not static.return_cells:
        return results
    return *results, Layout.of(input, h_n.shape[-1], fixed.ragged()).cells(cell, input.dtype, shape)


NOTHING_FIXED = Fixed()


class PreparedLayers(NamedTuple):
    """Layers without projections, prepared for dense batches, where nothing observes operators.

    Attributes:
        trains: whether a gradient is needed.
    """

    static: Static
    trains: bool
    batch_first: bool

    def call(self, input: Tensor, hx: States | None, weights: Sequence[Tensor]) -> tuple[Any, ...]:
        """What `functional.lstm` returns for an input (T, B, I), or (B, T, I) with `batch_first`."""
        if self.batch_first:
            input = input.transpose(0, 1)
        inputs = Inputs(input, NO_STATES if hx is None else Start(*hx), weights)
        fixed = NOTHING_FIXED if self.static.dropout == 0 else Fixed(seed_of(self.static, input))
        output, h_n, c_n, *cells = (train if self.trains else infer)(inputs, self.static, fixed)
        if self.batch_first:
            output, cells = output.transpose(0, 1), [each.transpose(1, 2) for each in cells]
        return output, (h_n, c_n), *cells


def scan_projected_layers(input: Tensor, start: Start, stack: Stack, options: Options) -> LaneResults:
    """`scan_layers` for layers with projections: h has P elements.

    Layers run one by one. After the scan of a layer, all its outputs are projected at once.
    """
    ends = []
    for layer in range(stack.num_layers()):
        lanes = stack.layer(layer)
        part = stack.part(lanes)
        folded_lanes = [
            folded(weights, start.of(lanes.start + at), part.is_reverse(at), options.ragged)
            for at, weights in enumerate(part.weights)
        ]
        output, y_n, *others = scan_layers(
            input,
            stacked([own_start for _, own_start in folded_lanes]),
            part._replace(weights=tuple(weights for weights, _ in folded_lanes)),
            options._replace(shared_output=True),  # nobody else gets y
        )
        outputs = zip(output.chunk(stack.directions, dim=-1), part.weights, strict=True)
        input = torch.cat([projected_steps(y, weights, options.ragged) for y, weights in outputs], dim=-1)
        h_n = torch.stack([projected(y, weights) for y, weights in zip(y_n, part.weights, strict=True)])
        ends.append((end_without_steps(h_n, start.of(lanes).h, options.ragged), *others))
        if options.dropout > 0 and layer < stack.num_layers() - 1:
            input = torch.nn.functional.dropout(input, options.dropout)
    return input, *(torch.cat(each) for each in zip(*ends, strict=True))


def folded(weights: LaneWeights, start: Start, reverse: bool, ragged: Ragged | None) -> tuple[LaneWeights, Start]:
    """A lane with a projection, rewritten as a lane without one. The new lane computes y instead of h.

    h_t = W_hr y_t, where y_t = o_t * tanh(c_t). So W_hh h_{t-1} = (W_hh W_hr) y_{t-1}. The product W_hh W_hr is
    computed here, before the scan. A step then has one exchange instead of two. A given h (initial or reset state) is
    no W_hr y, so it is multiplied by W_hh here: `Start.preact` and `Start.preact_reset`. If no step starts from an h,
    the caller may have any value there: 0 takes its place, as 0 times a NaN would be a gradient of W_hh.
    """
    assert weights.hr is not None
    hh = weights.hh
    without = weights._replace(hh=_within_range(hh, weights.hr) @ weights.hr, hr=None)
    h, h_reset = start.h, start.h_reset
    if ragged is not None and h is not None:
        h = torch.where(ragged.starts_from_initial(reverse).unsqueeze(1), h, 0)
    if ragged is not None and h_reset is not None:
        h_reset = torch.where(ragged.starts_from_reset(reverse).unsqueeze(1), h_reset, 0)
    preacts = (None if state is None else state @ hh.t() for state in (h, h_reset))
    return without, Start(None, start.c, None, start.c_reset, *preacts)


def _within_range(hh: Tensor, hr: Tensor) -> Tensor:
    """W_hh, with rows scaled down whose product with W_hr might leave the range of float16.

    An infinity times a y of 0 would be a NaN. The gates of such a row are open or shut, since their pre-activations are
    sums of huge terms. Scaled down, these sums keep their signs and are huge still. All other rows stay as they are.
    """
    if hh.dtype != torch.float16:
        return hh
    # A row's largest sum, even if all its terms have one sign.
    norm = torch.linalg.vector_norm
    most = norm(hh.detach(), 1, dim=1, keepdim=True, dtype=torch.float32) * norm(hr.detach(), torch.inf)
    scale = (most / torch.finfo(hh.dtype).max).clamp(1, 1e30)  # never infinite: what is infinite in W_hh stays infinite
    within: Tensor = (hh / scale).to(hh.dtype)
    return within


def projected(y: Tensor, weights: LaneWeights) -> Tensor:
    """h (..., P) from y (..., H)."""
    assert weights.hr is not None
    return y @ weights.hr.t()


def projected_steps(y: Tensor, weights: LaneWeights, ragged: Ragged | None) -> Tensor:
    """h of all steps (..., P) from y (..., H). Without a step it is 0, whatever W_hr is, and passes no gradient on."""
    h = projected(y, weights)
    return h if ragged is None else torch.where(ragged.is_step().unsqueeze(1), h, 0)


def end_without_steps(h_n: Tensor, h_0: Tensor | None, ragged: Ragged | None) -> Tensor:
    """h_n, but h_0 for sequences without steps: their final state is their initial state."""
    if ragged is None:
        return h_n
    return torch.where(ragged.lengths.unsqueeze(1) > 0, h_n, 0 if h_0 is None else h_0)

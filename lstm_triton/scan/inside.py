"""A lane through the kernels, with its gates and cells."""

import torch
from torch import Tensor

from ..ragged import Ragged
from ..reference import Gates
from ..stack import Inside, Stack
from .buffers import cells_of, output_of
from .forward import scan_forward


def scan_lane_inside(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None = None,
    *,
    reverse: bool,
    h_reset: Tensor | None,
    c_reset: Tensor | None,
    ragged: Ragged | None,
    return_cells: bool,
) -> Inside:
    """One lane of `autograd.scan_layers`, and what its backward pass would need of the kernels."""

    def of_lane(state: Tensor | None) -> Tensor | None:
        return None if state is None else state.unsqueeze(0)

    weights = [weight for weight in (weight_ih, weight_hh, bias_ih, bias_hh) if weight is not None]
    preacts: list[Tensor | None] = [None, None]
    before = h_0
    if weight_hr is not None:  # as scan_projected_layers does
        weights[1] = weight_hh @ weight_hr
        preacts = [None if h is None else of_lane(h @ weight_hh.t()) for h in (h_0, h_reset)]
        h_0 = h_reset = None
    stack = Stack(weights, 1, bias_ih is not None, reverse)
    hidden, _, cell, gates, h_n, c_n = scan_forward(
        input, of_lane(h_0), of_lane(c_0), *stack, True, True, () if ragged is None else tuple(ragged),
        of_lane(h_reset), of_lane(c_reset), preact_0=preacts[0], preact_reset=preacts[1],
    )  # fmt: skip
    output, h = output_of(hidden, stack, input, ragged), h_n[0]
    if weight_hr is not None:
        output, h = output @ weight_hr.t(), h @ weight_hr.t()
        if ragged is not None and before is not None:
            h = torch.where(ragged.lengths.unsqueeze(1) > 0, h, before)
    cells = cells_of(cell, stack, input, ragged)[0]
    found = gates[0].view(*input.shape[:-1], -1).chunk(4, dim=-1)
    return (output, h, c_n[0]), Gates(*found), cells

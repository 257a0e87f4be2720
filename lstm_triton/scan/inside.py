"""One lane computed by the kernels, with its gates and cells: for `trace`."""

from torch import Tensor

from ..ragged import Ragged, tables_of
from ..reference import Gates
from ..stack import Inside, LaneWeights, Stack, Start
from .forward import scan_forward
from .layers import end_without_steps, folded, projected, projected_steps
from .layout import Layout, output_of


def scan_lane_inside(
    input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None
) -> Inside:
    """Run a lane. Also return the gates and cells that the kernels keep for the backward scan."""
    own_weights, own_start = (weights, start) if weights.hr is None else folded(weights, start, reverse, ragged)
    stack, own = Stack((own_weights,), reverse=reverse), own_start.map(lambda state: state.unsqueeze(0))
    hidden, _, cell, gates, h_n, c_n = scan_forward(
        input,
        own.h,
        own.c,
        *stack.arguments(),
        keep_cells=True,
        keep_gates=True,
        tables=tables_of(ragged),
        h_reset=own.h_reset,
        c_reset=own.c_reset,
        preact_0=own.preact,
        preact_reset=own.preact_reset,
    )
    layout, shape = Layout.of(input, stack.hidden_size(), ragged), input.shape[:-1]
    output, h = output_of(hidden, h_n, 1, shape, shared=True), h_n[0]
    if weights.hr is not None:
        output = projected_steps(output, weights, ragged)
        h = end_without_steps(projected(h, weights), start.h, ragged)
    found = gates[0].view(*shape, -1).chunk(4, dim=-1)
    return (output, h, c_n[0]), Gates(*found), layout.cells(cell, input.dtype, shape)[0]

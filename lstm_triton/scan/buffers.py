"""The buffers of a scan: what lies in which state row, what it starts from, sentinels, alignment."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ragged import Ragged
from ..stack import Stack
from .plan import state_stride


def output_of(hidden: Tensor, stack: Stack, input: Tensor, ragged: Ragged | None) -> Tensor:
    """The last layer's outputs, laid out like the input, out of the state rows of h."""
    layout = Layout.of(input, stack.hidden_size, () if ragged is None else tuple(ragged))
    lanes = hidden[-stack.directions :, layout.steps, : stack.hidden_size]
    lanes = lanes.view(stack.directions, *input.shape[:-1], stack.hidden_size)
    return lanes[0].contiguous() if stack.directions == 1 else torch.cat(lanes.unbind(), dim=-1)


def cells_of(cell: Tensor, stack: Stack, input: Tensor, ragged: Ragged | None) -> Tensor:
    layout = Layout.of(input, stack.hidden_size, () if ragged is None else tuple(ragged))
    cells = cell[:, layout.steps, : stack.hidden_size].to(input.dtype)
    if ragged is not None:
        return torch.where(ragged.is_step().unsqueeze(1), cells, 0)
    return cells.view(-1, *input.shape[:-1], stack.hidden_size)


class Layout(NamedTuple):
    """State rows (kernels/forward.py): B initial states, the rows of the steps, B initial states of the reverse
    direction; of a ragged batch, B states to start anew from besides. A row has `state_stride(H)` elements, those past
    H are padding.
    """

    rows: int  # of the steps: T * B, or as many as a ragged batch has
    batch_size: int
    hidden_size: int
    ragged: bool

    @staticmethod
    def of(steps: Tensor, hidden_size: int, tables: Sequence[Tensor]) -> "Layout":
        """For steps (T, B, ...), or of a ragged batch (rows, ...)."""
        if tables:
            return Layout(steps.shape[0], Ragged(*tables).batch_size, hidden_size, True)
        return Layout(steps.shape[0] * steps.shape[1], steps.shape[1], hidden_size, False)

    @property
    def stride(self) -> int:
        return state_stride(self.hidden_size)

    @property
    def state_rows(self) -> int:
        return self.rows + (3 if self.ragged else 2) * self.batch_size

    @property
    def steps(self) -> slice:
        return slice(self.batch_size, self.batch_size + self.rows)

    @property
    def anew(self) -> slice:
        """The states to start anew from, of a ragged batch."""
        return slice(self.rows + 2 * self.batch_size, None)

    def initial(self, reverse: bool) -> slice:
        """The initial states, or, for the other direction, the rows after the last steps."""
        first = self.rows + self.batch_size if reverse else 0
        return slice(first, first + self.batch_size)

    def previous(self, reverse: bool) -> slice:
        """What the steps start from, in the order of `steps`; not of a ragged batch."""
        first = 2 * self.batch_size if reverse else 0
        return slice(first, first + self.rows)

    def last(self, reverse: bool) -> slice:
        """The last steps of the sequences; not of a ragged batch."""
        first = self.batch_size if reverse else self.rows
        return slice(first, first + self.batch_size)


class Buffers(NamedTuple):
    """What the forward scan writes; a block for each lane."""

    hidden: Tensor
    passed: Tensor
    cell: Tensor
    gates: Tensor

    @staticmethod
    def new(
        layout: Layout,
        like: Tensor,
        keep_cells: bool,
        keep_gates: bool,
        lanes: int,
        dropped: bool,
        hidden: Tensor | None = None,
    ) -> "Buffers":
        """Buffers in which nothing is written yet, with the dtype and device of a tensor; `hidden`: one that exists."""
        rows_of_cells = layout.state_rows if keep_cells else (2 if layout.ragged else 1) * layout.batch_size
        hidden = sentinels((lanes, layout.state_rows, layout.stride), like) if hidden is None else hidden
        passed = sentinels((lanes if dropped else 0, layout.state_rows, layout.stride), like)
        cell = like.new_empty((lanes, rows_of_cells, layout.stride), dtype=torch.float32)
        gates = like.new_empty((lanes if keep_gates else 0, layout.rows, 4 * layout.hidden_size))
        return Buffers(hidden, passed, cell, gates)

    def of(self, lanes: slice) -> "Buffers":
        return Buffers(*(buffer[lanes] for buffer in self))


class Window(NamedTuple):
    """Steps that one launch takes, and their rows."""

    steps: slice
    rows: slice


def write_start(
    buffers: Buffers, layout: Layout, ragged: Ragged | None, stack: Stack, states: list[Tensor | None]
) -> None:
    """Write what the steps start from, and what is known beforehand."""
    for lanes, reverse in stack.by_direction():
        h_0, c_0, h_reset, c_reset = (None if state is None else state[lanes] for state in states)
        hidden, cell = buffers.hidden[lanes], buffers.cell[lanes]
        initial = layout.initial(reverse) if cell.shape[1] == layout.state_rows else slice(layout.batch_size)
        _fill(cell[:, initial], c_0)
        if ragged is None:
            _fill(hidden[:, layout.initial(reverse)], h_0)
            continue
        # NaNs as all NaNs are: here too nobody must mistake one for a sentinel.
        _fill(hidden[:, layout.initial(reverse)], h_0, canonical=True)
        _fill(hidden[:, layout.initial(not reverse)], None)
        _fill(hidden[:, layout.anew], h_reset, canonical=True)
        _fill(cell[:, -layout.batch_size :], c_reset)
    if ragged is not None:
        no_step = ~ragged.is_step().unsqueeze(1)
        buffers.hidden[:, layout.steps].masked_fill_(no_step, 0)
        buffers.passed[:, layout.steps].masked_fill_(no_step, 0)
        buffers.passed[:, : layout.batch_size].zero_()


def add_starts(
    projected: Tensor,
    preacts: list[Tensor | None],
    window: Window,
    layout: Layout,
    ragged: Ragged | None,
    reverse: bool,
) -> None:
    """Add the shares of states to what the steps that start from them get from the input."""
    preact_0, preact_reset = preacts
    if preact_0 is not None:
        if ragged is None:
            rows = torch.arange(layout.batch_size, device=projected.device) + layout.last(not reverse).start
            begun = torch.ones_like(rows, dtype=torch.bool)
        else:
            rows, begun = ragged.firsts(reverse), ragged.starts_from_initial(reverse)
        rows = rows - layout.batch_size - window.rows.start
        here = begun & (rows >= 0) & (rows < len(projected))
        projected.index_add_(0, rows.clamp(0, len(projected) - 1), torch.where(here.unsqueeze(1), preact_0, 0))
    if preact_reset is not None and ragged is not None:
        anew = ragged.starts_anew(reverse)[window.rows].view(-1, layout.batch_size, 1)
        projected.view(*anew.shape[:2], -1).add_(torch.where(anew, preact_reset, 0))


def hidden_before(
    hidden: Tensor, layout: Layout, ragged: Ragged | None, reverse: bool, rows: slice = slice(None)
) -> Tensor:
    """(rows, H) the h that steps, or some of their rows, start from, out of a lane's state rows."""
    if ragged is None:
        return hidden[layout.previous(reverse), : layout.hidden_size][rows]
    sources = ragged.sources(reverse)
    sources = torch.where(sources >= 0, sources, ragged.own_rows())[rows]
    return hidden.index_select(0, sources)[:, : layout.hidden_size]


def begun_gates(grad_gates: Tensor, layout: Layout, ragged: Ragged | None, reverse: bool) -> Tensor:
    """(B, 4H) of a lane's grad_gates, those of the steps that start from initial states; zeros where none does."""
    columns = slice(4 * layout.hidden_size)
    if ragged is None:
        return grad_gates[layout.last(not reverse), columns]
    first_rows = grad_gates.index_select(0, ragged.firsts(reverse))[:, columns]
    return torch.where(ragged.starts_from_initial(reverse).unsqueeze(1), first_rows, 0)


def _fill(rows: Tensor, state: Tensor | None, canonical: bool = False) -> None:
    """Write states (lanes, B, H) into their state rows."""
    if state is None:
        rows.zero_()
        return
    hidden_size = state.shape[2]
    rows[..., :hidden_size] = torch.where(state.isnan(), torch.nan, state) if canonical else state
    rows[..., hidden_size:] = 0


def contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def aligned(weights: Sequence[Tensor], stride: int) -> tuple[Tensor, ...]:
    """Contiguous weights whose rows are padded to `stride` elements and aligned: copies, where they are not already.

    Loads are then as wide as those of states, without which weights would not stay in registers (kernels/fragments.py).
    """
    found = []
    for weight in weights:
        if weight.shape[1] < stride:
            weight = torch.nn.functional.pad(weight, (0, stride - weight.shape[1]))
        found.append(_at_aligned_address(weight.contiguous()))
    return tuple(found)


def transposed(weights: Sequence[Tensor], layout: Layout) -> tuple[Tensor, ...]:
    """Weights (4H, H) as rows of units whose columns are gate-minor, padded: (stride, 4 * stride) copies.

    The backward scan multiplies with columns of a weight. Read as rows, they come in pieces of 16 bytes, from shared
    memory too: as columns they took up to eight times as long from there.
    """
    found = []
    missing = layout.stride - layout.hidden_size
    for weight in weights:
        rows = weight.unflatten(0, (4, -1)).permute(2, 1, 0).flatten(1)
        if missing > 0:
            rows = torch.nn.functional.pad(rows, (0, 4 * missing, 0, missing))
        found.append(_at_aligned_address(rows.contiguous()))
    return tuple(found)


def sentinels(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An exchange buffer in which nothing has been published (kernels/exchange.py)."""
    buffer = like.new_empty(shape)
    if buffer.numel() > 0:
        buffer.view(torch.int32 if like.dtype.itemsize == 4 else torch.int16).fill_(-1)
    return buffer


def with_aligned_rows(input: Tensor) -> tuple[Tensor, int]:
    """An input whose rows are contiguous, aligned if their length allows it; and the unit of its strides."""
    unit = 16 if input.shape[-1] % 16 == 0 else 1
    *strides, last = input.stride()
    if last != 1 or any(stride % unit for stride in strides):
        input = input.contiguous()
    if unit > 1:  # columns of a wider tensor are not worth a compilation of their own
        input = _at_aligned_address(input)
    return input, unit


def _at_aligned_address(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()

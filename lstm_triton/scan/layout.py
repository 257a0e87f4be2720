"""Which row of a scan's buffers holds what.

For each lane, a buffer of states has *state rows* (kernels/forward.py) in this order: B initial states of the forward
direction, the rows of the steps, B initial states of the reverse direction, and if ragged B reset states. A state row
has `state_stride(H)` elements: h or c of all units, then padding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ragged import Ragged
from ..stack import Start
from .plan import state_stride

Place = tuple[tuple[int, ...], tuple[int, ...], int]  # sizes, strides and offset of a part of a buffer: for as_strided


class Window(NamedTuple):
    """A range of steps that one launch takes, and the rows of these steps."""

    steps: slice
    rows: slice


class Layout(NamedTuple):
    """The sizes of a batch. They determine where every row is."""

    time_steps: int
    rows: int  # rows of the steps: T * B; if packed, the sum of lengths
    batch_size: int
    hidden_size: int
    ragged: Ragged | None
    stride: int  # elements of a state row
    start_rows: int  # rows of the initial states of one direction, and if ragged of the reset states
    state_rows: int

    @staticmethod
    def sized(time_steps: int, rows: int, batch_size: int, hidden_size: int, ragged: Ragged | None = None) -> "Layout":
        start_rows = batch_size if ragged is None else 2 * batch_size
        state_rows = rows + batch_size + start_rows
        stride = state_stride(hidden_size)
        return Layout(time_steps, rows, batch_size, hidden_size, ragged, stride, start_rows, state_rows)

    @staticmethod
    def of(steps: Tensor, hidden_size: int, ragged: Ragged | None) -> "Layout":
        """The layout of a batch whose `steps` are (T, B, ...), or if ragged (rows, ...)."""
        if ragged is not None:
            return Layout.sized(ragged.time_steps(), steps.shape[0], ragged.batch_size(), hidden_size, ragged)
        time_steps, batch_size = steps.shape[:2]
        return Layout.sized(time_steps, time_steps * batch_size, batch_size, hidden_size)

    def steps(self) -> slice:
        return slice(self.batch_size, self.batch_size + self.rows)

    def resets(self) -> slice:
        """The rows of the reset states of a ragged batch."""
        return slice(self.rows + 2 * self.batch_size, None)

    def initial(self, reverse: bool) -> slice:
        """The rows of one direction's initial states. In the other direction they come after the last steps."""
        first = self.rows + self.batch_size if reverse else 0
        return slice(first, first + self.batch_size)

    def initial_rows(self, lanes: int, directions: int, reverse: bool, width: int) -> Place:
        """The initial states of lanes: (lanes, B, width) or (layers, directions, B, width). Not for a ragged batch.

        Args:
            lanes: how many lanes the buffer of states (lanes, state rows, width) has.
            directions: of these lanes.
            reverse: whether the first of them walks from the last step to the first.
        """
        behind = self.rows + self.batch_size
        return self._place(lanes, directions, width, *((behind, 0) if reverse else (0, behind)))

    def last_rows(self, lanes: int, directions: int, reverse: bool, width: int) -> Place:
        """The states of the last steps of lanes, as in `initial_rows`."""
        firsts = (self.batch_size, self.rows) if reverse else (self.rows, self.batch_size)
        return self._place(lanes, directions, width, *firsts)

    def _place(self, lanes: int, directions: int, width: int, first: int, first_of_second: int) -> Place:
        """B rows of each lane: from row `first` on, and in a second direction from row `first_of_second` on."""
        lane = self.state_rows * width
        if directions == 1:
            return (lanes, self.batch_size, width), (lane, width, 1), first * width
        sizes = (lanes // directions, directions, self.batch_size, width)
        strides = (directions * lane, lane + (first_of_second - first) * width, width, 1)
        return sizes, strides, first * width

    def last(self, reverse: bool) -> slice | Tensor:
        """The state row of each sequence's last step; for a sequence without steps, of its initial state."""
        if self.ragged is not None:
            return self.ragged.ends(reverse)
        first = self.batch_size if reverse else self.rows
        return slice(first, first + self.batch_size)

    def first(self, reverse: bool) -> slice | Tensor:
        """The state row of each sequence's first step; for a sequence without steps, a row that holds no step."""
        return self.last(not reverse)

    def input_rows(self, input: Tensor) -> Tensor:
        """(rows, I) the input of the steps. Rows without a step are 0: the caller may have any value there."""
        rows = input.reshape(self.rows, -1)
        return rows if self.ragged is None else self.of_steps(rows)

    def of_steps(self, rows: Tensor) -> Tensor:
        """Values or gradients (rows, ...) of the steps; 0 where there is no step."""
        return rows if self.ragged is None else torch.where(self.ragged.is_step().unsqueeze(1), rows, 0)

    def hidden_before(self, hidden: Tensor, reverse: bool, rows: slice | None = None) -> Tensor:
        """(rows, H) the h that the steps start from, out of a lane's state rows. `rows`: for these steps only."""
        if self.ragged is None:
            first = 2 * self.batch_size if reverse else 0
            found = hidden[first : first + self.rows, : self.hidden_size]
            return found if rows is None else found[rows]
        sources = self.ragged.sources(reverse)
        sources = torch.where(sources >= 0, sources, self.ragged.own_rows())
        sources = sources if rows is None else sources[rows]
        return hidden.index_select(0, sources)[:, : self.hidden_size]

    def first_step_gates(self, grad_gates: Tensor, reverse: bool) -> Tensor:
        """(B, 4H) gate gradients of the first step of each sequence, out of a lane's `grad_gates`.

        Multiplied by W_hh: the gradient of h_0, once `of_initial` has chosen among the sequences.
        """
        return grad_gates[self.first(reverse), : 4 * self.hidden_size]

    def of_initial(self, grads: Tensor, reverse: bool) -> Tensor:
        """Gradients (B, ...) of the initial states; 0 for a sequence that does not start from its initial state."""
        if self.ragged is None:
            return grads
        return torch.where(self.ragged.starts_from_initial(reverse).unsqueeze(1), grads, 0)

    def of_resets(self, grads: Tensor, reverse: bool) -> Tensor:
        """Gradients (B, ...) of the reset states; 0 for a sequence that never starts from its reset state."""
        assert self.ragged is not None
        return torch.where(self.ragged.starts_from_reset(reverse).unsqueeze(1), grads, 0)

    def reset_gates(self, gate_rows: Tensor, reverse: bool) -> Tensor | None:
        """(B, 4H) gate gradients (rows, 4H), summed over the steps that start from the reset state.

        None if there can be no reset: only padded batches have resets, and their rows are T * B.
        """
        if self.ragged is None or self.rows % self.batch_size != 0:
            return None
        is_reset = self.ragged.is_reset(reverse).unsqueeze(1)
        found: Tensor = torch.where(is_reset, gate_rows, 0).unflatten(0, (-1, self.batch_size)).sum(0)
        return found

    def add_preacts(self, projected: Tensor, start: Start, window: Window, reverse: bool) -> None:
        """Add a lane's `start.preact` and `start.preact_reset` to a window's pre-activations `projected` (rows, 4H)."""
        if start.preact is not None:
            if self.ragged is None:
                rows = torch.arange(self.batch_size, device=projected.device) + self.last(not reverse).start  # type: ignore[union-attr]
                starts = torch.ones_like(rows, dtype=torch.bool)
            else:
                rows, starts = self.ragged.firsts(reverse), self.ragged.starts_from_initial(reverse)
            rows = rows - self.batch_size - window.rows.start
            here = starts & (rows >= 0) & (rows < len(projected))
            projected.index_add_(0, rows.clamp(0, len(projected) - 1), torch.where(here.unsqueeze(1), start.preact, 0))
        if start.preact_reset is not None and self.ragged is not None:
            is_reset = self.ragged.is_reset(reverse)[window.rows].view(-1, self.batch_size, 1)
            projected.view(*is_reset.shape[:2], -1).add_(torch.where(is_reset, start.preact_reset, 0))

    def cells(self, cell: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """(lanes, *shape, H) a copy of every c_t, out of the state rows of c; 0 where there is no step."""
        cells = cell[:, self.steps(), : self.hidden_size]
        if self.ragged is not None:
            return torch.where(self.ragged.is_step().unsqueeze(1), cells.to(dtype), 0)
        return cells.view(-1, *shape, self.hidden_size).to(dtype, copy=True)

    def window(self, window: Window) -> "Layout":
        """The layout of one window."""
        steps, rows = window
        ragged = None if self.ragged is None else self.ragged.window(steps, rows)
        return Layout.sized(steps.stop - steps.start, rows.stop - rows.start, self.batch_size, self.hidden_size, ragged)


def output_of(hidden: Tensor, h_n: Tensor, directions: int, shape: torch.Size, shared: bool) -> Tensor:
    """The outputs of the last layer, (*shape, directions * H), out of the state rows of h.

    Args:
        hidden: (lanes, state rows, state_stride(H)).
        h_n: (lanes, B, H).
        shape: (T, B), ragged (rows,).
        shared: may share the memory of `hidden`, as one lane does whose rows are not padded. It shares its version
            counter, too. So backward notices if somebody has changed it in place.
    """
    _, batch_size, size = h_n.shape
    rows = shape[0] if len(shape) == 1 else shape[0] * shape[1]  # not shape.numel(), which fixes open sizes
    steps = slice(batch_size, batch_size + rows)
    if directions == 2:
        return torch.cat([hidden[lane, steps, :size].view(*shape, size) for lane in (-2, -1)], dim=-1)
    if hidden.shape[0] == 1 and hidden.shape[2] == size:
        lane = hidden.narrow(1, batch_size, rows).view(*shape, size)
    else:
        lane = hidden[-1, steps, :size].view(*shape, size)
    # Detached, it is no view: an autograd.Function forbids to change a view in place.
    return lane.contiguous().detach() if shared else lane.clone(memory_format=torch.contiguous_format)

"""The buffers that a forward scan writes, and what they hold before the scan runs."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..stack import Start, by_direction
from .layout import Layout


class Buffers(NamedTuple):
    """What the forward scan writes. The first axis is that of lanes. A buffer that is not needed is empty."""

    hidden: Tensor  # (lanes, state rows, state_stride(H)) h
    hidden_dropped: Tensor  # (lanes, state rows, state_stride(H)) h after dropout
    cell: Tensor  # float32 c: (lanes, state rows, state_stride(H)), or only the c at the start and the end
    gates: Tensor  # (lanes, rows, 4H)

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
        """Buffers in which nothing is written yet, with the dtype and device of `like`.

        `hidden`: a buffer to use instead of a new one.
        """
        rows_of_cells = layout.state_rows if keep_cells else layout.start_rows
        shape = (lanes, layout.state_rows, layout.stride)
        if hidden is None:
            hidden = sentinels(shape, like) if lanes > 0 else like.new_empty(shape)
        hidden_dropped = sentinels(shape, like) if dropped else like.new_empty((0, *shape[1:]))
        cell = like.new_empty((lanes, rows_of_cells, layout.stride), dtype=torch.float32)
        gates = like.new_empty((lanes if keep_gates else 0, layout.rows, 4 * layout.hidden_size))
        return Buffers(hidden, hidden_dropped, cell, gates)

    def of(self, lanes: slice) -> "Buffers":
        return Buffers(*(buffer[lanes] for buffer in self))

    def write_ragged(self, start: Start, layout: Layout, directions: int, reverse: bool) -> None:
        """Write the states that the sequences of a ragged batch start from, and zeros where there is no step.

        Args:
            start: of these lanes.
            directions: of these lanes.
            reverse: whether the first lane walks from the last step to the first.
        """
        assert layout.ragged is not None
        for lanes, reverse_in_time in by_direction(directions, reverse):
            hidden, cell, own = self.hidden[lanes], self.cell[lanes], start.of(lanes)
            every_cell = cell.shape[1] == layout.state_rows
            initial = layout.initial(reverse_in_time) if every_cell else slice(layout.batch_size)
            fill(cell[:, initial], own.c)
            # Every NaN gets the same bits, since the bits of a NaN must not look like the sentinel.
            fill(hidden[:, layout.initial(reverse_in_time)], own.h, canonical=True)
            fill(hidden[:, layout.initial(not reverse_in_time)], None)
            fill(hidden[:, layout.resets()], own.h_reset, canonical=True)
            fill(cell[:, -layout.batch_size :], own.c_reset)
        no_step = ~layout.ragged.is_step().unsqueeze(1)
        self.hidden[:, layout.steps()].masked_fill_(no_step, 0)
        self.hidden_dropped[:, layout.steps()].masked_fill_(no_step, 0)
        self.hidden_dropped[:, : layout.batch_size].zero_()

    def read_ragged_ends(self, h_n: Tensor, c_n: Tensor, layout: Layout, directions: int, reverse: bool) -> None:
        """Write the final states into h_n and c_n (lanes, B, H). `directions`, `reverse`: as in `write_ragged`."""
        size, every_cell = layout.hidden_size, self.cell.shape[1] == layout.state_rows
        for lanes, reverse_in_time in by_direction(directions, reverse):
            last_row = layout.last(reverse_in_time)
            h_n[lanes] = self.hidden[lanes, last_row, :size]
            if every_cell:
                c_n[lanes] = self.cell[lanes, last_row, :size]
        if not every_cell:
            c_n.copy_(self.cell[:, : layout.batch_size, :size])


def sentinels(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An exchange buffer in which nothing has been published (kernels/exchange.py)."""
    return like.new_full(shape, -1, dtype=torch.int32 if like.dtype.itemsize == 4 else torch.int16).view(like.dtype)


def fill(rows: Tensor, state: Tensor | None, canonical: bool = False) -> None:
    """Write states (lanes, B, H), or zeros for None, into state rows (..., B, stride) in the order of the lanes.

    `canonical`: every NaN gets the same bits.
    """
    if state is None:
        rows.zero_()
        return
    hidden_size = state.shape[2]
    state = torch.where(state.isnan(), torch.nan, state) if canonical else state
    if hidden_size == rows.shape[-1]:
        rows.copy_(state if rows.dim() == state.dim() else state.reshape(rows.shape))
        return
    rows[..., :hidden_size] = state.reshape(*rows.shape[:-1], hidden_size)
    rows[..., hidden_size:] = 0


def read(rows: Tensor, states: Tensor) -> None:
    """Write state rows (..., B, stride), in the order of the lanes, into states (lanes, B, H)."""
    size = states.shape[2]
    rows = rows if rows.shape[-1] == size else rows[..., :size]
    if rows.dim() != states.dim():
        states = states.view(rows.shape)
    states.copy_(rows)

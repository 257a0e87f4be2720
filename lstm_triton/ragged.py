"""Ragged batches: sequences differ in length, or are reset on the way. Tables say which step follows which.

All layers and directions share the tables. The host does not wait for the device when it makes the tables. The kernels
look up their rows in the tables (kernels/turns.py). The formula takes its masks from the tables.

The rows of the steps are numbered as they lie in memory, step after step: row t * B + b, or offsets[t] + b if packed.
State rows (kernels/forward.py) are, in order: B initial states of the forward direction, the rows of the steps, B
initial states of the reverse direction, B reset states.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import transforms


class Ragged(NamedTuple):
    """The tables of T time steps and B sequences. `rows` counts the rows of all steps.

    Attributes:
        before, after: (rows,) int32. For each step the state row that it starts from, forward in time (`before`) and
            backward in time (`after`). It is the row of the neighbouring step, of the direction's initial state, or of
            the reset state. -1: the row holds no step, since its sequence has ended.
        offsets: (T + 1,) int32, the first row of each time step, and the number of rows.
        lengths: (B,) int32.
    """

    before: Tensor
    after: Tensor
    offsets: Tensor
    lengths: Tensor

    @staticmethod
    def of(tables: Sequence[Tensor]) -> "Ragged | None":
        """The inverse of `tables_of`."""
        return Ragged(*tables) if tables else None

    def time_steps(self) -> int:
        return self.offsets.shape[0] - 1

    def batch_size(self) -> int:
        return self.lengths.shape[0]

    def rows(self) -> int:
        return self.before.shape[0]

    def sources(self, reverse: bool) -> Tensor:
        """(rows,) the state row from which each step starts, in one direction; -1 for no step."""
        return self.after if reverse else self.before

    def successors(self, reverse: bool) -> Tensor:
        """(rows,) for each step, the state row whose gradient flows back into the step; -1 for no step.

        Inside a sequence it is the next step's row. For the last step of a sequence it is the row behind the sequence.
        For the last step before a reset it is the row of the reset state. Both of these rows hold zeros.
        """
        if not reverse:
            return self.after
        # Backward in time, time 0 comes last, even where there is a reset at time 0.
        rows = torch.arange(self.rows(), dtype=torch.int32, device=self.before.device)
        return torch.where((rows < self.offsets[1]) & self.is_step(), rows, self.before)

    def is_reset(self, reverse: bool) -> Tensor:
        """(rows,) bool: which steps start from the reset state."""
        return self.sources(reverse) >= 2 * self.batch_size() + self.rows()

    def is_step(self) -> Tensor:
        """(rows,) bool: which rows hold a step."""
        return self.before >= 0

    def own_rows(self) -> Tensor:
        """(rows,) the state row of each step itself."""
        return torch.arange(self.rows(), device=self.before.device) + self.batch_size()

    def ends(self, reverse: bool) -> Tensor:
        """(B,) the state row of the last step in one direction; for a sequence without steps, of its initial state."""
        sequences = torch.arange(self.batch_size(), device=self.lengths.device)
        if reverse:
            last, initial = self.batch_size() + sequences, self.batch_size() + self.rows() + sequences
        else:
            last = self.batch_size() + self.offsets[(self.lengths.long() - 1).clamp_min(0)] + sequences
            initial = sequences
        return torch.where(self.lengths > 0, last, initial)

    def firsts(self, reverse: bool) -> Tensor:
        """(B,) the state row of the first step in one direction; for a sequence without steps, one without a step."""
        return self.ends(not reverse)

    def window(self, steps: slice, rows: slice) -> "Ragged":
        """The tables of a window: some of the time steps, given with their rows.

        The states at the two ends of the window become the initial states of the two directions.
        """
        count = rows.stop - rows.start
        offsets = self.offsets[steps.start : steps.stop + 1] - rows.start
        own = torch.arange(count, dtype=torch.int32, device=self.before.device)
        times = torch.searchsorted(offsets[1:].contiguous(), own, right=True)
        sequences = own - offsets[times]

        def renumbered(table: Tensor, outside: Tensor) -> Tensor:
            found = table[rows]
            row = found - self.batch_size() - rows.start  # within the window, if the step is in the window
            is_reset = found >= self.rows() + 2 * self.batch_size()
            outside = torch.where((row >= 0) & (row < count), row + self.batch_size(), outside)
            found = torch.where(is_reset, found - self.rows() + count, torch.where(found >= 0, outside, -1))
            return found.to(torch.int32)

        before = renumbered(self.before, sequences)
        after = renumbered(self.after, self.batch_size() + count + sequences)
        lengths = (self.lengths - steps.start).clamp(0, steps.stop - steps.start)
        return Ragged(before, after, offsets, lengths)

    def starts_from_initial(self, reverse: bool) -> Tensor:
        """(B,) bool: which sequences have a first step that starts from the initial state, not from the reset state."""
        batch_size = self.batch_size()
        if not reverse and self.rows() >= batch_size:  # the first rows are the first steps
            return (self.lengths > 0) & (self.before[:batch_size] < batch_size)
        firsts = (self.firsts(reverse) - batch_size).clamp(0, self.rows() - 1)
        return (self.lengths > 0) & ~self.is_reset(reverse)[firsts]

    def starts_from_reset(self, reverse: bool) -> Tensor:
        """(B,) bool: which sequences have a step that starts from the reset state. Not for a packed batch."""
        return self.is_reset(reverse).view(-1, self.batch_size()).any(0)

    def tile_steps(self, block_batch: int, batch_tiles: int) -> Tensor:
        """(batch_tiles,) int32: the number of steps of the longest sequence of each batch tile."""
        padding = batch_tiles * block_batch - self.batch_size()
        return torch.nn.functional.pad(self.lengths, (0, padding)).view(batch_tiles, block_batch).amax(1)


def tables_of(ragged: Ragged | None) -> Sequence[Tensor]:
    """The tables as a list, as operators take them; empty for a batch that is not ragged."""
    return () if ragged is None else tuple(ragged)


def dense(
    lengths: Tensor | None, resets: Tensor | None, time_steps: int, batch_size: int, device: torch.device
) -> Ragged:
    """The tables of a padded batch.

    Args:
        lengths: (B,) of any integer dtype and in any order, 0 <= length <= T; None: all sequences have T steps.
        resets: (T, B) bool, which steps are resets; None: none of them. No state passes between such a step and the
            step before it, in either direction.
    """
    if lengths is None:
        lengths = torch.full((batch_size,), time_steps, dtype=torch.int32, device=device)
    lengths = lengths.to(torch.int32)
    times = torch.arange(time_steps, dtype=torch.int32, device=device).unsqueeze(1)
    sequences = torch.arange(batch_size, dtype=torch.int32, device=device)
    rows = time_steps * batch_size
    own = batch_size + times * batch_size + sequences
    before = own - batch_size  # at time 0: the initial states
    after = torch.where(times + 1 < lengths, own + batch_size, batch_size + rows + sequences)
    if resets is not None:
        reset_rows = 2 * batch_size + rows + sequences
        before = torch.where(resets, reset_rows, before)
        cut = torch.cat((resets[1:], resets.new_zeros(1, batch_size)))  # PyTorch 2.9 cannot pad an empty batch
        after = torch.where(cut & (times + 1 < lengths), reset_rows, after)
    is_step = times < lengths
    before, after = (torch.where(is_step, table, -1).flatten() for table in (before, after))
    offsets = torch.arange(time_steps + 1, dtype=torch.int32, device=device) * batch_size
    return Ragged(before.to(torch.int32), after.to(torch.int32), offsets, lengths)


def batch_size_of(batch_sizes: Tensor) -> int:
    """B of a `PackedSequence`."""
    return _number(batch_sizes[0])


def _number(value: Tensor) -> int:
    """The value on the host. It stays a tensor while torch.jit.trace records: sizes then are tensors, too."""
    return value if transforms.tracing() else int(value)  # type: ignore[return-value]


def packed(batch_sizes: Tensor, device: torch.device) -> Ragged:
    """The tables of a `PackedSequence`. They are made on the CPU, where the batch sizes are, and copied."""
    batch_size, cpu = batch_size_of(batch_sizes), batch_sizes.device
    offsets = torch.nn.functional.pad(batch_sizes.cumsum(0), (1, 0))
    rows = _number(offsets[-1])
    numbers = torch.arange(rows, device=cpu)
    sequences = numbers - offsets[:-1].repeat_interleave(batch_sizes)
    own = batch_size + numbers
    before_sizes = torch.cat((batch_sizes[:1], batch_sizes[:-1]))
    after_sizes = torch.nn.functional.pad(batch_sizes[1:], (0, 1)).repeat_interleave(batch_sizes)
    before = own - before_sizes.repeat_interleave(batch_sizes)
    after = torch.where(
        sequences < after_sizes, own + batch_sizes.repeat_interleave(batch_sizes), batch_size + rows + sequences
    )
    lengths = (batch_sizes.unsqueeze(1) > torch.arange(batch_size, device=cpu)).sum(0)
    tables = (before, after, offsets, lengths)
    return Ragged(*(table.to(torch.int32).to(device, non_blocking=True) for table in tables))


def padded(values: Tensor, tables: Ragged, fill: float = torch.nan) -> Tensor:
    """(rows, N) -> (T, B, N), with `fill` where there is no step."""
    is_step = torch.arange(tables.time_steps(), device=values.device).unsqueeze(1) < tables.lengths
    padded = values.new_full((*is_step.shape, values.shape[1]), fill)
    padded[is_step] = values[tables.is_step()]
    return padded

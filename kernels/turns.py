"""Which step of which batch tile a program does next. One step of one of a program's tiles is a *turn*.

Where every sequence has all steps, the tiles of a program take turns within every step.

In a ragged batch sequences differ in length, are packed, or are reset on the way. Tables (lstm_triton/ragged.py)
describe it: for every time step its first row; for every row the state row from which its step starts (its source) and
the state row of the step that starts from it (its successor); for every batch tile its number of steps. While a program
works on a turn, it asks for the rows of the next turn and for the place of the turn after that. It waits for neither.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Schedule(NamedTuple):
    """What tells the turns of a program in a ragged batch. It stays as it is throughout a launch."""

    tile_steps_ptr: tl.tensor  # (batch_tiles,)
    offsets_ptr: tl.tensor  # (T + 1,)
    sources_ptr: tl.tensor  # (rows,) state rows, -1 for no step
    successors_ptr: tl.tensor | None  # (rows,) state rows; None in the forward scan, which needs no successors
    from_end: tl.tensor  # whether the last step of a tile comes first
    group: tl.tensor  # the program's tiles: group, group + groups, ...
    groups: tl.tensor
    batch_tiles: tl.tensor


class Turn(NamedTuple):
    step: tl.tensor  # counts the steps of the tile as they are done
    tile: tl.tensor
    steps: tl.tensor  # of the tile
    first: tl.tensor  # row of the first sequence at that time
    sequences: tl.tensor  # how many there are at that time


class Ahead(NamedTuple):
    """A turn to come, and what the tables say of its rows."""

    turn: Turn
    sources: tl.tuple  # one tensor for `rows`, one for `chunk_rows`: see look_ahead
    successors: tl.tuple  # the same; empty in the forward scan


@triton.jit
def dense_turn(index, group, groups, tiles_per_step, tiling):
    """(step, first row of the tile) of a turn where every sequence has all steps."""
    step = tl.cast(index, tl.int32)  # when interpreted, index is a Python integer
    tile = group
    if tiling.SEVERAL_TILES:
        step = step // tiles_per_step
        tile = group + index % tiles_per_step * groups
    return step, tile * tiling.BLOCK_BATCH


@triton.jit
def count_turns(schedule):
    """The turns of a program: the steps of all tiles that it serves."""
    turns = tl.load(schedule.tile_steps_ptr + schedule.group)
    for tile in range(schedule.group + schedule.groups, schedule.batch_tiles, schedule.groups):
        turns += tl.load(schedule.tile_steps_ptr + tile)
    return turns


@triton.jit
def no_turn(schedule, tiling):
    """What comes before the first turn."""
    steps = tl.load(schedule.tile_steps_ptr + schedule.group)
    tile = schedule.batch_tiles if tiling.SEVERAL_TILES else schedule.group
    return Turn(steps * 0 - 1, tile, steps, steps * 0, steps * 0)


@triton.jit
def next_turn(turn, left, schedule, tiling):
    """The turn after another one, past the tiles that have ended; the same turn if no turns are left."""
    step, tile, steps = turn.step, turn.tile, turn.steps
    if left > 0:
        if tiling.SEVERAL_TILES:
            tile += schedule.groups
            if tile >= schedule.batch_tiles:
                tile = schedule.group
                step += 1
            steps = tl.load(schedule.tile_steps_ptr + tile)
            while steps <= step:
                tile += schedule.groups
                if tile >= schedule.batch_tiles:
                    tile = schedule.group
                    step += 1
                steps = tl.load(schedule.tile_steps_ptr + tile)
        else:
            step += 1
    time = tl.maximum(tl.where(schedule.from_end, steps - 1 - step, step), 0)  # a program may have no turns at all
    first = tl.load(schedule.offsets_ptr + time)
    return Turn(step, tile, steps, first, tl.load(schedule.offsets_ptr + time + 1) - first)


@triton.jit
def look_up(table_ptr, turn, rows, tiling):
    """A table's entries for rows of a turn's tile, -1 for those past the batch."""
    tile_rows = turn.tile * tiling.BLOCK_BATCH + rows
    return tl.load(table_ptr + turn.first + tile_rows, mask=tile_rows < turn.sequences, other=-1)


@triton.jit
def look_ahead(turn, schedule, rows, chunk_rows, tiling):
    """Ask for what the tables say of a turn.

    rows, chunk_rows: the rows of a tile, as a scan holds them in what it computes and in the chunks that it requests.
    """
    sources = look_up(schedule.sources_ptr, turn, rows, tiling)
    if schedule.successors_ptr is None:
        chunk_sources = look_up(schedule.sources_ptr, turn, chunk_rows, tiling)
        successors = ()
    else:
        row_successors = look_up(schedule.successors_ptr, turn, rows, tiling)
        chunk_sources = look_up(schedule.sources_ptr, turn, chunk_rows, tiling)
        successors = (row_successors, look_up(schedule.successors_ptr, turn, chunk_rows, tiling))
    return Ahead(turn, (sources, chunk_sources), successors)

"""Where the steps of a ragged batch lie: sequences of different lengths, packed or not, and those that start anew.

Three tables (lstm_triton/ragged.py) describe it: the first row of every time step; for every row the state row from
which its step starts; and the number of steps that a batch tile has. A turn is one step of one of a program's tiles:
(step, tile, the tile's number of steps, the first row of all sequences at that time, the number of sequences then).
While a program works on a turn it asks for the rows of the next one, and for the place of the one after that: it waits
for neither.
"""

import triton
import triton.language as tl


@triton.jit
def count_turns(tile_steps_ptr, group, groups, batch_tiles):
    """The turns of a program: the steps of all tiles that it serves."""
    turns = tl.load(tile_steps_ptr + group)
    for tile in range(group + groups, batch_tiles, groups):
        turns += tl.load(tile_steps_ptr + tile)
    return turns


@triton.jit
def no_turn(tile_steps_ptr, group, batch_tiles, SEVERAL_TILES: tl.constexpr):
    """What comes before the first turn."""
    steps = tl.load(tile_steps_ptr + group)
    return steps * 0 - 1, batch_tiles if SEVERAL_TILES else group, steps, steps * 0, steps * 0


@triton.jit
def next_turn(
    turn, left, tile_steps_ptr, offsets_ptr, backwards, group, groups, batch_tiles, SEVERAL_TILES: tl.constexpr
):
    """The turn after another one, past the tiles that have ended; of the last one, itself."""
    step, tile, steps = turn[0], turn[1], turn[2]
    if left > 0:
        if SEVERAL_TILES:
            tile += groups
            if tile >= batch_tiles:
                tile = group
                step += 1
            steps = tl.load(tile_steps_ptr + tile)
            while steps <= step:
                tile += groups
                if tile >= batch_tiles:
                    tile = group
                    step += 1
                steps = tl.load(tile_steps_ptr + tile)
        else:
            step += 1
    time = tl.maximum(tl.where(backwards, steps - 1 - step, step), 0)  # a program may have no turns at all
    first = tl.load(offsets_ptr + time)
    return step, tile, steps, first, tl.load(offsets_ptr + time + 1) - first


@triton.jit
def look_up(table_ptr, turn, rows, BLOCK_BATCH: tl.constexpr):
    """A table's entries for rows of a turn's tile, -1 for those past the batch."""
    tile_rows = turn[1] * BLOCK_BATCH + rows
    return tl.load(table_ptr + turn[3] + tile_rows, mask=tile_rows < turn[4], other=-1)

"""Where the steps of a ragged batch lie: sequences of different lengths, packed or not, and those that start anew.

Three tables (lstm_triton/ragged.py) describe it: the first row of every time step; for every row the state row from
which its step starts; and the number of steps that a batch tile has. A program looks up a turn (a step of one of its
tiles) while it works on the one before.
"""

import triton
import triton.language as tl


@triton.jit
def count_turns(tile_steps_ptr, group, groups, batch_tiles):
    """The steps of all tiles that a program serves."""
    turns = tl.load(tile_steps_ptr + group)
    for tile in range(group + groups, batch_tiles, groups):
        turns += tl.load(tile_steps_ptr + tile)
    return turns


@triton.jit
def next_turn(step, tile, left, tile_steps_ptr, group, groups, batch_tiles):
    """The turn after (step, tile), past the tiles that have ended; the same once more if none is left."""
    if left > 0:
        tile += groups
        if tile >= batch_tiles:
            tile = group
            step += 1
        while tl.load(tile_steps_ptr + tile) <= step:
            tile += groups
            if tile >= batch_tiles:
                tile = group
                step += 1
    return step, tl.maximum(tile, group)


@triton.jit
def locate(step, tile, backwards, tile_steps_ptr, offsets_ptr):
    """(first row, number of rows) of all sequences at the time of a turn; time runs backwards if told so."""
    steps = tl.load(tile_steps_ptr + tile)
    time = tl.maximum(tl.where(backwards, steps - 1 - step, step), 0)  # a tile may have no steps at all
    first = tl.load(offsets_ptr + time)
    return first, tl.load(offsets_ptr + time + 1) - first

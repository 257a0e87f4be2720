"""What travels together through the helpers of a scan: how the scan is cut up, and the weights of a program.

The kernels themselves take flat lists of arguments: a bundle among the arguments would cost the host time at every
launch.
"""

from typing import NamedTuple

import triton.language as tl


class Tiling(NamedTuple):
    """How a scan is cut up. A kernel makes it from its constants in its first lines."""

    SEVERAL_TILES: tl.constexpr  # a program serves more than one batch tile
    BLOCK_BATCH: tl.constexpr  # rows of a batch tile
    BLOCK_HIDDEN: tl.constexpr  # units of a program
    BLOCK_K: tl.constexpr  # depth of a chunk of weights, states or inputs
    SPLIT_K: tl.constexpr  # parts of a chunk, which different warps multiply at the same time
    RESIDENT_CHUNKS: tl.constexpr  # weight chunks that stay on the chip; the others are read every step
    REGISTER_CHUNKS: tl.constexpr  # of the resident ones, how many stay in registers
    GROUP_CHUNKS: tl.constexpr  # resident chunks whose states are waited for together
    ACCUMULATORS: tl.constexpr  # chains of dots that do not wait for each other
    DOT_PRECISION: tl.constexpr
    TF32_ROUNDING: tl.constexpr  # "rn" or "rna": how operands are rounded where DOT_PRECISION is "tf32"; "": not


class Weights(NamedTuple):
    """The weights of a program's units, cut into chunks along K."""

    chunks: tl.tuple  # the resident ones
    pointers: tl.tensor  # of chunk 0, as the next two: for chunks that are not resident
    mask: tl.tensor
    ks: tl.tensor

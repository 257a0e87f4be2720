"""How programs of one launch hand values to each other: a value is its own ready flag.

The exchange buffer is filled beforehand with the sentinel, a bit pattern (all ones: a NaN) that `publish` never
stores. A reader loads the tiles it needs past the first-level cache, and loads them again until no sentinel is left
in them. There are no counters, fences or atomics: every element says for itself whether it has been written.

A wait ends: after `MOST_LOOKS` looks in vain, which take seconds, the launch ends in an error of the device.
"""

import triton
import triton.language as tl

from .spin import MOST_POLLS, spin

SENTINEL_16 = tl.constexpr(0xFFFF)
SENTINEL_32 = tl.constexpr(0xFFFFFFFF)
MOST_LOOKS = tl.constexpr(MOST_POLLS)


@triton.jit
def bits_of(value):
    """The value's bit pattern as an unsigned integer of its width; the sentinel is the largest there is."""
    if value.dtype.primitive_bitwidth == 16:
        bits = value.to(tl.uint16, bitcast=True)
    else:
        bits = value.to(tl.uint32, bitcast=True)
    return bits


@triton.jit
def publish(pointers, value, mask):
    """Store a tile for the peers, in the pointers' dtype; a NaN that looks like the sentinel as another quiet NaN."""
    value = value.to(pointers.dtype.element_ty)
    bits = bits_of(value)
    sentinel = SENTINEL_16 if bits.dtype == tl.uint16 else SENTINEL_32
    bits = tl.where(bits == sentinel, sentinel >> 1, bits).to(bits.dtype)  # without its sign bit it is a NaN still
    tl.store(pointers, bits.to(value.dtype, bitcast=True), mask=mask, cache_modifier=".cg")


@triton.jit
def request(
    pointers, ks, first: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr = False,
):  # fmt: skip
    """Load COUNT neighbouring (rows, BLOCK_K) tiles from chunk `first` on, all in flight together; ks: their columns.

    Columns from SIZE on read 0, which is never the sentinel; MASKED, wherever the tiles lie: of a chunk that is known
    at run time only, pointers and ks are its own. Rows are not masked (that would cost instructions before
    every load): the caller lets rows past the batch point at one within it.
    """
    tiles = ()
    for chunk in tl.static_range(first, first + COUNT):
        if MASKED or (chunk + 1) * BLOCK_K > SIZE:
            mask = chunk * BLOCK_K + ks < SIZE
            tile = tl.load(pointers + chunk * BLOCK_K, mask=mask, other=0.0, volatile=True)
        else:
            tile = tl.load(pointers + chunk * BLOCK_K, volatile=True)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def larger_bits(left, right, PACKED: tl.constexpr):
    if PACKED:
        # Two 16-bit elements a register, one instruction; plain Triton would unpack them.
        larger = tl.inline_asm_elementwise(
            "max.u16x2 $0, $1, $2;", "=r,r,r", [left, right], dtype=tl.uint16, is_pure=True, pack=2
        )
    else:
        larger = tl.maximum(left, right)
    return larger


@triton.jit
def any_missing(tiles, COUNT: tl.constexpr, PACKED: tl.constexpr):
    """True while any element of the tiles is still the sentinel."""
    largest = bits_of(tiles[0])
    for chunk in tl.static_range(1, COUNT):
        largest = larger_bits(largest, bits_of(tiles[chunk]), PACKED)
    if largest.dtype == tl.uint16:
        missing = tl.max(largest.to(tl.int32)) == SENTINEL_16
    else:
        missing = tl.max(largest) == SENTINEL_32
    return missing


@triton.jit
def give_up():
    """End the launch in an error of the device: a store to the address 0, where nobody may, does so on every one."""
    tl.store(tl.cast(0, tl.int64).to(tl.pointer_type(tl.int32)), 0)


@triton.jit
def receive(
    tiles, pointers, ks, first: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, wait,
    THREAD_ELEMENTS: tl.constexpr, PACKED: tl.constexpr, TOGETHER: tl.constexpr, MASKED: tl.constexpr = False,
):  # fmt: skip
    """What `request` gave, with the same arguments, once all of it has been published if to `wait` for that."""
    if THREAD_ELEMENTS > 0:
        # A vector lies before SIZE or past it: past it are zeros, which nobody asks for again.
        tl.static_assert(SIZE * tiles[0].dtype.primitive_bitwidth % 128 == 0)
        tiles = spin(tiles, pointers + first * BLOCK_K, wait, COUNT, BLOCK_K, THREAD_ELEMENTS, PACKED, TOGETHER)
    else:
        looks = 0
        while any_missing(tiles, COUNT, PACKED) & wait:
            looks += 1
            if looks > MOST_LOOKS:
                give_up()
            tiles = request(pointers, ks, first, COUNT, SIZE, BLOCK_K, MASKED)
    return tiles

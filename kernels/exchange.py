"""How programs of one launch hand values to each other: a value is its own ready flag.

The exchange buffer is filled beforehand with the sentinel, a bit pattern (all ones: a NaN) that `publish` never
stores. A reader loads the chunks it needs past the first-level cache, and loads them again until no sentinel is left
in them. There are no counters, fences or atomics: every element says for itself whether it has been written.

A wait ends: after `MOST_LOOKS` looks in vain, which take seconds, the launch ends in an error of the device.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .spin import MOST_POLLS, spin

SENTINEL_16 = tl.constexpr(0xFFFF)
SENTINEL_32 = tl.constexpr(0xFFFFFFFF)
MOST_LOOKS = tl.constexpr(MOST_POLLS)


class Polling(NamedTuple):
    """How a program waits for its peers' values."""

    THREAD_ELEMENTS: tl.constexpr  # of a chunk, for which a thread waits by itself (spin.py); 0: all wait together
    PACKED: tl.constexpr  # there are instructions for two 16-bit elements at a time
    # The threads of a warp end their waits together. A value that is the same for all of them may then stay in a
    # register of the warp. But the compiler may move loads from before the wait to behind it.
    TOGETHER: tl.constexpr


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
    """Store values for the peers, in the pointers' dtype. A NaN with the sentinel's bits becomes another quiet NaN."""
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
    """Load COUNT neighbouring (rows, BLOCK_K) chunks from chunk `first` on, all in flight together.

    pointers, ks: of chunk 0. Columns from SIZE on read as 0, which is never the sentinel: nobody waits for them. Only
    the chunk that crosses SIZE is masked. With MASKED every chunk is. That is for a chunk whose number is known at run
    time only: `first` is then 0, and `pointers` and `ks` are that chunk's own. Rows are never masked, as a mask costs
    instructions before every load: the caller lets rows past the batch point at a row within it.
    """
    chunks = ()
    for chunk in tl.static_range(first, first + COUNT):
        if MASKED or (chunk + 1) * BLOCK_K > SIZE:
            mask = chunk * BLOCK_K + ks < SIZE
            loaded = tl.load(pointers + chunk * BLOCK_K, mask=mask, other=0.0, volatile=True)
        else:
            loaded = tl.load(pointers + chunk * BLOCK_K, volatile=True)
        chunks = chunks + (loaded,)
    return chunks


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
def any_missing(chunks, PACKED: tl.constexpr):
    """True while any element of the chunks is still the sentinel."""
    largest = bits_of(chunks[0])
    for chunk in tl.static_range(1, len(chunks)):
        largest = larger_bits(largest, bits_of(chunks[chunk]), PACKED)
    if largest.dtype == tl.uint16:
        missing = tl.max(largest.to(tl.int32)) == SENTINEL_16
    else:
        missing = tl.max(largest) == SENTINEL_32
    return missing


@triton.jit
def give_up():
    """End the launch in an error of the device. A store to the address 0 does so on every device."""
    tl.store(tl.cast(0, tl.int64).to(tl.pointer_type(tl.int32)), 0)


@triton.jit
def receive(
    chunks, pointers, ks, first: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, wait, polling,
    MASKED: tl.constexpr = False,
):  # fmt: skip
    """The chunks that `request` gave for the same arguments, once every element is published if told to `wait`."""
    if polling.THREAD_ELEMENTS > 0:
        # A vector lies before SIZE or past it: past it are zeros, which nobody asks for again.
        tl.static_assert(SIZE * chunks[0].dtype.primitive_bitwidth % 128 == 0)
        chunks = spin(chunks, pointers + first * BLOCK_K, wait, BLOCK_K, polling)
    else:
        looks = 0
        while any_missing(chunks, polling.PACKED) & wait:
            looks += 1
            if looks > MOST_LOOKS:
                give_up()
            chunks = request(pointers, ks, first, len(chunks), SIZE, BLOCK_K, MASKED)
    return chunks

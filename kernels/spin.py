"""Waiting for published values thread by thread, in PTX: the fast form of `receive` in exchange.py.

Every thread looks at its own elements only and asks again only for those that are missing. The portable form takes one
decision for the whole program, which costs two block-wide barriers whenever it looks, and asks for everything again.
"""

import triton
import triton.language as tl

MOST_POLLS = 1 << 24  # seconds: after so many in vain, the scan ends in an error instead of never


@triton.constexpr_function
def _code(COUNT, ELEMENTS, BITS, CHUNK_BYTES, PACKED, TOGETHER):
    """PTX for one thread, which holds ELEMENTS elements of each of COUNT tiles.

    Operands: the words of all tiles on return; the same on entry; the addresses of the elements of the first tile; and,
    as many times as there are elements, a mask. Where a word's elements have their sign bits, the mask has ones, or
    zeros if there is nothing to wait for.
    """
    words = ELEMENTS * BITS // 32  # of a tile
    width = min(words, 4)  # words of a vector, which one instruction loads: they lie side by side
    address, mask = 2 * COUNT * words, 2 * COUNT * words + ELEMENTS
    vectors = [range(first, first + width) for first in range(0, COUNT * words, width)]
    # Maxima tell of all words at once whether one is missing. There is none of two halves a word before sm_90.
    by_maximum = PACKED or BITS == 32
    combine = ("max.u16x2" if BITS == 16 else "max.u32") if by_maximum else "or.b32"

    def marks(result, value):
        # Subtracted from the largest number but one, only an element that is all ones leaves, and keeps, a sign bit.
        largest_but_one = "0xFFFEFFFE" if BITS == 16 else "0xFFFFFFFE"
        return [f"sub.u32 {result}, {largest_but_one}, {value};", f"and.b32 {result}, {result}, {value};"]

    def is_missing(value):
        return [*(marks("bits", value) if by_maximum else [f"mov.b32 bits, {value};"]), f"and.b32 bits, bits, ${mask};"]

    lines = [f"mov.b32 ${word}, ${COUNT * words + word};" for word in range(COUNT * words)]
    lines += ["mov.b32 polls, 0;", *([] if TOGETHER else ["setp.ne.b32 late, polls, 0;"]), "again:", "mov.b32 all, 0;"]
    for number, vector in enumerate(vectors):
        lines += [f"mov.b32 seen{number}, 0;"]
        for word in vector:
            lines += [] if by_maximum else marks("bits", f"${word}")
            lines += [f"{combine} seen{number}, seen{number}, {f'${word}' if by_maximum else 'bits'};"]
        lines += [f"{combine} all, all, seen{number};"]
    lines += [*is_missing("all"), "setp.ne.b32 yes, bits, 0;"]
    lines += ["vote.sync.any.pred yes, yes, 0xFFFFFFFF;"] if TOGETHER else []
    lines += ["@!yes bra received;"]
    # A late thread gives up where it has met those of its warp that are not late. In the loop it might wait for them
    # first, unless the threads of a warp stay together all the time.
    lines += ["add.u32 polls, polls, 1;", f"setp.gt.u32 late, polls, {MOST_POLLS};"]
    lines += ["@late trap;"] if TOGETHER else ["@late bra received;"]
    for number, vector in enumerate(vectors):
        chunk, word = divmod(vector[0], words)
        source = f"[${address + word * 32 // BITS} + {chunk * CHUNK_BYTES}]"
        target = "{" + ", ".join(f"${word}" for word in vector) + "}" if width > 1 else f"${vector[0]}"
        load = f"@yes ld.relaxed.gpu.global{f'.v{width}' if width > 1 else ''}.b32 {target}, {source};"
        lines += [*is_missing(f"seen{number}"), "setp.ne.b32 yes, bits, 0;", load]
    lines += ["bra again;", "received:", *([] if TOGETHER else ["@late trap;"])]
    seen = ", ".join(f"seen{number}" for number in range(len(vectors)))
    return "\n".join(["{", ".reg .pred yes, late;", f".reg .b32 bits, all, polls, {seen};", *lines, "}"])


@triton.constexpr_function
def _constraints(COUNT, ELEMENTS, BITS):
    words = COUNT * ELEMENTS * BITS // 32
    return ",".join(["=&r"] * words + ["r"] * words + ["l"] * ELEMENTS + ["r"] * ELEMENTS)


@triton.constexpr_function
def _types(dtype, COUNT):
    return (dtype,) * COUNT


@triton.jit
def spin(
    chunks,  # as requested: neighbours, each (rows, BLOCK_K)
    pointers,  # of the first chunk
    wait,
    BLOCK_K: tl.constexpr,
    polling,
):
    """The chunks when none of their elements is the sentinel, or at once if not to `wait`."""
    COUNT: tl.constexpr = len(chunks)
    BITS: tl.constexpr = chunks[0].dtype.primitive_bitwidth
    ELEMENTS: tl.constexpr = polling.THREAD_ELEMENTS
    sign_bits = tl.where(wait, -0x7FFF8000 if BITS == 16 else -0x80000000, 0).to(tl.int32)
    return tl.inline_asm_elementwise(
        _code(COUNT, ELEMENTS, BITS, BLOCK_K * BITS // 8, polling.PACKED, polling.TOGETHER),
        _constraints(COUNT, ELEMENTS, BITS),
        chunks + (pointers.to(tl.int64), sign_bits),
        dtype=_types(chunks[0].dtype, COUNT),
        is_pure=False,
        pack=ELEMENTS,
    )

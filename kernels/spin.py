"""Waiting for published values thread by thread, in PTX: the fast form of `receive` in exchange.py.

Every thread looks at its own elements only, and asks again only for vectors with missing elements. The portable form
takes one decision for the whole program: every look costs two block-wide barriers, and everything is asked for again.
"""

import triton
import triton.language as tl

MOST_POLLS = 1 << 24  # they take seconds: after so many in vain, the scan ends in an error


@triton.constexpr_function
def _code(COUNT, ELEMENTS, BITS, CHUNK_BYTES, PACKED, TOGETHER):
    """PTX for one thread, which holds ELEMENTS elements of each of COUNT chunks.

    These are W = COUNT * ELEMENTS * BITS / 32 words. Operands, in this order:
        W outputs: the words, complete
        W inputs: the words as they were requested
        ELEMENTS inputs: the addresses of the first chunk's elements
        ELEMENTS inputs, all alike: a mask of the sign bits of a word's elements; 0 for "do not wait"
    """
    words = ELEMENTS * BITS // 32  # of a chunk
    width = min(words, 4)  # words of a vector, which one instruction loads: they lie side by side
    address, mask = 2 * COUNT * words, 2 * COUNT * words + ELEMENTS
    vectors = [range(first, first + width) for first in range(0, COUNT * words, width)]
    # A maximum over all words tells whether an element is missing. Before sm_90 there is none of two 16-bit elements.
    by_maximum = PACKED or BITS == 32
    combine = ("max.u16x2" if BITS == 16 else "max.u32") if by_maximum else "or.b32"

    def marks(result, value):
        # (0xFFFE - x) & x has its sign bit set for x = 0xFFFF, the sentinel, and for no other x; with 32 bits alike.
        # A borrow from the lower half of a word does no harm: its element is missing then.
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
    # A late thread traps behind the loop, where the threads of its warp have met again: in the loop it might wait for
    # the others first. Threads that stay together all the time may trap in the loop.
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
    """The chunks, once none of their elements is the sentinel; as they are if not told to `wait`."""
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

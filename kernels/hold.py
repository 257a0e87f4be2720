"""When a program first looks for what its peers publish: no earlier than it can be there.

A look that comes too early costs more than it saves. Every program asks for the same lines of L2 at the same time, and
the programs that miss ask again. What is published meanwhile waits behind these requests. On an H100 a step of the
forward scan (float16, H = 768, B = 16) took 2.0 microseconds where all threads looked at once, and 1.5 where they held
back for 640 cycles after their own publication (docs/performance.md).

The planner says for how many cycles (`Plan.hold`), the same throughout a launch. To hold back longer after every look
in vain did not work: a thread that looks later publishes later, so that its peers look in vain and hold back in turn.
"""

import triton
import triton.language as tl


@triton.jit
def clock(HOLDS: tl.constexpr):
    """The multiprocessor's clock in cycles, modulo 2^32; 0 where threads do not hold back."""
    if HOLDS:
        now = tl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    else:
        now = tl.cast(0, tl.int32)
    return now


@triton.jit
def hold_back(cycles, since, HOLDS: tl.constexpr):
    """Wait until so many cycles have passed since an earlier `clock`. The threads of a warp wait together."""
    if HOLDS:
        tl.inline_asm_elementwise(
            """{
            .reg .pred early;
            .reg .b32 passed;
            again: mov.u32 passed, %clock;
            sub.u32 passed, passed, $2;
            setp.lt.u32 early, passed, $1;
            vote.sync.any.pred early, early, 0xFFFFFFFF;
            @early bra again;
            mov.u32 $0, 0;
            }""",
            "=r,r,r", [cycles, since], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip

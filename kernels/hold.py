"""When a thread first looks for what its peers publish: not before it can be there.

A look that comes too early costs more than it saves. Every program asks for the same lines of L2 at the same time, and
those that miss ask again: what is published meanwhile waits behind them. On an H100 a step of the forward scan
(float16, H = 768, B = 16) took 2.0 microseconds where all threads looked at once, and 1.5 where they held back for 640
cycles (bench/NOTES.md).

How long is best depends on the sizes and on the device. So each thread keeps its own time. The planner says where it
starts (`Plan.hold`). Each time that a thread looked in vain, it holds back a little longer from then on.

A thread's two numbers, the length of its hold and the time of its last publication, are PTX registers of the whole
kernel, which `begin_hold` declares. Triton knows nothing of them: as values of its own they would be tiles, with a
register for each element.
"""

import triton
import triton.language as tl

STEP = 16  # cycles longer each time
LONGEST = 2048  # cycles


@triton.constexpr_function
def lengthen_code():
    """PTX for a thread that looked in vain for the first time: for spin.py, where `late` is true."""
    return [f"@late add.u32 hold, hold, {STEP};", f"@late min.u32 hold, hold, {LONGEST};"]


@triton.jit
def begin_hold(cycles, HOLDS: tl.constexpr):
    """Once a kernel, before its loops; if HOLDS: otherwise nobody holds back."""
    if HOLDS:
        tl.inline_asm_elementwise(
            ".reg .b32 hold, published; mov.u32 hold, $1; mov.u32 published, %clock; mov.u32 $0, 0;",
            "=r,r", [cycles], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def have_published(HOLDS: tl.constexpr):
    """From now on the time counts."""
    if HOLDS:
        tl.inline_asm_elementwise(
            "mov.u32 published, %clock; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def hold_back(HOLDS: tl.constexpr):
    """Wait until it is time to look. The threads of a warp wait together."""
    if HOLDS:
        tl.inline_asm_elementwise(
            """{
            .reg .pred early;
            .reg .b32 passed;
            again: mov.u32 passed, %clock;
            sub.u32 passed, passed, published;
            setp.lt.u32 early, passed, hold;
            vote.sync.any.pred early, early, 0xFFFFFFFF;
            @early bra again;
            mov.u32 $0, 0;
            }""",
            "=r", [], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip

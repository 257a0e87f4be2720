"""What `python -m bench contact` tries: layers to check, layers to time, and everything else that it launches."""

from __future__ import annotations

import itertools
from dataclasses import replace

from . import devices, measure
from .cases import BenchCase
from .plans import SCAN_MODES, plans_to_try

BOTH = "forward+backward"
CHECKED_DTYPES = ("float16", "bfloat16", "tf32", "float32")
CANDIDATES = 8  # so many of the planner's best plans are timed for each scan, its own among them


def layer(dtype: str, T: int, B: int, I: int, H: int) -> BenchCase:  # noqa: E741
    return BenchCase(BOTH, dtype, T=T, B=B, I=I, H=H)


# In this order: one program; some programs; the size of the headline; odd sizes; several tiles; asynchronous tensor
# cores; streamed weights; lengths and resets; a chain; both directions; full precision with several tiles.
CHECKS = (
    *(layer(dtype, 8, 3, 8, 8) for dtype in CHECKED_DTYPES),
    *(layer(dtype, 8, 3, 16, 64) for dtype in CHECKED_DTYPES),
    *(layer(dtype, 16, 16, 768, 768) for dtype in CHECKED_DTYPES),
    *(layer(dtype, 12, 17, 33, 131) for dtype in ("float16", "tf32")),
    *(layer(dtype, 16, 64, 256, 1024) for dtype in ("bfloat16", "tf32")),
    layer("float16", 12, 256, 256, 768),
    *(layer(dtype, 8, 16, 64, 2048) for dtype in ("float16", "tf32")),
    layer("bfloat16", 6, 16, 64, 4096),
    *(replace(layer(dtype, 16, 16, 64, 256), layout="lengths") for dtype in ("float16", "tf32")),
    replace(layer("float16", 16, 16, 64, 256), layout="resets"),
    replace(layer("bfloat16", 16, 32, 128, 512), layers=4),
    replace(layer("bfloat16", 16, 32, 128, 512), bidirectional=True),
    layer("float32", 16, 64, 96, 512),
)
HEADLINE = layer("float16", 1024, 16, 768, 768)
# In this order: the headline; several numbers of steps, whose differences tell what a step costs and whether it
# matters that rows come from memory; sizes H and B, as nn.LSTM may be faster at the smallest and the largest; a call
# that is all overhead.
TIMED = (
    *(replace(HEADLINE, dtype=dtype, mode=mode) for dtype in CHECKED_DTYPES for mode in ("forward", BOTH)),
    *(replace(HEADLINE, T=steps, mode="forward") for steps in (128, 256, 2048)),
    *(
        replace(HEADLINE, T=256, H=hidden, I=hidden, B=batch)
        for batch, hidden in itertools.product((16, 1, 64, 256), (256, 64, 1024, 512, 128, 2048))
    ),
    replace(HEADLINE, T=2, B=1, H=512, I=512, mode="inference"),
)
HOST = layer("float16", 16, 16, 256, 256)
CASES = (*CHECKS, *TIMED, HOST)


def launch_besides(device: devices.Cpu) -> None:
    """Launch everything that `bench contact` launches besides its cases, so that it gets into Triton's cache."""
    from lstm_triton.scan import planner
    from lstm_triton.scan.plan import Plan

    from . import handoff

    handoff.times(device)
    for kind, mode in SCAN_MODES.items():
        case = replace(HEADLINE, mode=mode)
        for _, plan in plans_to_try(case, device, kind, CANDIDATES):
            with planner.forced(Plan(**plan), kind):
                measure.compile_kernels(case, device)

"""Sizes for which PyTorch's own function was measured to be faster than the kernels. There "auto" takes it.

A device's measurements lie beside its measured plans, in plans/NAME-against-stock.json: for layers of some sizes, the
time of the kernels divided by the time of `nn.LSTM`. `python -m bench.routes` writes the file from the results of a
benchmark. For other sizes the nearest measured size decides, if it is at most a factor of two away.
"""

import json
import math
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .scan.plan import dtype_name
from .scan.planner import table_path
from .target import Device

FARTHEST = 1.0  # in powers of two, of hidden and batch size together
SLOWER = 1.05  # a smaller ratio is within the noise of two measurements


class Measured(NamedTuple):
    """One layer of one size: how its time in the kernels compares.

    Attributes:
        mode: "training" (forward and backward) or "inference".
        dtype: "float32", "tf32", "float16" or "bfloat16".
        ratio: time in the kernels / time of nn.LSTM.
    """

    mode: str
    dtype: str
    hidden_size: int
    batch_size: int
    ratio: float


def table_path_of(device: Device) -> Path:
    """The file with what was measured on a device."""
    plans = table_path(device)
    return plans.with_name(f"{plans.stem}-against-stock.json")


@cache
def measured_on(device: Device) -> tuple[Measured, ...]:
    """All that was measured on a device; empty if nothing was measured, or if the table is wrong."""
    path = table_path_of(device)
    if not path.exists():
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError(f"it must be a JSON list, not {type(rows).__name__}")
        return tuple(_checked(row) for row in rows)
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"the table of measured times {path} is ignored: {error}", RuntimeWarning, stacklevel=2)
        return ()


def _checked(row: Any) -> Measured:
    types = [str, str, int, int, float]
    if isinstance(row, list) and [type(value) for value in row] in (types, [*types[:4], int]):
        found = Measured(*row)
        if min(found.hidden_size, found.batch_size) > 0 and math.isfinite(found.ratio) and found.ratio > 0:
            return found
    raise ValueError(f"{row!r} is not mode, dtype, H, B and a ratio of times")


@lru_cache(maxsize=1024)
def why_stock(
    mode: str, dtype: torch.dtype, allow_tf32: bool, hidden_size: int, batch_size: int, device: Device
) -> str | None:
    """Why a layer takes PyTorch's own function: it was measured to be faster; None: it was not."""
    name = dtype_name(dtype, allow_tf32)

    def distance(row: Measured) -> float:
        return math.hypot(math.log2(row.hidden_size / hidden_size), math.log2(row.batch_size / batch_size))

    rows = [row for row in measured_on(device) if (row.mode, row.dtype) == (mode, name)]
    nearest = min(rows, key=distance, default=None)
    if nearest is None or distance(nearest) > FARTHEST or nearest.ratio < SLOWER:
        return None
    return (
        f"nn.LSTM was measured to be {nearest.ratio:.2f} times as fast in {mode} on {device.name} "
        f"({name}, H = {nearest.hidden_size}, B = {nearest.batch_size})"
    )

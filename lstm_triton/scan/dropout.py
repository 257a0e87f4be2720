"""Dropout between layers, as the scans compute it, for what is computed outside of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..stack import Stack
from .launch import launch
from .plan import DROPOUT_BLOCK, Launch


class Dropout(NamedTuple):
    """Dropout on the outputs of some lanes of a launch."""

    lanes: int  # how many, the first ones
    probability: float
    seed: Tensor | None  # (1,) int64; None only where no lane has dropout


def dropped_lanes(launch: Launch, stack: Stack, dropout: float) -> int:
    """How many lanes of a launch, the first ones, have dropout: those of all layers but the last."""
    if dropout == 0:
        return 0
    return max(0, min(launch.plan.lanes, stack.lanes - stack.directions - launch.first))


@torch.library.custom_op("lstm_triton::dropout_scale", mutates_args=())
def dropout_scale(seed: Tensor, lane: int, dropout: float, like: Tensor, first_row: int = 0) -> Tensor:
    """What the scans multiply a lane's outputs (T, B, H) or (rows, H) with, from a row on: 0 or 1 / (1 - dropout).

    In float32, as they do it.
    """
    from ..kernels.lanes import dropout_scales

    scale = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    arguments = {
        "seed_ptr": seed,
        "lane": lane,
        "probability": dropout,
        "scale_ptr": scale,
        "elements": scale.numel(),
        "first_element": first_row * like.shape[-1],
    }
    grid = (-(-scale.numel() // DROPOUT_BLOCK),)
    launch(dropout_scales, grid, like.device, arguments, {"BLOCK": DROPOUT_BLOCK}, {})
    return scale


@dropout_scale.register_fake
def _(seed: Tensor, lane: int, dropout: float, like: Tensor, first_row: int = 0) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.float32)

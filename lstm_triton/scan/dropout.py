"""Dropout between layers: which lanes have it, and what it does outside of the scans."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..stack import Stack
from .launch import launch
from .plan import DROPOUT_BLOCK, Launch


class Dropout(NamedTuple):
    """Dropout on the output of all layers but the last. What it does to an element is a function of the seed."""

    probability: float = 0.0
    seed: Tensor | None = None  # (1,) int64, needed where the probability is not 0

    def lanes(self, launch: Launch, stack: Stack) -> int:
        """How many lanes of a launch have dropout: the first ones, those of all layers but the last."""
        if self.probability == 0:
            return 0
        return max(0, min(launch.plan.lanes, stack.lanes() - stack.directions - launch.first))

    def applied(self, lane: int, output: Tensor, first_row: int = 0) -> Tensor:
        """A lane's output (T, B, H) or (rows, H), from a row on, after dropout; rounded once, as the scans do it.

        It is linear, and so does the same to gradients on their way back.
        """
        assert self.seed is not None
        scale: Tensor = dropout_scale(self.seed, lane, self.probability, output.detach(), first_row)
        return (output * scale).to(output.dtype)


@torch.library.custom_op("lstm_triton::dropout_scale", mutates_args=())
def dropout_scale(seed: Tensor, lane: int, dropout: float, like: Tensor, first_row: int = 0) -> Tensor:
    """What the scans multiply a lane's output (T, B, H) or (rows, H) with, from a row on: 0 or 1 / (1 - dropout).

    In float32, as the scans have it.
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

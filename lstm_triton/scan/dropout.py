"""Dropout between layers: which lanes have it, and how it is computed outside the scans."""

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import prepared, run
from .plan import DROPOUT_BLOCK, divide_up


class Dropout(NamedTuple):
    """Dropout on the output of all layers but the last. The seed decides which elements are kept."""

    probability: float = 0.0
    seed: Tensor | None = None  # (1,) int64, needed if the probability is not 0

    def applied(self, lane: int, output: Tensor, first_row: int = 0) -> Tensor:
        """A lane's output (T, B, H) or (rows, H) after dropout, rounded once, as in the scans.

        `first_row`: the row of the lane that is the first row of `output`. Dropout is linear, so this function also
        takes gradients back through dropout.
        """
        assert self.seed is not None
        scale: Tensor = dropout_scale(self.seed, lane, self.probability, output.detach(), first_row)
        return (output * scale).to(output.dtype)


@torch.library.custom_op("lstm_triton::dropout_scale", mutates_args=())
def dropout_scale(seed: Tensor, lane: int, dropout: float, like: Tensor, first_row: int = 0) -> Tensor:
    """The factors of dropout for a lane's output: 0 or 1 / (1 - dropout), in float32, as in the scans.

    `like`: the output, (T, B, H) or (rows, H). `first_row`: the row of the lane that is its first row.
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
    grid = (divide_up(scale.numel(), DROPOUT_BLOCK),)
    run(prepared(dropout_scales, grid, {"BLOCK": DROPOUT_BLOCK}, {}), like.device, arguments)
    return scale


@dropout_scale.register_fake
def _(seed: Tensor, lane: int, dropout: float, like: Tensor, first_row: int = 0) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.float32)

"""The words that both paths share: the weights of a stack of layers, its states, and the loop over its lanes.

A *lane* is one direction of one layer. A stack has layer after layer, in each the forward and then the
reverse direction.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ragged import Ragged
from .reference import Gates

States = tuple[Tensor, Tensor]  # h and c, of all layers and directions
Results = tuple[Tensor, Tensor, Tensor, Tensor | None]  # output, h_n, c_n, and the cells if asked for
ScanLayers = Callable[..., tuple[Tensor, ...]]  # with the parameters of scan_layers
LaneResults = tuple[Tensor, ...]  # output, h_n, c_n, and the cells if asked for
# What the layer returns, its gates and its cells, (T, B, H) or (rows, H).
Inside = tuple[tuple[Tensor, ...], Gates, Tensor]


def lane_by_lane(
    one_layer: Callable[..., LaneResults],
    projected: bool,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    directions: int,
    bias: bool,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    dropout: float = 0.0,
    low_memory: bool = False,
    return_cells: bool = False,
) -> LaneResults:
    """What `lstm_triton.autograd.scan_layers` computes, lane after lane, by `layer` or `operator_lane`.

    With `projected`, the weights of a lane end with its weight_hr. `low_memory` changes nothing: what PyTorch's own
    function keeps for backward is its own choice.
    """
    size = (4 if bias else 2) + projected
    lanes = len(weights) // size
    outputs, ends = [], []
    for lane in range(lanes):
        weight_ih, weight_hh, *others = weights[size * lane : size * (lane + 1)]
        weight_hr = others[-1] if projected else None
        states = [None if each is None else each[lane] for each in (h_0, c_0, h_reset, c_reset)]
        output, *end = one_layer(
            input, *states[:2], weight_ih, weight_hh, *(others[:2] if bias else (None, None)), weight_hr,
            reverse=lane % directions == 1, h_reset=states[2], c_reset=states[3], ragged=ragged,
            return_cells=return_cells,
        )  # fmt: skip
        outputs.append(output)
        ends.append(end)
        if len(outputs) == directions:
            input, outputs = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1), []
            if dropout > 0 and lane < lanes - 1:
                input = F.dropout(input, dropout)
    return input, *(torch.stack(each) for each in zip(*ends, strict=True))


WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Stack(NamedTuple):
    """The weights of a stack of layers.

    Attributes:
        weights: of each lane weight_ih, weight_hh, and with `bias` bias_ih and bias_hh.
        directions: 1 or 2.
        reverse: whether the first direction walks from the last step to the first.
    """

    weights: Sequence[Tensor]
    directions: int
    bias: bool
    reverse: bool

    @property
    def weights_per_lane(self) -> int:
        return 4 if self.bias else 2

    @property
    def lanes(self) -> int:
        return len(self.weights) // self.weights_per_lane

    @property
    def num_layers(self) -> int:
        return self.lanes // self.directions

    @property
    def hidden_size(self) -> int:
        return self.weights[1].shape[1]

    def named(self, name: str) -> Sequence[Tensor]:
        """One weight of every lane."""
        return self.weights[WEIGHTS.index(name) :: self.weights_per_lane]

    def is_reverse(self, lane: int) -> bool:
        return self.reverse != (lane % self.directions == 1)

    def layer(self, number: int) -> slice:
        """The lanes of a layer."""
        return slice(number * self.directions, (number + 1) * self.directions)

    def by_direction(self) -> list[tuple[slice, bool]]:
        """The lanes of each direction, and whether it walks from the last step to the first."""
        return [
            (slice(first, None, self.directions), self.is_reverse(first))
            for first in range(min(self.directions, self.lanes))
        ]

    def of(self, lanes: slice) -> "Stack":
        """Some of the lanes."""
        size = self.weights_per_lane
        weights = self.weights[size * lanes.start : size * lanes.stop]
        return Stack(weights, self.directions, self.bias, self.is_reverse(lanes.start))

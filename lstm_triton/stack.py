"""What both paths share: the weights of a stack of layers, the states that sequences start from, and the lanes.

A *lane* is one direction of one layer. The lanes of a stack are in the order of its layers; in each layer the forward
direction comes before the reverse one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .ragged import Ragged
from .reference import Gates, lstm_layer

States = tuple[Tensor, Tensor]  # h and c, of all lanes
Results = tuple[Tensor, Tensor, Tensor, Tensor | None]  # output, h_n, c_n, and the cells if asked for
LaneResults = tuple[Tensor, ...]  # output, h_n, c_n, and the cells if asked for
Inside = tuple[LaneResults, Gates, Tensor]  # a lane's results; its gates and its cells (T, B, H) or (rows, H)


class LaneWeights(NamedTuple):
    """The weights of one lane. The gates are in the order i, f, g, o."""

    ih: Tensor  # (4H, I)
    hh: Tensor  # (4H, P); in the scans (4H, H), with the projection folded in
    bias_ih: Tensor | None = None  # (4H,)
    bias_hh: Tensor | None = None  # (4H,)
    hr: Tensor | None = None  # (P, H), of a layer with projections

    def given(self) -> list[Tensor]:
        """The weights that are not None, in the order of `torch.nn.LSTM`."""
        return [weight for weight in self if weight is not None]

    def of_given(self, values: Sequence[Any]) -> list[Any]:
        """From one value for each field, the values of the weights that are not None."""
        return [value for weight, value in zip(self, values, strict=True) if weight is not None]


class Start(NamedTuple):
    """The states that sequences start from, of all lanes (lanes, B, ...) or of one lane (B, ...). None: zeros.

    For layers with projections (scan/layers.py), `preact` and `preact_reset` replace `h` and `h_reset`. They are what h
    adds to the pre-activations: h W_hh^T.
    """

    h: Tensor | None = None  # (..., P) at the beginning
    c: Tensor | None = None  # (..., H)
    h_reset: Tensor | None = None  # (..., P) at a reset
    c_reset: Tensor | None = None  # (..., H)
    preact: Tensor | None = None  # (..., 4H) at the beginning
    preact_reset: Tensor | None = None  # (..., 4H) at a reset

    def map(self, function: Callable[[Tensor], Tensor]) -> "Start":
        return Start(*[None if each is None else function(each) for each in self])

    def of(self, lanes: int | slice) -> "Start":
        """The states of one lane, or of some lanes."""
        return Start(*[None if each is None else each[lanes] for each in self])


NO_STATES = Start()


class Stack(NamedTuple):
    """A stack of layers.

    Attributes:
        weights: the weights of each lane.
        directions: 1 or 2.
        reverse: whether the first direction walks from the last step to the first.
    """

    weights: tuple[LaneWeights, ...]
    directions: int = 1
    reverse: bool = False

    @staticmethod
    def of(
        weights: Sequence[Tensor], directions: int, bias: bool, reverse: bool = False, projected: bool = False
    ) -> "Stack":
        """From a flat list: for each lane ih, hh, with `bias` bias_ih and bias_hh, with `projected` hr."""
        size = (4 if bias else 2) + (1 if projected else 0)
        none = () if bias else (None, None)  # in the place of the biases
        lanes = [
            LaneWeights(*weights[first : first + 2], *none, *weights[first + 2 : first + size])
            for first in range(0, len(weights), size)
        ]
        return Stack(tuple(lanes), directions, reverse)

    def arguments(self) -> tuple[list[Tensor], int, bool, bool]:
        """The stack as operators take it: the weights of all lanes, directions, bias, reverse."""
        return [weight for lane in self.weights for weight in lane.given()], self.directions, self.bias(), self.reverse

    def lanes(self) -> int:
        return len(self.weights)

    def num_layers(self) -> int:
        return self.lanes() // self.directions

    def hidden_size(self) -> int:
        return self.weights[0].ih.shape[0] // 4

    def bias(self) -> bool:
        return self.weights[0].bias_ih is not None

    def biases(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Contiguous bias_ih and bias_hh of every lane; both are empty without biases."""
        if self.weights[0].bias_ih is None:
            return (), ()
        ih = tuple([lane.bias_ih.contiguous() for lane in self.weights])  # type: ignore[union-attr]
        return ih, tuple([lane.bias_hh.contiguous() for lane in self.weights])  # type: ignore[union-attr]

    def is_reverse(self, lane: int) -> bool:
        return self.reverse != (lane % self.directions == 1)

    def is_last(self, lane: int) -> bool:
        """Whether the lane belongs to the last layer."""
        return lane >= self.lanes() - self.directions

    def layer(self, number: int) -> slice:
        """The lanes of a layer."""
        return slice(number * self.directions, (number + 1) * self.directions)

    def part(self, lanes: slice) -> "Stack":
        """The stack of some of the lanes."""
        return Stack(self.weights[lanes], self.directions, self.is_reverse(lanes.start))


def by_direction(directions: int, reverse: bool) -> list[tuple[slice, bool]]:
    """For each direction its lanes, and whether it walks from the last step to the first, as the first may do."""
    return [(slice(first, None, directions), reverse != (first == 1)) for first in range(directions)]


class Lane(Protocol):
    """What computes one lane.

    Args:
        input: (T, B, I), ragged (rows, I).
        start: the states that the lane starts from, (B, ...).
        ragged: which step follows which; None: every sequence has T steps in order.

    Returns:
        output (T, B, P), h_n (B, P), c_n (B, H), and with `return_cells` cells (T, B, H). Ragged: output (rows, P) and
        cells (rows, H), with zeros where there is no step.
    """

    def __call__(
        self,
        input: Tensor,
        start: Start,
        weights: LaneWeights,
        *,
        reverse: bool,
        ragged: Ragged | None,
        return_cells: bool,
    ) -> LaneResults: ...


class Options(NamedTuple):
    """How a stack is computed, besides its weights and states.

    Attributes:
        ragged: which step follows which; None: every sequence has T steps in order.
        dropout: the probability of dropout on the output of every layer but the last.
        low_memory: keep little for backward, which then takes longer. It has no effect with `return_cells`.
        return_cells: whether every c_t is asked for.
        shared_output: whether the output may share memory with what is kept for backward.
    """

    ragged: Ragged | None = None
    dropout: float = 0.0
    low_memory: bool = False
    return_cells: bool = False
    shared_output: bool = False


# What computes a stack: (input, start, stack, options) -> output (T, B, directions * P), h_n and c_n (lanes, B, ...),
# with `return_cells` cells (lanes, T, B, H). Ragged: output (rows, directions * P), cells (lanes, rows, H).
ScanLayers = Callable[[Tensor, Start, Stack, Options], LaneResults]


def formula_lane(
    input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None, return_cells: bool
) -> LaneResults:
    """A lane by the step-by-step formula: plain operations, for derivatives and transforms of any kind."""
    return lstm_layer(
        input,
        start.h,
        start.c,
        weight_ih=weights.ih,
        weight_hh=weights.hh,
        bias_ih=weights.bias_ih,
        bias_hh=weights.bias_hh,
        weight_hr=weights.hr,
        reverse=reverse,
        h_reset=start.h_reset,
        c_reset=start.c_reset,
        ragged=ragged,
        return_cells=return_cells,
    )


def layers_of(lane: Lane) -> ScanLayers:
    """A function that computes a stack with this `lane`. It ignores `low_memory`: the lane decides what it keeps."""

    def layers(input: Tensor, start: Start, stack: Stack, options: Options) -> LaneResults:
        def drop(layer: int, output: Tensor) -> Tensor:
            return F.dropout(output, options.dropout)

        return lane_by_lane(lane, input, start, stack, options, drop)

    return layers


def lane_by_lane(
    lane: Lane, input: Tensor, start: Start, stack: Stack, options: Options, drop: Callable[[int, Tensor], Tensor]
) -> LaneResults:
    """Compute a stack, one lane after the other.

    Args:
        drop: dropout between layers: (layer, output of the layer) -> what the layer above reads.
    """
    outputs: list[Tensor] = []
    ends: list[Sequence[Tensor]] = []
    for index, weights in enumerate(stack.weights):
        output, *end = lane(
            input,
            start.of(index),
            weights,
            reverse=stack.is_reverse(index),
            ragged=options.ragged,
            return_cells=options.return_cells,
        )
        outputs.append(output)
        ends.append(end)
        if len(outputs) == stack.directions:
            input, outputs = outputs[0] if stack.directions == 1 else torch.cat(outputs, dim=-1), []
            if options.dropout > 0 and not stack.is_last(index):
                input = drop(index // stack.directions, input)
    return input, *(torch.stack(each) for each in zip(*ends, strict=True))

"""What the scans get, and what backward has of forward: each tensor by its name.

A `torch.autograd.Function` takes and saves a flat list of tensors. The records of this file are its parts, in the order
of the list: `Static`, `Fixed` and `Inputs` are the arguments of `Scan`; `Fixed`, `Buffers` and `Inputs` are saved.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..ragged import Ragged
from ..stack import Stack, Start
from .buffers import Buffers
from .dropout import Dropout


class Static(NamedTuple):
    """What is no tensor."""

    directions: int
    bias: bool
    reverse: bool
    dropout: float  # probability
    low_memory: bool
    return_cells: bool


class Fixed(NamedTuple):
    """Tensors that no gradient reaches."""

    seed: Tensor | None = None  # of dropout
    before: Tensor | None = None  # this and the next three are the tables of a ragged batch
    after: Tensor | None = None
    offsets: Tensor | None = None
    lengths: Tensor | None = None

    def tables(self) -> tuple[Tensor, ...]:
        """As operators take them."""
        return tuple(table for table in self[1:] if table is not None)

    def ragged(self) -> Ragged | None:
        return Ragged.of(self.tables())


class Inputs(NamedTuple):
    """Tensors that gradients reach; also used for their gradients, and for whether each gradient is needed."""

    input: Any
    start: Start
    weights: Sequence[Any]  # of all lanes, one after the other

    @staticmethod
    def of(flat: Sequence[Any]) -> "Inputs":
        count = 1 + len(Start._fields)
        return Inputs(flat[0], Start(*flat[1:count]), flat[count:])

    def flat(self) -> tuple[Any, ...]:
        return self.input, *self.start, *self.weights


class Grads(NamedTuple):
    """Gradients of the results; None: zeros."""

    output: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    cells: Tensor | None


class Saved(NamedTuple):
    """What backward has of forward."""

    static: Static
    fixed: Fixed
    buffers: Buffers
    inputs: Inputs

    @staticmethod
    def of(static: Sequence[Any], tensors: Sequence[Any]) -> "Saved":
        fixed, end = len(Fixed._fields), len(Fixed._fields) + len(Buffers._fields)
        return Saved(Static(*static), Fixed(*tensors[:fixed]), Buffers(*tensors[fixed:end]), Inputs.of(tensors[end:]))

    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self.fixed, *self.buffers, *self.inputs.flat()

    def stack(self) -> Stack:
        return stack_of(self.static, self.inputs)

    def dropout(self) -> Dropout:
        return Dropout(self.static.dropout, self.fixed.seed)


def stack_of(static: Static, inputs: Inputs) -> Stack:
    return Stack.of(inputs.weights, static.directions, static.bias, static.reverse)

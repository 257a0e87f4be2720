"""What the scans get, and what forward saves for backward: every tensor has a name.

A `torch.autograd.Function` takes and saves a flat list of tensors. The records of this file are the parts of this list,
in its order. `Static`, `Fixed` and `Inputs` are the arguments of `LSTMScan`. `Fixed`, `Inputs` and `Buffers` are saved.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..ragged import Ragged
from ..stack import Stack, Start
from .buffers import Buffers


class Static(NamedTuple):
    """The arguments that are not tensors."""

    directions: int
    bias: bool
    reverse: bool
    dropout: float  # probability
    low_memory: bool
    return_cells: bool
    shared_output: bool  # whether the output may share the memory of `Buffers.hidden`


class Fixed(NamedTuple):
    """Tensors that get no gradient."""

    seed: Tensor | None = None  # of dropout
    before: Tensor | None = None  # this and the next three: the tables of a ragged batch (ragged.py)
    after: Tensor | None = None
    offsets: Tensor | None = None
    lengths: Tensor | None = None

    def tables(self) -> tuple[Tensor, ...]:
        """The tables as operators take them; empty if the batch is not ragged."""
        # Field by field: a part of a NamedTuple is one again when PyTorch 2.9 traces it.
        tables = (self.before, self.after, self.offsets, self.lengths)
        return () if self.before is None else tables  # type: ignore[return-value]

    def ragged(self) -> Ragged | None:
        return None if self.before is None else Ragged(*self.tables())


class Inputs(NamedTuple):
    """Tensors that get gradients. Also used for their gradients, and for bools: whether each gradient is needed."""

    input: Any
    start: Start
    weights: Sequence[Any]  # the weights of all lanes, lane after lane

    @staticmethod
    def of(flat: Sequence[Any]) -> "Inputs":
        return Inputs(flat[0], Start(*flat[1:FIRST_WEIGHT]), flat[FIRST_WEIGHT:])

    def flat(self) -> tuple[Any, ...]:
        return self.input, *self.start, *self.weights


FIRST_WEIGHT = 1 + len(Start._fields)


class Grads(NamedTuple):
    """Gradients of the results. None stands for zeros."""

    output: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    cells: Tensor | None


class Saved(NamedTuple):
    """What forward saves for backward."""

    static: Static
    fixed: Fixed
    inputs: Inputs
    buffers: Buffers

    @staticmethod
    def of(static: Sequence[Any], tensors: Sequence[Any]) -> "Saved":
        inputs = Inputs.of(tensors[FIXED:-BUFFERS])
        return Saved(Static(*static), Fixed(*tensors[:FIXED]), inputs, Buffers(*tensors[-BUFFERS:]))

    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self.fixed, *self.inputs.flat(), *self.buffers

    def stack(self) -> Stack:
        return stack_of(self.static, self.inputs)


FIXED, BUFFERS = len(Fixed._fields), len(Buffers._fields)


def stack_of(static: Static, inputs: Inputs) -> Stack:
    return Stack.of(inputs.weights, static.directions, static.bias, static.reverse)

"""The checked arguments of one call of an LSTM or of an LSTMCell, as one record.

A record that torch.compile traces has methods and no properties: PyTorch 2.9 cannot trace a property of a NamedTuple.
"""

from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .autocast import autocast_dtype, is_on
from .ragged import Ragged, dense, packed
from .stack import Stack, Start, States

Sequences = TypeVar("Sequences", Tensor, PackedSequence)
Memory = Literal["full", "low"]
MEMORY: tuple[str, ...] = get_args(Memory)


def in_order(states: States, order: Tensor | None) -> States:
    """The states with their sequences in another order."""
    return states if order is None else (states[0].index_select(1, order), states[1].index_select(1, order))


class Call(NamedTuple):
    """The checked arguments of one call of an LSTM. They have a batch dimension, even if the input has none."""

    data: Tensor  # (T, B, I), with batch_first (B, T, I), or the rows of a packed sequence (sum of lengths, I)
    batch_sizes: Tensor | None  # (T,), of a packed sequence
    states: States | None  # h_0 and c_0; of a packed sequence, in the order of its sequences before they were sorted
    weights: list[Tensor]
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    training: bool
    directions: int  # D, 1 or 2
    time_steps: int  # T
    batch_size: int  # B
    hidden_size: int  # H, of c
    output_size: int  # P, of h: less than H with projections
    lengths: Tensor | None = None  # (B,)
    resets: Tensor | None = None  # (T, B)
    reset_state: States | None = None
    return_cells: bool = False
    low_memory: bool = False
    sorted_indices: Tensor | None = None  # (B,), of a packed sequence: the order of its sequences in the data

    def tensors(self) -> list[Tensor]:
        """Every tensor that takes part in the arithmetic."""
        return [self.data, *(self.states or ()), *(self.reset_state or ()), *self.weights]

    def trains(self) -> bool:
        """Whether a gradient of one of the tensors is needed. Not inside torch.func, where tensors do not tell."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors())

    def projected(self) -> bool:
        return self.output_size < self.hidden_size

    def dense(self) -> bool:
        """Whether every sequence has T steps, and no sequence is reset."""
        return self.batch_sizes is None and self.lengths is None and self.resets is None

    def ordered_states(self) -> States | None:
        """h_0 and c_0 in the order of the data's sequences."""
        return None if self.states is None else in_order(self.states, self.sorted_indices)

    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype that autocast gives to all tensors. None: it is off, or keeps dtypes, as it does float64."""
        return autocast_dtype(self.tensors()) if is_on(self.data.device) else None

    def ragged(self) -> Ragged | None:
        """The tables of a ragged call: which step follows which. None for a dense call."""
        device = self.data.device
        if self.batch_sizes is not None:
            return packed(self.batch_sizes, device)
        if self.lengths is not None or self.resets is not None:
            return dense(self.lengths, self.resets, self.time_steps, self.batch_size, device)
        return None

    def prepared(self) -> tuple[Tensor, Start, Stack, Ragged | None]:
        """Input (T, B, I) or (rows, I), start, stack and tables for `ScanLayers`, in the dtype of autocast."""
        input, weights, ragged = self.data, self.weights, None if self.dense() else self.ragged()
        states = self.states if self.sorted_indices is None else self.ordered_states()
        start = Start(*(states or (None, None)), *(self.reset_state or (None, None)))
        dtype = self.autocast_dtype() if torch._C._is_any_autocast_enabled() else None
        if dtype is not None:
            input, weights = input.to(dtype), [weight.to(dtype) for weight in weights]
            start = start.map(lambda state: state.to(dtype))
        if self.batch_first:
            input = input.transpose(0, 1)
        if ragged is not None and self.batch_sizes is None:
            input = input.reshape(-1, input.shape[2])
        return input, start, Stack.of(weights, self.directions, self.bias, False, self.projected()), ragged


class CellCall(NamedTuple):
    """The checked arguments of one call of an LSTMCell. They have a batch dimension, even if the input has none."""

    data: Tensor  # (B, I)
    states: States | None  # (B, H) each
    weights: list[Tensor]
    batch_size: int  # B
    hidden_size: int  # H

    def tensors(self) -> list[Tensor]:
        """Every tensor that takes part in the arithmetic."""
        return [self.data, *(self.states or ()), *self.weights]

    def autocast_dtype(self) -> torch.dtype | None:
        """As in `Call`."""
        return autocast_dtype(self.tensors()) if is_on(self.data.device) else None


def has_several_dtypes(call: Call | CellCall) -> bool:
    """Whether tensors have other dtypes than the data, and autocast does not convert them."""
    return call.autocast_dtype() is None and any(tensor.dtype != call.data.dtype for tensor in call.tensors())

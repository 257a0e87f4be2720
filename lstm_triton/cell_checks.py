"""The checks of the arguments of an LSTMCell. Every caller makes its `CellCall` here."""

from typing import Any

import torch
from torch import Tensor, nn

from .call import CellCall
from .checks import check_memory


def call_of_cell(cell: Any, input: Any, hx: Any) -> CellCall | None:
    """The call that a cell would make, with a batch dimension; None: `nn.LSTMCell` itself judges the arguments.

    The sizes are those of the weights, as for `nn.LSTMCell`. The cell may be anything with the attributes of one.

    Raises:
        RuntimeError: for what `nn.LSTMCell` takes, but crashes on or computes garbage from.
    """
    if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        return None
    states: list[Tensor] = [] if hx is None else list(hx)
    weights = [cell.weight_ih, cell.weight_hh]
    weights += [bias for bias in (cell.bias_ih, cell.bias_hh) if bias is not None]
    given: tuple[Any, ...] = (input, *states, *weights)
    for tensor in given:
        if not isinstance(tensor, Tensor):
            return None
    if len(weights) == 3:  # one bias was taken away
        zeros = torch.zeros_like(weights[2])
        weights = [*weights[:2], *((zeros, weights[2]) if cell.bias_ih is None else (weights[2], zeros))]
    if weights[0].dim() != 2 or weights[1].dim() != 2:
        return None
    dimensions, ranks = input.dim(), [state.dim() for state in states]
    if dimensions == 1:
        input = input.unsqueeze(0)
        states = [state.unsqueeze(0) for state in states]
    input_size, hidden_size = weights[0].shape[1], weights[1].shape[1]
    fits_states = (
        input.dim() == 2
        and input.shape[1] == input_size
        and all(state.shape == (input.shape[0], hidden_size) for state in states)
        and (hx is not None or cell.hidden_size == hidden_size)
        and input_size > 0
        and hidden_size > 0
    )
    if not fits_states:
        _refuse_ranks(dimensions, ranks, states, hidden_size)
        return None
    gates = 4 * hidden_size
    sizes = ((gates, input_size), (gates, hidden_size))
    for index, weight in enumerate(weights[:2]):
        if weight.shape != sizes[index]:  # nn.LSTMCell broadcasts such gates
            name = ("weight_ih", "weight_hh")[index]
            raise RuntimeError(f"Expected {name} size {sizes[index]}, got {list(weight.shape)}")
    if any(bias.shape != (gates,) for bias in weights[2:]):  # it broadcasts biases, too
        return None
    if not input.is_meta:
        check_memory(input, states, weights)
    return CellCall(input, (states[0], states[1]) if states else None, weights, input.shape[0], hidden_size)


def _refuse_ranks(dimensions: int, ranks: list[int], states: list[Tensor], hidden_size: int) -> None:
    """Refuse 2-D states beside a 1-D input where `nn.LSTMCell` does not: it splits the wrong dimension into gates."""
    if dimensions != 1 or not all(rank in (1, 2) for rank in ranks):
        return
    for index, (rank, state) in enumerate(zip(ranks, states, strict=True)):
        if rank == 2 and state.shape[1] == hidden_size:
            raise RuntimeError(f"For unbatched 1-D input, hx[{index}] should also be 1-D but got a 2-D tensor")


def checked_call_of_cell(cell: nn.LSTMCell, input: Any, hx: Any) -> CellCall:
    """`call_of_cell`; wrong arguments raise the error that the cell itself would raise."""
    call = call_of_cell(cell, input, hx)
    if call is None:
        nn.LSTMCell.forward(cell, input, hx)
        raise ValueError("the sizes of the input, the states and the weights do not fit each other")
    return call

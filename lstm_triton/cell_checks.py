"""The checks of the arguments of an LSTMCell. Every caller makes its `CellCall` here."""

from typing import Any

import torch
from torch import Tensor, nn

from .call import CellCall
from .checks import check_memory


def call_of_cell(cell: nn.LSTMCell, input: Any, hx: Any) -> CellCall | None:
    """The call that a cell would make, with a batch dimension; None: `nn.LSTMCell` itself judges the arguments.

    Raises:
        RuntimeError: for what `nn.LSTMCell` takes, but crashes on or computes garbage from.
    """
    if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        return None
    states: list[Tensor] = [] if hx is None else list(hx)
    weights = [cell.weight_ih, cell.weight_hh]
    weights += [bias for bias in (cell.bias_ih, cell.bias_hh) if bias is not None]
    given: tuple[Any, ...] = (input, *states, *weights)
    if not all(isinstance(tensor, Tensor) for tensor in given):
        return None
    if len(weights) == 3:  # one bias was taken away
        zeros = torch.zeros_like(weights[2])
        weights = [*weights[:2], *((zeros, weights[2]) if cell.bias_ih is None else (weights[2], zeros))]
    dimensions = input.dim()
    if dimensions == 1:
        input = input.unsqueeze(0)
        states = [state.unsqueeze(0) for state in states]
    gates = 4 * cell.hidden_size
    expected = [(gates, cell.input_size), (gates, cell.hidden_size), (gates,), (gates,)]
    fits = (
        input.dim() == 2
        and input.shape[1] == cell.input_size
        and all(state.shape == (input.shape[0], cell.hidden_size) for state in states)
        and all(weight.shape == shape for weight, shape in zip(weights, expected, strict=False))
        and cell.input_size > 0
        and cell.hidden_size > 0
    )
    if not fits:
        _refuse_in_cell(cell, dimensions, states, weights)
        return None
    if not input.is_meta:
        check_memory(input, states, weights)
    return CellCall(input, (states[0], states[1]) if states else None, weights, input.shape[0], cell.hidden_size)


def _refuse_in_cell(cell: nn.LSTMCell, dimensions: int, states: list[Tensor], weights: list[Tensor]) -> None:
    """Refuse what `nn.LSTMCell` takes by mistake: it broadcasts weights, and states of another rank than the input."""
    for index, state in enumerate(states):
        # nn.LSTMCell compares these two sizes only, and then splits the wrong dimension into gates.
        if state.dim() > 2 and dimensions < 3 and state.shape[1] == cell.hidden_size:
            raise RuntimeError(
                f"hx[{index}] must be {dimensions}-D like the input, got {state.dim() - (dimensions == 1)}-D"
            )
    for name, weight in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=False):
        columns = {"weight_ih": (cell.input_size,), "weight_hh": (cell.hidden_size,)}.get(name, ())
        size = (4 * cell.hidden_size, *columns)
        if weight.dim() != len(size) or weight.shape[0] != size[0]:
            raise RuntimeError(f"Expected {name} size {size}, got {list(weight.shape)}")


def checked_call_of_cell(cell: nn.LSTMCell, input: Any, hx: Any) -> CellCall:
    """`call_of_cell`; wrong arguments raise the error that the cell itself would raise."""
    call = call_of_cell(cell, input, hx)
    if call is None:
        nn.LSTMCell.forward(cell, input, hx)
        raise ValueError("the sizes of the input, the states and the weights do not fit each other")
    return call

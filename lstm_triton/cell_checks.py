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
    if cell.bias_ih is not None and cell.bias_hh is not None:
        weights += [cell.bias_ih, cell.bias_hh]
    for tensor in (input, *states, *weights):
        if not isinstance(tensor, Tensor):
            return None
    if len(weights) == 2 and (cell.bias_ih is not None or cell.bias_hh is not None):
        weights += _with_zeros(cell.bias_ih, cell.bias_hh)
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


def _with_zeros(bias_ih: Tensor | None, bias_hh: Tensor | None) -> list[Tensor]:
    """Both biases of a cell that has one of them."""
    bias_ih = torch.zeros_like(bias_hh) if bias_ih is None and bias_hh is not None else bias_ih
    bias_hh = torch.zeros_like(bias_ih) if bias_hh is None and bias_ih is not None else bias_hh
    return [bias for bias in (bias_ih, bias_hh) if bias is not None]


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

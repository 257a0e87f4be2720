"""Derivatives above the first, and forward-mode ones: through the step-by-step formula (reference.py)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ragged import Ragged
from ..reference import lstm_layer
from .dropout import dropout_scale
from .gradients import STATES, Saved


def gradients_by_formula(saved: Saved, needed: tuple[bool, ...], grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The needed ones of the gradients, in operations that can be differentiated again."""
    arguments = [*saved.states, *saved.weights]
    wanted = [place for place, need in enumerate(needed) if need]

    def results(*tensors: Tensor) -> list[Tensor]:
        renewed = list(arguments)
        for place, tensor in zip(wanted, tensors, strict=True):
            renewed[place] = tensor
        results = stack_by_formula(saved._replace(states=renewed[:STATES], weights=renewed[STATES:]))  # type: ignore[arg-type]
        return [result for result, grad in zip(results, grads, strict=True) if grad is not None]

    pull_back = torch.func.vjp(results, *(arguments[place] for place in wanted))[1]
    found: tuple[Tensor, ...] = pull_back([grad for grad in grads if grad is not None])
    return found


def stack_by_formula(saved: Saved) -> tuple[Tensor, ...]:
    """What `scan_layers` returns, step by step."""
    stack, dropout = saved.stack, saved.options.dropout
    below, size, others = saved.input, stack.weights_per_lane, saved.states[1:]
    h_n, c_n, cells, outputs = [], [], [], []
    for lane in range(stack.lanes):
        h_0, c_0, h_reset, c_reset, *preacts = (None if each is None else each[lane] for each in others)
        weight_ih, weight_hh, *biases = stack.weights[size * lane : size * (lane + 1)]
        reverse, below_and_more = stack.is_reverse(lane), below
        if preacts[0] is not None or preacts[1] is not None:
            # As if they were inputs of their own.
            more = _shares_of_states(preacts, below, reverse, saved.ragged)
            below_and_more = torch.cat([below, more], dim=-1)
            weight_ih = torch.cat([weight_ih, torch.eye(4 * stack.hidden_size).to(weight_ih)], dim=1)
        output, h, c, every_c = lstm_layer(
            below_and_more, h_0, c_0, weight_ih, weight_hh, *(biases or (None, None)), reverse=reverse,
            h_reset=h_reset, c_reset=c_reset, ragged=saved.ragged, return_cells=True,
        )  # fmt: skip
        h_n.append(h)
        c_n.append(c)
        cells.append(every_c)
        if dropout > 0 and lane < stack.lanes - stack.directions:
            assert saved.seed is not None
            output = (output * dropout_scale(saved.seed, lane, dropout, output.detach())).to(output.dtype)
        outputs.append(output)
        if len(outputs) == stack.directions:
            below, outputs = torch.cat(outputs, dim=-1), []
    return below, torch.stack(h_n), torch.stack(c_n), torch.stack(cells)


def _shares_of_states(preacts: Sequence[Tensor | None], input: Tensor, reverse: bool, ragged: Ragged | None) -> Tensor:
    """(T, B, 4H), or (rows, 4H): what the states that steps start from add to their pre-activations."""
    preact_0, preact_reset = preacts
    if ragged is None:
        assert preact_0 is not None
        others = preact_0.new_zeros(input.shape[0] - 1, *preact_0.shape)
        return torch.cat([others, preact_0.unsqueeze(0)] if reverse else [preact_0.unsqueeze(0), others])
    some = preact_0 if preact_0 is not None else preact_reset
    assert some is not None
    shares = some.new_zeros(ragged.rows, some.shape[1])
    if preact_0 is not None:
        rows = (ragged.firsts(reverse) - ragged.batch_size).clamp(0, ragged.rows - 1)
        shares = shares.index_add(0, rows, torch.where(ragged.starts_from_initial(reverse).unsqueeze(1), preact_0, 0))
    if preact_reset is not None:
        anew = ragged.starts_anew(reverse).view(-1, ragged.batch_size, 1)
        shares = shares + torch.where(anew, preact_reset, 0).flatten(0, 1)
    return shares

"""Higher derivatives and forward-mode derivatives, by the step-by-step formula (reference.py)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import refusal, target
from ..preference import current_backend
from ..ragged import Ragged
from ..refusal import LaunchRefused
from ..stack import LaneResults, LaneWeights, Options, Start, formula_lane, lane_by_lane
from .dropout import Dropout
from .saved import Fixed, Inputs, Static, stack_of

Formula = Callable[..., Sequence[Tensor]]  # arguments -> results, in differentiable operations


def gradients_by_formula(
    formula: Formula, arguments: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The gradients that are needed, computed in differentiable operations.

    Args:
        arguments: the arguments of the formula.
        needed: for each argument, whether its gradient is needed.
        grads: the gradients of the formula's results; None: zeros.
    """
    wanted = [place for place, need in enumerate(needed) if need]

    def results(*tensors: Tensor) -> list[Tensor]:
        found = formula(*replaced(arguments, wanted, tensors))
        return [result for result, grad in zip(found, grads, strict=True) if grad is not None]

    pull_back = torch.func.vjp(results, *(arguments[place] for place in wanted))[1]
    found: tuple[Tensor, ...] = pull_back([grad for grad in grads if grad is not None])
    return found


def fall_back_to_formula(error: LaunchRefused, input: Tensor, hidden_size: int) -> None:
    """Let `gradients_by_formula` replace a kernel that was refused, and warn of it.

    Raises:
        LaunchRefused: "triton" is asked for, or torch.compile compiled the call.
    """
    if torch.compiler.is_dynamo_compiling() or current_backend() == "triton":
        raise error
    refusal.give_way(error, target.layers(input.device, input.dtype, hidden_size))


def second_gradients(
    formula: Formula,
    arguments: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    *grads_of_gradients: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Differentiate `gradients_by_formula`. Returns the gradients of all `grads`, then those of all `arguments`.

    Args:
        grads_of_gradients: for each argument, the gradient of its gradient. None: zeros, or the argument's gradient was
            not needed.
    """
    every = [*grads, *arguments]
    places = [place for place, tensor in enumerate(every) if tensor is not None]

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        renewed = replaced(every, places, tensors)
        return gradients_by_formula(formula, renewed[len(grads) :], needed, renewed[: len(grads)])

    found, pull_back = torch.func.vjp(gradients, *(every[place] for place in places))[:2]
    given = [grad for grad, need in zip(grads_of_gradients, needed, strict=True) if need]
    pairs = zip(found, given, strict=True)
    pulled = pull_back(tuple(torch.zeros_like(each) if grad is None else grad for each, grad in pairs))
    return tuple(replaced([None] * len(every), places, pulled))


def replaced(values: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
    """A copy of `values` with `others` at these places."""
    found = list(values)
    for place, other in zip(places, others, strict=True):
        found[place] = other
    return found


def stack_by_formula(inputs: Inputs, static: Static, fixed: Fixed) -> LaneResults:
    """Output, h_n, c_n and cells of a stack, computed step by step."""
    stack, dropout = stack_of(static, inputs), Dropout(static.dropout, fixed.seed)

    def drop(layer: int, output: Tensor) -> Tensor:
        lanes = range(layer * stack.directions, (layer + 1) * stack.directions)
        outputs = output.chunk(stack.directions, dim=-1)
        return torch.cat([dropout.applied(lane, each) for lane, each in zip(lanes, outputs, strict=True)], dim=-1)

    options = Options(fixed.ragged(), static.dropout, return_cells=True)
    return lane_by_lane(_lane, inputs.input, inputs.start, stack, options, drop)


def _lane(
    input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None, return_cells: bool
) -> LaneResults:
    """`formula_lane`, with `start.preact` and `start.preact_reset` as 4H more input features of weight 1."""
    if start.preact is not None or start.preact_reset is not None:
        input = torch.cat([input, _preacts(start, input, reverse, ragged)], dim=-1)
        identity = torch.eye(weights.ih.shape[0], dtype=weights.ih.dtype, device=weights.ih.device)
        weights = weights._replace(ih=torch.cat([weights.ih, identity], dim=1))
    return formula_lane(input, start, weights, reverse=reverse, ragged=ragged, return_cells=return_cells)


def _preacts(start: Start, input: Tensor, reverse: bool, ragged: Ragged | None) -> Tensor:
    """(T, B, 4H), or ragged (rows, 4H): what `preact` and `preact_reset` add to the pre-activations of each step."""
    preact, preact_reset = start.preact, start.preact_reset
    if ragged is None:
        assert preact is not None
        others = preact.new_zeros(input.shape[0] - 1, *preact.shape)
        return torch.cat([others, preact.unsqueeze(0)] if reverse else [preact.unsqueeze(0), others])
    given = preact if preact is not None else preact_reset
    assert given is not None
    found = given.new_zeros(ragged.rows(), given.shape[1])
    if preact is not None:
        rows = (ragged.firsts(reverse) - ragged.batch_size()).clamp(0, ragged.rows() - 1)
        found = found.index_add(0, rows, torch.where(ragged.starts_from_initial(reverse).unsqueeze(1), preact, 0))
    if preact_reset is not None:
        is_reset = ragged.is_reset(reverse).view(-1, ragged.batch_size(), 1)
        found = found + torch.where(is_reset, preact_reset, 0).flatten(0, 1)
    return found

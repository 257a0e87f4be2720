"""How many floating-point operations an operator computes: for `torch.utils.flop_counter.FlopCounterMode`.

PyTorch counts matrix products, and does not look into an operator that it does not know. So each operator of this
library that multiplies has a formula, which stands below the operator. A formula counts as PyTorch counts: two
operations for each multiplication. `counted` hands the formulas to the counters.

A counter copies all known formulas when it is made. This library may be imported later, and its operators are made at
the first call that needs them. So every call looks for active counters.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .ragged import Ragged

Formula = Callable[..., int]
_formulas: dict[str, Formula] = {}  # by the name of the operator


def counts(operator: str) -> Callable[[Formula], Formula]:
    """A decorator: this formula counts the operator. It takes the operator's arguments."""

    def add(formula: Formula) -> Formula:
        def without_result(*arguments: Any, out_val: Any = None, **by_name: Any) -> int:
            return formula(*arguments, **by_name)

        _formulas[operator] = without_result
        return formula

    return add


def counted() -> bool:
    """Whether a FLOP counter is active. Every active counter then knows the formulas."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return False
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None:
        return False
    active = False
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, flop_counter.FlopCounterMode):
            active = True
            for name, formula in _formulas.items():
                library, operator = name.split("::")
                packet = getattr(getattr(torch.ops, library), operator, None)
                if packet is not None:
                    counter.flop_registry.setdefault(packet, formula)
    return active


def products(rows: int, weights: Sequence[Tensor | None]) -> int:
    """The operations of one product of `rows` rows with each weight matrix. Biases are not counted, as PyTorch does."""
    return sum(2 * rows * weight.numel() for weight in weights if weight is not None and weight.dim() == 2)


def steps(rows: int, batch_size: int, ragged: Ragged | None) -> tuple[int, int]:
    """How many steps the sequences have together, and how many sequences have a step.

    The lengths are values of a tensor. If it has none (a fake tensor, for example), every sequence has all its steps.
    """
    if ragged is None or ragged.rows() < batch_size * ragged.time_steps():  # dense or packed: every row is a step
        return rows, batch_size
    lengths = ragged.lengths
    if type(lengths) is not Tensor or lengths.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        return rows, batch_size
    return int(lengths.sum()), int(lengths.count_nonzero())

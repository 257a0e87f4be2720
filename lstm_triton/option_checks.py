"""The checks of the options of a call. PyTorch's own function refuses options of these types, too."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def check_bools(**options: Any) -> None:
    """Refuse what is no bool, by name."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {_shown(value)}")


def checked_int(name: str, value: Any) -> int:
    """An integer of any type, such as NumPy's."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be an int, got {_shown(value)}")


def checked_dropout(value: Any, is_applied: bool) -> float:
    """The probability of dropout, checked. Like PyTorch, take any number where no dropout is applied."""
    dropout = value if isinstance(value, float) else _number(value)
    if is_applied and not 0 <= dropout <= 1:  # NaN is refused, too
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {str(dropout).removesuffix('.0')}")
    return dropout


def _number(dropout: Any) -> float:
    try:
        if not isinstance(dropout, str):
            return float(dropout)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"dropout must be a number, got {_shown(dropout)}")


def checked_weights(weights: Any) -> Sequence[Tensor]:
    """The weights as a sequence. What is in it is checked with the sizes."""
    if isinstance(weights, (list, tuple)):
        return weights
    if isinstance(weights, Tensor) or not isinstance(weights, Iterable):
        raise TypeError(f"weights must be a list or a tuple of tensors, got {_shown(weights)}")
    return list(weights)


def _shown(value: Any) -> str:
    shown = repr(value) if isinstance(value, (str, int, float, complex)) else ""
    return f"{type(value).__name__} {shown}".rstrip() if len(shown) <= 40 else type(value).__name__

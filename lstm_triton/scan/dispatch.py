"""Calls of this library's operators past PyTorch's dispatcher, where nobody looks."""

import inspect
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..failure import explained

PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str}


def invoke(operator: Any, *arguments: Any) -> Any:
    """Call an operator of this library; as the function that it is, unless somebody sees which operators are called.

    The way through PyTorch's dispatcher and back takes longer than the function itself. It is for torch.compile and
    torch.export, vmap, modes, and subclasses of tensors, such as those without data.

    Raises:
        KernelFailed: the GPU reports that a kernel failed.
    """
    if _is_observed(arguments):
        return operator(*arguments)
    try:
        return operator._init_fn(*arguments)
    except RuntimeError as error:
        if (failed := explained(error)) is None:
            raise
        raise failed from error


def _is_observed(arguments: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or transforms.active() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for argument in arguments:
        if type(argument) not in PLAIN_TYPES and (
            not isinstance(argument, (list, tuple)) or any(type(each) not in PLAIN_TYPES for each in argument)
        ):
            return True
    return False


def named(operator: Any, arguments: Sequence[Any]) -> SimpleNamespace:
    """An operator's arguments by the names of its parameters, with the defaults of those that are left out."""
    defaults = _defaults(operator)
    return SimpleNamespace(**{**defaults, **dict(zip(defaults, arguments, strict=False))})


@cache
def _defaults(operator: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(operator._init_fn).parameters.items()}

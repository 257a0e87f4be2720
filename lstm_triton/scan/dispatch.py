"""Call this library's operators without PyTorch's dispatcher, where nothing observes operators."""

import inspect
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import flops, transforms
from ..failure import explained

PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str}


def invoke(operator: Any, *arguments: Any) -> Any:
    """Call an operator of this library. If nothing observes operators, call its Python function directly.

    A call through PyTorch's dispatcher takes longer than the function itself. Only torch.compile, torch.export, vmap,
    dispatch modes and tensor subclasses, such as fake tensors, need the dispatcher.

    Raises:
        KernelFailed: the GPU reports that a kernel failed.
    """
    if _is_observed(arguments):
        flops.counted()  # hands the formulas to the counters
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
    """An operator's arguments by the names of its parameters. A parameter that is left out has its default."""
    defaults = _defaults(operator)
    return SimpleNamespace(**{**defaults, **dict(zip(defaults, arguments, strict=False))})


@cache
def _defaults(operator: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(operator._init_fn).parameters.items()}

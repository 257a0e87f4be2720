"""Call this library's operators without PyTorch's dispatcher, where nothing observes operators."""

import inspect
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from .. import flops, transforms
from ..failure import explained

PLAIN_TYPES = {type(None), bool, int, float, str}


def invoke(operator: Any, *arguments: Any) -> Any:
    """Call an operator of this library. If nothing observes operators, call its Python function directly.

    A call through PyTorch's dispatcher takes longer than the function itself. Only torch.compile, torch.export, vmap,
    dispatch modes and tensor subclasses, such as fake tensors, need the dispatcher. So do negated views, such as the
    imaginary part of a conjugate: the dispatcher computes the values, which are not those in memory.

    Raises:
        KernelFailed: the GPU reports that a kernel failed.
    """
    if is_observed(arguments):
        flops.counted()  # hands the formulas to the counters
        return operator(*arguments)
    try:
        if torch._C._autograd._profiler_enabled():  # a profiler shows the name, as the dispatcher would tell it
            with torch.profiler.record_function(operator._qualname):
                return operator._init_fn(*arguments)
        return operator._init_fn(*arguments)
    except RuntimeError as error:
        if (failed := explained(error)) is None:
            raise
        raise failed from error


def is_observed(arguments: Sequence[Any]) -> bool:
    """Whether something may observe an operator with these arguments, so that the dispatcher has to call it."""
    if torch.compiler.is_dynamo_compiling():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return True
    tensors: list[Tensor] = []
    for argument in arguments:
        kind = type(argument)
        if kind in transforms.PLAIN_TENSORS:
            tensors += (argument,)
        elif kind is list or kind is tuple:
            for each in argument:
                if type(each) in transforms.PLAIN_TENSORS:
                    tensors += (each,)
                elif type(each) not in PLAIN_TYPES:
                    return True
        elif kind not in PLAIN_TYPES:
            return True
    return any(map(Tensor.is_neg, tensors))


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`.

    torch.compile takes a tensor as one argument only. So a tensor that is given again is given as a view of itself: one
    tensor as both states, weights shared by layers.
    """
    if torch.compiler.is_dynamo_compiling():
        given: list[Tensor] = []
        others: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                if True in [argument is each for each in given]:
                    argument = argument.view_as(argument)
                else:
                    given.append(argument)
            others.append(argument)
        return function.apply(*others)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return function.apply(*arguments)
    # What `function.apply` does next. Before that, it would look up the defaults in the signature of `forward`, which
    # has none, and this takes longer than all else that it does.
    tensors = [argument for argument in arguments if type(argument) not in PLAIN_TYPES]
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        arguments = unwrap_dead_wrappers(arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def named(operator: Any, arguments: Sequence[Any]) -> SimpleNamespace:
    """An operator's arguments by the names of its parameters. A parameter that is left out has its default."""
    defaults = _defaults(operator)
    return SimpleNamespace(**{**defaults, **dict(zip(defaults, arguments, strict=False))})


@cache
def _defaults(operator: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(operator._init_fn).parameters.items()}

"""Is a call inside torch.func (vmap, grad, jvp), forward-mode differentiation, torch.export or torch.jit.trace?

Forward-mode derivatives take the step-by-step formula (reference.py). Without kernels, every vmap takes the formula,
too. PyTorch's own function has rules for neither. The kernels' rules for vmap are in scan/vmap.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN_TENSORS = {Tensor, torch.nn.Parameter}  # types: a subclass may look at the operations on its tensors


def active() -> bool:
    """Whether a call is inside a transform of torch.func. Its tensors then do not tell whether a gradient is needed."""
    return not torch.compiler.is_dynamo_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are taken: by torch.func.jvp, or in a torch.autograd.forward_ad.dual_level."""
    return not torch.compiler.is_dynamo_compiling() and forward_ad._current_level >= 0


def need_formula() -> bool:
    """Whether a call without kernels must take the formula, which is plain PyTorch operations."""
    if in_forward_mode():
        return True
    vmap = torch._C._functorch.TransformType.Vmap
    return active() and any(level.key() == vmap for level in torch._C._functorch.get_interpreter_stack() or ())


def exporting() -> bool:
    """Whether torch.export traces the call, and not torch.compile.

    In Dynamo of PyTorch 2.11 and older, `torch.compiler.is_exporting()` is True under torch.compile as well. The flag
    behind this function is right in all versions.
    """
    return torch.compiler._is_exporting_flag


def tracing() -> bool:
    """Whether torch.jit.trace records the call. It does so for ONNX's older exporter, too. Sizes are then tensors."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-any-return, no-untyped-call]


@contextmanager
def unrecorded() -> Iterator[None]:
    """A context in which torch.jit.trace records nothing: for what does not depend on a traced program's arguments."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def plain(tensor: Tensor) -> Tensor:
    """The tensor without torch.func's wrappers: the entries of every vmap around it are visible."""
    while not torch.compiler.is_dynamo_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor

"""Which of torch.func's transforms and of PyTorch's forward-mode derivatives a call is inside of, and of what else.

Forward-mode derivatives take the step-by-step formula (reference.py), and so does every vmap where there are no
kernels: PyTorch's own function has rules for neither. The kernels' rules for vmap are in vmap.py.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .failure import explained

PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str}


def active() -> bool:
    """Whether a call is inside a transform of torch.func: its tensors do not tell then what requires a gradient."""
    return not torch.compiler.is_dynamo_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are taken: by torch.func.jvp, or in a torch.autograd.forward_ad.dual_level."""
    return not torch.compiler.is_dynamo_compiling() and forward_ad._current_level >= 0


def need_formula() -> bool:
    """Whether, where there are no kernels, only plain PyTorch operations will do."""
    if in_forward_mode():
        return True
    vmap = torch._C._functorch.TransformType.Vmap
    return active() and any(level.key() == vmap for level in torch._C._functorch.get_interpreter_stack() or ())


def exporting() -> bool:
    """Whether torch.export traces the call, and not torch.compile.

    Dynamo of PyTorch 2.11 and older takes `torch.compiler.is_exporting()` for True under torch.compile as well. The
    flag behind that function is right in all versions.
    """
    return torch.compiler._is_exporting_flag


def plain(tensor: Tensor) -> Tensor:
    """The tensor with the entries of every vmap around it."""
    while not torch.compiler.is_dynamo_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def call(operator: Any, *arguments: Any) -> Any:
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
    if torch.compiler.is_compiling() or active() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for argument in arguments:
        if type(argument) not in PLAIN_TYPES and (
            not isinstance(argument, (list, tuple)) or any(type(each) not in PLAIN_TYPES for each in argument)
        ):
            return True
    return False


def autocast_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype autocast gives to tensors of one device; None: it is off, or leaves them alone as it does float64."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off, inside the `with` block; nothing at all where it is off anyway."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()

"""Which of torch.func's transforms and of PyTorch's forward-mode derivatives a call is inside of, and of what else.

Forward-mode derivatives take the step-by-step formula (reference.py), and so does every vmap where there are no
kernels: PyTorch's own function has rules for neither. The kernels' rules for vmap are in scan/vmap.py.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a invoke is inside a transform of torch.func: its tensors do not tell then what requires a gradient."""
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
    """Whether torch.export traces the invoke, and not torch.compile.

    Dynamo of PyTorch 2.11 and older takes `torch.compiler.is_exporting()` for True under torch.compile as well. The
    flag behind that function is right in all versions.
    """
    return torch.compiler._is_exporting_flag


def plain(tensor: Tensor) -> Tensor:
    """The tensor with the entries of every vmap around it."""
    while not torch.compiler.is_dynamo_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor

"""`torch.jit.script` of a model: TorchScript compiles the module of torch.nn in place of a module of this library."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def scriptable(
    module: nn.Module, ours: type[nn.Module], computed: Sequence[str], stock_of: Callable[[Any], nn.Module]
) -> nn.Module:
    """What `torch.jit.script` compiles for a module: see `__prepare_scriptable__` in PyTorch.

    Args:
        module: the module.
        ours: its class in this library.
        computed: the names of its weights that are no parameters.
        stock_of: makes the module of torch.nn that has the same parameters.

    Raises:
        ValueError: a weight is computed from other tensors. The compiled module would not compute it again.
    """
    if "forward" in vars(module) or type(module).forward is not ours.forward:
        return module  # a subclass: its own forward is what is compiled
    kind = f"lstm_triton.{ours.__name__}"
    if computed:
        raise ValueError(
            f"torch.jit.script cannot compile an {kind} whose {', '.join(computed)} is computed from other tensors. "
            "First remove what computes it, such as a parametrization or weight_norm"
        )
    warnings.warn(
        f"torch.jit.script compiles a torch.nn.{ours.__name__} with the same parameters in place of an {kind}, and "
        f"leaves it in the model that it was given. To keep the {kind} there, script copy.deepcopy(model)",
        stacklevel=2,
    )
    stock = stock_of(module)
    stock._forward_hooks, stock._forward_pre_hooks = module._forward_hooks, module._forward_pre_hooks
    return stock

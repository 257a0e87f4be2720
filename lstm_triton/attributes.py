"""What a call reads off a module: its weights and its options.

The modules of this library share their names with a user's subclass, and with an `nn.LSTM` that becomes one of them. So
a call reads the attributes of `nn.LSTM`, and one attribute whose name nobody else uses.
"""

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

MEMORY_ATTRIBUTE = "_lstm_triton_memory"


def memory_of(module: nn.RNNBase) -> Any:
    """The option `memory` of a module; "full" for an `nn.LSTM`."""
    return getattr(module, MEMORY_ATTRIBUTE, "full")


def options_of(module: nn.RNNBase) -> dict[str, Any]:
    """The options of a module, as `lstm_triton.functional.lstm` takes them."""
    return {
        "num_layers": module.num_layers,
        "bias": module.bias,
        "batch_first": module.batch_first,
        "dropout": module.dropout,
        "training": module.training,
        "bidirectional": module.bidirectional,
        "proj_size": module.proj_size,
        "memory": getattr(module, MEMORY_ATTRIBUTE, "full"),  # `memory_of`, which would be one more call
    }


def weights_of(module: nn.RNNBase) -> list[Tensor]:
    """The weights that a call computes with, by the rule of `nn.LSTM`.

    There are two places: the attributes with the names of the weights, and the list `_flat_weights`. The attributes
    count if one of them is another tensor than at the last call: parametrizations, weight-dropping wrappers,
    `functional_call` and others exchange attributes. Otherwise the list counts: a subclass may have put other tensors
    there, and a deleted parameter is still there.
    """
    names: list[str] = module._flat_weights_names
    listed: list[Any] = module._flat_weights
    seen: list[Any] = module._flat_weight_refs
    if not torch.compiler.is_dynamo_compiling():
        # The usual case, quickly: both places have the same parameters, and they are those of the last call.
        attributes = module.__dict__
        parameters = map(attributes["_parameters"].get, names)
        try:
            for name, weight, known, parameter in zip(names, listed, seen, parameters, strict=True):
                if parameter is not weight or known is None or known() is not weight or name in attributes:
                    break
            else:
                return listed
        except ValueError:  # there are not as many of each
            pass
    compiling = torch.compiler.is_compiling()
    named: list[Any] = [getattr(module, name, None) for name in names]
    for weight, known in zip(named, seen, strict=False):
        if weight is not None and known is not None and known() is not weight:
            if not compiling:
                _remember(module, named)
            return named
    return list(listed)


def computed_weights(module: nn.RNNBase) -> list[str]:
    """The names of the weights that are no parameters of the module: computed from others, or handed over."""
    computed = []
    for name, weight in zip(module._flat_weights_names, weights_of(module), strict=True):
        if not isinstance(weight, nn.Parameter) or module._parameters.get(name) is not weight:
            computed.append(name)
    return computed


def _remember(module: nn.RNNBase, named: list[Any]) -> None:
    """Write down which tensors the attributes are. A later change of the list then counts.

    Only tensors that the module may keep are written down: no tensor with a graph behind it, and no tensor of
    torch.func. Any other weight counts as another tensor at the next call, too.
    """
    listed: list[Any] = list(module._flat_weights)
    seen: list[Any] = list(module._flat_weight_refs)
    if not len(listed) == len(seen) == len(named):
        listed, seen = list(named), [None] * len(named)
    for index, weight in enumerate(named):
        plain = type(weight) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
        if plain and weight.is_leaf:
            listed[index], seen[index] = weight, ref(weight)
        elif weight is not None:
            seen[index] = _never
    module._flat_weights, module._flat_weight_refs = listed, seen


def _never() -> None:
    """Stands for a weak reference to a tensor that is gone."""

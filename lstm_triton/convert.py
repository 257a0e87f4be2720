"""Convert whole models in place: every `torch.nn.LSTM` becomes an `lstm_triton.LSTM`, and back."""

from dataclasses import dataclass, field

import torch
from torch import nn

from .module import LSTM, own_names


@dataclass(frozen=True)
class Replaced:
    """An `nn.LSTM` that is an `lstm_triton.LSTM` now.

    Attributes:
        names: its names in the model; several if the model uses it in several places; "" for the model itself.
        module: the module.
        original_class: its class before. The class that parametrizations derive from it does not count.
    """

    names: tuple[str, ...]
    module: LSTM = field(repr=False)
    original_class: type[nn.LSTM] = field(repr=False)


@dataclass(frozen=True)
class Left:
    """An LSTM that stays what it was, and why."""

    names: tuple[str, ...]
    kind: str
    reason: str


@dataclass(frozen=True)
class Replacement:
    """What `replace_lstm` did; `print` it.

    Attributes:
        replaced: the modules that are `lstm_triton.LSTM`s now, in the model's order.
        left: the LSTMs that are not, and why.
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def undo(self) -> None:
        """Make the modules `nn.LSTM`s again, with the weights they have now. A second call does nothing.

        Raises:
            RuntimeError: something else has changed the class of a module since; nothing is undone then.
        """
        for entry in self.replaced:
            if _plain(type(entry.module)) not in (LSTM, entry.original_class):
                raise RuntimeError(f"cannot undo: {_shown(entry.names)} has become a {type(entry.module).__name__}")
        for entry in self.replaced:
            _set_class(entry.module, entry.original_class)
            entry.module.flatten_parameters()  # for cuDNN: parameters may have moved meanwhile

    def __str__(self) -> str:
        lines = [f"now lstm_triton.LSTM: {len(self.replaced)}"]
        lines += [f"  {_shown(entry.names)}: {entry.module}".splitlines()[0] for entry in self.replaced]
        if self.left:
            lines.append(f"left as they were: {len(self.left)}")
            lines += [f"  {_shown(entry.names)}: {entry.kind}, {entry.reason}" for entry in self.left]
        return "\n".join(lines)

    __repr__ = __str__


def replace_lstm(model: nn.Module) -> Replacement:
    """Make every `torch.nn.LSTM` of a model an `lstm_triton.LSTM`.

    The modules stay the same objects. Only their class changes, as with PyTorch's own parametrizations. So names and
    `state_dict`, parameters (tied ones, too), hooks, parametrizations, weight_norm, the training flag, optimizers and
    every reference to a module stay valid. The model may itself be an `nn.LSTM`. Call `replace_lstm` before
    `torch.compile`, and before `fully_shard` shards the LSTM by itself.

    An `nn.LSTM` is left as it was if it has methods or attributes of its own, from a subclass or set on the object
    (`lstm_triton.accelerate` may serve such modules). Layers that are no `nn.LSTM` are left, too: quantised layers,
    layers compiled by TorchScript, `nn.LSTMCell`s.

    Args:
        model: any module, with LSTMs at any depth.

    Returns:
        what was replaced, what was left and why, and `undo`.

    Raises:
        TypeError: `model` is no `nn.Module`.

    >>> from torch import nn
    >>> model = nn.ModuleDict({"encoder": nn.LSTM(3, 4, num_layers=2), "step": nn.LSTMCell(4, 4)})
    >>> replacement = replace_lstm(model)
    >>> print(replacement)
    now lstm_triton.LSTM: 1
      encoder: LSTM(3, 4, num_layers=2)
    left as they were: 1
      step: LSTMCell, its calls are single steps: lstm_triton.LSTMCell takes its place by hand
    >>> type(model["encoder"])
    <class 'lstm_triton.module.LSTM'>
    >>> replacement.undo()
    >>> type(model["encoder"])
    <class 'torch.nn.modules.rnn.LSTM'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    replaced, left = [], []
    for module, places in names.items():
        reason = _reason_to_leave(module)
        if reason is not None:
            left.append(Left(tuple(places), _kind(module), reason))
        elif isinstance(module, nn.LSTM):
            original_class = _plain(type(module))
            _set_class(module, LSTM)
            replaced.append(Replaced(tuple(places), module, original_class))  # type: ignore[arg-type]
    return Replacement(tuple(replaced), tuple(left))


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why an LSTM cannot be replaced; None if it can be replaced, or if the module is no LSTM."""
    if isinstance(module, nn.LSTM):
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):  # by name: no import of FSDP
            return "it is sharded by fully_shard: replace it before"
        added = own_names(_plain(type(module)))
        if added:
            return f"its class defines {added}"
        return "its forward was set on the object" if "forward" in vars(module) else None
    if isinstance(module, nn.LSTMCell):
        return "its calls are single steps: lstm_triton.LSTMCell takes its place by hand"
    if _kind(module) == "LSTM":
        if isinstance(module, torch.jit.ScriptModule):
            return "it is compiled by TorchScript"
        if type(module).__module__.startswith("torch.ao."):
            return "it is quantised, or made for that"
    return None


def _kind(module: nn.Module) -> str:
    # TorchScript keeps the name of the class that a module had.
    return str(getattr(module, "original_name", type(module).__name__))


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(name or "the model itself" for name in names)


def _is_parametrized(cls: type) -> bool:
    """Whether PyTorch derived this class for one module, to make the module's parametrized weights properties."""
    return cls.__module__ == nn.utils.parametrize.__name__


def _plain(cls: type) -> type:
    return cls.__bases__[0] if _is_parametrized(cls) else cls


def _set_class(module: nn.Module, plain: type[nn.Module]) -> None:
    cls = type(module)
    module.__class__ = type(cls.__name__, (plain,), dict(vars(cls))) if _is_parametrized(cls) else plain

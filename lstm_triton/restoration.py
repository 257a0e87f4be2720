"""The way back, in place: every layer of this library becomes PyTorch's own again."""

from dataclasses import dataclass, field

from torch import nn

from .attributes import MEMORY_ATTRIBUTE
from .cell import LSTMCell
from .convert import Left, kind_of, plain_class, set_class, shown
from .module import LSTM


@dataclass(frozen=True)
class Restored:
    """A layer of this library that is an `nn.LSTM` or `nn.LSTMCell` now.

    Attributes:
        names: its names in the model; several if the model uses it in several places; "" for the model itself.
        module: the module.
        original_class: its class before. The class that parametrizations derive from it does not count.
        memory: its option `memory` before; None for an `LSTMCell`.
    """

    names: tuple[str, ...]
    module: nn.Module = field(repr=False)
    original_class: type[nn.Module] = field(repr=False)
    memory: str | None = None


@dataclass(frozen=True)
class Restoration:
    """What `to_torch` did; `print` it.

    Attributes:
        restored: the modules that are PyTorch's own now, in the model's order.
        left: the modules that are still this library's, and why.
    """

    restored: tuple[Restored, ...]
    left: tuple[Left, ...]

    def undo(self) -> None:
        """Make the modules this library's again, with the weights they have now. A second call does nothing.

        Raises:
            RuntimeError: something else has changed the class of a module since; nothing is undone then.
        """
        for entry in self.restored:
            if plain_class(type(entry.module)) not in (nn.LSTM, nn.LSTMCell, entry.original_class):
                raise RuntimeError(f"cannot undo: {shown(entry.names)} has become a {type(entry.module).__name__}")
        for entry in self.restored:
            set_class(entry.module, entry.original_class)
            if entry.memory is not None:
                setattr(entry.module, MEMORY_ATTRIBUTE, entry.memory)

    def __str__(self) -> str:
        lines = []
        for name, stock in (("LSTM", nn.LSTM), ("LSTMCell", nn.LSTMCell)):
            entries = [entry for entry in self.restored if _stock_class(entry.original_class) is stock]
            if entries or name == "LSTM":
                lines.append(f"now torch.nn.{name}: {len(entries)}")
            lines += [f"  {shown(entry.names)}: {entry.module}".splitlines()[0] for entry in entries]
        if self.left:
            lines.append(f"left as they were: {len(self.left)}")
            lines += [f"  {shown(entry.names)}: {entry.kind}, {entry.reason}" for entry in self.left]
        return "\n".join(lines)

    __repr__ = __str__


def to_torch(model: nn.Module) -> Restoration:
    """Make every `lstm_triton.LSTM` of a model a `torch.nn.LSTM`, and every `LSTMCell` a `torch.nn.LSTMCell`.

    It is for tools that look for PyTorch's classes (quantisation, FLOP counters, exporters), and for saving a whole
    model for machines without this package. It does not matter whether `lstm_triton.replace_lstm` brought the layers
    into the model, or its author.

    The modules stay the same objects. Only their class changes. So names and `state_dict`, parameters (tied and frozen
    ones, too), hooks, parametrizations, the training flag, optimizers and every reference to a module stay valid. The
    model may itself be an `lstm_triton.LSTM`. To keep the model as it is, change a copy: `copy.deepcopy(model)`.

    A module is left as it was if it has methods or attributes of its own, from a subclass or set on the object. A model
    that calls a layer with `lengths`, `resets` or `with_cells` fails after the change: PyTorch's layers have no such
    options.

    Args:
        model: any module, with layers of this library at any depth.

    Returns:
        what was changed, what was left and why, and `undo`.

    Raises:
        TypeError: `model` is no `nn.Module`.

    >>> import lstm_triton
    >>> model = nn.ModuleDict({"encoder": lstm_triton.LSTM(3, 4), "step": lstm_triton.LSTMCell(4, 4)})
    >>> print(to_torch(model))
    now torch.nn.LSTM: 1
      encoder: LSTM(3, 4)
    now torch.nn.LSTMCell: 1
      step: LSTMCell(4, 4)
    >>> type(model["encoder"])
    <class 'torch.nn.modules.rnn.LSTM'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    restored, left = [], []
    for module, places in names.items():
        if not isinstance(module, (LSTM, LSTMCell)):
            continue
        if (reason := _reason_to_leave(module)) is not None:
            left.append(Left(tuple(places), kind_of(module), reason))
            continue
        original_class = plain_class(type(module))
        set_class(module, _stock_class(original_class))
        if isinstance(module, nn.LSTM):
            module._init_flat_weights()  # nn.LSTM reads its weights from this list
        memory = vars(module).pop(MEMORY_ATTRIBUTE, None)
        restored.append(Restored(tuple(places), module, original_class, memory))
    return Restoration(tuple(restored), tuple(left))


def _stock_class(cls: type[nn.Module]) -> type[nn.Module]:
    return nn.LSTM if issubclass(cls, LSTM) else nn.LSTMCell


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why a layer of this library cannot change its class; None if it can."""
    if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):  # by name: no import of FSDP
        return "it is sharded by fully_shard: change it before"
    if added := _names_added(plain_class(type(module))):
        return f"its class defines {added}"
    return "its forward was set on the object" if "forward" in vars(module) else None


def _names_added(cls: type) -> str:
    """The names that a user's subclass defines besides a constructor. PyTorch's class would lack them."""
    of_every_class = {*vars(type("Empty", (), {"__annotations__": {}})), "__init__", "__orig_bases__", "__parameters__"}
    of_every_class |= {"__firstlineno__", "__static_attributes__", "__annotate_func__", "__annotations_cache__"}
    library = __name__.split(".")[0]
    added = [base for base in cls.__mro__ if base.__module__.split(".")[0] not in (library, "torch", "builtins", "abc")]
    return ", ".join(sorted({name for base in added for name in vars(base)} - of_every_class))

"""Convert whole models in place: every `torch.nn.LSTM` and `torch.nn.LSTMCell` becomes this library's, and back."""

from dataclasses import dataclass, field

import torch
from torch import nn

from .cell import LSTMCell
from .module import LSTM, own_names
from .standin import stand_in_for

KINDS: dict[str, type[nn.Module]] = {"LSTM": LSTM, "LSTMCell": LSTMCell}
STOCK: dict[str, type[nn.Module]] = {"LSTM": nn.LSTM, "LSTMCell": nn.LSTMCell}
STILL_STOCK = (
    "each stays an nn.LSTM for isinstance. So torch.compile breaks its graph at each, as at every nn.LSTM. With "
    "torch._dynamo.config.allow_rnn = True it does not"
)


@dataclass(frozen=True)
class Replaced:
    """An `nn.LSTM` that is an `lstm_triton.LSTM` now, or an `nn.LSTMCell` that is an `lstm_triton.LSTMCell` now.

    Attributes:
        names: its names in the model; several if the model uses it in several places; "" for the model itself.
        module: the module. For `isinstance`, it is what it was before, too.
        original_class: its class before. The class that parametrizations derive from it does not count.
    """

    names: tuple[str, ...]
    module: LSTM | LSTMCell = field(repr=False)
    original_class: type[nn.LSTM] | type[nn.LSTMCell] = field(repr=False)


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
        replaced: the modules that are `lstm_triton.LSTM`s or `lstm_triton.LSTMCell`s now, in the model's order.
        left: the LSTMs and cells that are not, and why.
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def undo(self) -> None:
        """Make the modules what they were, with the weights they have now. A second call does nothing.

        Raises:
            RuntimeError: something else has changed the class of a module since; nothing is undone then.
        """
        for entry in self.replaced:
            if plain_class(type(entry.module)) not in (stand_in_for(entry.original_class), entry.original_class):
                raise RuntimeError(f"cannot undo: {shown(entry.names)} has become a {type(entry.module).__name__}")
        for entry in self.replaced:
            set_class(entry.module, entry.original_class)
            if isinstance(entry.module, nn.LSTM):
                entry.module.flatten_parameters()  # for cuDNN: parameters may have moved meanwhile

    def __str__(self) -> str:
        lines = []
        for name, kind in KINDS.items():
            found = [entry for entry in self.replaced if isinstance(entry.module, kind)]
            if found or name == "LSTM":
                lines.append(f"now lstm_triton.{name}: {len(found)}")
            lines += [f"  {shown(entry.names)}: {entry.module}".splitlines()[0] for entry in found]
            lines += [f"  {STILL_STOCK}"] if found and name == "LSTM" else []
        if self.left:
            lines.append(f"left as they were: {len(self.left)}")
            lines += [f"  {shown(entry.names)}: {entry.kind}, {entry.reason}" for entry in self.left]
        return "\n".join(lines)

    __repr__ = __str__


def replace_lstm(model: nn.Module) -> Replacement:
    """Make every `torch.nn.LSTM` of a model an `lstm_triton.LSTM`, and every `torch.nn.LSTMCell` its `LSTMCell`.

    The modules stay the same objects. Only their class changes, as with PyTorch's own parametrizations. So names and
    `state_dict`, parameters (tied ones, too), hooks, parametrizations, weight_norm, the training flag, optimizers and
    every reference to a module stay valid. `isinstance(module, nn.LSTM)` stays true, and so for a subclass that the
    module is of. `type(module) is nn.LSTM` does not. The model may itself be an `nn.LSTM`. Call `replace_lstm` before
    `torch.compile`, and before `fully_shard` shards the LSTM by itself.

    At an `nn.LSTM`, `torch.compile` breaks its graph, and so at a replaced one: what the module calls is a graph of its
    own. With `torch._dynamo.config.allow_rnn = True` there is one graph, and `fullgraph=True` works.

    A module is left as it was if it has methods or attributes of its own, from a subclass or set on the object
    (`lstm_triton.accelerate` may serve such modules). Quantised layers, and layers compiled by TorchScript, are left.

    Args:
        model: any module, with LSTMs at any depth.

    Returns:
        what was replaced, what was left and why, and `undo`.

    Raises:
        TypeError: `model` is no `nn.Module`.

    >>> from torch import nn
    >>> model = nn.ModuleDict({"encoder": nn.GRU(3, 4), "step": nn.LSTMCell(4, 4)})
    >>> replacement = replace_lstm(model)
    >>> print(replacement)
    now lstm_triton.LSTM: 0
    now lstm_triton.LSTMCell: 1
      step: LSTMCell(4, 4)
    >>> type(model["step"])
    <class 'lstm_triton.cell.LSTMCell'>
    >>> replacement.undo()
    >>> type(model["step"])
    <class 'torch.nn.modules.rnn.LSTMCell'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    replaced: list[Replaced] = []
    left: list[Left] = []
    for module, places in names.items():
        if isinstance(module, tuple(KINDS.values())) or _is_inside(places[0], left):
            continue
        reason = _reason_to_leave(module)
        if reason is not None:
            left.append(Left(tuple(places), kind_of(module), reason))
        elif isinstance(module, (nn.LSTM, nn.LSTMCell)):
            original_class = plain_class(type(module))
            set_class(module, stand_in_for(original_class))
            replaced.append(Replaced(tuple(places), module, original_class))  # type: ignore[arg-type]
    return Replacement(tuple(replaced), tuple(left))


def _is_inside(name: str, left: list[Left]) -> bool:
    """Whether a module is a part of a module that is left, as the cells of a quantised LSTM are."""
    return any(not place or name.startswith(f"{place}.") for entry in left for place in entry.names)


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why an LSTM or a cell cannot be replaced; None if it can be replaced, or if the module is neither."""
    for stock in STOCK.values():
        if isinstance(module, stock):
            if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):  # by name: no import of FSDP
                return "it is sharded by fully_shard: replace it before"
            added = own_names(plain_class(type(module)), stock)
            if added:
                return f"its class defines {added}"
            return "its forward was set on the object" if "forward" in vars(module) else None
    if kind_of(module) in STOCK:
        if isinstance(module, torch.jit.ScriptModule):
            return "it is compiled by TorchScript"
        if type(module).__module__.startswith("torch.ao."):
            return "it is quantised, or made for that"
    return None


def kind_of(module: nn.Module) -> str:
    # TorchScript keeps the name of the class that a module had.
    return str(getattr(module, "original_name", type(module).__name__))


def shown(names: tuple[str, ...]) -> str:
    return ", ".join(name or "the model itself" for name in names)


def _is_parametrized(cls: type) -> bool:
    """Whether PyTorch derived this class for one module, to make the module's parametrized weights properties."""
    return cls.__module__ == nn.utils.parametrize.__name__


def plain_class(cls: type) -> type:
    return cls.__bases__[0] if _is_parametrized(cls) else cls


def set_class(module: nn.Module, plain: type[nn.Module]) -> None:
    cls = type(module)
    module.__class__ = type(cls.__name__, (plain,), dict(vars(cls))) if _is_parametrized(cls) else plain

"""Modules whose class changes in place, and back: what `replace_lstm` and `to_torch` share."""

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import nn


@dataclass(frozen=True)
class Changed:
    """A module that has another class now.

    Attributes:
        names: its names in the model; several if the model uses it in several places; "" for the model itself.
        module: the module.
        original_class: its class before. The class that parametrizations derive from it does not count.
        new_class: its class now; as for `original_class`.
    """

    names: tuple[str, ...]
    module: nn.Module = field(repr=False)
    original_class: type[nn.Module] = field(repr=False)
    new_class: type[nn.Module] = field(repr=False)


@dataclass(frozen=True)
class Left:
    """A module that stays what it was, and why."""

    names: tuple[str, ...]
    kind: str
    reason: str


def places_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module of a model, with its names.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    return names


def change(names: tuple[str, ...], module: nn.Module, new_class: type[nn.Module]) -> Changed:
    """Give a module another class."""
    changed = Changed(names, module, plain_class(type(module)), new_class)
    _set_class(module, new_class)
    return changed


def undo(every: Sequence[Changed]) -> None:
    """Give modules the classes that they had.

    Raises:
        RuntimeError: something else has changed the class of a module since; nothing is undone then.
    """
    for each in every:
        if plain_class(type(each.module)) not in (each.new_class, each.original_class):
            raise RuntimeError(f"cannot undo: {_shown(each.names)} has become a {type(each.module).__name__}")
    for each in every:
        _set_class(each.module, each.original_class)


def report(package: str, every: Iterable[Changed], left: Sequence[Left], note: str | None = None) -> str:
    """What to print: the modules that are `package`'s now, and those that were left.

    Args:
        note: a line about the LSTMs.
    """
    lines = []
    found: dict[str, list[Changed]] = {"LSTM": [], "LSTMCell": []}
    for each in every:
        found["LSTM" if isinstance(each.module, nn.RNNBase) else "LSTMCell"].append(each)
    for kind, modules in found.items():
        if modules or kind == "LSTM":
            lines.append(f"now {package}.{kind}: {len(modules)}")
        lines += [f"  {_shown(each.names)}: {each.module}".splitlines()[0] for each in modules]
        if modules and kind == "LSTM" and note is not None:
            lines.append(f"  {note}")
    if left:
        lines.append(f"left as they were: {len(left)}")
        lines += [f"  {_shown(each.names)}: {each.kind}, {each.reason}" for each in left]
    return "\n".join(lines)


def reason_to_leave(module: nn.Module, known: Iterable[type], do: str) -> str | None:
    """Why the class of a module cannot change; None if it can.

    Args:
        known: the classes whose names the new class has, too.
        do: what to do before the module is sharded.
    """
    if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):  # by name: no import of FSDP
        return f"it is sharded by fully_shard: {do} it before"
    if added := own_names(plain_class(type(module)), known):
        return f"its class defines {added}"
    return "its forward was set on the object" if "forward" in vars(module) else None


Anything = TypeVar("Anything")


class _Plain(Generic[Anything], abc.ABC):
    """A class that defines nothing, besides what Python, abc and typing define in every class."""


def own_names(cls: type, known: Iterable[type]) -> str:
    """The names that a class defines besides a constructor, in itself and in all bases but the `known` ones."""
    of_every_class = {*vars(_Plain), "__init__", "__annotations__", "__type_params__", "__slots__", "__constants__"}
    of_every_class |= {"__orig_bases__", "__firstlineno__", "__static_attributes__"}
    of_every_class |= {"__annotate_func__", "__annotations_cache__"}
    added = set(cls.__mro__) - {*known, abc.ABC, Generic, object}
    return ", ".join(sorted({name for base in added for name in vars(base)} - of_every_class))


def kind_of(module: nn.Module) -> str:
    # TorchScript keeps the name of the class that a module had.
    return str(getattr(module, "original_name", type(module).__name__))


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(name or "the model itself" for name in names)


def _is_parametrized(cls: type) -> bool:
    """Whether PyTorch derived this class for one module, to make the module's parametrized weights properties."""
    return cls.__module__ == nn.utils.parametrize.__name__


def plain_class(cls: type) -> type:
    return cls.__bases__[0] if _is_parametrized(cls) else cls


def _set_class(module: nn.Module, plain: type[nn.Module]) -> None:
    cls = type(module)
    module.__class__ = type(cls.__name__, (plain,), dict(vars(cls))) if _is_parametrized(cls) else plain

"""The way back, in place: every layer of this library becomes PyTorch's own again."""

from dataclasses import dataclass, field

from torch import nn

from .attributes import MEMORY_ATTRIBUTE
from .cell import LSTMCell
from .module import LSTM
from .reclassing import Changed, Left, change, kind_of, places_of, reason_to_leave, report, undo


@dataclass(frozen=True)
class Restoration:
    """What `to_torch` did; `print` it.

    Attributes:
        restored: the modules that are PyTorch's own now, in the model's order.
        left: the modules that are still this library's, and why.
    """

    restored: tuple[Changed, ...]
    left: tuple[Left, ...]
    _memory: dict[nn.Module, str] = field(repr=False)  # the options `memory` before

    def undo(self) -> None:
        """Make the modules this library's again, with the weights they have now. A second call does nothing.

        Raises:
            RuntimeError: something else has changed the class of a module since; nothing is undone then.
        """
        undo(self.restored)
        for module, memory in self._memory.items():
            setattr(module, MEMORY_ATTRIBUTE, memory)

    def __str__(self) -> str:
        return report("torch.nn", self.restored, self.left)

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
    restored: list[Changed] = []
    left: list[Left] = []
    memory: dict[nn.Module, str] = {}
    for module, places in places_of(model).items():
        if not isinstance(module, (LSTM, LSTMCell)):
            continue
        reason = reason_to_leave(module, _known_bases(type(module)), "change")
        if reason is not None:
            left.append(Left(places, kind_of(module), reason))
            continue
        restored.append(change(places, module, nn.LSTM if isinstance(module, LSTM) else nn.LSTMCell))
        if isinstance(module, nn.LSTM):
            module._init_flat_weights()  # nn.LSTM reads its weights from this list
        if MEMORY_ATTRIBUTE in vars(module):
            memory[module] = vars(module).pop(MEMORY_ATTRIBUTE)
    return Restoration(tuple(restored), tuple(left), memory)


def _known_bases(cls: type) -> list[type]:
    """The classes of this library and of PyTorch: their names are not a user's."""
    library = __name__.split(".")[0]
    return [base for base in cls.__mro__ if base.__module__.split(".")[0] in (library, "torch")]

"""Convert whole models in place: every `torch.nn.LSTM` and `torch.nn.LSTMCell` becomes this library's, and back."""

from dataclasses import dataclass

import torch
from torch import nn

from .cell import LSTMCell
from .module import LSTM
from .reclassing import Changed, Left, change, kind_of, places_of, plain_class, reason_to_leave, report, undo
from .standin import stand_in_for

STOCK: dict[str, type[nn.Module]] = {"LSTM": nn.LSTM, "LSTMCell": nn.LSTMCell}
STILL_STOCK = (
    "each stays an nn.LSTM for isinstance. So torch.compile breaks its graph at each, as at every nn.LSTM. With "
    "torch._dynamo.config.allow_rnn = True it does not"
)


@dataclass(frozen=True)
class Replacement:
    """What `replace_lstm` did; `print` it.

    Attributes:
        replaced: the modules that are `lstm_triton.LSTM`s or `lstm_triton.LSTMCell`s now, in the model's order. For
            `isinstance`, each is what it was before, too.
        left: the LSTMs and cells that are not, and why.
    """

    replaced: tuple[Changed, ...]
    left: tuple[Left, ...]

    def undo(self) -> None:
        """Make the modules what they were, with the weights they have now. A second call does nothing.

        Raises:
            RuntimeError: something else has changed the class of a module since; nothing is undone then.
        """
        undo(self.replaced)
        for entry in self.replaced:
            if isinstance(entry.module, nn.LSTM):
                entry.module.flatten_parameters()  # for cuDNN: parameters may have moved meanwhile

    def __str__(self) -> str:
        return report("lstm_triton", self.replaced, self.left, note=STILL_STOCK)

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
    replaced: list[Changed] = []
    left: list[Left] = []
    for module, places in places_of(model).items():
        if isinstance(module, (LSTM, LSTMCell)) or _is_inside(places[0], left):
            continue
        reason = _reason_to_leave(module)
        if reason is not None:
            left.append(Left(places, kind_of(module), reason))
        elif isinstance(module, (nn.LSTM, nn.LSTMCell)):
            replaced.append(change(places, module, stand_in_for(plain_class(type(module)))))
    return Replacement(tuple(replaced), tuple(left))


def _is_inside(name: str, left: list[Left]) -> bool:
    """Whether a module is a part of a module that is left, as the cells of a quantised LSTM are."""
    return any(not place or name.startswith(f"{place}.") for entry in left for place in entry.names)


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why an LSTM or a cell cannot be replaced; None if it can be replaced, or if the module is neither."""
    for stock in STOCK.values():
        if isinstance(module, stock):
            return reason_to_leave(module, stock.__mro__, "replace")
    if kind_of(module) in STOCK:
        if isinstance(module, torch.jit.ScriptModule):
            return "it is compiled by TorchScript"
        if type(module).__module__.startswith("torch.ao."):
            return "it is quantised, or made for that"
    return None

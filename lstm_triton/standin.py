"""What `replace_lstm` makes of a module: a class of this library that is the module's class, too.

Models ask `isinstance(module, nn.LSTM)` when they run. So a replaced module must stay what it was.
"""

from types import new_class
from typing import Any

from torch import nn

from . import cell, module


class LSTM(module.LSTM, nn.LSTM):
    """An `lstm_triton.LSTM` that is an `nn.LSTM`, too.

    It computes what `lstm_triton.LSTM` computes, and has its methods and options. But `torch.compile` refuses to look
    into any `nn.LSTM`. At this module, it breaks the graph, and compiles what the module calls as a graph of its own.
    With `torch._dynamo.config.allow_rnn = True` there is one graph, and `fullgraph=True` works.
    """


def stand_in_for(original: type[nn.Module]) -> type[Any]:
    """The class that a module of this class gets: a class of this library that is a subclass of the original.

    Args:
        original: `nn.LSTM`, `nn.LSTMCell`, or a subclass that only has a constructor of its own.
    """
    if original is nn.LSTM:
        return LSTM
    if original is nn.LSTMCell:
        return cell.LSTMCell
    if original not in _derived:
        ours: type[nn.Module] = LSTM if issubclass(original, nn.LSTM) else cell.LSTMCell
        names = {"__module__": __name__, "__doc__": ours.__doc__, "__reduce_ex__": _reduce_ex}
        _derived[original] = new_class(original.__name__, (original, ours), exec_body=lambda body: body.update(names))
    return _derived[original]


_derived: dict[type[nn.Module], type[nn.Module]] = {}  # by the original class


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # Nobody can import the class by its name. So a file has the original class.
    made: Any = next(cls for cls in type(self).__mro__ if cls in _derived.values())
    _, _, *state = super(made, self).__reduce_ex__(protocol)
    return new_stand_in, (made.__bases__[0],), *state


def new_stand_in(original: type[nn.Module]) -> nn.Module:
    """An empty module, which `pickle` and `copy` fill."""
    made: Any = stand_in_for(original)
    return made.__new__(made)  # type: ignore[no-any-return]

"""Calls of an LSTM that were checked before.

To check the arguments of a call and to choose its path takes the host longer than a small layer takes the GPU. Both
depend on options, sizes, dtypes, devices and settings, and on no value of a tensor. A *key* has all of them. What was
decided for a key is remembered, and holds for every later call with an equal key.

Nothing has to be thrown away when a module or a setting changes, since the changed call has another key. A key is made
anew in each call, and nothing is remembered of a tensor but its dtype, device, layout, shape and `requires_grad`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import refusal, target
from .call import Call
from .checks import VF_LSTM_ARGUMENTS
from .preference import current_backend
from .routing import Choice
from .stack import Options, States
from .transforms import PLAIN_TENSORS

REMEMBERED = 1024  # keys, about 2 KB each. When there are more, all are forgotten
# The types of options: one key must not stand for 1, 1.0 and True.
OPTIONS = {
    (int, bool, bool, dropout, bool, bool, int, bool, str, backend)
    for dropout in (float, int)
    for backend in (type(None), str)
}
Key = tuple[Any, ...]

_facts = attrgetter("dtype", "device", "layout", "shape", "requires_grad")
known: dict[Key | None, "PreparedCall"] = {}


class PreparedCall(NamedTuple):
    """What was decided for a key.

    Attributes:
        choice: the path, "triton" or "aten", and why.
        decided: the checked call. Its tensors are left out.
        batch_axis: of an input without a batch: where its batch dimension is added.
        run: what computes the call, from input, hx and weights; None: `functional.run` does.
    """

    choice: Choice
    decided: tuple[Any, ...]
    batch_axis: int | None
    run: Callable[[Tensor, States | None, Sequence[Tensor]], tuple[Any, ...]] | None

    def call(self, input: Tensor, hx: States | None, weights: Sequence[Tensor]) -> Call:
        """The checked call of these tensors."""
        if self.batch_axis is not None:
            input = input.unsqueeze(self.batch_axis)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        return Call(input, None, hx, list(weights), *self.decided)


FIRST_PLAIN = Call._fields.index("num_layers")  # before it, a `Call` has tensors


def key_of(input: Any, hx: Any, weights: Sequence[Any], options: tuple[object, ...]) -> Key | None:
    """The key of a call. None: the call has no key, and is checked anew.

    Args:
        options: num_layers, bias, batch_first, dropout, training, bidirectional, proj_size, return_cells, memory and
            backend, as `lstm` takes them.
    """
    if type(weights) not in (list, tuple):
        return None
    if hx is None:
        tensors = (input, *weights)
    elif type(hx) is tuple and len(hx) == 2:
        tensors = (input, *hx, *weights)
    else:
        return None
    kinds = (*map(type, options),)
    if kinds not in OPTIONS or not PLAIN_TENSORS.issuperset(map(type, tensors)) or any(map(Tensor.is_neg, tensors)):
        return None
    if (
        refusal.state
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return None
    try:
        facts = (*map(_facts, tensors),)
    except RuntimeError:  # a nested tensor has no shape
        return None
    return (
        facts,
        hx is None,
        options,
        kinds,
        current_backend(),
        target.current(),
        torch.is_grad_enabled(),
        _autocast(input.device.type) if torch._C._is_any_autocast_enabled() else None,
        torch._C._get_fp32_precision_getter("cuda", "rnn"),
        torch._C._get_cudnn_enabled(),
    )


def key_of_vf_lstm(arguments: tuple[Any, ...]) -> Key | None:
    """The key of a call of `torch._VF.lstm`: that of the same call of `lstm`. None: as in `key_of`, and if packed."""
    if len(arguments) != VF_LSTM_ARGUMENTS or torch.compiler.is_dynamo_compiling():
        return None
    input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first = arguments
    if not (type(input) is Tensor and input.dim() == 3 and type(hx) is tuple and type(weights) is list):
        return None
    if len(weights) < 2 or type(weights[1]) not in PLAIN_TENSORS or weights[1].dim() != 2:
        return None
    size, hidden_size = weights[1].shape[1], weights[1].shape[0] // 4
    proj_size = size if size != hidden_size else 0
    options = (num_layers, bias, batch_first, dropout, training, bidirectional, proj_size, False, "full", None)
    return key_of(input, hx, weights, options)


def _autocast(device: str) -> tuple[object, ...]:
    return () if device == "meta" else (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))


def prepare(call: Call, choice: Choice, input: Tensor) -> PreparedCall:
    """What holds for all calls with the key of this call."""
    batch_axis = None if input.dim() == 3 else 0 if call.batch_first else 1
    run = None
    if batch_axis is None and call.autocast_dtype() is None:
        run = _by_kernels(call) if choice.path == "triton" else _without_kernels(call)
    return PreparedCall(choice, call[FIRST_PLAIN:], batch_axis, run)


def remember(key: Key | None, prepared: PreparedCall) -> None:
    if len(known) >= REMEMBERED:
        known.clear()
    known[key] = prepared


def forget() -> None:
    """Forget everything, as if no call had been made."""
    known.clear()


def _without_kernels(call: Call) -> Callable[..., Any] | None:
    from .aten.layers import PreparedStack

    prepared = PreparedStack.of(call)
    return None if prepared is None else prepared.call


def _by_kernels(call: Call) -> Callable[..., Any] | None:
    if call.projected():
        return None
    from .scan.cell import StackStep
    from .scan.layers import PreparedLayers, static_of
    from .scan.schedule import is_single_step

    trains = call.trains()
    options = Options(None, call.dropout if call.training else 0.0, call.low_memory, call.return_cells)
    static = static_of(options, call.num_layers * call.directions, call.directions, call.bias)
    has_dropout = static.dropout > 0
    if trains or call.return_cells or not is_single_step(call.time_steps, False, has_dropout, fuse_input=True):
        return PreparedLayers(static, trains, call.batch_first).call
    time_axis = 1 if call.batch_first else 0
    row = call.data.select(time_axis, 0)
    step = StackStep.of(row, call.weights, call.directions, call.bias, call.states is not None)
    return partial(step.call, time_axis, target.current())

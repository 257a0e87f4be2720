"""Unchanged models: their calls of `torch._VF.lstm`, which is what `nn.LSTM` ends in, are taken over by the kernels."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from .backend import choose
from .functional import Call, check_arguments, compute

ARGUMENTS = 9  # positional ones, with which nn.LSTM calls it


class Acceleration(TorchFunctionMode):
    """What `accelerate` gives: the context, and a count of what happened in it; `print` it.

    Attributes:
        taken_over: the calls that the kernels computed.
        left: how many calls PyTorch's own function computed, by the reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken_over = 0
        self.left: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # While this runs the mode is off, for this thread: what is called here does not come back.
        if func is torch._VF.lstm and isinstance(_weights(args), list):
            call = None if kwargs else _call_of(args)
            if call is None:
                self.left["the arguments are not those of nn.LSTM"] += 1
            else:
                choice = choose(None, call)
                if choice.path == "triton":
                    results = compute("triton", call)[:3]
                    self.taken_over += 1
                    return results
                self.left[choice.reason] += 1
        return func(*args, **(kwargs or {}))

    def __str__(self) -> str:
        lines = [f"calls of torch._VF.lstm taken over by the kernels: {self.taken_over}"]
        lines += [f"left to PyTorch: {count} ({reason})" for reason, count in self.left.items()]
        return "\n".join(lines)


def accelerate() -> Acceleration:
    """Inside `with lstm_triton.accelerate():`, every `torch.nn.LSTM` runs in the Triton kernels where they can run.

    For models that cannot be changed, subclasses of `nn.LSTM`, and code that insists on `isinstance(m, nn.LSTM)`: it
    takes over the function in which `nn.LSTM` ends, `torch._VF.lstm`, and leaves the rest to the module. Where the
    kernels do not take a call PyTorch's own function computes it, as it would have; `lstm_triton.backend` chooses here
    as well. Where the model can be changed, `lstm_triton.replace_lstm` costs less: here every PyTorch function called
    inside passes through Python once more.

    It holds for the thread that enters it, and for backward passes started in it. Call `backward` inside, too, where
    activation checkpointing computes a forward pass again. Layers compiled by TorchScript do not pass through here.

    Returns:
        The context. `with accelerate() as acceleration:` gives it a name, under which it tells what it did.

    >>> from torch import nn
    >>> with accelerate() as acceleration:
    ...     output, _ = nn.LSTM(3, 4)(torch.randn(5, 2, 3))
    >>> print(acceleration)
    calls of torch._VF.lstm taken over by the kernels: 0
    left to PyTorch: 1 (the kernels run on NVIDIA GPUs, not on 'cpu' tensors)
    """
    return Acceleration()


def _weights(arguments: tuple[Any, ...]) -> Any:
    """Of (input, hx, weights, ...), or of (data, batch_sizes, hx, weights, ...)."""
    index = 3 if len(arguments) > 1 and isinstance(arguments[1], Tensor) else 2
    return arguments[index] if len(arguments) > index else None


def _call_of(arguments: tuple[Any, ...]) -> Call | None:
    """The checked call; None: the arguments are wrong, which PyTorch's function says best itself."""
    if len(arguments) != ARGUMENTS:
        return None
    input, *others = arguments
    batch_first, packed = False, isinstance(others[0], Tensor)
    if packed:
        batch_sizes, hx, weights, bias, num_layers, dropout, training, bidirectional = others
    else:
        hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first = others
    try:
        if input.dim() == 2 and not packed:  # nn.LSTM adds the dimension of the batch before
            return None
        output_size = weights[1].shape[1]
        return check_arguments(
            PackedSequence(input, batch_sizes) if packed else input,
            hx,
            weights,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            training=training,
            bidirectional=bidirectional,
            proj_size=output_size if output_size != weights[0].shape[0] // 4 else 0,
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None

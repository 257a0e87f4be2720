"""Run unchanged models in the kernels: replace `torch._VF.lstm`, the function that `nn.LSTM` calls."""

from collections import Counter
from threading import Lock
from typing import Any

import torch

from .checks import call_of_vf_lstm
from .functional import compute
from .routing import choose

_lock = Lock()
_active: list["Acceleration"] = []  # in the order of entering
_original = torch._VF.lstm


class Acceleration:
    """The context that `accelerate` returns. It counts the calls inside the `with` block; `print` it.

    Attributes:
        taken_over: how many calls went to the kernels.
        left: how many calls went to PyTorch's own function, by reason.
    """

    def __init__(self) -> None:
        self.taken_over = 0
        self.left: Counter[str] = Counter()

    def __enter__(self) -> "Acceleration":
        global _original
        with _lock:
            if not _active:
                _original, torch._VF.lstm = torch._VF.lstm, _lstm
            _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _active.remove(self)
            if not _active:
                torch._VF.lstm = _original

    def __str__(self) -> str:
        lines = [f"calls of torch._VF.lstm taken over by the kernels: {self.taken_over}"]
        lines += [f"left to PyTorch: {count} ({reason})" for reason, count in self.left.items()]
        return "\n".join(lines)

    __repr__ = __str__


def accelerate() -> Acceleration:
    """Inside `with lstm_triton.accelerate():`, every `torch.nn.LSTM` runs in the Triton kernels where they can run.

    It is for models that cannot be changed, for subclasses of `nn.LSTM`, and for code that insists on
    `isinstance(m, nn.LSTM)`. It replaces `torch._VF.lstm`, the function that `nn.LSTM` calls, and leaves the rest to
    the module. PyTorch's own function still computes the calls that the kernels do not take. `lstm_triton.backend`
    chooses here as well.

    It holds for all threads, as `lstm_triton.backend` does. `backward` may run inside or after the `with` block. With
    activation checkpointing `backward` must run inside, since checkpointing computes the forward pass again. Layers
    compiled by TorchScript are not accelerated, and `torch.jit.script` cannot compile an `nn.LSTM` inside the block.

    Returns:
        The context. In `with accelerate() as acceleration:`, `acceleration` counts the calls. Of nested contexts, only
        the inner one counts.

    >>> from torch import nn
    >>> with accelerate() as acceleration:
    ...     output, _ = nn.LSTM(3, 4)(torch.randn(5, 2, 3))
    >>> print(acceleration)
    calls of torch._VF.lstm taken over by the kernels: 0
    left to PyTorch: 1 (the kernels run on NVIDIA GPUs, not on 'cpu' tensors)
    """
    return Acceleration()


def _lstm(*arguments: Any, **by_name: Any) -> Any:
    """What `torch._VF.lstm` is while an acceleration is active."""
    call = None if by_name else call_of_vf_lstm(arguments)
    path, reason = ("aten", "the arguments are not those of nn.LSTM") if call is None else choose(None, call)
    with _lock:
        if _active:  # another thread may just have left the last context
            if path == "triton":
                _active[-1].taken_over += 1
            else:
                _active[-1].left[reason] += 1
    if call is None or path == "aten":
        return _original(*arguments, **by_name)
    return compute(call, path)[:3]

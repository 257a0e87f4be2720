"""The backend that calls take unless they name one: "auto", "triton" or "aten"."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from .settings import Setting

BACKENDS = ("auto", "triton", "aten")
_backend = Setting("backend", "auto")
_traced: str | None = None  # what a block says that torch.compile traces; always None outside of its traces


def backend(name: str, *, all_threads: bool = False) -> AbstractContextManager[object]:
    """Choose the path of every call inside the `with` block, unless the call itself names one.

    It holds in the thread or asyncio task that enters the block, and in what took the context along: tasks that are
    created inside, `asyncio.to_thread`, `contextvars.copy_context().run`, and the threads of a backward pass that is
    called inside. Blocks may end in any order. A block may be entered again, and may decorate a function.

    Args:
        name: "auto": the Triton kernels where they can run; PyTorch's own function elsewhere, and where it was measured
            to be faster on this GPU. "triton": the kernels; where they cannot run, a RuntimeError says why. "aten":
            PyTorch's own function.
        all_threads: whether the block holds in every thread that has no block of its own, too. `nn.DataParallel` needs
            that.

    Raises:
        ValueError: for any other name.

    >>> import lstm_triton
    >>> with lstm_triton.backend("aten"):
    ...     output, (h_n, c_n) = lstm_triton.LSTM(3, 4)(torch.zeros(5, 2, 3))
    """
    checked = checked_name(name)
    if torch.compiler.is_dynamo_compiling():  # which can trace a generator, and a global, but not context variables
        return _traced_block(checked)
    return _backend.block(checked, all_threads=all_threads)


@contextmanager
def _traced_block(name: str) -> Iterator[None]:
    global _traced
    previous, _traced = _traced, name
    try:
        yield
    finally:
        _traced = previous


def current_backend() -> str:
    if _traced is not None and torch.compiler.is_dynamo_compiling():
        return _traced
    return _backend.now


def checked_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name

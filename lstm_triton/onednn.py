"""A context without oneDNN, which computes for PyTorch on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .settings import ForkLock

_lock = ForkLock()
_blocks = 0  # how many are open in the process
_was_enabled = True  # before the first of them


@contextmanager
def without_onednn() -> Iterator[None]:
    """PyTorch computes without oneDNN inside the `with` block.

    The setting belongs to the whole process, and several threads may have such a block open. The last one to end puts
    the setting back.
    """
    global _blocks, _was_enabled
    # torch.backends.mkldnn.flags sets other flags besides, and warns of them.
    with _lock:
        if _blocks == 0:
            _was_enabled = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                torch._C._set_mkldnn_enabled(_was_enabled)

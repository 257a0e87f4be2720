"""Kernels tried on a small batch, to know whether they are refused on this machine (refusal.py)."""

from functools import lru_cache
from threading import Thread
from typing import Any

import torch

from ..preference import backend
from ..stack import Options, Stack, Start
from ..target import running_on
from .layers import scan_layers
from .step import step


@lru_cache(maxsize=256)  # which keeps no exceptions
def try_kernels(target: Any, device: torch.device, dtype: torch.dtype, hidden_size: int, of_cell: bool) -> None:
    """Run kernels for layers of this size on a `Target`, forward and backward.

    Raises:
        LaunchRefused: they are refused on this machine.
    """
    found: list[BaseException] = []

    def run() -> None:
        try:
            with running_on(target), backend("triton"):  # which does not fall back
                _run(device, dtype, hidden_size, of_cell)
        except BaseException as error:
            found.append(error)

    # A thread of its own has none of the modes that are on while torch.compile traces.
    thread = Thread(target=run)
    thread.start()
    thread.join()
    if found:
        raise found[0]


def _run(device: torch.device, dtype: torch.dtype, hidden_size: int, of_cell: bool) -> None:
    def zeros(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device, requires_grad=True)

    weights = zeros(4 * hidden_size, hidden_size), zeros(4 * hidden_size, hidden_size)
    if of_cell:
        output = step(zeros(1, hidden_size), None, None, *weights)[0]
    else:
        stack = Stack.of(weights, 1, False)
        output = scan_layers(zeros(2, 1, hidden_size), Start(), stack, Options(None, 0.0, False, False))[0]
    torch.autograd.grad(output.sum(), weights)

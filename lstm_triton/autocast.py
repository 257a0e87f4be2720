"""Autocast: which dtype it gives to tensors, and how to turn it off."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def is_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype that autocast gives to tensors of one device. None: it is off, or keeps dtypes, as it does float64."""
    device = tensors[0].device
    if not is_on(device):
        return None
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which autocast is off. It does nothing if autocast is off already."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING

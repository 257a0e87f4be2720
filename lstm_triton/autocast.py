"""Autocast: which dtype it gives to tensors, and off."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype autocast gives to tensors of one device; None: it is off, or leaves them alone as it does float64."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off, inside the `with` block; nothing at all where it is off anyway."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()

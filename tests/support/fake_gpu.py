"""A GPU that is not there: enough of it to choose a path and a plan."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton import target, triton_package
from lstm_triton.routing import _found_obstacle_of_device


class OnGPU(Tensor):
    """A tensor that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda:0"))  # type: ignore[assignment]


@dataclasses.dataclass
class FakeGPU:
    """The properties of a GPU that is not there, to be changed at will."""

    name: str = "NVIDIA H100"
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 132
    shared_memory_per_block_optin: int = 227 * 1024
    gcnArchName: str = "gfx942:sramecc+"

    def tensor(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros((), dtype=dtype).expand(sizes).as_subclass(OnGPU)  # type: ignore[return-value]

    def lstm(self, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> lstm_triton.LSTM:
        module = lstm_triton.LSTM(*args, device="meta", **kwargs)
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(self.tensor(*parameter.shape, dtype=dtype)))
        return module


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """PyTorch tells of this GPU."""
    properties = FakeGPU()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(triton_package, "obstacle", lambda: None)
        patch.setenv("TRITON_INTERPRET", "0")
        for function in (_found_obstacle_of_device, target._gpu):  # what they remember is of another GPU
            function.cache_clear()
            stack.callback(function.cache_clear)
        yield properties

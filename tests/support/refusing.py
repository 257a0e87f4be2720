"""Where launches fail."""

from collections.abc import Callable

import torch

from lstm_triton import interpreter
from lstm_triton.target import KernelLaunch


class Refusing(interpreter.Interpreted):
    """The interpreter, whose launches fail, all or those of some kernels. Without an error they do not."""

    def __init__(self, error: Callable[[], Exception] | None, *kernels: str) -> None:
        super().__init__(0)
        self.error, self.kernels = error, kernels
        self.launches = 0

    def may_refuse(self, device: torch.device) -> bool:
        return True

    def run(self, launch: KernelLaunch) -> None:
        self.launches += 1
        if self.error is not None and (not self.kernels or launch.name in self.kernels):
            raise self.error()
        super().run(launch)

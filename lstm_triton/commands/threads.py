"""How many threads a program of this project computes with on a CPU.

The threads of a product wait for each other at its end. An LSTM has a product in every step. If other programs take a
processor away from one of the threads, all threads wait for it at every step: on two processors that others shared,
the demo took 6 to 35 times as long with two threads as with one. A small product gains little from a second thread.
"""

import os
import sys

import torch

OPERATIONS_PER_THREAD = 64_000_000  # of one step: some milliseconds of work
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with which a user chooses


def choose_threads(device: torch.device | str, *, operations: int = 0, program: bool) -> None:
    """Take one thread for every 64 million operations of a step, at least one, and no more than PyTorch would take.

    It changes nothing if the user has chosen by an environment variable, if the work is not on the CPU, or without
    `program`: in another program it is that program's user who chooses.

    Args:
        device: where the work is.
        operations: of the largest matrix product of a step.
        program: whether this process is a program of this project.
    """
    if not program or torch.device(device).type != "cpu" or any(os.environ.get(name) for name in SETTINGS):
        return
    threads = min(max(1, operations // OPERATIONS_PER_THREAD), torch.get_num_threads())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def is_command() -> bool:
    """Whether this process was started as `python -m lstm_triton`."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return specification is not None and specification.name == "lstm_triton.__main__"

"""The checks of a `PackedSequence`, before anything is launched.

A kernel follows the batch sizes from step to step. With wrong ones its programs would wait for values that never come,
or read what is not there. PyTorch's own function finds some of these faults, and computes wrong results for others.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import transforms

MADE_BY = "pack_padded_sequence and pack_sequence of torch.nn.utils.rnn make right ones"


def check_packed(packed: PackedSequence, with_states: bool) -> None:
    """Check everything about a `PackedSequence` except its dtype and its number of features.

    Args:
        with_states: whether initial states are given. `torch.nn.LSTM` then raises other classes of exceptions.
    """
    data: Any = packed.data
    batch_sizes, sorted_indices, unsorted_indices = packed[1:]
    if not isinstance(data, Tensor):
        error = TypeError if with_states else AttributeError
        raise error(f"the data of a PackedSequence must be a Tensor, got {type(data).__name__}")
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    _check_kind(batch_sizes, TypeError if not with_states else RuntimeError)
    if torch.compiler.is_compiling():
        _assert_sizes(batch_sizes, data.shape[0])  # `index_select` refuses wrong indices
        return
    if torch._C._get_tracing_state() is not None:  # a traced program does not check, and does not take the kernels
        return
    _check_sizes(transforms.plain(batch_sizes).tolist(), data.shape[0])
    if sorted_indices is not None or unsorted_indices is not None:
        _check_indices(sorted_indices, unsorted_indices, int(batch_sizes[0]), data.device)


def _check_kind(batch_sizes: Any, error: type[Exception]) -> None:
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(f"batch_sizes must be a Tensor, got {type(batch_sizes).__name__}: {MADE_BY}")
    if batch_sizes.dim() == 0 or batch_sizes.shape[0] == 0:
        raise IndexError(
            f"batch_sizes must have one number for each time step, got the shape {tuple(batch_sizes.shape)}: {MADE_BY}"
        )
    if batch_sizes.dim() != 1:
        raise error(f"batch_sizes must have 1 dimension, got {batch_sizes.dim()}: {MADE_BY}")
    if batch_sizes.dtype != torch.int64:
        is_integer = not (batch_sizes.is_floating_point() or batch_sizes.is_complex())
        raise (RuntimeError if is_integer else error)(
            f"batch_sizes must have the dtype torch.int64, got {batch_sizes.dtype}: {MADE_BY}"
        )
    if batch_sizes.device.type != "cpu":
        raise RuntimeError(f"batch_sizes must be on the CPU, got {batch_sizes.device}: {MADE_BY}")
    if batch_sizes.layout != torch.strided or not batch_sizes.is_contiguous():
        raise RuntimeError(f"batch_sizes must be contiguous: {MADE_BY}")


def _check_sizes(sizes: list[int], rows: int) -> None:
    if sizes[-1] <= 0 or sizes != sorted(sizes, reverse=True):  # the first step that is wrong is looked for only now
        for step, size in enumerate(sizes):
            if size <= 0:
                raise RuntimeError(f"batch_sizes must be positive, got {size} at time step {step}: {MADE_BY}")
            if step > 0 and size > sizes[step - 1]:
                raise RuntimeError(
                    f"batch_sizes must not grow, got {size} at time step {step} after {sizes[step - 1]}: {MADE_BY}"
                )
    if sum(sizes) != rows:
        raise RuntimeError(
            f"batch_sizes must add up to the number of rows of the data, {rows}, got {sum(sizes)}: {MADE_BY}"
        )


def _assert_sizes(batch_sizes: Tensor, rows: int) -> None:
    """`_check_sizes` for compiled programs, which do not read the values. The CPU raises the error at once."""
    fits = (batch_sizes > 0).all() & (batch_sizes[1:] <= batch_sizes[:-1]).all() & (batch_sizes.sum() == rows)
    torch._assert_async(fits, "batch_sizes must be positive, must not grow, and must add up to the rows of the data")


def _check_indices(sorted_indices: Any, unsorted_indices: Any, batch_size: int, device: torch.device) -> None:
    """Check the order of the sequences. Without indices, the sequences were sorted before they were packed."""
    pair = {"sorted_indices": sorted_indices, "unsorted_indices": unsorted_indices}
    given = {name: indices for name, indices in pair.items() if indices is not None}
    for name, indices in given.items():
        if not isinstance(indices, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(indices).__name__}: {MADE_BY}")
        if indices.dim() != 1 or indices.layout != torch.strided:
            raise IndexError(f"{name} must be a dense vector, got {indices.dim()} dimensions: {MADE_BY}")
        if indices.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(f"{name} must have the dtype torch.int64, got {indices.dtype}: {MADE_BY}")
        if indices.shape[0] != batch_size:
            raise RuntimeError(
                f"{name} must have one number for each of the {batch_size} sequences, got {indices.shape[0]}: {MADE_BY}"
            )
        if indices.device != device:
            raise RuntimeError(f"{name} must be on the data's device, {device}, got {indices.device}: {MADE_BY}")
    # To look at indices on a GPU, the host would wait for it. There PyTorch's `index_select` refuses wrong ones.
    if device.type != "cpu":
        return
    numbers = list(range(batch_size))
    values = {name: transforms.plain(indices).tolist() for name, indices in given.items()}
    for name, found in values.items():
        if sorted(found) != numbers:
            raise RuntimeError(f"{name} must have each number from 0 to {batch_size - 1} once, got {found}: {MADE_BY}")
    if len(values) == 2 and [values["sorted_indices"][index] for index in values["unsorted_indices"]] != numbers:
        raise RuntimeError(
            f"unsorted_indices must be the inverse of sorted_indices, {values['sorted_indices']}, "
            f"got {values['unsorted_indices']}: {MADE_BY}"
        )

"""Tensors as the kernels read them: rows contiguous, padded, and at aligned addresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..prepared_kernel import modulo_16


def contiguous(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if all(map(Tensor.is_contiguous, weights)):
        return tuple(weights)
    return tuple([weight.contiguous() for weight in weights])


def aligned(weights: Sequence[Tensor], stride: int) -> Sequence[Tensor]:
    """Contiguous weights with rows padded to `stride` elements, at aligned addresses. Copies are made only if needed.

    The kernels then load weights in pieces as wide as those of states. With narrower loads weights could not stay in
    registers (kernels/fragments.py).
    """
    for weight in weights:
        if weight.shape[1] < stride:
            break
    else:
        if not any(map(modulo_16, map(Tensor.data_ptr, weights))):
            return weights
    found = []
    for weight in weights:
        if weight.shape[1] < stride:
            found.append(torch.nn.functional.pad(weight, (0, stride - weight.shape[1])))
        else:
            found.append(weight.clone() if weight.data_ptr() % 16 else weight)
    return tuple(found)


def transposed(weights: Sequence[Tensor], stride: int) -> tuple[Tensor, ...]:
    """Weights (4H, H) as rows of units whose columns are gate-minor, padded: (stride, 4 * stride) copies.

    The backward scan multiplies with columns of a weight. In the copies the columns are rows, which are read in pieces
    of 16 bytes, also from shared memory. Reading columns from shared memory took up to eight times as long.
    """
    found: list[Tensor] = []
    for weight in weights:
        gates, size = weight.shape
        rows = weight.new_empty((stride, 4 * stride))
        if size < stride:
            rows.zero_()
        rows.as_strided((4, gates // 4, size), (1, 4, 4 * stride)).copy_(weight.reshape(4, gates // 4, size))
        found += (rows,)
    return tuple(found)


def with_aligned_rows(input: Tensor) -> tuple[Tensor, list[int]]:
    """The input with contiguous rows, and its strides but the last in units of `unit_of_rows`."""
    unit = 16 if input.shape[-1] % 16 == 0 else 1
    *strides, last = input.stride()
    is_aligned = last == 1 and (unit == 1 or input.data_ptr() % 16 == 0)
    for axis, stride in enumerate(strides):
        if stride % unit:
            is_aligned = False
        strides[axis] = stride // unit
    if is_aligned:
        return input, strides
    # A copy of a view costs less than a kernel compiled for its address.
    return with_aligned_rows(input.clone(memory_format=torch.contiguous_format))


def unit_of_rows(size: int) -> int:
    """The unit of strides between rows of this size: 16 elements if the rows can be aligned, otherwise 1."""
    return 16 if size % 16 == 0 else 1

"""Tensors as the kernels read them: rows contiguous, padded, and at aligned addresses."""

from collections.abc import Iterable

import torch
from torch import Tensor


def aligned(weights: Iterable[Tensor], stride: int) -> tuple[Tensor, ...]:
    """Weights with contiguous rows, padded to `stride` elements, at aligned addresses. Copies are made only if needed.

    The kernels then load weights in pieces as wide as those of states. With narrower loads weights could not stay in
    registers (kernels/fragments.py).
    """
    found = []
    for weight in weights:
        if weight.shape[1] < stride:
            weight = torch.nn.functional.pad(weight, (0, stride - weight.shape[1]))
        if not weight.is_contiguous() or weight.data_ptr() % 16:
            weight = weight.clone(memory_format=torch.contiguous_format)
        found.append(weight)
    return tuple(found)


def transposed(weights: Iterable[Tensor], stride: int) -> tuple[Tensor, ...]:
    """Weights (4H, H) as rows of units whose columns are gate-minor, padded: (stride, 4 * stride) copies.

    The backward scan multiplies with columns of a weight. In the copies the columns are rows, which are read in pieces
    of 16 bytes, also from shared memory. Reading columns from shared memory took up to eight times as long.
    """
    found = []
    for weight in weights:
        gates, size = weight.shape
        rows = weight.new_empty((stride, 4 * stride))
        if size < stride:
            rows.zero_()
        rows.as_strided((4, gates // 4, size), (1, 4, 4 * stride)).copy_(weight.reshape(4, gates // 4, size))
        found.append(rows)
    return tuple(found)


def with_aligned_rows(input: Tensor) -> tuple[Tensor, int]:
    """The input with contiguous rows, and the unit of its strides in elements, 16 or 1.

    The unit is 16 if the length of a row is a multiple of 16. Rows then begin at aligned addresses.
    """
    unit = 16 if input.shape[-1] % 16 == 0 else 1
    *strides, last = input.stride()
    if last != 1 or (unit > 1 and [stride for stride in strides if stride % unit]):
        input = input.contiguous()
    if unit > 1 and input.data_ptr() % 16:  # a copy of a view costs less than a kernel compiled for its address
        input = input.clone()
    return input, unit

"""What the operators of the kernels do under torch.vmap.

A scan whose weights are shared becomes one scan of a larger batch; where each entry has its own weights, or the batch
is ragged, there is one scan for each entry. All else of a layer is PyTorch's operations, which know vmap themselves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import ops

Dims = Sequence[Any]  # of each argument the axis that is mapped, None for none


def _scan_forward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    input, h_0, c_0, *weights = arguments[:7]
    *options, tables = arguments[7:11]
    if tables or any(dim is not None for dim in in_dims[3:7]):
        return _one_by_one(ops.scan_forward, info, in_dims, arguments)
    size = info.batch_size
    hidden, cell, gates = ops.scan_forward(
        _folded(input, in_dims[0], size, 1),
        _folded(h_0, in_dims[1], size, 0),
        _folded(c_0, in_dims[2], size, 0),
        *weights,
        *options,
        tables,
    )
    keep_gates = options[-1]
    batches = (size, -1)
    return (
        (
            hidden.unflatten(1, batches),
            cell.unflatten(1, batches),
            gates.unflatten(1, batches) if keep_gates else gates,
        ),
        (1, 1, 1 if keep_gates else None),
    )


def _scan_backward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    grad_output, grad_h_n, grad_c_n, weight_hh, cell, gates, reverse, tables, *grad_cells = arguments
    if tables or in_dims[3] is not None:
        return _one_by_one(ops.scan_backward, info, in_dims, arguments)
    size = info.batch_size
    grad_gates, grad_cell = ops.scan_backward(
        _folded(grad_output, in_dims[0], size, 1),
        _folded(grad_h_n, in_dims[1], size, 0),
        _folded(grad_c_n, in_dims[2], size, 0),
        weight_hh,
        _folded(cell, in_dims[4], size, 1),
        _folded(gates, in_dims[5], size, 1),
        reverse,
        tables,
        *(_folded(grad, dim, size, 1) for grad, dim in zip(grad_cells, in_dims[8:], strict=True)),
    )
    return (grad_gates.unflatten(1, (size, -1)), grad_cell.unflatten(0, (size, -1))), (1, 0)


def _cuda_matmul(info: Any, in_dims: Dims, left: Tensor, right: Tensor) -> tuple[Tensor, int]:
    left, right = (_mapped_to(t, dim, info.batch_size, 0) for t, dim in zip((left, right), in_dims, strict=True))
    return ops.batched_matmul(left, right), 0


def _folded(tensor: Tensor | None, dim: int | None, size: int, batch_axis: int) -> Tensor | None:
    """The mapped axis as a part of the batch: (N, B) sequences as N * B."""
    if tensor is None:
        return None
    return _mapped_to(tensor, dim, size, batch_axis).flatten(batch_axis, batch_axis + 1)


def _mapped_to(tensor: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """The tensor with its mapped axis elsewhere; without one, the same in all entries."""
    if dim is not None:
        return tensor.movedim(dim, axis)
    shape = list(tensor.shape)
    shape.insert(axis, size)
    return tensor.unsqueeze(axis).expand(shape)


def _one_by_one(
    operator: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: Dims, arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule that always holds: call the operator for each entry."""
    leaves, structure = pytree.tree_flatten(arguments)
    dims = pytree.tree_leaves(list(in_dims))
    entries = []
    for index in range(info.batch_size):
        chosen = [leaf if dim is None else leaf.select(dim, index) for leaf, dim in zip(leaves, dims, strict=True)]
        entries.append(operator(*pytree.tree_unflatten(chosen, structure)))
    results = tuple(torch.stack(entry) for entry in zip(*entries, strict=True))
    return results, (0,) * len(results)


torch.library.register_vmap(ops.scan_forward, _scan_forward)
torch.library.register_vmap(ops.scan_backward, _scan_backward)
torch.library.register_vmap("lstm_triton::matmul", _cuda_matmul)

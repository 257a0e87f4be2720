"""What the operators of the kernels do under torch.vmap.

If all entries share the weights, a scan becomes one scan of a larger batch. There is one scan for each entry if each
entry has its own weights, if the batch is ragged, with dropout, and with memory="low". The rest of a layer is PyTorch's
own operations, which support vmap themselves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import products
from .backward import scan_backward
from .cell import cell_backward, cell_forward, single_step
from .dispatch import named
from .dropout import dropout_scale
from .forward import scan_forward
from .low_memory import low_memory_gradients

Dims = Sequence[Any]  # for each argument, its mapped axis; None: it has none


def _scan_forward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    given, dims = vars(named(scan_forward, arguments)), vars(named(scan_forward, in_dims))
    shared = all(each is None for each in pytree.tree_leaves(dims["weights"]))
    if given["tables"] or given["dropout"] > 0 or given["low_memory"] or not shared:
        return _one_by_one(scan_forward, info, in_dims, arguments)
    size = info.batch_size
    for name in ("input", "h_0", "c_0", "preact_0"):
        given[name] = _folded(given[name], dims[name], size, 1)
    results = scan_forward(**given)
    batch_size = results[-1].shape[1] // size
    rows = [_unfolded_rows(buffer, batch_size, size) for buffer in results[:4]]
    states = [state.unflatten(1, (size, batch_size)) for state in results[4:]]
    return (*(buffer for buffer, _ in rows), *states), (*(dim for _, dim in rows), 1, 1)


def _scan_backward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
    given, dims = vars(named(scan_backward, arguments)), vars(named(scan_backward, in_dims))
    shared = all(each is None for each in pytree.tree_leaves(dims["weights"]))
    if given["tables"] or given["dropout"] > 0 or not shared:
        return _one_by_one(scan_backward, info, in_dims, arguments)
    size, batch_size = info.batch_size, given["batch_size"]
    for name in ("grad_output", "grad_h_n", "grad_c_n"):
        given[name] = _folded(given[name], dims[name], size, 1)
    given["grad_cells"] = _folded(given["grad_cells"], dims["grad_cells"], size, 2)
    for name in ("cell", "gates"):
        given[name] = _folded_rows(given[name], dims[name], batch_size, size)
    grad_gates, grad_cell = scan_backward(**{**given, "batch_size": batch_size * size})
    found, dim = _unfolded_rows(grad_gates, batch_size, size)
    return (found, grad_cell.unflatten(1, (size, batch_size))), (dim, 1)


def _folded_rows(rows: Tensor, dim: int | None, batch_size: int, size: int) -> Tensor:
    """Mapped (lanes, T * B, ...) -> (lanes, T * N * B, ...): the mapped axis (size N) becomes a part of the batch."""
    if dim is not None:
        rows = rows.movedim(dim, 0)
    steps = rows.unflatten(-2, (-1, batch_size))
    return _mapped_to(steps, 0 if dim is not None else None, size, 2).flatten(1, 3)


def _unfolded_rows(rows: Tensor, batch_size: int, size: int) -> tuple[Tensor, int | None]:
    """The inverse of `_folded_rows`, and the mapped axis of its result: None if `rows` is empty."""
    if rows.numel() == 0:
        return rows, None
    return rows.unflatten(1, (-1, size, batch_size)).movedim(2, 0).flatten(2, 3), 0


def _cuda_matmul(info: Any, in_dims: Dims, left: Tensor, right: Tensor, exact: bool = False) -> tuple[Tensor, int]:
    left, right = (_mapped_to(t, dim, info.batch_size, 0) for t, dim in zip((left, right), in_dims[:2], strict=True))
    return products.batched_matmul(left, right, exact), 0


def _folded(tensor: Tensor | None, dim: int | None, size: int, batch_axis: int) -> Tensor | None:
    """Make the mapped axis a part of the batch: (N, B) sequences become N * B."""
    if tensor is None:
        return None
    return _mapped_to(tensor, dim, size, batch_axis).flatten(batch_axis, batch_axis + 1)


def _mapped_to(tensor: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """The tensor with its mapped axis at `axis`. Without a mapped axis, every entry gets the same tensor."""
    if dim is not None:
        return tensor.movedim(dim, axis)
    shape = list(tensor.shape)
    shape.insert(axis, size)
    return tensor.unsqueeze(axis).expand(shape)


def _one_by_one(operator: Callable[..., Any], info: Any, in_dims: Dims, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """The rule that always holds: call the operator for each entry."""
    leaves, structure = pytree.tree_flatten(arguments)
    dims = pytree.tree_leaves(list(in_dims))
    entries = []
    for index in range(info.batch_size):
        chosen = [leaf if dim is None else leaf.select(dim, index) for leaf, dim in zip(leaves, dims, strict=True)]
        entries.append(operator(*pytree.tree_unflatten(chosen, structure)))
    if isinstance(entries[0], Tensor):
        return torch.stack(entries), 0
    results = [torch.stack(entry) for entry in zip(*entries, strict=True)]
    return type(entries[0])(results), type(entries[0])([0] * len(results))


def _entries_of(operator: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    def rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
        return _one_by_one(operator, info, in_dims, arguments)

    return rule


torch.library.register_vmap(scan_forward, _scan_forward)
torch.library.register_vmap(scan_backward, _scan_backward)
for operator in (
    dropout_scale, low_memory_gradients, cell_forward, single_step, cell_backward,
):  # fmt: skip
    torch.library.register_vmap(operator, _entries_of(operator))
torch.library.register_vmap("lstm_triton::matmul", _cuda_matmul)

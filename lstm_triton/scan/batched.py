"""Batched gradients of torch.autograd.grad(is_grads_batched=True), on which `jacobian(vectorize=True)` is built.

PyTorch computes them by its first vmap, which knows no operators of other libraries. Here torch.vmap, the second one,
takes its place, since the operators of the kernels have rules for torch.vmap (vmap.py).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .formula import replaced

Gradients = tuple[Tensor | None, ...]

_LEVEL = 1  # of the first vmap: autograd does not nest it


def mapped(function: Callable[..., Gradients], *grads: Tensor | None) -> Gradients:
    """`function(*grads)`, through torch.vmap if autograd has batched any of the grads."""
    if torch.compiler.is_dynamo_compiling():
        return function(*grads)
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    batched = {place: grad for place, grad in enumerate(grads) if grad is not None and is_batched(grad)}
    if not batched:
        return function(*grads)
    missing: list[bool] = []

    def of_entry(*chosen: Tensor) -> tuple[Tensor, ...]:
        found = function(*replaced(grads, list(batched), chosen))
        missing[:] = [each is None for each in found]
        return tuple(each for each in found if each is not None)

    entries = [torch._remove_batch_dim(grad, _LEVEL, 1, 0) for grad in batched.values()]
    found: Iterator[Tensor] = iter(torch.vmap(of_entry)(*entries))
    return tuple([None if is_missing else torch._add_batch_dim(next(found), 0, _LEVEL) for is_missing in missing])

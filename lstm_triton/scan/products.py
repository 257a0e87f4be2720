"""Matrix products outside the scans, in TF32 where cuDNN would use TF32; and conversion between the two gate orders."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import flops, target
from ..autocast import without_autocast
from ..settings import ForkLock
from ..stack import LaneWeights
from .dispatch import invoke
from .launch import allows_tf32
from .layout import Layout


def input_gradient(grad_gates: Tensor, weights: Sequence[LaneWeights], layout: Layout) -> Tensor:
    """(rows, I) the gradient of a layer's input, from the gate gradients and the weights of its lanes."""
    products = [
        matmul(lane[layout.steps(), : 4 * layout.hidden_size], gate_minor(own.ih))
        for lane, own in zip(grad_gates, weights, strict=True)
    ]
    return products[0] if len(products) == 1 else products[0] + products[1]


def gate_minor(weight: Tensor) -> Tensor:
    """(4H, K) gate after gate -> (4H, K) gate-minor: the four gates of a unit are neighbours."""
    return _regrouped(weight, (4, -1))


def gate_major(weight: Tensor) -> Tensor:
    """The inverse of gate_minor."""
    return _regrouped(weight, (-1, 4))


def _regrouped(weight: Tensor, groups: tuple[int, int]) -> Tensor:
    result: Tensor = weight.unflatten(0, groups).transpose(0, 1).flatten(0, 1)
    return result


def matmul(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    """left @ right, in TF32 where cuDNN would use TF32 for an LSTM. torch.matmul's own setting is off by default.

    exact: never use TF32. For the product of a single step, which takes hardly any time.
    """
    if target.current().may_take_tf32(left):
        product: Tensor = invoke(cuda_matmul, left, right, exact)
        return product
    return left @ right


@torch.library.custom_op("lstm_triton::matmul", mutates_args=())
def cuda_matmul(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    # An operator, because torch.compile cannot change the setting within a graph.
    return batched_matmul(left, right, exact)


@cuda_matmul.register_fake
def _(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


@flops.counts("lstm_triton::matmul")
def _(left: Tensor, right: Tensor, exact: bool = False) -> int:
    return flops.products(left.shape[0], [right])


def project(rows: Tensor, weight: Tensor, projected: Tensor, add: bool = False) -> None:
    """Write rows @ weight^T into `projected` (rows, 4H), or add it."""
    setting: AbstractContextManager[None] = contextlib.nullcontext()
    if target.current().may_take_tf32(rows):
        setting = matmul_precision("tf32" if allows_tf32() else "ieee")
    elif rows.is_cpu:
        setting = _without_onednn()
    with without_autocast(rows.device), setting:
        torch.addmm(projected, rows, weight.t(), beta=int(add), out=projected)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """oneDNN's bfloat16 product for processors with AMX lets NaN of a row into the row before, for an odd H or I.

    Rows without a step may hold NaN.
    """
    onednn: Any = torch.backends.mkldnn
    previous, onednn.enabled = onednn.enabled, False
    try:
        yield
    finally:
        onednn.enabled = previous


def batched_matmul(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    """`matmul` on a GPU, for any batch of matrices."""
    with matmul_precision("tf32" if allows_tf32() and not exact else "ieee"):
        return left @ right


_matmul_precision_lock = ForkLock()


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    # A lock, since the setting belongs to the whole process and backward runs in one thread for each device.
    with _matmul_precision_lock:
        previous = settings.fp32_precision
        if previous == precision or {previous, precision} <= {"none", "ieee"}:
            yield
            return
        settings.fp32_precision = precision
        try:
            yield
        finally:
            settings.fp32_precision = "none"  # inherits torch.backends.fp32_precision, as `previous` may have
            if settings.fp32_precision != previous:
                settings.fp32_precision = previous

"""Matrix products outside the scans, in TF32 where cuDNN would use TF32; and conversion between the two gate orders."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import local
from typing import Any

import torch
from torch import Tensor

from .. import flops, target
from ..autocast import without_autocast
from ..onednn import without_onednn
from ..settings import ForkLock
from .dispatch import invoke
from .launch import allows_tf32
from .layout import Layout


def input_gradient(grad_gates: Tensor, weights_ih: Sequence[Tensor], layout: Layout) -> Tensor:
    """(rows, I) the gradient of a layer's input, from the gate gradients and the input weights of its lanes."""
    rows = layout.steps(), slice(4 * layout.hidden_size)
    with precision_for(grad_gates):
        products = [matmul(grad_gates[lane][rows], gate_minor(weight)) for lane, weight in enumerate(weights_ih)]
    return products[0] if len(products) == 1 else products[0] + products[1]


def gate_minor(weight: Tensor) -> Tensor:
    """(4H, K) gate after gate -> (4H, K) gate-minor: the four gates of a unit are neighbours."""
    return weight.reshape(4, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape)


def gate_major(weight: Tensor) -> Tensor:
    """The inverse of gate_minor."""
    return weight.reshape(-1, 4, weight.shape[1]).transpose(0, 1).reshape(weight.shape)


def matmul(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    """left @ right, in TF32 where cuDNN would use TF32 for an LSTM. torch.matmul's own setting is off by default.

    exact: never use TF32. For the product of a single step, which takes hardly any time.
    """
    if left.dtype != torch.float32:
        return left @ right
    # The setting is right already, inside a `MatmulPrecision`.
    if not torch.compiler.is_dynamo_compiling() and _held.precision in (("ieee",) if exact else ("ieee", "tf32")):
        return left @ right
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
    setting: AbstractContextManager[object] = nullcontext()
    if target.current().may_take_tf32(rows):
        setting = MatmulPrecision("tf32" if allows_tf32() else "ieee")
    elif rows.is_cpu:
        # oneDNN's bfloat16 product for processors with AMX lets NaN of a row into the row before, for an odd H or I.
        # Rows without a step may hold NaN.
        setting = without_onednn()
    with without_autocast(rows.device), setting:
        torch.addmm(projected, rows, weight.t(), beta=int(add), out=projected)


def batched_matmul(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    """`matmul` on a GPU, for any batch of matrices."""
    with MatmulPrecision("tf32" if allows_tf32() and not exact else "ieee"):
        return left @ right


def precision_for(like: Tensor) -> AbstractContextManager[object]:
    """A context in which the setting is changed once for all calls of `matmul` with tensors like this one."""
    if like.dtype != torch.float32 or torch.compiler.is_dynamo_compiling():
        return nullcontext()
    # A mode that records operators has to see `cuda_matmul`, which is right wherever it is run.
    if torch._C._len_torch_dispatch_stack() > 0 or not target.current().may_take_tf32(like):
        return nullcontext()
    return MatmulPrecision("tf32" if allows_tf32() else "ieee")


class _Held(local):
    """What this thread has set PyTorch's precision of matrix products to, inside a `MatmulPrecision`."""

    precision: str | None = None


_held = _Held()
_matmul_precision_lock = ForkLock()


class MatmulPrecision:
    """A `with` block in which float32 matrix products on GPUs have a precision, "tf32" or "ieee".

    One thread after the other: the setting belongs to the whole process, and backward runs in one thread for each
    device. Blocks may be nested.
    """

    __slots__ = ("_changes", "_outer", "_precision", "_previous")

    def __init__(self, precision: str) -> None:
        self._precision = precision

    def __enter__(self) -> None:
        self._outer = _held.precision
        if self._outer is None:
            _matmul_precision_lock.__enter__()
        try:
            self._previous: Any = _precision()
            is_equal = self._previous == self._precision or {self._previous, self._precision} <= {"none", "ieee"}
            self._changes = not is_equal
            if self._changes:
                _set_precision(self._precision)
        except BaseException:
            if self._outer is None:
                _matmul_precision_lock.__exit__()
            raise
        _held.precision = self._precision

    def __exit__(self, *_: object) -> None:
        _held.precision = self._outer
        try:
            if self._changes:
                _set_precision("none")  # inherits torch.backends.fp32_precision, as the previous value may have
                if _precision() != self._previous:
                    _set_precision(self._previous)
        finally:
            if self._outer is None:
                _matmul_precision_lock.__exit__()


# What torch.backends.cuda.matmul.fp32_precision reads and writes.
_precision = partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")
_set_precision = partial(torch._C._set_fp32_precision_setter, "cuda", "matmul")

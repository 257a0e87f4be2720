"""Arithmetic with sizes that are known when a kernel is compiled, for every supported version of Triton."""

import triton


@triton.constexpr_function
def smaller(left, right):
    """The smaller one of two constants: `min` takes them for tensors in Triton 3.5."""
    return min(left, right)

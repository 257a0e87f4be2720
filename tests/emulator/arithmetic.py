"""Types, and arithmetic on values of one type, element by element."""

from collections.abc import Callable

import numpy as np

from tests.emulator.machine import Lanes

DTYPES = {f"{kind}{bits}": f"uint{bits}" for kind in "bu" for bits in (8, 16, 32, 64)}
DTYPES |= {f"s{bits}": f"int{bits}" for bits in (8, 16, 32, 64)} | {f"f{bits}": f"float{bits}" for bits in (16, 32, 64)}
DTYPES |= {"u16x2": "uint16", "s16x2": "int16", "f16x2": "float16", "pred": "bool"}  # x2: (64,), the lower half first
BFLOATS = ("bf16", "bf16x2")  # as float32 in between


def quotient(left: Lanes, right: Lanes) -> Lanes:
    if left.dtype.kind == "f":
        return left / right
    rounded_down = left // right
    return rounded_down + ((left - rounded_down * right != 0) & ((left < 0) != (right < 0)))


def fused(left: Lanes, right: Lanes, added: Lanes) -> Lanes:
    if left.dtype.kind != "f":
        return left * right + added
    return (left.astype(np.float64) * right + added).astype(left.dtype)


def approximate(exact: Callable[[Lanes], Lanes], bits: float) -> Callable[[Lanes], Lanes]:
    """With a relative error of up to 2^-bits, that depends on nothing but the argument."""

    def function(x: Lanes) -> Lanes:
        noise = (x.view(np.uint32) * np.uint32(2654435761) >> 8) / 2.0**23 - 1
        return (exact(x.astype(np.float64)) * (1 + noise * 2.0**-bits)).astype(x.dtype)

    return function


def shift(left: Lanes, by: Lanes, right: bool) -> Lanes:
    by = np.minimum(by, 64).astype(left.dtype)  # NumPy shifts by more than the width as PTX does
    return left >> by if right else left << by


ELEMENTWISE: dict[str, Callable[..., Lanes]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": fused, "fma": fused, "div": quotient,
    "rem": lambda left, right: left - quotient(left, right) * right,
    "min": lambda left, right: (np.fmin if left.dtype.kind == "f" else np.minimum)(left, right),
    "max": lambda left, right: (np.fmax if left.dtype.kind == "f" else np.maximum)(left, right),
    "neg": np.negative, "abs": np.abs, "not": np.invert, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": lambda left, by: shift(left, by, False), "shr": lambda left, by: shift(left, by, True),
    "rcp": approximate(lambda x: 1 / x, 23), "ex2": approximate(np.exp2, 22.5), "lg2": approximate(np.log2, 22),
    "sqrt": approximate(np.sqrt, 23), "rsqrt": approximate(lambda x: x**-0.5, 22.9), "tanh": approximate(np.tanh, 11),
}  # fmt: skip
COMPARISONS: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": np.equal, "ne": lambda left, right: (left < right) | (left > right), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal, "num": lambda left, right: ~(np.isnan(left) | np.isnan(right)),
    "nan": lambda left, right: np.isnan(left) | np.isnan(right), "neu": np.not_equal,
    "equ": lambda left, right: ~((left < right) | (left > right)), "ltu": lambda left, right: ~(left >= right),
    "leu": lambda left, right: ~(left > right), "gtu": lambda left, right: ~(left <= right),
    "geu": lambda left, right: ~(left < right),
}  # fmt: skip
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def to_bfloat16(values: Lanes) -> Lanes:
    """The bits of float32 values, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def widened(bits: Lanes) -> Lanes:
    """bfloat16 -> float32"""
    return (bits.astype(np.uint32) << 16).view(np.float32)

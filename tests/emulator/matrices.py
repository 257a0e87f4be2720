"""Matrix products: tensor cores' instructions, and how they lay matrices out in registers and shared memory."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from tests.emulator.arithmetic import widened
from tests.emulator.instructions import Decoder
from tests.emulator.machine import LANES, SHARED_BASE, Lanes, Mask, Warp


class MatrixDecoder(Decoder):
    """Knows the instructions for matrices, too."""

    def do_ldmatrix(self) -> Callable[[Warp, Mask], None]:
        self.type = "b32"
        targets, address = (
            [self.target(name, "b32") for name in self.vector(self.operands[0])],
            self.address(self.operands[1]),
        )
        transposed = "trans" in self.words

        def load(warp: Warp, mask: Mask) -> None:
            rows = address(warp)[: 8 * len(targets)] - SHARED_BASE
            matrices = warp.cta.shared.load(warp, rows, 16).view(np.uint16).reshape(-1, 8, 8)
            for matrix, target in zip(matrices, targets, strict=True):
                target(warp, np.ascontiguousarray(matrix.T if transposed else matrix).view(np.uint32).reshape(-1), mask)

        return load

    def do_stmatrix(self) -> Callable[[Warp, Mask], None]:
        address, sources = (
            self.address(self.operands[0]),
            [self.source(name, "b32") for name in self.vector(self.operands[1])],
        )
        transposed = "trans" in self.words

        def store(warp: Warp, mask: Mask) -> None:
            rows = address(warp)[: 8 * len(sources)] - SHARED_BASE
            matrices = [np.ascontiguousarray(source(warp)).view(np.uint16).reshape(8, 8) for source in sources]
            values = np.concatenate([matrix.T if transposed else matrix for matrix in matrices])
            warp.cta.shared.store(warp, rows, np.ascontiguousarray(values).view(np.uint8), warp.cta.moment)

        return store

    def do_mma(self) -> Callable[[Warp, Mask], None]:
        if (
            self.words[1:3] != ["sync", "aligned"]
            or self.words[4:7] != ["row", "col", "f32"]
            or self.words[9:] != ["f32"]
        ):
            raise NotImplementedError(self.instruction.where)
        type_, depth = self.words[7], int(self.words[3].partition("k")[2])
        targets = [self.target(name, "f32") for name in self.vector(self.operands[0])]
        lefts, rights = ([self.source(name, "b32") for name in self.vector(text)] for text in self.operands[1:3])
        sums = [self.source(name, "f32") for name in self.vector(self.operands[3])]

        def multiply(warp: Warp, mask: Mask) -> None:
            left = left_fragment([each(warp) for each in lefts], type_, depth)
            # (8 columns, depth), laid out like the upper half of the left operand
            right = left_fragment([part for each in rights for part in (each(warp), each(warp))], type_, depth)[:8]
            total = (left.astype(np.float64) @ right.T.astype(np.float64)).astype(np.float32)
            for at, (target, added) in enumerate(zip(targets, sums, strict=True)):
                target(warp, result_fragment(total, at) + added(warp), mask)

        return multiply

    def do_wgmma_fence(self) -> None:
        return None

    def do_wgmma_commit_group(self) -> Callable[[Warp, Mask], None]:
        return lambda warp, mask: warp.commit("wgmma")

    def do_wgmma_wait_group(self) -> Callable[[Warp, Mask], None]:
        left = int(self.operands[0])
        return lambda warp, mask: warp.wait("wgmma", left)

    def do_wgmma_mma_async(self) -> Callable[[Warp, Mask], None]:
        """Of a group of four warps each computes 16 of the 64 rows."""
        columns, depth = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", self.words[4]).groups())  # type: ignore[union-attr]
        type_ = self.words[6]
        names = self.vector(self.operands[0])
        targets, sums = [self.target(name, "f32") for name in names], [self.source(name, "f32") for name in names]
        in_registers = self.operands[1].startswith("{")
        if in_registers:
            lefts = [self.source(name, "b32") for name in self.vector(self.operands[1])]
        else:
            left_descriptor = self.source(self.operands[1], "u64")
        right_descriptor = self.source(self.operands[2], "u64")
        accumulates = self.source(self.operands[3], "pred")
        settings = [int(text) for text in self.operands[4:]]
        if settings[:2] != [1, 1] or self.words[5] != "f32":
            raise NotImplementedError(f"{self.instruction.where} {self.operands}")
        transposed = [bool(setting) for setting in [0, *settings[2:]][-2:]] if settings[2:] else [False, False]

        def multiply(warp: Warp, mask: Mask) -> None:
            adds = accumulates(warp)[0]
            descriptors = [0 if in_registers else int(left_descriptor(warp)[0]), int(right_descriptor(warp)[0])]

            def act() -> None:
                if in_registers:
                    left = left_fragment([each(warp) for each in lefts], type_, depth)
                else:
                    first = warp.number % 4 * 16
                    left = described(warp, descriptors[0], range(first, first + 16), type_, depth, transposed[0])
                right = described(warp, descriptors[1], range(columns), type_, depth, transposed[1])
                total = (left.astype(np.float64) @ right.T.astype(np.float64)).astype(np.float32)
                for at, (target, added) in enumerate(zip(targets, sums, strict=True)):
                    value = result_fragment(total, at)
                    target(warp, value + added(warp) if adds else value, None)

            warp.issue("wgmma", act)

        return multiply


def as_floats(data: np.ndarray, type_: str) -> np.ndarray:
    """The operands of a matrix product, as what tensor cores make of these bytes (..., n) -> (..., elements)."""
    if type_ == "tf32":
        return (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return widened(data.view(np.uint16)) if type_ == "bf16" else data.view(np.float16).astype(np.float32)


def left_fragment(registers: Sequence[Lanes], type_: str, depth: int) -> np.ndarray:
    """(16, depth) of the left operand: registers alternate between rows 0 to 7 and 8 to 15."""
    parts = np.stack(registers).reshape(-1, 2, 8, 4)  # (depth / 4 words, half, row, word)
    words = np.ascontiguousarray(parts.transpose(1, 2, 0, 3)).reshape(16, -1)
    tile = as_floats(words, type_)
    assert tile.shape[1] == depth
    return tile


def result_fragment(total: np.ndarray, at: int) -> Lanes:
    """Register number `at` of a result (16, columns): four for each 8 columns, the first two of rows 0 to 7."""
    return total.reshape(2, 8, -1, 4, 2)[at // 2 % 2, :, at // 4, :, at % 2].reshape(LANES)


def described(warp: Warp, descriptor: int, rows: range, type_: str, depth: int, transposed: bool) -> np.ndarray:
    """(rows, depth) of an operand of wgmma in shared memory, out of its matrix descriptor.

    Tiles of 8 rows (of the operand, or transposed, of the depth) x as many bytes as the swizzle spans.
    """
    start, leading, stride = (descriptor >> bit & 0x3FFF for bit in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("a base offset in a matrix descriptor")
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62 & 3]
    size = 4 if type_ == "tf32" else 2
    row, k = np.array(rows)[:, None], np.arange(depth)[None, :]
    # Positions along the contiguous axis and across it; distances between tiles along both.
    along, across = (row, k) if transposed else (k, row)
    span = 16 << swizzle
    between_along, between_across = (leading, stride) if swizzle or not transposed else (stride, leading)
    offsets = along * size % span + across % 8 * span + 16 * start
    offsets = offsets + along * size // span * 16 * between_along + across // 8 * 16 * between_across
    offsets ^= (offsets >> 7 & (1 << swizzle) - 1) << 4
    data = warp.cta.shared.load(warp, offsets.reshape(-1) - SHARED_BASE, size, fenced=False)
    return as_floats(data, type_).reshape(offsets.shape)

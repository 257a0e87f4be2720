"""Triton's interpreter in a quarter of its time, with the same results and errors.

The interpreter spends nearly all of its time on types, and hardly any on numbers. Every operation of a program builds
the types of its operands and of its result again, and compares them element by element. But a kernel has few types, and
repeats its operations in every step and program. Here, what depends on types alone is computed once.
"""

import functools
import math
from typing import Any, ClassVar

import numpy
import triton.language as tl
from triton.runtime import interpreter

core = tl.core
Types = tuple[Any, Any]


def install() -> None:
    """Take the shortcuts from now on, in the whole process."""
    # Plain Triton fills a table of all types whenever it looks one of them up.
    interpreter._get_np_dtype = functools.cache(interpreter._get_np_dtype)
    _make_equal_types_one_object()
    _make_tensors_share_their_shapes()
    _call_operations_directly()
    core._unwrap_if_constexpr = _unwrapping(core._unwrap_if_constexpr)
    interpreter.TritonSemantic = Semantic  # Triton 3.6 makes one for every operation
    interpreter.interpreter_semantic = Semantic(interpreter.interpreter_builder)


def _make_equal_types_one_object() -> None:
    """Make equal types one object: types are then compared and hashed by address, and can be keys of tables."""
    known: dict[Any, Any] = {}

    def new_block(cls: Any, element_ty: Any, shape: Any) -> Any:
        key = element_ty, tuple([core._unwrap_if_constexpr(size) for size in shape])
        if key not in known:
            known[key] = made(cls, element_ty, shape)
        return known[key]

    def new_pointer(cls: Any, *arguments: Any, **keywords: Any) -> Any:
        pointer = made(cls, *arguments, **keywords)
        return known.setdefault((pointer.element_ty, pointer.address_space, pointer.const), pointer)

    plain = {cls: cls.__init__ for cls in (tl.block_type, tl.pointer_type)}

    def made(cls: Any, *arguments: Any, **keywords: Any) -> Any:
        found = object.__new__(cls)
        plain[cls](found, *arguments, **keywords)
        return found

    for cls, new in ((tl.block_type, new_block), (tl.pointer_type, new_pointer)):
        cls.__new__ = new
        cls.__init__ = lambda self, *arguments, **keywords: None  # Python calls __init__ on what __new__ returns
        cls.__eq__ = lambda self, other: self is core._unwrap_if_constexpr(other)
        cls.__hash__ = object.__hash__

    plain_equal = tl.dtype.__eq__
    tl.dtype.__eq__ = lambda self, other: self is other or plain_equal(self, other)

    plain_to_ir = tl.block_type.to_ir

    def to_ir(self: Any, builder: Any) -> Any:
        # The interpreter uses Triton's own types, so `self` is the result. Plain Triton builds it a second time.
        return self if isinstance(builder, interpreter.InterpreterBuilder) else plain_to_ir(self, builder)

    tl.block_type.to_ir = to_ir


def _make_tensors_share_their_shapes() -> None:
    """Share shapes between tensors of one type. Plain Triton makes a new object for each size of every tensor."""

    @functools.cache
    def extents(type: Any) -> tuple[Any, Any]:
        sizes = list(type.shape) if type.is_block() else []
        return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def initialise(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = extents(type)

    tl.tensor.__init__ = initialise


def _call_operations_directly() -> None:
    """Skip two wrappers of plain Triton: one adds an operation's last argument, one checks that it is there."""
    wrapper = core.builtin(lambda: None).__code__

    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        # Some members are classes, which have no code of their own.
        operation = member.__wrapped__ if getattr(member, "__code__", None) is wrapper else member

        def call(*arguments: Any, **keywords: Any) -> Any:
            keywords["_semantic"] = interpreter.interpreter_semantic
            return operation(*arguments, **keywords)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch_attr


def _unwrapping(plain: Any) -> Any:
    """Plain Triton's function that unwraps constants, but it tests for the most frequent arguments first."""
    constant, others = tl.constexpr, {tl.tensor, tl.dtype, int, bool, float, str, type(None)}

    def unwrap(value: Any) -> Any:
        kind = type(value)
        if kind in others:
            return value
        return value.value if kind is constant else plain(value)

    return unwrap


class Semantic(tl.semantic.TritonSemantic):  # type: ignore[misc]
    """Triton's semantics of operations, with tables of operand types. Triton itself computes what is not there yet."""

    # Key: what is given. Value: the types that the operands must have, or the tensor that a number becomes.
    operands: ClassVar[dict[Any, Types]] = {}
    broadcasts: ClassVar[dict[Types, Types]] = {}

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *options: Any, **keywords: Any) -> Types:
        # 0, 0.0, -0.0 and False are equal, but their texts differ.
        left = lhs.type if isinstance(lhs, tl.tensor) else repr(lhs)
        right = rhs.type if isinstance(rhs, tl.tensor) else repr(rhs)
        key = left, right, *options, *keywords.items()
        wanted = self.operands.get(key)
        if wanted is not None:
            return self._with_type(lhs, wanted[0]), self._with_type(rhs, wanted[1])
        found = super().binary_op_type_checking_impl(lhs, rhs, *options, **keywords)
        self.operands[key] = (
            found[0].type if isinstance(lhs, tl.tensor) else found[0],
            found[1].type if isinstance(rhs, tl.tensor) else found[1],
        )
        return found  # type: ignore[no-any-return]

    def _with_type(self, operand: Any, wanted: Any) -> Any:
        if isinstance(wanted, tl.tensor):  # the operand is a number
            return wanted
        return operand if operand.type is wanted else self._repeated(self.cast(operand, wanted.scalar), wanted)

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> Types:
        if lhs.type is rhs.type:
            return lhs, rhs
        key = lhs.type, rhs.type
        if key not in self.broadcasts:
            left, right = super().broadcast_impl_value(lhs, rhs)
            self.broadcasts[key] = left.type, right.type
        left_type, right_type = self.broadcasts[key]
        return self._repeated(lhs, left_type), self._repeated(rhs, right_type)

    def _repeated(self, operand: Any, wanted: Any) -> Any:
        """Broadcast an operand to the wanted shape. It has the wanted scalar type already."""
        if operand.type is wanted:
            return operand
        data = numpy.empty(wanted.shape.values, operand.handle.data.dtype)
        data[...] = operand.handle.data
        return tl.tensor(interpreter.TensorHandle(data, wanted.scalar), wanted)

    def cast(self, input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        return input if input.dtype is dst_ty.scalar else super().cast(input, dst_ty, fp_downcast_rounding)

    def binary_op_sanitize_overflow_impl(self, lhs: Any, rhs: Any, binary_op: Any) -> None:
        # Without `debug`, plain Triton computes every operation a second time, in 64 bits, and ignores the result.
        if self.builder.options.debug:
            super().binary_op_sanitize_overflow_impl(lhs, rhs, binary_op)

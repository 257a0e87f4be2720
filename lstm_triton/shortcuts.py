"""Triton's interpreter in a quarter of its time: the same results and errors.

Nearly all of the time goes into types, hardly any into numbers: every operation of a program builds the types of its
operands and of its result anew, and compares them element by element. A kernel has few types, and its operations come
again with every step and program: here, what follows from the types alone is worked out once.
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
    """Take the shortcuts, from now on and in this process."""
    # Plain Triton fills a table of all types whenever it looks one of them up.
    interpreter._get_np_dtype = functools.cache(interpreter._get_np_dtype)
    _make_equal_types_one_object()
    _make_tensors_share_their_shapes()
    _call_operations_directly()
    core._unwrap_if_constexpr = _unwrapping(core._unwrap_if_constexpr)
    interpreter.TritonSemantic = Semantic  # Triton 3.6 makes one for every operation
    interpreter.interpreter_semantic = Semantic(interpreter.interpreter_builder)


def _make_equal_types_one_object() -> None:
    """Types are then compared and hashed by their addresses, and can be looked up in tables."""
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
        cls.__init__ = lambda self, *arguments, **keywords: None  # Python calls it for what __new__ returns
        cls.__eq__ = lambda self, other: self is core._unwrap_if_constexpr(other)
        cls.__hash__ = object.__hash__

    plain_equal = tl.dtype.__eq__
    tl.dtype.__eq__ = lambda self, other: self is other or plain_equal(self, other)

    plain_to_ir = tl.block_type.to_ir

    def to_ir(self: Any, builder: Any) -> Any:
        # The interpreter's types are Triton's own: plain Triton builds this one a second time.
        return self if isinstance(builder, interpreter.InterpreterBuilder) else plain_to_ir(self, builder)

    tl.block_type.to_ir = to_ir


def _make_tensors_share_their_shapes() -> None:
    """A tensor's shape is a tuple of constants, each an object: plain Triton makes them for every tensor."""

    @functools.cache
    def extents(type: Any) -> tuple[Any, Any]:
        sizes = list(type.shape) if type.is_block() else []
        return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def initialise(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = extents(type)

    tl.tensor.__init__ = initialise


def _call_operations_directly() -> None:
    """Plain Triton goes through two wrappers, that give an operation its last argument and check that it is there."""
    wrapper = core.builtin(lambda: None).__code__

    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        operation = member.__wrapped__ if member.__code__ is wrapper else member

        def call(*arguments: Any, **keywords: Any) -> Any:
            keywords["_semantic"] = interpreter.interpreter_semantic
            return operation(*arguments, **keywords)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch_attr


def _unwrapping(plain: Any) -> Any:
    """What plain Triton's function for constants gives, the most frequent arguments first."""
    constant, others = tl.constexpr, {tl.tensor, tl.dtype, int, bool, float, str, type(None)}

    def unwrap(value: Any) -> Any:
        kind = type(value)
        if kind in others:
            return value
        return value.value if kind is constant else plain(value)

    return unwrap


class Semantic(tl.semantic.TritonSemantic):  # type: ignore[misc]
    """What operations mean, with the types of their operands looked up in tables; what is not there yet is Triton's."""

    # By what is given: the types that operands are to have, or the tensor that a number becomes.
    operands: ClassVar[dict[Any, Types]] = {}
    broadcasts: ClassVar[dict[Types, Types]] = {}

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *options: Any, **keywords: Any) -> Types:
        # The digits of a number tell 0, 0.0, -0.0 and False apart, which are equal.
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
        """An operand of the wanted scalar type in the wanted shape."""
        if operand.type is wanted:
            return operand
        data = numpy.empty(wanted.shape.values, operand.handle.data.dtype)
        data[...] = operand.handle.data
        return tl.tensor(interpreter.TensorHandle(data, wanted.scalar), wanted)

    def cast(self, input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        return input if input.dtype is dst_ty.scalar else super().cast(input, dst_ty, fp_downcast_rounding)

    def binary_op_sanitize_overflow_impl(self, lhs: Any, rhs: Any, binary_op: Any) -> None:
        # Without `debug` plain Triton computes everything a second time, in 64 bits, and does not look at it.
        if self.builder.options.debug:
            super().binary_op_sanitize_overflow_impl(lhs, rhs, binary_op)

"""From the text of an instruction to the function that does it: all but matrices."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from tests.emulator.arithmetic import (
    BFLOATS,
    COMPARISONS,
    DTYPES,
    ELEMENTWISE,
    LOGIC,
    ROUNDINGS,
    shift,
    to_bfloat16,
    widened,
)
from tests.emulator.machine import (
    LANE,
    LANES,
    SHARED_BASE,
    Deadlock,
    Diverged,
    Instruction,
    Lanes,
    Mask,
    Program,
    Warp,
)


class Scope:
    """The names that are declared between two braces."""

    def __init__(self, program: Program, outer: "Scope | None" = None) -> None:
        self.program, self.outer = program, outer
        self.registers: dict[str, np.dtype] = {}  # by name, or "%r<>" for a numbered family
        self.numbers: dict[str, int] = {}
        self.labels: dict[str, int] = {}

    def register(self, name: str) -> int:
        """Its number; it gets one when it is first met."""
        where: Scope | None = self
        while where is not None:
            for declared in (name, re.sub(r"\d+$", "<>", name)):
                if declared in where.registers:
                    if name not in where.numbers:
                        where.numbers[name] = len(self.program.registers)
                        self.program.registers.append(where.registers[declared])
                    return where.numbers[name]
            where = where.outer
        raise NotImplementedError(f"the register or symbol {name}")


class Decoder:
    """Turns the text of one instruction into its action."""

    def __init__(self, scope: Scope, instruction: Instruction, operands: Sequence[str]) -> None:
        self.program, self.scope, self.instruction, self.operands = scope.program, scope, instruction, operands
        self.words = instruction.opcode.replace("::", "_").split(".")
        self.type = self.words[-1]

    def decode(self) -> None:
        name = self.words[0]
        self.instruction.aligned = "aligned" in self.words or name in ("bar", "barrier", "redux", "elect")
        # A method of the instruction's first two words, or of the first one, or arithmetic.
        specific = getattr(self, "_".join(["do", *self.words[:2]]), None) or getattr(self, f"do_{name}", None)
        if specific is not None:
            action = specific()
            if action is not None:
                self.instruction.action = action
        elif name in ELEMENTWISE and (self.type in DTYPES or self.type in BFLOATS):
            second = "u32" if name in ("shl", "shr") else self.type
            self.elementwise(ELEMENTWISE[name], [self.type, *[second] * (len(self.operands) - 2)])
        else:
            raise NotImplementedError(f"{self.instruction.where} {', '.join(self.operands)}")

    # Operands.

    def source(self, text: str, type_: str) -> Callable[[Warp], Lanes]:
        """A function that reads an operand."""
        dtype = np.dtype(DTYPES.get(type_, np.float32))
        if text in self.program.symbols:
            constant = np.full(LANES, self.program.symbols[text]).astype(dtype)
            return lambda warp: constant
        if text.startswith("%") and (
            text.split(".")[0] in ("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid")
        ):
            return lambda warp: warp.special[text].astype(dtype)
        if text == "%clock":
            return lambda warp: np.full(LANES, warp.machine.ticks(), dtype)
        literal = re.fullmatch(r"(0[fFdD])([0-9a-fA-F]+)|(-?(?:0[xX][0-9a-fA-F]+|\d+))U?", text)
        if literal:
            if literal[1]:
                value = np.array([int(literal[2], 16)], np.uint32 if literal[1] in ("0f", "0F") else np.uint64).view(
                    dtype
                )
            elif dtype == np.bool_:
                value = np.array([int(literal[3], 0) != 0])
            else:
                lanes = max(1, 4 // dtype.itemsize) if type_.endswith("x2") else 1
                size = dtype.itemsize * lanes
                bits = (int(literal[3], 0) % 2 ** (8 * size)).to_bytes(size, "little")
                value = np.frombuffer(bits, np.uint16 if type_ in BFLOATS else dtype)
                value = widened(value) if type_ in BFLOATS else value
            constant = np.tile(value.astype(dtype), LANES)
            return lambda warp: constant
        negated, register = text.startswith("!"), self.scope.register(text.lstrip("!"))
        raw = self.program.registers[register]
        if negated:
            return lambda warp: ~warp.registers[register]
        if type_ in BFLOATS:
            return lambda warp: widened(warp.registers[register].view(np.uint16))
        if raw == dtype:
            return lambda warp: warp.registers[register]
        if raw.itemsize > dtype.itemsize and not type_.endswith("x2"):
            unsigned = np.dtype(f"u{dtype.itemsize}")
            return lambda warp: warp.registers[register].astype(unsigned).view(dtype)
        return lambda warp: warp.registers[register].view(dtype)

    def target(self, text: str, type_: str) -> Callable[[Warp, Lanes, Mask], None]:
        """A function that writes an operand."""
        if text == "_":
            return lambda warp, value, mask: None
        register = self.scope.register(text)
        raw = self.program.registers[register]

        def write(warp: Warp, value: Lanes, mask: Mask) -> None:
            if type_ in BFLOATS:
                value = to_bfloat16(value)
            if value.size * value.itemsize < LANES * raw.itemsize:  # into a wider register
                value = value.astype(np.dtype(f"{'i' if value.dtype.kind == 'i' else 'u'}{raw.itemsize}"))
            value = value if value.dtype == raw else np.ascontiguousarray(value).view(raw)
            warp.registers[register] = value if mask is None else np.where(mask, value, warp.registers[register])

        return write

    def vector(self, text: str) -> list[str]:
        return [each.strip() for each in text.strip("{}").split(",")]

    def bits(self, text: str) -> Callable[[Warp], np.ndarray]:
        """(lanes, bytes) of an operand, or of a vector of them, as many as their registers have, or the type."""
        names = self.vector(text)
        sources = [self.source(name, self.type) for name in names]
        return lambda warp: np.stack([source(warp) for source in sources], 1).view(np.uint8)

    def address(self, text: str) -> Callable[[Warp], Lanes]:
        base, _, offset = (part.strip() for part in text.strip("[]").partition("+"))
        is_wide = base.startswith("%") and self.program.registers[self.scope.register(base)].itemsize == 8
        source, distance = self.source(base, "b64" if is_wide else "b32"), int(offset or "0", 0)
        return lambda warp: source(warp).astype(np.int64) + distance

    def elementwise(self, function: Callable[..., Lanes], types: Sequence[str], result: str | None = None) -> None:
        target = self.target(self.operands[0], result or types[0])
        sources = [self.source(text, type_) for text, type_ in zip(self.operands[1:], types, strict=True)]
        if len(sources) == 1:
            (one,) = sources
            self.instruction.action = lambda warp, mask: target(warp, function(one(warp)), mask)
        elif len(sources) == 2:
            left, right = sources
            self.instruction.action = lambda warp, mask: target(warp, function(left(warp), right(warp)), mask)
        else:
            self.instruction.action = lambda warp, mask: target(warp, function(*(each(warp) for each in sources)), mask)

    # Control.

    def do_bra(self) -> None:
        scope: Scope | None = self.scope
        while scope is not None and self.operands[0] not in scope.labels:
            scope = scope.outer
        assert scope is not None, self.operands
        goal = scope.labels[self.operands[0]]

        def jump(warp: Warp, taken: Lanes) -> None:
            warp.places[taken] = goal

        self.instruction.jump = jump

    def do_ret(self) -> None:
        def jump(warp: Warp, taken: Lanes) -> None:
            if taken.any() and not taken.all():
                raise NotImplementedError("lanes that end before others")
            warp.ended = bool(taken.all())

        self.instruction.jump = jump

    do_exit = do_ret

    def do_bar(self) -> None:
        if "warp" in self.words:
            return  # the lanes of a warp are never far from each other here
        if self.words[-1] not in ("sync", "aligned") or self.operands not in (["0"], ["0", str(self.program.threads)]):
            raise NotImplementedError(f"{self.instruction.where} {self.operands}")

        def jump(warp: Warp, taken: Lanes) -> None:
            if not taken.all():
                raise Diverged(f"lanes {np.flatnonzero(~taken)} are missing")
            warp.cta.arrive(warp)

        self.instruction.jump = jump

    do_barrier = do_bar

    def do_nanosleep(self) -> None:
        return None

    def do_trap(self) -> None:
        def give_up(warp: Warp, mask: Mask) -> None:
            raise Deadlock(f"trap after too many polls ({self.instruction.where})")

        self.instruction.action = give_up

    # Moving and converting.

    def do_mov(self) -> Callable[[Warp, Mask], None]:
        into, out_of = self.operands
        if into.startswith("{"):
            names = self.vector(into)
            part = f"b{int(self.type[1:]) // len(names)}"
            targets, source = [self.target(name, part) for name in names], self.source(out_of, self.type)

            def unpack(warp: Warp, mask: Mask) -> None:
                for target, value in zip(targets, source(warp).view(DTYPES[part]).reshape(LANES, -1).T, strict=True):
                    target(warp, np.ascontiguousarray(value), mask)

            return unpack
        target = self.target(into, self.type)
        if out_of.startswith("{"):
            names = self.vector(out_of)
            sources = [self.source(name, f"b{int(self.type[1:]) // len(names)}") for name in names]
            dtype = DTYPES[self.type]
            return lambda warp, mask: target(
                warp, np.stack([each(warp) for each in sources], 1).view(dtype)[:, 0], mask
            )
        source = self.source(out_of, self.type)
        return lambda warp, mask: target(warp, source(warp), mask)

    def do_cvta(self) -> Callable[[Warp, Mask], None]:
        return self.do_mov()

    def do_cvt(self) -> Callable[[Warp, Mask], None]:
        into, out_of = self.words[-2:]
        modifiers = set(self.words[1:-2])
        if not modifiers <= {"rn", "rna", "ftz", *ROUNDINGS} or ("rna" in modifiers and into != "tf32"):
            raise NotImplementedError(self.instruction.where)
        sources = [self.source(text, out_of) for text in self.operands[1:]]
        target = self.target(self.operands[0], "b32" if into == "tf32" else into)
        rounding = next((ROUNDINGS[word] for word in modifiers if word in ROUNDINGS), None)
        dtype = np.dtype(DTYPES.get(into, np.float32))

        def convert(warp: Warp, mask: Mask) -> None:
            value = sources[0](warp)
            if len(sources) == 2:  # the first one is the upper half
                value = np.stack([sources[1](warp), value], 1).reshape(-1)
            if into == "tf32":
                bits = value.view(np.uint32)
                half = np.uint32(0x1000) if "rna" in modifiers else np.uint32(0xFFF) + (bits >> 13 & np.uint32(1))
                value = np.where(np.isfinite(value), bits + half, bits) & np.uint32(0xFFFFE000)
            elif rounding is not None and value.dtype.kind == "f":
                if dtype.kind == "f":
                    value = rounding(value).astype(dtype)
                else:
                    limits = np.iinfo(dtype)
                    value = np.nan_to_num(rounding(value.astype(np.float64)), nan=0, posinf=2.0**63, neginf=-(2.0**63))
                    value = np.clip(value, float(limits.min), float(limits.max)).astype(dtype)
            else:
                value = value.astype(dtype)
            target(warp, value, mask)

        return convert

    # Integers, predicates and bits.

    def do_mul_wide(self) -> None:
        wide = f"{self.type[0]}{2 * int(self.type[1:])}"
        types = [self.type, self.type, wide][: len(self.operands) - 1]

        def product(left: Lanes, right: Lanes, added: Lanes | None = None) -> Lanes:
            found = left.astype(DTYPES[wide]) * right.astype(DTYPES[wide])
            return found if added is None else found + added

        self.elementwise(product, types, wide)

    do_mad_wide = do_mul_wide

    def do_mul_hi(self) -> None:
        bits = int(self.type[1:])
        wide = np.dtype(object) if bits == 64 else np.dtype(f"{self.type[0].replace('s', 'i')}{bits // 4}")
        dtype = DTYPES[self.type]
        self.elementwise(
            lambda left, right: (left.astype(wide) * right.astype(wide) >> bits).astype(dtype), [self.type] * 2
        )

    def do_setp(self) -> Callable[[Warp, Mask], None]:
        compare, logic = COMPARISONS[self.words[1]], LOGIC.get(self.words[2])
        left, right = (self.source(text, self.type) for text in self.operands[1:3])
        if self.words[1] == "ne" and self.type not in BFLOATS and np.dtype(DTYPES[self.type]).kind != "f":
            compare = np.not_equal
        targets = [self.target(name, "pred") for name in self.operands[0].split("|")]
        combined = self.source(self.operands[3], "pred") if logic else None
        halves = self.type.endswith("x2")

        def action(warp: Warp, mask: Mask) -> None:
            found = compare(left(warp), right(warp))
            results = (found[::2], found[1::2]) if halves else (found, ~found)
            for target, result in zip(targets, results, strict=False):
                target(warp, logic(result, combined(warp)) if logic and combined else result, mask)

        return action

    def do_selp(self) -> None:
        self.elementwise(lambda left, right, which: np.where(which, left, right), [self.type, self.type, "pred"])

    def do_bfe(self) -> None:
        bits = int(self.type[1:])

        def extract(value: Lanes, first: Lanes, length: Lanes) -> Lanes:
            first, length = np.minimum(first & 255, bits), length & 255
            above = np.maximum(bits - first.astype(np.int64) - length, 0)  # bits above the field
            field = shift(shift(value, above, False), above + first, True)
            return np.where(length == 0, np.zeros_like(value), field)

        self.elementwise(extract, [self.type, "u32", "u32"])

    def do_bfi(self) -> None:
        def insert(field: Lanes, value: Lanes, first: Lanes, length: Lanes) -> Lanes:
            ones = shift(shift(np.ones_like(value), length & 255, False) - 1, first & 255, False).astype(value.dtype)
            return value & ~ones | shift(field, first & 255, False) & ones

        self.elementwise(insert, [self.type, self.type, "u32", "u32"])

    def do_prmt(self) -> None:
        if self.words != ["prmt", "b32"]:
            raise NotImplementedError(self.instruction.where)

        def permute(low: Lanes, high: Lanes, selection: Lanes) -> Lanes:
            bytes_ = np.stack([low, high], 1).view(np.uint8)
            chosen = selection[:, None] >> np.array([0, 4, 8, 12], np.uint32)
            picked = np.take_along_axis(bytes_, (chosen & 7).astype(int), 1)
            signs = np.where(picked >= 128, 255, 0).astype(np.uint8)
            return np.where(chosen & 8, signs, picked).astype(np.uint8).view(np.uint32)[:, 0]

        self.elementwise(permute, ["b32"] * 3)

    def do_lop3(self) -> None:
        def look_up(a: Lanes, b: Lanes, c: Lanes, table: Lanes) -> Lanes:
            found = np.zeros_like(a)
            for row in range(8):
                if table[0] >> row & 1:
                    found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            return found

        self.elementwise(look_up, ["b32"] * 4)

    # Between the lanes of a warp.

    def members(self, text: str) -> Callable[[Warp, Mask], Lanes]:
        """Which lanes take part: all of them have to be here."""
        source = self.source(text, "u32")

        def members(warp: Warp, mask: Mask) -> Lanes:
            expected = (source(warp)[0 if mask is None else mask.argmax()] >> LANE & 1).astype(bool)
            if mask is not None and (expected & ~mask).any():
                raise Diverged(f"lanes {np.flatnonzero(expected & ~mask)} are missing")
            return expected

        return members

    def do_shfl(self) -> Callable[[Warp, Mask], None]:
        mode, names = self.words[2], self.operands[0].split("|")
        target, ok = self.target(names[0], "b32"), self.target(names[1] if len(names) > 1 else "_", "pred")
        value, by, control = (self.source(text, "b32") for text in self.operands[1:4])
        members = self.members(self.operands[4])

        def shuffle(warp: Warp, mask: Mask) -> None:
            members(warp, mask)
            distance, clamp, segment = by(warp).astype(int), control(warp) & 31, control(warp) >> 8 & 31
            last = LANE & segment | clamp & ~segment & 31
            at = {
                "bfly": LANE ^ distance,
                "idx": LANE & segment | distance & ~segment & 31,
                "up": LANE - distance,
                "down": LANE + distance,
            }[mode]
            inside = at >= last if mode == "up" else at <= last
            target(warp, value(warp)[np.where(inside, at, LANE)], mask)
            ok(warp, inside, mask)

        return shuffle

    def do_redux(self) -> Callable[[Warp, Mask], None]:
        reduce = {"min": np.min, "max": np.max, "add": np.sum, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce}
        function, members = reduce[self.words[2]], self.members(self.operands[2])
        target, value = self.target(self.operands[0], self.type), self.source(self.operands[1], self.type)
        dtype = DTYPES[self.type]
        return lambda warp, mask: target(
            warp, np.full(LANES, function(value(warp)[members(warp, mask)])).astype(dtype), mask
        )

    def do_vote(self) -> Callable[[Warp, Mask], None]:
        kind, members = self.words[2], self.members(self.operands[2])
        target = self.target(self.operands[0], "b32" if kind == "ballot" else "pred")
        votes = self.source(self.operands[1], "pred")

        def vote(warp: Warp, mask: Mask) -> None:
            cast, present = votes(warp), members(warp, mask)
            if kind == "ballot":
                target(warp, np.full(LANES, (1 << LANE[cast & present]).sum(), np.uint32), mask)
            else:
                result = {"any": cast[present].any(), "all": cast[present].all()}[kind]
                target(warp, np.full(LANES, result), mask)

        return vote

    def do_activemask(self) -> Callable[[Warp, Mask], None]:
        target = self.target(self.operands[0], "b32")
        return lambda warp, mask: target(
            warp, np.full(LANES, (1 << (LANE if mask is None else LANE[mask])).sum(), np.uint32), mask
        )

    def do_elect(self) -> Callable[[Warp, Mask], None]:
        names = self.operands[0].split("|")
        lane, elected = self.target(names[0], "b32"), self.target(names[1], "pred")

        def elect(warp: Warp, mask: Mask) -> None:
            lane(warp, np.zeros(LANES, np.uint32), mask)
            elected(warp, LANE == 0, mask)

        return elect

    # Memory.

    def do_ld_param(self) -> Callable[[Warp, Mask], None]:
        target, address, dtype = (
            self.target(self.operands[0], self.type),
            self.address(self.operands[1]),
            DTYPES[self.type],
        )
        size = np.dtype(dtype).itemsize

        def load(warp: Warp, mask: Mask) -> None:
            bytes_ = warp.machine.parameters[address(warp)[:, None] + np.arange(size)]
            target(warp, bytes_.view(dtype)[:, 0], mask)

        return load

    def do_ld(self) -> Callable[[Warp, Mask], None]:
        targets = [self.target(name, self.type) for name in self.vector(self.operands[0])]
        address, dtype = self.address(self.operands[1]), np.dtype(DTYPES[self.type])
        size = dtype.itemsize * len(targets)
        strong = not {"volatile", "relaxed", "acquire"}.isdisjoint(self.words)
        is_shared = any(word.startswith("shared") for word in self.words)
        if not is_shared and "global" not in self.words:
            raise NotImplementedError(self.instruction.where)
        self.instruction.polls = strong and not is_shared

        def load(warp: Warp, mask: Mask) -> None:
            addresses = address(warp)
            lanes = LANE if mask is None else LANE[mask]
            found = np.zeros((LANES, size), np.uint8)
            if is_shared:
                found[lanes] = warp.cta.shared.load(warp, addresses[lanes] - SHARED_BASE, size)
            else:
                for memory, which, offsets in warp.machine.located(addresses[lanes]):
                    found[lanes[which]] = memory.load(warp, offsets, size, strong)
            values = found.view(dtype)
            for at, target in enumerate(targets):
                target(warp, np.ascontiguousarray(values[:, at]), mask)

        return load

    def do_st(self) -> Callable[[Warp, Mask], None]:
        address, bits = self.address(self.operands[0]), self.bits(self.operands[1])
        is_shared = any(word.startswith("shared") for word in self.words)
        if not is_shared and "global" not in self.words:
            raise NotImplementedError(self.instruction.where)

        def store(warp: Warp, mask: Mask) -> None:
            lanes = LANE if mask is None else LANE[mask]
            addresses, values = address(warp)[lanes], bits(warp)[lanes]
            if is_shared:
                warp.cta.shared.store(warp, addresses - SHARED_BASE, values, warp.cta.moment)
                return
            for memory, which, offsets in warp.machine.located(addresses):
                _, pairs = memory.places(offsets, values.shape[1])
                if (memory.buffering[pairs] == warp.number).any():
                    warp.publish()
                memory.buffering[pairs] = warp.number
                word = min(4, values.shape[1])  # what becomes visible at once
                offsets = offsets[:, None] + np.arange(0, values.shape[1], word)
                warp.stores.append((memory, offsets.reshape(-1), values[which].reshape(-1, word), warp.cta.moment))

        return store

    def do_cp_async(self) -> Callable[[Warp, Mask], None]:
        if "commit_group" in self.words:
            return lambda warp, mask: warp.commit("cp")
        if "wait_group" in self.words:
            left = int(self.operands[0])
            return lambda warp, mask: warp.wait("cp", left)
        if "wait_all" in self.words or "bulk" in self.words:
            raise NotImplementedError(self.instruction.where)
        into, out_of = self.address(self.operands[0]), self.address(self.operands[1])
        size = int(self.operands[2], 0)
        used = self.source(self.operands[3], "u32") if len(self.operands) > 3 else lambda warp: np.full(LANES, size)

        def copy(warp: Warp, mask: Mask) -> None:
            lanes = LANE if mask is None else LANE[mask]
            offsets, addresses, counts = into(warp)[lanes] - SHARED_BASE, out_of(warp)[lanes], used(warp)[lanes]

            def act() -> None:
                values = np.zeros((len(lanes), size), np.uint8)
                some = counts > 0
                if some.any():
                    for memory, which, found in warp.machine.located(addresses[some]):
                        values[np.flatnonzero(some)[which]] = memory.load(warp, found, size)
                values[np.arange(size) >= counts[:, None]] = 0
                warp.cta.shared.store(warp, offsets, values, warp.cta.moment)

            warp.issue("cp", act)

        return copy

    def do_fence(self) -> Callable[[Warp, Mask], None]:
        if "async_shared_cta" not in "_".join(self.words):
            return lambda warp, mask: warp.publish()

        def fence(warp: Warp, mask: Mask) -> None:
            shared = warp.cta.shared
            shared.unfenced &= (shared.writer != warp.number) & (shared.written == warp.cta.moment)

        return fence

    def do_membar(self) -> Callable[[Warp, Mask], None]:
        return lambda warp, mask: warp.publish()

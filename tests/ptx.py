"""An emulator of PTX: compiled kernels on the CPU, instruction by instruction, with all of their threads.

`emulated` puts a GPU that does not exist under Triton. Kernels are compiled for it as for a real one, down to PTX, and
a launch with CPU tensors runs that PTX here. A warp's 32 threads are one NumPy array per register; they may diverge, in
which case those that are furthest behind go first. Warps of all programs (PTX: CTAs) take turns in a seeded random
order, at any instruction.

Whatever a GPU leaves open is made to vary: stores to global memory become visible late, word by word and out of order;
threads of one warp poll at different times; asynchronous instructions read and write at once, or when they are waited
for. Beyond that, four kinds of mistakes raise an error wherever they happen, whether or not a value comes out wrong:

    Fault     an access outside of all buffers, or not aligned
    Race      two warps touch the same shared memory, or write the same global memory, without a barrier in between, and
              a value changes; or a load that may be served from a stale cache reads what another program has written
    Deadlock  programs wait for each other, or for values, and nothing is written any more
    Diverged  threads of a warp are at different places at an instruction that all have to execute together

NaNs (0x7fba) are in registers and shared memory that nobody has written, and come out of global memory that another
warp of the program has written without a barrier since: not an error, as threads may load what they have no use for,
where there are more threads than elements. Not modelled: acquire and release, atomics, thread block clusters, and time.

Instructions, layouts of fragments and descriptors: NVIDIA, PTX ISA. Only what the kernels need is here; anything else
raises NotImplementedError.
"""

import functools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

LANES = 32
LANE = np.arange(LANES)
BYTES = np.arange(16)
POISON = 0x7FBA  # a NaN in float16 and bfloat16, twice one in float32
DTYPES = {f"{kind}{bits}": f"uint{bits}" for kind in "bu" for bits in (8, 16, 32, 64)}
DTYPES |= {f"s{bits}": f"int{bits}" for bits in (8, 16, 32, 64)} | {f"f{bits}": f"float{bits}" for bits in (16, 32, 64)}
DTYPES |= {"u16x2": "uint16", "s16x2": "int16", "f16x2": "float16", "pred": "bool"}  # x2: (64,), the lower half first
BFLOATS = ("bf16", "bf16x2")  # as float32 in between
SHARED_BASE = 1024  # address of shared memory; swizzles need it aligned
BUFFER_BITS = 40  # every buffer has so many bits of addresses of its own and lies in their middle

Lanes = np.ndarray  # of values, or of bits, one for each lane
Mask = np.ndarray | None  # which lanes take part; None: all


class Fault(RuntimeError):
    """An access outside of all buffers, or not aligned."""


class Race(RuntimeError):
    """The order of two accesses to the same memory is left to chance."""


class Deadlock(RuntimeError):
    """Nothing is written any more, and some warps have not ended."""


class Diverged(RuntimeError):
    """Not all lanes of a warp have come to an instruction that they have to execute together."""


# The machine: memory, warps and programs.


class Memory:
    """Bytes, and of every pair of bytes who touched it last, and when.

    A moment is an interval between two barriers of a program, numbered across all programs.
    """

    def __init__(self, name: str, data: np.ndarray, is_shared: bool = False) -> None:
        self.name, self.data, self.is_shared = name, data, is_shared
        pairs = len(data) // 2 + 1
        self.writer, self.reader, self.buffering = (np.full(pairs, -1) for _ in range(3))  # warps; -1: none
        self.written, self.read = np.full(pairs, -1), np.full(pairs, -1)  # moments
        self.unfenced = np.zeros(pairs, bool)  # written by ordinary stores, not yet visible to wgmma

    def places(self, offsets: Lanes, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices (lanes, bytes) and (lanes, pairs of bytes)."""
        if offsets.min() < 0 or offsets.max() + size > len(self.data):
            outside = (offsets < 0) | (offsets + size > len(self.data))
            raise Fault(f"{offsets[outside][0]:+d} is outside of {self.name}, which has {len(self.data)} bytes")
        if (offsets % size).any():
            raise Fault(f"{offsets[offsets % size != 0][0]:+d} in {self.name} is not a multiple of {size}")
        return offsets[:, None] + BYTES[:size], (offsets[:, None] + BYTES[:size:2]) >> 1

    def load(self, warp: "Warp", offsets: Lanes, size: int, strong: bool = False, fenced: bool = True) -> np.ndarray:
        """(lanes, bytes). strong: volatile or relaxed, which may meet a write; fenced: by an ordinary load."""
        bytes_, pairs = self.places(offsets, size)
        if warp.stores and (self.buffering[pairs] == warp.number).any():
            warp.publish()
        found = self.data[bytes_]
        if strong:
            return found
        writer, moment = self.writer[pairs], warp.cta.moment
        other = (writer >= 0) & (writer != warp.number)
        if self.is_shared:
            self.forbid(warp, other & (self.written[pairs] == moment), "reads", writer)
            if not fenced:
                self.forbid(warp, self.unfenced[pairs], "reads, without a fence,", writer)
            alone = (self.read[pairs] != moment) | (self.reader[pairs] == warp.number)
            self.reader[pairs], self.read[pairs] = np.where(alone, warp.number, -2), moment  # -2: several
        elif other.any():
            elsewhere = writer // warp.cta.warps != warp.cta.index
            self.forbid(warp, other & elsewhere, "reads, perhaps from its cache,", writer)
            found.view(np.uint16)[other & (self.written[pairs] == moment)] = POISON
        return found

    def store(self, warp: "Warp", offsets: Lanes, values: np.ndarray, moment: int) -> None:
        """values: (lanes, bytes)."""
        size = values.shape[1]
        bytes_, pairs = self.places(offsets, size)
        changed = (self.data[bytes_] != values).reshape(*pairs.shape, -1).any(-1)
        writer = self.writer[pairs]
        elsewhere = writer // warp.cta.warps != warp.cta.index
        overwrites = (writer >= 0) & (writer != warp.number) & (elsewhere | (self.written[pairs] == moment))
        self.forbid(warp, overwrites & changed, "overwrites", writer)
        overtakes = (self.read[pairs] == moment) & (self.reader[pairs] != warp.number)
        self.forbid(warp, overtakes & changed, "overwrites", self.reader[pairs], "is reading")
        self.data[bytes_] = values
        self.writer[pairs], self.written[pairs], self.buffering[pairs] = warp.number, moment, -1
        self.unfenced[pairs] = True

    def forbid(self, warp: "Warp", which: np.ndarray, does: str, others: np.ndarray, did: str = "has written") -> None:
        if which.any():
            at = np.unravel_index(which.argmax(), which.shape)
            other = "another warp" if others[at] < 0 else f"warp {others[at]}"
            raise Race(f"warp {warp.number} {does} what {other} {did} in {self.name}")


class Cta:
    """A program."""

    def __init__(self, machine: "Machine", index: int, place: tuple[int, ...], threads: int, shared_bytes: int) -> None:
        self.machine, self.index, self.place = machine, index, place
        self.count, self.warps = machine.ctas, threads // LANES  # programs in all; warps of this one
        self.moment = index
        poisoned = np.resize(np.array([POISON], "<u2").view(np.uint8), shared_bytes)
        self.shared = Memory("shared memory", poisoned, is_shared=True)
        self.waiting: list[Warp] = []

    def arrive(self, warp: "Warp") -> None:
        warp.publish()
        warp.waits = True
        self.waiting.append(warp)
        if len(self.waiting) == self.warps:
            self.moment += self.count
            for each in self.waiting:
                each.waits = False
            self.waiting = []


class Warp:
    """32 threads (PTX: lanes)."""

    def __init__(self, program: "Program", cta: Cta, at: int) -> None:
        self.cta, self.number = cta, cta.index * cta.warps + at
        self.machine = cta.machine
        self.registers: list[Lanes] = [poison(dtype) for dtype in program.registers]
        self.places = np.zeros(LANES, int)  # the next instruction of every lane
        self.waits, self.ended = False, False
        self.speed = self.machine.chance.uniform(0.2, 1)
        self.stores: list[tuple[Memory, Lanes, np.ndarray, int]] = []  # that are not visible yet
        # Of wgmma and of cp.async: what has been issued, and the groups that have been committed.
        self.issued: dict[str, list[Callable[[], None]]] = {"wgmma": [], "cp": []}
        self.groups: dict[str, list[list[Callable[[], None]]]] = {"wgmma": [], "cp": []}
        self.special = {"%laneid": LANE, "%warpid": np.full(LANES, at), "%tid.x": at * LANES + LANE}
        self.special |= {"%ntid.x": np.full(LANES, cta.warps * LANES), "%tid.y": 0 * LANE, "%tid.z": 0 * LANE}
        for axis, index, size in zip("xyz", cta.place, self.machine.grid, strict=True):
            self.special |= {f"%ctaid.{axis}": np.full(LANES, index), f"%nctaid.{axis}": np.full(LANES, size)}
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}

    def publish(self, probability: float = 1.0) -> None:
        """Make stores visible to others: all, or each with a probability."""
        left = []
        for memory, offsets, values, moment in self.stores:
            now = np.array([self.machine.chance.random() < probability for _ in offsets])
            if now.any():
                memory.store(self, offsets[now], values[now], moment)
                self.machine.idle = 0
            if not now.all():
                left.append((memory, offsets[~now], values[~now], moment))
        self.stores = left

    def issue(self, kind: str, action: Callable[[], None]) -> None:
        """An asynchronous instruction: it happens now, or in its turn when it is waited for."""
        if self.issued[kind] or self.groups[kind] or self.machine.chance.random() < 0.5:
            self.issued[kind].append(action)
        else:
            action()

    def commit(self, kind: str) -> None:
        self.groups[kind].append(self.issued[kind])
        self.issued[kind] = []

    def wait(self, kind: str, left: int) -> None:
        while len(self.groups[kind]) > left:
            for action in self.groups[kind].pop(0):
                action()

    def run(self, program: "Program", patience: int) -> None:
        """Up to so many instructions; it stops early where others should go on."""
        code = program.instructions
        while patience > 0 and not self.waits and not self.ended:
            place = int(self.places.min())
            mask: Mask = self.places == place
            limit = len(code)  # where the lanes in front are waiting
            if mask.all():
                mask = None
            else:
                limit = int(self.places[~mask].min())
            jumped = False
            while place < limit and patience > 0 and not jumped:
                instruction = code[place]
                patience -= 1
                self.machine.idle += 1
                active = mask
                if instruction.predicate is not None:
                    chosen = self.registers[instruction.predicate] ^ instruction.negated
                    active = chosen if mask is None else chosen & mask
                    active = None if active.all() else active
                try:
                    if instruction.jump is not None:
                        jumped = True
                        taken = LANE >= 0 if active is None else active
                        self.places[LANE >= 0 if mask is None else mask] = place + 1
                        instruction.jump(self, taken)
                    elif active is None or active.any():
                        if instruction.aligned and active is not None:
                            raise Diverged(f"lanes {np.flatnonzero(~active)} are missing")
                        if instruction.polls and self.machine.chance.random() < 0.25:
                            # Some lanes look now, the others when they get their turn.
                            here = LANE >= 0 if mask is None else mask
                            now = here & np.array([self.machine.chance.random() < 0.5 for _ in LANE])
                            looking = now if active is None else now & active
                            if looking.any():
                                instruction.action(self, looking)
                            self.places[here], self.places[now] = place, place + 1
                            return
                        instruction.action(self, active)
                except (Fault, Race, Diverged) as error:
                    raise type(error)(f"{error} ({instruction.where})") from error
                place += 1
                if instruction.polls:
                    patience = 0
            if not jumped:
                self.places[LANE >= 0 if mask is None else mask] = place


class Machine:
    """A launch: its programs, and whose turn it is."""

    def __init__(self, program: "Program", grid: tuple[int, ...], shared_bytes: int, seed: int) -> None:
        self.program, self.grid = program, grid
        self.chance = random.Random(seed)
        self.ctas = int(np.prod(grid))
        self.clock = self.chance.randrange(2**32)
        self.idle = 0  # instructions since something was written
        self.buffers: list[Memory] = []
        self.bases: list[int] = []  # their addresses
        self.storages: dict[int, int] = {}  # the number of each one's buffer
        self.parameters = np.zeros(8 * len(program.parameters), np.uint8)
        places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        ctas = [Cta(self, at, place, program.threads, shared_bytes) for at, place in enumerate(places)]
        self.warps = [Warp(program, cta, at) for cta in ctas for at in range(cta.warps)]

    def ticks(self) -> int:
        """A clock that takes a while between two looks."""
        self.clock = (self.clock + self.chance.randrange(1, 500)) % 2**32
        return self.clock

    def address_of(self, tensor: torch.Tensor) -> int:
        """Where a tensor lies for the kernel: each storage far from all others, aligned as it is."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = len(self.buffers)
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self.buffers.append(Memory(f"buffer {len(self.buffers)} {tuple(tensor.shape)}", data))
            self.bases.append(((2 * len(self.buffers) + 1) << BUFFER_BITS - 1) + storage.data_ptr() % 256)
        return self.bases[self.storages[storage.data_ptr()]] + tensor.data_ptr() - storage.data_ptr()

    def located(self, addresses: Lanes) -> Iterator[tuple[Memory, np.ndarray, Lanes]]:
        """The buffers in which global addresses lie, which of the addresses those are, and the offsets."""
        numbers = addresses >> BUFFER_BITS
        for number in (numbers[0],) if (numbers == numbers[0]).all() else np.unique(numbers):
            if not 0 < number <= len(self.buffers):
                raise Fault(f"address {addresses[numbers == number][0]:#x} is in no buffer")
            which = numbers == number
            yield self.buffers[number - 1], which, addresses[which] - self.bases[number - 1]

    def run(self) -> None:
        enough = (1000 + 8 * len(self.program.instructions)) * len(self.warps)
        left = self.warps
        while left := [warp for warp in left if not warp.ended]:
            ready = [warp for warp in left if not warp.waits]
            if not ready:
                raise Deadlock(f"{len(left)} warps wait at a barrier")
            if self.idle > enough:
                raise Deadlock(f"{len(left)} warps wait for values that none of them writes")
            warp = self.chance.choices(ready, [each.speed for each in ready])[0]
            warp.run(self.program, self.chance.randrange(1, 300))
            if storing := [each for each in self.warps if each.stores]:
                self.chance.choice(storing).publish(self.chance.choice((0.0, 0.5, 1.0)))
        for warp in self.warps:
            warp.publish()


@functools.cache
def poison(dtype: np.dtype) -> Lanes:
    if dtype == np.bool_:
        return np.zeros(LANES, bool)
    return np.full(LANES * dtype.itemsize // 2, POISON, np.uint16).view(dtype)


# The program: what the text says, decoded once into functions that act on a warp.


@dataclass
class Instruction:
    opcode: str
    where: str
    predicate: int | None = None  # a register
    negated: bool = False
    action: Callable[[Warp, Mask], None] = lambda warp, mask: None
    jump: Callable[[Warp, Lanes], None] | None = None  # instead of an action; lanes: those that jump
    aligned: bool = False  # all lanes have to execute it together
    polls: bool = False  # reads what other programs write


class Scope:
    """The names that are declared between two braces."""

    def __init__(self, outer: "Scope | None") -> None:
        self.outer = outer
        self.registers: dict[str, np.dtype] = {}  # by name, or "%r<>" for a numbered family
        self.numbers: dict[str, int] = {}
        self.labels: dict[str, int] = {}


TOKEN = re.compile(
    r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|\.reg\s+\.(?P<type>\w+)\s+(?P<names>[^;]+);"
    r"|(?:@(?P<not>!?)(?P<predicate>[%\w]+)\s+)?(?P<opcode>[a-z][\w.:]*)(?P<operands>[^;]*);|(?P<other>[^;]*;))"
)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


class Program:
    """An entry point of a PTX text."""

    def __init__(self, text: str) -> None:
        self.registers: list[np.dtype] = []
        self.instructions: list[Instruction] = []
        entry = re.search(r"\.entry\s+\w+\((.*?)\)(.*?)\n\{", text, re.DOTALL)
        assert entry is not None
        self.parameters = [DTYPES[each.split()[1].lstrip(".")] for each in entry[1].split(",")]
        self.symbols = {
            each.split()[-1]: 8 * at for at, each in enumerate(entry[1].split(","))
        }  # parameters' addresses
        self.symbols["global_smem"] = SHARED_BASE
        self.threads = int(re.search(r"\.(?:req|max)ntid (\d+)", entry[2])[1])  # type: ignore[index]
        lines, sources, source = text.splitlines(), [], ""
        for number, line in enumerate(lines):
            if line.lstrip().startswith((".loc", ".file", ".pragma")):
                source = line.partition("// ")[2].rpartition(":")[0]
                lines[number] = ""
            sources.append(source)
            lines[number] = lines[number].partition("//")[0]
        bare, starts = "\n".join(lines), np.cumsum([0] + [len(line) + 1 for line in lines])
        scope, decoding = Scope(None), []
        at = re.search(r"\n\{", bare[bare.index(".entry") :]).end() + bare.index(".entry")  # type: ignore[union-attr]
        while True:
            token = TOKEN.match(bare, at)
            assert token is not None, bare[at : at + 100]
            at = token.end()
            if token["brace"] == "{":
                scope = Scope(scope)
            elif token["brace"] == "}":
                if scope.outer is None:
                    break
                scope = scope.outer
            elif token["label"]:
                scope.labels[token["label"]] = len(decoding)
            elif token["type"]:
                for name in token["names"].split(","):
                    bits = "pred" if token["type"] == "pred" else "b" + token["type"].lstrip("bsuf")
                    scope.registers[re.sub(r"<\d+>", "<>", name.strip())] = np.dtype(DTYPES[bits])
            elif token["opcode"]:
                line = int(np.searchsorted(starts, token.start("opcode"), "right"))
                where = f"{token['opcode']}, line {line} of the PTX, {sources[line - 1]}"
                instruction = Instruction(token["opcode"], where, negated=token["not"] == "!")
                if token["predicate"]:
                    instruction.predicate = self.register(scope, token["predicate"])
                self.instructions.append(instruction)
                decoding.append(
                    (instruction, scope, [operand.strip() for operand in OPERAND.findall(token["operands"])])
                )
        for instruction, scope, operands in decoding:
            Decoder(self, scope, instruction, operands).decode()

    def register(self, scope: Scope, name: str) -> int:
        """Its number; it gets one when it is first met."""
        where: Scope | None = scope
        while where is not None:
            for declared in (name, re.sub(r"\d+$", "<>", name)):
                if declared in where.registers:
                    if name not in where.numbers:
                        where.numbers[name] = len(self.registers)
                        self.registers.append(where.registers[declared])
                    return where.numbers[name]
            where = where.outer
        raise NotImplementedError(f"the register or symbol {name}")


# Arithmetic, element by element, on values of the instruction's type.


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


def as_floats(data: np.ndarray, type_: str) -> np.ndarray:
    """The operands of a matrix product, as what tensor cores make of these bytes (..., n) -> (..., elements)."""
    if type_ == "tf32":
        return (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return widened(data.view(np.uint16)) if type_ == "bf16" else data.view(np.float16).astype(np.float32)


class Decoder:
    """Turns the text of one instruction into its action."""

    def __init__(self, program: Program, scope: Scope, instruction: Instruction, operands: Sequence[str]) -> None:
        self.program, self.scope, self.instruction, self.operands = program, scope, instruction, operands
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
        negated, register = text.startswith("!"), self.program.register(self.scope, text.lstrip("!"))
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
        register = self.program.register(self.scope, text)
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
        is_wide = base.startswith("%") and self.program.registers[self.program.register(self.scope, base)].itemsize == 8
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

    # Matrices.

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


# Launches.

program_of = functools.lru_cache(maxsize=None)(Program)


def launch(text: str, grid: tuple[int, ...], arguments: Sequence[Any], shared_bytes: int, seed: int) -> None:
    """Run the entry point of a PTX text to its end.

    Args:
        arguments: tensors, whose contents the kernel sees and changes, or numbers; missing ones are 0.
    """
    program = program_of(text)
    machine = Machine(program, grid, shared_bytes, seed)
    for at, (value, dtype) in enumerate(zip(arguments, program.parameters, strict=False)):
        value = machine.address_of(value) if isinstance(value, torch.Tensor) else value
        bytes_ = np.array([value]).astype(dtype).view(np.uint8)
        machine.parameters[8 * at : 8 * at + len(bytes_)] = bytes_
    with np.errstate(all="ignore"):
        machine.run()


class _Driver:
    """What Triton asks of the driver of a GPU."""

    def __init__(self, capability: int, shared_bytes: int, seed: int) -> None:
        self.capability, self.shared_bytes, self.seed = capability, shared_bytes, seed
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, LANES)

    def get_current_device(self) -> int:
        return 1000 + self.capability  # Triton keeps kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, kernel, 0, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        from triton.runtime import driver

        def flat(value: Any) -> Iterator[Any]:
            if isinstance(value, tuple):
                for each in value:
                    yield from flat(each)
            else:
                yield value

        def run(x: int, y: int, z: int, stream: int, function: bytes, packed: Any, *others: Any) -> None:
            types, values = flat(tuple(source.signature.values())), flat(others[3:])
            arguments = [value for type_, value in zip(types, values, strict=True) if type_ != "constexpr"]
            launch(function.decode(), (x, y, z), arguments, metadata.shared, driver.active.seed)

        return run


@contextmanager
def emulated(capability: int = 90, shared_bytes: int = 232448, seed: int = 0) -> Iterator[None]:
    """Compile and emulate the kernels that are launched inside the `with` block, on CPU tensors.

    Triton must not be interpreting: TRITON_INTERPRET is not 1 when it is first imported.

    Args:
        capability: the compute capability of the GPU that is emulated, 80 or 90.
        shared_bytes: shared memory that one program can have.
        seed: of the schedule.
    """
    from triton.backends import Backend, backends
    from triton.runtime import driver

    class Compiler(backends["nvidia"].compiler):
        """Ends with PTX."""

        def __init__(self, target: Any) -> None:
            super().__init__(target)
            self.binary_ext = "ptx"

        def hash(self) -> str:
            return f"{super().hash()}, without a binary"  # what is cached is of no use to a GPU

        def add_stages(self, stages: dict[str, Any], *arguments: Any) -> None:
            super().add_stages(stages, *arguments)
            del stages["cubin"]

    changed = {"nvidia": Backend(compiler=Compiler, driver=backends["nvidia"].driver)}
    with (
        mock.patch.dict(backends, changed),
        mock.patch.object(driver, "_active", _Driver(capability, shared_bytes, seed)),
    ):
        yield

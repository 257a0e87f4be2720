"""The machine: memory, warps and programs, and whose turn it is."""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

LANES = 32
LANE = np.arange(LANES)
BYTES = np.arange(16)
POISON = 0x7FBA  # a NaN in float16 and bfloat16, twice one in float32
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


# What it runs.


@dataclass
class Instruction:
    opcode: str
    where: str
    predicate: int | None = None  # a register
    negated: bool = False
    action: Callable[["Warp", Mask], None] = lambda warp, mask: None
    jump: Callable[["Warp", Lanes], None] | None = None  # instead of an action; lanes: those that jump
    aligned: bool = False  # all lanes have to execute it together
    polls: bool = False  # reads what other programs write


@dataclass
class Program:
    """The entry point of a PTX text, decoded once into instructions that act on a warp."""

    threads: int  # of every CTA
    parameters: list[str]  # their dtypes
    symbols: dict[str, int]  # addresses by name
    registers: list[np.dtype] = field(default_factory=list)  # of every thread
    instructions: list[Instruction] = field(default_factory=list)


# What runs it.


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

    def __init__(self, program: Program, cta: Cta, at: int) -> None:
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

    def run(self, program: Program, patience: int) -> None:
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

    def __init__(self, program: Program, grid: tuple[int, ...], shared_bytes: int, seed: int) -> None:
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

"""What the machine code of a scan says, without a GPU: the cycles of a step, and whether the kernels can rely on it.

They rest on facts that are left to the assembler (tests/kernels/test_sass.py):

    reached_apart    what a warp does together after a wait, it does when all of its threads have met again
    requests, polls  what peers have written is loaded past the first-level cache, of which nobody tells that it is old
    publications     what peers are to read is stored past it, too
    usage            a program has no more registers than there are, and needs no more

`step_cycles` estimates the cycles of one pass through the time loop. Every SASS instruction since Volta carries control
bits: how many cycles to stall after issue, which of six scoreboards it sets when its result arrives, and which ones it
waits for. The outermost loop is walked once as a single warp that finds its data ready, adding stalls and waits, with
assumed latencies for what the encoding leaves open. Contention between warps, the rates of shared memory and tensor
cores, and the peers' own delay are left out: a lower bound to compare versions of a kernel by, not a prediction.
"""

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

LATENCY = {
    "LDG": 600,  # from L2
    "LDS": 30,
    "LDSM": 33,
    "STS": 20,
    "STG": 20,
    "MUFU": 24,
    "SHFL": 25,
    "REDUX": 30,
    "BAR": 25,
}
OTHER_LATENCY = 20
SCOREBOARDS = 6

REGISTERS = 65536  # of a multiprocessor, from Volta to Blackwell
REGISTER_UNIT = 256  # a warp has a multiple of so many

# What a warp's threads do together, beside products (...MMA): PTX's instructions for all threads, and aligned barriers.
TOGETHER = ("BAR", "ELECT", "LDSM", "LDTM", "MATCH", "MOVM", "REDUX", "SHFL", "STSM", "STTM", "VOTE", "WARPGROUP")
MEET = ("WARPSYNC", "BSYNC")  # where threads of a warp that went different ways wait for each other
LEAD_ANYWHERE = ("BRX", "BRXU", "JMP", "JMX", "JMXU")

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
_HIGH_WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"\.(L_x_\d+):")
# As a jump out of a loop there is CALL, too; BRA.U has its predicate as an operand.
_BRANCH = re.compile(r"(?:BRA|CALL)\S* (?:[^,`]+, )?`\(\.(L_x_\d+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")


def tool(name: str) -> str:
    """The path of one of the CUDA binary tools that Triton's package carries."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def run_on_cubin(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool(name), *options, file.name], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Instruction:
    text: str
    stall: int
    sets: int  # the scoreboard released when the result arrives; 7: none
    sets_when_read: int  # the scoreboard released when the operands have been read; 7: none
    waits: int  # bit mask of scoreboards

    @property
    def opcode(self) -> str:
        return _PREDICATE.sub("", self.text).split()[0].split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return _PREDICATE.sub("", self.text).split()[0].split(".")[1:]

    @property
    def operands(self) -> list[str]:
        return [operand.strip() for operand in " ".join(_PREDICATE.sub("", self.text).split()[1:]).split(",")]

    @property
    def target(self) -> str | None:
        found = _BRANCH.search(self.text)
        return found and found.group(1)

    @property
    def together(self) -> bool:
        """Whether a warp's threads have to be here at the same time; said of all functions, as they are not read."""
        if self.opcode == "CALL":
            return self.target is None
        return self.opcode in TOGETHER or "MMA" in self.opcode

    @property
    def conditional(self) -> bool:
        return self.text.startswith("@") or (self.opcode == "BRA" and len(self.operands) > 1)

    @property
    def strong(self) -> bool:
        """Whether a load or a store is one that threads of other programs take part in: past the first-level cache."""
        return "STRONG" in self.modifiers and self.modifiers[-1] in ("GPU", "SYS")

    @property
    def bytes(self) -> int:
        """Of a load or a store, in one thread."""
        return next((bits // 8 for bits in (8, 16, 64, 128) if {f"{bits}", f"U{bits}"} & {*self.modifiers}), 4)


def parse(disassembly: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the position each label stands before."""
    lines = disassembly.splitlines()
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if label := _LABEL.match(line.strip()):
            labels[label.group(1)] = len(code)
        if first := _INSTRUCTION.search(line):
            high = _HIGH_WORD.search(following)
            assert high is not None, f"an instruction of two words, got {following!r}"
            control = int(high.group(1), 16) >> 41
            code.append(
                Instruction(first.group(1), control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63)
            )
    return code, labels


@dataclass(frozen=True)
class Loop:
    """The instructions from which a jump back can be reached, without passing where it leads to.

    Attributes:
        start: the position that is jumped back to.
        end: the last position from which that is done.
        positions: all of them; they need not lie side by side.
    """

    start: int
    end: int
    positions: frozenset[int]


@dataclass(frozen=True)
class Scan:
    """The machine code of a scan.

    Attributes:
        code: the instructions in order.
        labels: the position that each label stands before.
    """

    code: list[Instruction]
    labels: dict[str, int]

    @staticmethod
    def of(cubin: bytes) -> "Scan":
        return Scan(*parse(run_on_cubin("nvdisasm", cubin, "-hex", "-c", "-ndf")))  # without tables and live ranges

    def goes_to(self, position: int) -> int | None:
        target = self.code[position].target
        return None if target is None else self.labels[target]

    @cached_property
    def following(self) -> list[list[int]]:
        """Of every instruction, the positions at which a thread may be after it. Functions return."""
        found = []
        for position, instruction in enumerate(self.code):
            target = self.goes_to(position)
            if instruction.opcode in LEAD_ANYWHERE or (instruction.opcode == "BRA" and target is None):
                raise NotImplementedError(f"where {instruction.text!r} leads to")
            after = [] if target is None else [target]
            ends = target is not None or instruction.opcode in ("EXIT", "RET") or "TRAP" in instruction.modifiers
            if (instruction.conditional or not ends) and position + 1 < len(self.code):
                after.append(position + 1)
            found.append(after)
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        before: list[list[int]] = [[] for _ in self.code]
        for position, after in enumerate(self.following):
            for each in after:
                before[each].append(position)
        found: dict[int, Loop] = {}
        for end, start in ((position, after) for position, each in enumerate(self.following) for after in each):
            if start >= end:
                continue
            positions, left = {start, end}, [end]
            while left:
                new = {*before[left.pop()]} - positions
                positions |= new
                left += new
            if 0 in positions and start != 0:
                continue  # one can come here without passing `start`: a way back from code that was moved aside
            known = found.get(start)
            found[start] = Loop(start, end, frozenset(positions | (known.positions if known else {start})))
        return list(found.values())

    @cached_property
    def time_loop(self) -> Loop:
        """The outermost loop."""
        return max(self.loops, key=lambda loop: len(loop.positions))

    @cached_property
    def inner_loops(self) -> list[Loop]:
        return sorted(
            (loop for loop in self.loops if loop.positions < self.time_loop.positions), key=lambda loop: loop.start
        )

    @cached_property
    def waits(self) -> list[Loop]:
        """The loops that ask again for what has not been published yet."""

        def are_any(word: str, loop: Loop) -> bool:
            return any(word in self.code[position].text for position in loop.positions)

        return [loop for loop in self.inner_loops if are_any("STRONG", loop) and not are_any("MMA", loop)]

    def around(self, loop: Loop) -> list[int]:
        """The positions of branches in the time loop that lead around another loop."""
        return [
            position
            for position in range(self.time_loop.start, loop.start)
            if self.code[position].conditional and (self.goes_to(position) or 0) > loop.end
        ]

    @cached_property
    def requests(self) -> list[Instruction]:
        """The strong loads of the time loop outside of its waits: they ask for the first time."""
        return self._strong("LDG", self.time_loop.positions.difference(*(wait.positions for wait in self.waits)))

    @cached_property
    def polls(self) -> list[Instruction]:
        """The strong loads of the waits."""
        return self._strong("LDG", frozenset().union(*(wait.positions for wait in self.waits)))

    @cached_property
    def publications(self) -> list[Instruction]:
        """The strong stores of the time loop."""
        return self._strong("STG", self.time_loop.positions)

    def _strong(self, opcode: str, positions: Iterable[int]) -> list[Instruction]:
        code = [self.code[position] for position in sorted(positions)]
        return [each for each in code if each.opcode == opcode and each.strong]

    @cached_property
    def reached_apart(self) -> list[Instruction]:
        """What threads do together (TOGETHER) but may reach at different times, as some still wait for values.

        Threads that leave a wait by a vote leave it at the same time. Others have to meet again (WARPSYNC, BSYNC) on
        every way from the wait to the first thing that they do together. Only waits are looked at: that the conditions
        of all other branches are the same for all threads of a warp is taken for granted.
        """
        found: set[int] = set()
        for wait in self.waits:
            leaving = [at for at in wait.positions if not wait.positions.issuperset(self.following[at])]
            for position in [*leaving, *self._test_before(wait)]:
                if not self._by_vote(position):
                    found |= self._reached_first(set(self.following[position]) - wait.positions)
        return [self.code[position] for position in sorted(found)]

    @cached_property
    def held_up(self) -> list[Instruction]:
        """Where threads that give up a wait (TRAP) first wait for others of their warp, who wait for them elsewhere.

        Such a scan would never end, where some threads of a warp have their values and others wait in vain.
        """
        found: set[int] = set()
        for wait in self.waits:
            leaving = [at for at in wait.positions if not self._by_vote(at)]
            left = [after for at in leaving for after in self.following[at] if after not in wait.positions]
            meetings = self._until(left, MEET)
            if len(meetings) > 1:
                found |= {
                    at for at in meetings if any(self._traps(each) for each in self._until(self.following[at], ()))
                }
        return [self.code[position] for position in sorted(found)]

    def _until(self, positions: Iterable[int], opcodes: Collection[str]) -> set[int]:
        """The first instructions with one of the opcodes on all ways from these positions on; with none, all TRAPs."""
        found, seen, left = set(), set(), list(positions)
        while left:
            position = left.pop()
            if position in seen:
                continue
            seen.add(position)
            if self.code[position].opcode in opcodes or (not opcodes and self._traps(position)):
                found.add(position)
            elif self.code[position].opcode not in MEET and not self.code[position].together:
                left += self.following[position]
        return found

    def _traps(self, position: int) -> bool:
        return "TRAP" in self.code[position].modifiers

    def _test_before(self, wait: Loop) -> list[int]:
        """The branch, if there is one, past a wait whose condition is tested at its end: between request and wait."""
        for position in range(wait.start - 1, -1, -1):
            instruction = self.code[position]
            if instruction.target is not None and instruction.opcode == "BRA":
                return [position] if instruction.conditional else []
            if (instruction.opcode == "LDG" and instruction.strong) or position in self.labels.values():
                break
        return []

    def _by_vote(self, position: int) -> bool:
        """Whether a branch is the same for all threads of a warp: its condition is a uniform one, or voted for."""
        branch = self.code[position]
        predicate = re.match(r"@!?(U?P\d)", branch.text)
        if predicate is None or predicate[1].startswith("U"):
            return predicate is not None or branch.modifiers == ["U"]
        for before in range(position - 1, -1, -1):
            instruction = self.code[before]
            if before + 1 in self.labels.values() or instruction.target is not None:
                break  # one may come from elsewhere
            if predicate[1] in instruction.operands:
                return instruction.opcode == "VOTE" and instruction.operands[0] == predicate[1]
        return False

    def _reached_first(self, positions: Iterable[int]) -> set[int]:
        """What threads do together, first on a way from these positions on, without having met before."""
        found, seen = set(), set()
        # Beside a position: barriers of this way, at which only those meet that have gone it.
        left: list[tuple[int, frozenset[str]]] = [(position, frozenset()) for position in positions]
        while left:
            position, own = left.pop()
            if (position, own) in seen:
                continue
            seen.add((position, own))
            instruction = self.code[position]
            if instruction.opcode in ("BSSY", "BREAK"):
                own |= {each for each in instruction.operands if re.fullmatch(r"B\d+", each)}
            if instruction.together:
                found.add(position)
            elif not self._all_meet(instruction, own):
                left += [(after, own) for after in self.following[position]]
        return found

    @staticmethod
    def _all_meet(instruction: Instruction, own: frozenset[str]) -> bool:
        if instruction.conditional:
            return False
        if instruction.opcode == "WARPSYNC":
            return instruction.modifiers == ["ALL"] or instruction.operands == ["0xffffffff"]
        return instruction.opcode == "BSYNC" and not own & {*instruction.operands}


def usage(cubin: bytes) -> tuple[int, int]:
    """A kernel's registers in each thread, and bytes that a thread has in memory as it has too few of them."""
    text = run_on_cubin("cuobjdump", cubin, "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack


def allocated(registers: int, warps: int) -> int:
    """The registers of a program whose threads have so many: it starts only if there are as many (REGISTERS)."""
    return warps * -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT


def step_cycles(cubin: bytes) -> int:
    """Cycles of one pass through the outermost loop.

    Every poll finds its data ready: the branch around the loop that asks again is taken. So are the branches around the
    loops before the first poll: of a ragged batch, the search for a batch tile that has not ended finds the next one.
    """
    scan = Scan.of(cubin)
    code, waits = scan.code, scan.waits
    taken = set()
    for loop in scan.inner_loops:
        if loop in waits or not waits or loop.end < waits[0].start:
            around = scan.around(loop)
            taken.update(around[-1:] if loop in waits else around)

    now, ready, position = 0, [0] * SCOREBOARDS, scan.time_loop.start
    while position <= scan.time_loop.end:
        instruction = code[position]
        now = max([now, *(ready[board] for board in range(SCOREBOARDS) if instruction.waits >> board & 1)])
        latency = LATENCY.get(instruction.opcode, OTHER_LATENCY)
        if instruction.sets < SCOREBOARDS:
            # A scoreboard counts what is under way: it is released by the last of several.
            ready[instruction.sets] = max(ready[instruction.sets], now + latency)
        if instruction.sets_when_read < SCOREBOARDS:
            ready[instruction.sets_when_read] = max(
                ready[instruction.sets_when_read], now + min(latency, OTHER_LATENCY)
            )
        now += max(instruction.stall, 1) + (LATENCY["BAR"] if instruction.opcode == "BAR" else 0)
        following = scan.goes_to(position) if position in taken else position + 1
        assert following is not None
        position = following
    return now

"""Estimate the cycles of one pass through a kernel's time loop from its machine code, without a GPU.

Every SASS instruction since Volta carries control bits: how many cycles to stall after issue, which of six
scoreboards it sets when its result arrives, and which ones it waits for. `step_cycles` walks the outermost loop once
as a single warp that finds its data ready, adding stalls and waits, with assumed latencies for what the encoding
leaves open. Contention between warps, the rates of shared memory and tensor cores, and the peers' own delay are left
out: a lower bound to compare versions of a kernel by, not a prediction.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
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

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
_HIGH_WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"\.(L_x_\d+):")
_BRANCH = re.compile(r"BRA `\(\.(L_x_\d+)\)")
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
    def target(self) -> str | None:
        found = _BRANCH.search(self.text)
        return found and found.group(1)


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


def step_cycles(cubin: bytes) -> int:
    """Cycles of one pass through the outermost loop.

    Every poll finds its data ready: the branch around the loop that asks again is taken. So are the branches around the
    loops before the first poll: of a ragged batch, the search for a batch tile that has not ended finds the next one.
    """
    code, labels = parse(run_on_cubin("nvdisasm", cubin, "-hex"))

    def goes_to(position: int) -> int | None:
        target = code[position].target
        return None if target is None else labels[target]

    backward = [(position, goes_to(position)) for position in range(len(code))]
    loops = [(start, end) for end, start in backward if start is not None and start < end]
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    inner = sorted(loop for loop in loops if start < loop[0] and loop[1] < end)
    polls = [
        loop
        for loop in inner
        if any("STRONG" in code[at].text for at in range(*loop))
        and not any("MMA" in code[at].text for at in range(*loop))
    ]
    taken = set()
    for loop in inner:
        if loop in polls or not polls or loop[1] < polls[0][0]:
            around = [
                at for at in range(start, loop[0]) if code[at].text.startswith("@") and (goes_to(at) or 0) > loop[1]
            ]
            taken.update(around[-1:] if loop in polls else around)

    now, ready, position = 0, [0] * SCOREBOARDS, start
    while position <= end:
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
        following = goes_to(position) if position in taken else position + 1
        assert following is not None
        position = following
    return now

"""From a PTX text to a program."""

import functools
import re

import numpy as np

from tests.emulator.arithmetic import DTYPES
from tests.emulator.instructions import Scope
from tests.emulator.machine import SHARED_BASE, Instruction, Program
from tests.emulator.matrices import MatrixDecoder

TOKEN = re.compile(
    r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|\.reg\s+\.(?P<type>\w+)\s+(?P<names>[^;]+);"
    r"|(?:@(?P<not>!?)(?P<predicate>[%\w]+)\s+)?(?P<opcode>[a-z][\w.:]*)(?P<operands>[^;]*);|(?P<other>[^;]*;))"
)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


@functools.cache
def program_of(text: str) -> Program:
    """The entry point of a PTX text."""
    entry = re.search(r"\.entry\s+\w+\((.*?)\)(.*?)\n\{", text, re.DOTALL)
    assert entry is not None
    parameters = entry[1].split(",")
    program = Program(
        threads=int(re.search(r"\.(?:req|max)ntid (\d+)", entry[2])[1]),  # type: ignore[index]
        parameters=[DTYPES[each.split()[1].lstrip(".")] for each in parameters],
        symbols={each.split()[-1]: 8 * at for at, each in enumerate(parameters)} | {"global_smem": SHARED_BASE},
    )
    lines, sources, source = text.splitlines(), [], ""
    for number, line in enumerate(lines):
        if line.lstrip().startswith((".loc", ".file", ".pragma")):
            source = line.partition("// ")[2].rpartition(":")[0]
            lines[number] = ""
        sources.append(source)
        lines[number] = lines[number].partition("//")[0]
    bare, starts = "\n".join(lines), np.cumsum([0] + [len(line) + 1 for line in lines])
    scope, decoding = Scope(program), []
    at = re.search(r"\n\{", bare[bare.index(".entry") :]).end() + bare.index(".entry")  # type: ignore[union-attr]
    while True:
        token = TOKEN.match(bare, at)
        assert token is not None, bare[at : at + 100]
        at = token.end()
        if token["brace"] == "{":
            scope = Scope(program, scope)
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
                instruction.predicate = scope.register(token["predicate"])
            program.instructions.append(instruction)
            decoding.append((instruction, scope, [operand.strip() for operand in OPERAND.findall(token["operands"])]))
    for instruction, scope, operands in decoding:
        MatrixDecoder(scope, instruction, operands).decode()
    return program

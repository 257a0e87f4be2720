"""What the kernels rely on, in the machine code that the assembler makes of them, read without a GPU (bench/sass.py).

Every check is also shown a fault: most are put into the PTX of a compiled kernel, and the assembler makes the rest.
"""

import base64
import json
import re
import subprocess
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import pytest

from bench import sass
from bench.resources import DEVICES, DTYPES, KINDS, KernelCase, plan_of
from bench.sass import REGISTERS, Scan, allocated
from lstm_triton.scan.launch import compiler_options
from lstm_triton.scan.plan import Plan, ScanShape
from lstm_triton.scan.planner import candidates
from tests.support.processes import output_of_python

pytest.importorskip("triton")

CASES = {
    f"{case.arch} {layer} {case.kernel}": case
    for layer, case in (
        ("headline", KernelCase("forward", "sm_90", 768, 16, "float16")),
        ("headline", KernelCase("backward", "sm_90", 768, 16, "float16")),
        ("headline tf32", KernelCase("forward", "sm_90", 768, 16, "tf32")),
        ("headline float32", KernelCase("forward", "sm_90", 768, 16, "float32")),  # waits for one group after the other
        ("ragged, several tiles", KernelCase("backward", "sm_90", 768, 256, "float16", ragged=True)),
        ("four layers", KernelCase("forward", "sm_90", 256, 16, "bfloat16", lanes=4, chained=True, dropout=True)),
        ("weights read every step", KernelCase("forward", "sm_90", 2048, 16, "tf32")),
        ("small", KernelCase("backward", "sm_90", 64, 16, "float16")),
        ("asynchronous tensor cores", KernelCase("forward", "sm_90", 768, 256, "float16")),
        ("headline", KernelCase("forward", "sm_80", 768, 16, "float16")),
        ("four layers", KernelCase("forward", "sm_80", 256, 16, "bfloat16", lanes=4, chained=True, dropout=True)),
        ("weights read every step", KernelCase("forward", "sm_80", 2048, 16, "float16")),
        ("headline", KernelCase("forward", "sm_100", 768, 16, "float16")),
        ("four layers", KernelCase("backward", "sm_100", 128, 16, "bfloat16", lanes=4, chained=True, dropout=True)),
    )
}

COMPILE = r"""
import base64, json, sys
from bench import resources

for name, fields in json.loads(sys.argv[1]).items():
    case = resources.KernelCase(**fields)
    dtype, plan = resources.DTYPES[case.dtype][0], resources.plan_of(case)
    asm = resources.compiled(case.kernel, case.arch, case.hidden, dtype, plan, case.ragged, case.dropout).asm
    print(json.dumps([name, asm["ptx"], base64.b64encode(asm["cubin"]).decode()]))
"""


@dataclass(frozen=True)
class Kernel:
    case: KernelCase
    ptx: str
    cubin: bytes

    @cached_property
    def plan(self) -> Plan:
        plan = plan_of(self.case)
        assert isinstance(plan, Plan)
        return plan

    @property
    def itemsize(self) -> int:
        return DTYPES[self.case.dtype][0].itemsize

    @cached_property
    def scan(self) -> Scan:
        return Scan.of(self.cubin)

    @cached_property
    def usage(self) -> tuple[int, int]:
        return sass.usage(self.cubin)

    @property
    def warps(self) -> int:
        threads = re.search(r"^\.reqntid (\d+)", self.ptx, re.MULTILINE)
        assert threads is not None
        return int(threads[1]) // 32

    def with_fault(self, folder: Path, text: str, replacement: str) -> "Kernel":
        """The same kernel, assembled anew with a text of its PTX replaced wherever it occurs."""
        from triton.backends.nvidia.compiler import get_ptxas

        assert text in self.ptx
        ptx = self.ptx.replace(text, replacement)
        source, target = folder / "kernel.ptx", folder / "kernel.cubin"
        source.write_text(ptx)
        arch = re.search(r"^\.target (sm_(\d+)\w?)", ptx, re.MULTILINE)
        assert arch is not None
        subprocess.run([get_ptxas(int(arch[2])).path, f"--gpu-name={arch[1]}", source, "-o", target], check=True)
        return Kernel(self.case, ptx, target.read_bytes())


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    found = {}
    for line in output_of_python(
        "-c", COMPILE, json.dumps({name: asdict(case) for name, case in CASES.items()})
    ).splitlines():
        name, ptx, cubin = json.loads(line)
        found[name] = Kernel(CASES[name], ptx, base64.b64decode(cubin))
    assert found.keys() == CASES.keys()
    return found


@pytest.fixture(params=CASES)
def kernel(request: pytest.FixtureRequest, kernels: dict[str, Kernel]) -> Kernel:
    return kernels[request.param]


# (a) Between a wait and what the threads of a warp do together, they have met again.


def waits_of(plan: Plan) -> int:
    """One for each group of resident chunks; those that are read anew in every step have one loop, with one wait."""
    groups = -(-plan.resident_chunks // plan.group_chunks) + (plan.resident_chunks < plan.chunks)
    return groups * (2 if plan.chained else 1)


def test_threads_meet_after_every_wait(kernel: Kernel) -> None:
    assert len(kernel.scan.waits) == waits_of(kernel.plan)
    assert any("MMA" in kernel.scan.code[position].opcode for position in kernel.scan.time_loop.positions)
    assert kernel.scan.reached_apart == []


def test_threads_that_give_up_end_the_launch(kernel: Kernel) -> None:
    assert any("TRAP" in each.modifiers for each in kernel.scan.code)
    assert kernel.scan.held_up == []


@pytest.mark.parametrize("late", [["BSYNC B0"], []])
def test_threads_that_are_held_up_are_found(late: list[str]) -> None:
    """As the assembler did where threads gave up within the loop: those that go on meet in another place."""
    poll = ["@P3 BRA `(.L_x_4)", "@P0 LDG.E.128.STRONG.GPU R4, [R2.64]", "@P0 BRA `(.L_x_0)", "WARPSYNC.ALL"]
    texts = ["BSSY B0, `(.L_x_4)", "NOP", *poll, "HMMA.16816.F32 R8, R4, R6, R8", "@P2 BRA `(.L_x_3)", "EXIT"]
    scan = Scan(
        [sass.Instruction(text, 1, 7, 7, 0) for text in [*texts, *late, "BPT.TRAP 0x1"]],
        {"L_x_3": 1, "L_x_0": 2, "L_x_4": len(texts)},
    )
    assert [each.text for each in scan.held_up] == late


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("layer", ["headline", "four layers"])
def test_threads_that_do_not_meet_are_found(kernels: dict[str, Kernel], arch: str, layer: str) -> None:
    """In a changed listing: whatever the PTX, the assembler lets them meet before its instructions for whole warps."""
    scan = kernels[f"{arch} {layer} forward"].scan
    meet = ("VOTE", "WARPSYNC", "BSYNC")
    code = [replace(each, text="NOP") if each.opcode in meet else each for each in scan.code]
    apart = replace(scan, code=code).reached_apart
    assert len(apart) >= len(scan.waits)
    assert all("MMA" in each.opcode or each.opcode in sass.TOGETHER for each in apart)


@pytest.mark.parametrize(
    ("tail", "meet"),
    [
        (["WARPSYNC.ALL"], True),
        (["WARPSYNC 0xffffffff"], True),
        (["BSYNC B0"], True),
        (["BSYNC.RECONVERGENT B0"], True),
        ([], False),
        (["WARPSYNC R3"], False),  # of some threads
        (["@P1 WARPSYNC.ALL"], False),
        (["BSSY B1, `(.L_x_0)", "BSYNC B1"], False),  # those that come at the same time
        (["BREAK B0", "BSYNC B0"], False),
        (["@P1 BRA `(.L_x_2)", "WARPSYNC.ALL"], False),  # past it
        (["CALL.REL.NOINC `($function)", "WARPSYNC.ALL"], False),  # who knows what it does
    ],
)
def test_where_threads_meet(tail: list[str], meet: bool) -> None:
    head = ["BSSY B0, `(.L_x_2)", "LDG.E.128.STRONG.SYS R4, [R2.64]", "@!P0 BRA `(.L_x_1)"]
    poll = ["@P3 BRA `(.L_x_4)", "@P0 LDG.E.128.STRONG.GPU R4, [R2.64]", "@P0 BRA `(.L_x_0)"]
    product = ["HMMA.16816.F32 R8, R4, R6, R8", "@P2 BRA `(.L_x_3)", "EXIT"]
    texts = ["NOP", *head, *poll, *tail, *product, "BPT.TRAP 0x1", "HMMA.16816.F32 R8, R4, R6, R8"]
    labels = {"L_x_3": 1, "L_x_0": 4, "L_x_1": 7, "L_x_2": 7 + len(tail), "L_x_4": len(texts) - 2}
    scan = Scan([sass.Instruction(text, 1, 7, 7, 0) for text in texts], labels)
    assert [sorted(wait.positions) for wait in scan.waits] == [[4, 5, 6]]
    assert (scan.reached_apart == []) == meet


@pytest.mark.parametrize(
    ("before", "branch", "together"),
    [
        (["VOTE.ANY P0, P0"], "@P0 BRA `(.L_x_0)", True),
        (["VOTE.ANY P0, P0", "FADD R1, R2, R3"], "@P0 BRA `(.L_x_0)", True),
        (["VOTE.ANY P0, P0", "ISETP.EQ.AND P0, PT, R1, R2, P0"], "@P0 BRA `(.L_x_0)", False),
        (["VOTE.ANY P1, P0"], "@P0 BRA `(.L_x_0)", False),
        ([], "@P0 BRA `(.L_x_0)", False),
        ([], "BRA.U UP0, `(.L_x_0)", True),
        ([], "@UP0 BRA `(.L_x_0)", True),
    ],
)
def test_a_vote_ends_waits_together(before: list[str], branch: str, together: bool) -> None:
    texts = ["NOP", "NOP", "LDG.E.128.STRONG.GPU R4, [R2.64]", *before, branch, "HMMA.16816.F32 R8, R4, R6, R8"]
    texts += ["@P2 BRA `(.L_x_3)", "EXIT"]
    scan = Scan([sass.Instruction(text, 1, 7, 7, 0) for text in texts], {"L_x_0": 2, "L_x_3": 1})
    assert len(scan.waits) == 1
    assert (scan.reached_apart == []) == together


@pytest.mark.parametrize("meet", [True, False])
def test_a_wait_that_was_moved_behind_the_time_loop(meet: bool) -> None:
    """As the assembler does for sm_100. Its code is part of the time loop all the same."""
    loop = ["LDG.E.128.STRONG.SYS R4, [R2.64]", "@P0 BRA `(.L_x_1)", "WARPSYNC.ALL" if meet else "NOP"]
    loop += ["HMMA.16816.F32 R8, R4, R6, R8", "@P2 BRA `(.L_x_3)", "EXIT"]
    moved = ["LDG.E.128.STRONG.GPU R4, [R2.64]", "BRA `(.L_x_0)"]
    texts = ["NOP", *loop, *moved]
    scan = Scan([sass.Instruction(text, 1, 7, 7, 0) for text in texts], {"L_x_3": 1, "L_x_0": 2, "L_x_1": 7})
    assert [sorted(wait.positions) for wait in scan.waits] == [[2, 7, 8]]
    assert (len(scan.requests), len(scan.polls)) == (1, 1)
    assert [each.opcode for each in scan.reached_apart] == ([] if meet else ["HMMA"])


# (b) What peers have written is asked for past the first-level cache, the first time and again.


def loads_of(plan: Plan, itemsize: int) -> int:
    """Loads of 16 bytes by which a thread asks once for its part of a state, or of both."""
    chunks = plan.resident_chunks + (plan.resident_chunks < plan.chunks)
    return chunks * (plan.thread_elements * itemsize // 16) * (2 if plan.chained else 1)


def test_states_are_loaded_past_the_first_level_cache(kernel: Kernel) -> None:
    """As many strong loads as there have to be: so none of them is another one."""
    for loads in (kernel.scan.requests, kernel.scan.polls):
        assert [each.bytes for each in loads] == [16] * loads_of(kernel.plan, kernel.itemsize)
        assert loads


@pytest.mark.parametrize(
    ("name", "strong", "weak", "are_first"),
    [
        ("sm_80 headline forward", "ld.volatile.global", "ld.global", True),
        ("sm_80 headline forward", "ld.relaxed.gpu.global", "ld.global", False),
        ("sm_90 headline forward", "ld.relaxed.gpu.global", "ld.relaxed.cta.global", False),
        ("sm_90 four layers forward", "ld.volatile.global", "ld.global.ca", True),
    ],
)
def test_loads_from_the_first_level_cache_are_found(
    kernels: dict[str, Kernel], name: str, strong: str, weak: str, are_first: bool, tmp_path: Path
) -> None:
    kernel = kernels[name]
    scan = kernel.with_fault(tmp_path, strong, weak).scan
    expected = loads_of(kernel.plan, kernel.itemsize)
    assert len(scan.requests) == (0 if are_first else expected)
    assert len(scan.polls) == (expected if are_first else 0)


# (c) What peers are to read is stored where they see it.


def published_bytes_of(kernel: Kernel) -> int:
    """What a thread stores of a program's results, which several threads have if there are fewer of them."""
    plan, is_forward = kernel.plan, kernel.case.kernel == "forward"
    elements = plan.block_batch * plan.block_hidden * (1 if is_forward else 4) // (32 * plan.num_warps)
    copies = 2 if is_forward and kernel.case.dropout else 1  # a layer's own, and what it passes on
    return max(elements, 1) * kernel.itemsize * copies


def test_results_are_stored_where_peers_see_them(kernel: Kernel) -> None:
    assert sum(each.bytes for each in kernel.scan.publications) == published_bytes_of(kernel) > 0


@pytest.mark.parametrize("name", ["sm_80 headline forward", "sm_90 four layers forward"])
def test_results_that_peers_may_not_see_are_found(kernels: dict[str, Kernel], name: str, tmp_path: Path) -> None:
    faulty = kernels[name].with_fault(tmp_path, "st.global.cg", "st.global")
    assert faulty.scan.publications == []


# (d) A program's registers exist: otherwise it never starts. And they are enough: nothing is kept in memory instead.


def test_registers_exist_and_are_enough(kernel: Kernel) -> None:
    registers, spilled_bytes = kernel.usage
    assert kernel.warps == kernel.plan.num_warps
    assert 0 < allocated(registers, kernel.warps) <= REGISTERS
    assert spilled_bytes == 0


def test_registers_that_do_not_exist_are_found(kernels: dict[str, Kernel], tmp_path: Path) -> None:
    """The assembler takes a kernel of 16 warps whose threads have as many registers as those of 8 may have."""
    faulty = kernels["sm_90 headline forward"].with_fault(tmp_path, ".reqntid 256", ".reqntid 512")
    registers, _ = faulty.usage
    assert allocated(registers, faulty.warps) > REGISTERS


def test_registers_that_are_not_enough_are_found(kernels: dict[str, Kernel], tmp_path: Path) -> None:
    _, spilled_bytes = kernels["sm_90 headline forward"].with_fault(tmp_path, ".maxnreg 255", ".maxnreg 64").usage
    assert spilled_bytes > 0


def most_registers(plan: Plan) -> int:
    """Of a program, as far as the assembler is told."""
    options = compiler_options(plan, is_nvidia=True)
    per_thread, warps = options["maxnreg"], options["num_warps"]
    assert isinstance(per_thread, int)
    assert isinstance(warps, int)
    return allocated(per_thread, warps)


def test_registers_are_allocated_in_units() -> None:
    assert allocated(255, 8) == allocated(249, 8) == REGISTERS
    assert allocated(248, 8) == REGISTERS - 8 * sass.REGISTER_UNIT


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_no_plan_asks_for_registers_that_do_not_exist(arch: str) -> None:
    """Not only those that the planner prefers."""
    count = 0
    for kind, hidden, batch, (dtype, allow_tf32), (lanes, chained) in product(
        KINDS, (1, 8, 37, 64, 256, 768, 1024, 2048, 4096), (1, 16, 100, 512), DTYPES.values(), ((1, False), (4, True))
    ):
        shape = ScanShape(kind, batch, hidden, hidden, dtype, DEVICES[arch], allow_tf32, lanes, chained)
        for plan in candidates(shape):
            assert most_registers(plan) <= REGISTERS, plan
            count += 1
    assert count > 1000
    assert most_registers(replace(plan, num_warps=16)) > REGISTERS

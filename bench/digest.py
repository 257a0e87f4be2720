"""`python -m bench.digest`: digests of the code that kernels compile to. They tell whether an edit changed any of it.

An edit of kernels/ that is meant to change nothing (a move, a new name, a comment) leaves every digest as it was. So
take the digests before the edit and compare them afterwards, without a GPU:

    python -m bench.digest --out before.json
    python -m bench.digest --compare before.json  # names the cases that differ, and exits with 1

A digest is of the assembly language that Triton emits: PTX for NVIDIA's GPUs, AMDGCN for AMD's. Comments, debug
information and the kernel's name are left out. The cases are compiled as bench/resources.py compiles them, with the
plans that the planner chooses; so an edit of the planner may show here, too. Each version of Triton emits its own code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lstm_triton.command_line import Parser, output_file, whole, whole_file
from lstm_triton.ending import Mistake, program

from .pool import processes
from .resources import AGAIN, CELLS, DTYPES, KernelCase, compiled, compiled_cell, compiled_recompute, plan_of


@dataclass(frozen=True)
class Variant:
    """A case of bench/resources.py, and the constants of its kernel that are not a training step's."""

    case: KernelCase
    constants: tuple[tuple[str, bool], ...] = ()

    def __str__(self) -> str:
        case = self.case
        words = [case.arch, case.kernel, case.dtype, f"H={case.hidden}", f"B={case.batch}"]
        words += [f"{case.lanes} layers" if case.chained else f"{case.lanes} directions"] if case.lanes > 1 else []
        words += [name for name in ("ragged", "dropout") if getattr(case, name)]
        return " ".join([*words, *(f"{name}={value}" for name, value in self.constants)])


def _of(kernel: str, arch: str, dtype: str, hidden: int, batch: int, *flags: str, **constants: bool) -> Variant:
    lanes = next((int(flag[0]) for flag in flags if flag[0].isdigit()), 1)
    chained = any(flag.endswith("layers") for flag in flags)
    case = KernelCase(kernel, arch, hidden, batch, dtype, "ragged" in flags, lanes, chained, "dropout" in flags)
    return Variant(case, tuple(constants.items()))


# Every path through the kernels: weights in registers, in shared memory and read every step; one batch tile a program
# and several; the input's product in the scan and before it; threads that hold back and those that do not.
VARIANTS = (
    _of("forward", "sm_90", "float16", 768, 16),
    _of("forward", "sm_90", "float16", 256, 64, "2 directions"),
    _of("forward", "sm_90", "float16", 512, 33, "2 directions"),
    _of("forward", "sm_90", "bfloat16", 768, 16, "ragged", "dropout"),
    _of("forward", "sm_90", "bfloat16", 512, 32, "4 layers"),
    _of("forward", "sm_90", "bfloat16", 768, 16, "ragged", KEEP_CELLS=False, KEEP_GATES=False),
    _of("forward", "sm_90", "float32", 100, 5),
    _of("forward", "sm_90", "float32", 512, 33, HAS_BIAS=False),
    _of("forward", "sm_90", "tf32", 1025, 3),
    _of("forward", "sm_90", "tf32", 2048, 256, "ragged"),
    _of("forward", "sm_90", "tf32", 512, 33, "2 layers", "dropout"),
    _of("forward", "sm_80", "tf32", 512, 33),
    _of("forward", "sm_80", "float16", 37, 5, KEEP_CELLS=False, KEEP_GATES=False),
    _of("forward", "sm_80", "float16", 256, 64, "2 directions", "ragged"),
    _of("forward", "sm_80", "bfloat16", 256, 64, "2 layers", "ragged", "dropout"),
    _of("forward", "sm_80", "bfloat16", 2048, 256, KEEP_CELLS=False, KEEP_GATES=False),
    _of("forward", "sm_80", "float32", 768, 16),
    _of("forward", "gfx942", "float16", 768, 16, "ragged"),
    _of("forward", "gfx942", "float32", 512, 33),
    _of("backward", "sm_90", "float16", 768, 16),
    _of("backward", "sm_90", "float16", 256, 64, "2 directions", GRAD_CELLS=True),
    _of("backward", "sm_90", "bfloat16", 768, 16, "ragged", "dropout"),
    _of("backward", "sm_90", "bfloat16", 512, 32, "4 layers", "dropout"),
    _of("backward", "sm_90", "float32", 100, 5),
    _of("backward", "sm_90", "tf32", 1025, 3),
    _of("backward", "sm_90", "tf32", 2048, 256, "ragged"),
    _of("backward", "sm_80", "tf32", 512, 33, "ragged"),
    _of("backward", "sm_80", "float16", 37, 5),
    _of("backward", "sm_80", "bfloat16", 256, 64, "2 layers", "ragged", "dropout"),
    _of("backward", "sm_80", "float32", 768, 16),
    _of("backward", "gfx942", "float16", 256, 16, "ragged"),
    _of(AGAIN, "sm_90", "bfloat16", 768, 16, "ragged"),
    _of(AGAIN, "sm_80", "float32", 37, 3, HAS_BIAS=False),
    _of("cell", "sm_90", "float16", 768, 16),
    _of("cell", "sm_80", "tf32", 37, 5, HAS_STATE=False, HAS_BIAS=False, HAS_OUTPUT=True),
    _of("cell_backward", "sm_90", "bfloat16", 768, 16),
    _of("cell_backward", "sm_80", "float32", 37, 5, HAS_STATE=False),
)


def binary_of(variant: Variant) -> Any:
    case, constants = variant.case, dict(variant.constants)
    if case.kernel == AGAIN:
        return compiled_recompute(case, **constants)
    dtype, _ = DTYPES[case.dtype]
    plan: Any = plan_of(case)
    if case.kernel in CELLS:
        return compiled_cell(case.kernel, case.arch, case.hidden, dtype, plan, **constants)
    kind: Any = case.kernel
    return compiled(kind, case.arch, case.hidden, dtype, plan, case.ragged, case.dropout, **constants)


def normalised(assembly: str, comment: str) -> str:
    """Assembly language without comments, debug information and the kernel's name."""
    code = assembly.partition("\t.section\t.debug_")[0]  # these sections come last
    entry = re.search(r"^\s*(?://)?\s*\.globl\s+(\w+)", code, re.MULTILINE)
    assert entry, "a kernel has a name"
    code = re.sub(rf"\b{entry[1]}", "kernel", code)
    lines = (line.partition(comment)[0].rstrip() for line in code.splitlines())
    debugging = re.compile(r"\s*\.(loc|file|cfi_\w+)\s|(\$L__|\.L)(tmp|func_?)\w*:")
    return "\n".join(line for line in lines if line and not debugging.match(line))


def digest(variant: Variant) -> str:
    code = binary_of(variant).asm
    text = normalised(code["ptx"], "//") if "ptx" in code else normalised(code["amdgcn"], ";")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The cases whose digests differ, in the order of `after`; then those that are gone."""
    return [
        *(name for name, found in after.items() if before.get(name) != found),
        *(f"{name} (gone)" for name in before if name not in after),
    ]


def read(path: Path) -> dict[str, Any]:
    """What an earlier call has written. Raises Mistake where it has not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"triton": content["triton"], "cases": dict(content["cases"])}
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise Mistake(f"{path} has no digests: {error}") from error


@program("python -m bench.digest", extra="bench")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.digest", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=output_file, metavar="FILE", help="where to write the digests")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="digests that an earlier call has written")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases with this in their names")
    parser.add_argument("--workers", type=whole(), default=os.cpu_count() or 1, help="processes that compile")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    import triton

    before = read(chosen.compare) if chosen.compare else None
    if before and before["triton"] != triton.__version__:
        parser.error(f"{chosen.compare} has digests of Triton {before['triton']}, this is Triton {triton.__version__}")
    variants = [variant for variant in VARIANTS if chosen.only in str(variant)]
    if not variants:
        parser.error(f"no case has {chosen.only!r} in its name")
    # A cache of its own: what is compared has been compiled from the sources as they are.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        found = {}
        with processes(chosen.workers) as pool:
            for variant, one in zip(variants, pool.map(digest, variants), strict=True):
                found[str(variant)] = one
                print(one, variant, flush=True)
    if chosen.out:
        text = json.dumps({"triton": triton.__version__, "cases": found}, indent=1) + "\n"
        with whole_file(chosen.out) as file:
            file.write(text.encode())
    if before is None:
        return 0
    expected = {name: one for name, one in before["cases"].items() if chosen.only in name}
    differing = differences(expected, found)
    for name in differing:
        print(f"differs: {name}")
    print(f"{len(found)} cases, {len(differing)} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())

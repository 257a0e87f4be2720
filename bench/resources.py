"""`python -m bench.resources --arch sm_90`: what the kernels compile to, for every case, without a GPU.

Compiles the scans ahead of time, as the planner would launch them on a typical GPU of that architecture, and reports
registers, spills, shared memory, an estimate of the cycles of one step (bench/sass.py), and the seconds of processor
time that compiling took, next to nothing where TRITON_CACHE_DIR has the kernel already. The kernels of LSTMCell, which
does not keep its weights on the chip, are reported on request: `--kernel cell cell_backward`.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch

from lstm_triton.command_line import Parser, whole
from lstm_triton.ending import program
from lstm_triton.scan import planner
from lstm_triton.scan.plan import (
    CELL_BACKWARD_BLOCK,
    RECOMPUTE_BLOCK,
    RECOMPUTE_WARPS,
    CellPlan,
    Kind,
    Plan,
    ScanShape,
    divide_up,
    state_stride,
)
from lstm_triton.target import Device

from .pool import processes

DEVICES = {
    device.arch: device
    for device in (
        Device("NVIDIA A100", "sm_80", 108, 166912),
        Device("NVIDIA GeForce RTX 3090", "sm_86", 82, 101376),
        Device("NVIDIA GeForce RTX 4090", "sm_89", 128, 101376),
        Device("NVIDIA H100 or H200", "sm_90", 132, 232448),
        Device("NVIDIA B200", "sm_100", 148, 232448),
        Device("NVIDIA GeForce RTX 5090", "sm_120", 170, 101376),
        Device("AMD Instinct MI300X", "gfx942", 304, 65536),
        Device("AMD Instinct MI350X", "gfx950", 256, 163840),
    )
}
DTYPES = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
TRITON_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TABLES = ("before_ptr", "after_ptr", "before_successors_ptr", "offsets_ptr", "tile_steps_ptr")
TYPES = {"cell_ptr": "*fp32", "grad_cell_ptr": "*fp32", "seed_ptr": "*i64", **dict.fromkeys(TABLES, "*i32")}
KINDS: tuple[Kind, ...] = ("forward", "backward")
CELLS = ("cell", "cell_backward")
AGAIN = "gates_again"  # of memory="low"


@dataclass(frozen=True)
class KernelCase:
    kernel: str  # one of KINDS, CELLS, or AGAIN
    arch: str
    hidden: int
    batch: int
    dtype: str
    ragged: bool = False  # with lengths, packed, or starting anew
    lanes: int = 1  # layers or directions of one launch
    chained: bool = False  # layers, and not directions
    dropout: bool = False


def plan_of(case: KernelCase) -> Plan | CellPlan:
    """The planner's choice; the input is as wide as the layer."""
    dtype, allow_tf32 = DTYPES[case.dtype]
    sizes: dict[str, Any] = {
        "batch_size": case.batch,
        "input_size": case.hidden,
        "hidden_size": case.hidden,
        "dtype": dtype,
        "device": DEVICES[case.arch],
        "allow_tf32": allow_tf32,
    }
    if case.kernel in CELLS:
        return planner.plan_cell(**sizes)
    kind: Kind = "forward" if case.kernel == "forward" else "backward"
    return planner.plan(ScanShape(kind, lanes=case.lanes, chained=case.chained, **sizes))


def compiled_cell(kernel: str, arch: str, hidden: int, dtype: torch.dtype, chosen: CellPlan, **others: object) -> Any:
    """A kernel of LSTMCell, compiled for an architecture: what a training step launches.

    others: constants of the kernel that are to differ from a training step's.
    """
    from lstm_triton.kernels.cell import cell_backward, cell_forward
    from lstm_triton.scan.cell import BACKWARD_OPTIONS, cell_compiler_options, cell_constants_of

    constants: dict[str, Any] = {"HIDDEN": hidden, "HAS_STATE": True}
    if kernel == "cell_backward":
        constants["BLOCK"] = CELL_BACKWARD_BLOCK
        return _compiled(cell_backward, arch, dtype, constants | others, BACKWARD_OPTIONS, {})
    unit = 16 if hidden % 16 == 0 else 1
    constants |= {"INPUT": hidden, "INPUT_STRIDE_UNIT": unit, "HAS_BIAS": True, "HAS_OUTPUT": False, "KEEP_GATES": True}
    constants |= cell_constants_of(chosen)
    return _compiled(cell_forward, arch, dtype, constants | others, cell_compiler_options(chosen), {})


def compiled_recompute(case: KernelCase, **others: object) -> Any:
    """The kernel of kernels/recompute.py, compiled for an architecture."""
    from lstm_triton.kernels.recompute import recompute_gates

    block_batch, block_hidden = RECOMPUTE_BLOCK
    constants: dict[str, Any] = {"HIDDEN": case.hidden, "STATE_STRIDE": state_stride(case.hidden), "HAS_BIAS": True}
    constants |= {"RAGGED": case.ragged, "BLOCK_BATCH": block_batch, "BLOCK_HIDDEN": block_hidden}
    options = {"num_warps": RECOMPUTE_WARPS}
    return _compiled(recompute_gates, case.arch, DTYPES[case.dtype][0], constants | others, options, TYPES)


def compiled(
    kind: Kind,
    arch: str,
    hidden: int,
    dtype: torch.dtype,
    chosen: Plan,
    ragged: bool = False,
    dropout: bool = False,
    **others: object,
) -> Any:
    """The scan of a plan, compiled for an architecture: what a training step launches.

    others: constants of the kernel that are to differ from a training step's.
    """
    from lstm_triton.kernels.backward import backward_scan
    from lstm_triton.kernels.forward import forward_scan
    from lstm_triton.scan.launch import compiler_options, constants_of, input_constants_of

    kernel = forward_scan if kind == "forward" else backward_scan
    constants: dict[str, Any] = {"HIDDEN": hidden, "STATE_STRIDE": state_stride(hidden), **constants_of(chosen)}
    constants |= {"RAGGED": ragged, "DROPOUT": dropout}
    if kind == "forward":
        unit = 16 if hidden % 16 == 0 else 1
        constants |= {
            "HAS_BIAS": True,
            "KEEP_CELLS": True,
            "KEEP_GATES": True,
            **input_constants_of(chosen, hidden, unit),
        }
    else:
        constants |= {"GRAD_CELLS": False}
    options = compiler_options(chosen, is_nvidia=arch.startswith("sm_"))
    return _compiled(kernel, arch, dtype, constants | others, options, TYPES, chosen.lanes)


def _compiled(
    kernel: Any,
    arch: str,
    dtype: torch.dtype,
    constants: dict[str, Any],
    options: dict[str, Any],
    types: dict[str, str],
    lanes: int = 1,
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature: dict[str, Any] = {}
    aligned: list[tuple[int, ...]] = []
    for at, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptrs"):  # one for each lane
            signature[name] = (TRITON_TYPES[dtype],) * lanes
            aligned += [(at, lane) for lane in range(lanes)]
        elif name.endswith("_ptr"):
            signature[name] = types.get(name, TRITON_TYPES[dtype])
            aligned.append((at,))
        else:
            signature[name] = "fp32" if name == "dropout" else "i32"
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options=options)


def resources(binary: Any, is_scan: bool = True) -> dict[str, int | None]:
    """registers, spill_bytes, shared_bytes and, of a scan, step_cycles of a compiled kernel."""
    from . import sass

    if "cubin" in binary.asm:
        cubin = binary.asm["cubin"]
        registers, stack = sass.usage(cubin)
        return {
            "registers": registers,
            "spill_bytes": stack,
            "shared_bytes": binary.metadata.shared,
            "step_cycles": sass.step_cycles(cubin) if is_scan else None,
        }
    text = binary.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": 4 * number("vgpr_spill_count"),
        "shared_bytes": number("group_segment_fixed_size") or binary.metadata.shared,
        "step_cycles": None,
    }


@cache
def _resources(case: KernelCase, chosen: Plan | CellPlan) -> dict[str, int | float | None]:
    dtype, _ = DTYPES[case.dtype]
    kind: Kind = "forward" if case.kernel == "forward" else "backward"
    start = _processor_seconds()
    if isinstance(chosen, CellPlan):
        binary = compiled_cell(case.kernel, case.arch, case.hidden, dtype, chosen)
    else:
        binary = compiled(kind, case.arch, case.hidden, dtype, chosen, case.ragged, case.dropout)
    seconds = round(_processor_seconds() - start, 2)
    return {**resources(binary, is_scan=not isinstance(chosen, CellPlan)), "compile_seconds": seconds}


def _processor_seconds() -> float:
    """Of this process and those that it has started, as Triton starts ptxas."""
    return sum(os.times()[:4])


def report(case: KernelCase) -> dict[str, Any]:
    """One row. `error` says why a case has no resources."""
    row: dict[str, Any] = asdict(case)
    if case.kernel == AGAIN:
        tiles = (divide_up(size, block) for size, block in zip((case.batch, case.hidden), RECOMPUTE_BLOCK, strict=True))
        row |= {"programs": math.prod(tiles), "resident_fraction": None, "plan": None, "error": None}
        return {**row, **resources(compiled_recompute(case), is_scan=False), "compile_seconds": None}
    empty = dict.fromkeys(("registers", "spill_bytes", "shared_bytes", "step_cycles", "compile_seconds"))
    try:
        chosen = plan_of(case)
    except ValueError as error:
        return {**row, **empty, "programs": None, "resident_fraction": None, "plan": None, "error": str(error)}
    row |= {"programs": chosen.programs, "plan": asdict(chosen)}
    # What the batch size does not change is compiled once.
    if isinstance(chosen, CellPlan):
        row["resident_fraction"] = None
        same: Plan | CellPlan = replace(chosen, programs=1)
    else:
        row["resident_fraction"] = chosen.resident_fraction
        same = replace(
            chosen,
            batch_tiles=1 + (chosen.batch_tiles > chosen.groups),
            groups=1,
            predicted_cycles=0,
            hold=int(chosen.hold > 0),
        )
    try:
        return {**row, **_resources(replace(case, batch=0), same), "error": None}
    except Exception as error:  # a compiler's failure is a finding, not the end of the report
        return {**row, **empty, "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def reports(cases: list[KernelCase], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from map(report, cases)
        return
    # Neighbours share kernels: each worker takes runs of them.
    with processes(workers) as pool:
        yield from pool.map(report, cases, chunksize=max(1, len(cases) // (4 * workers)))


def problems(row: dict[str, Any]) -> list[str]:
    """What a row falls short of: no spills, shared memory and programs within the device."""
    device = DEVICES[row["arch"]]
    if row["error"]:
        return [row["error"]]
    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > device.shared_bytes:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, the device has {device.shared_bytes}")
    if row["programs"] > device.multiprocessors and row["kernel"] in KINDS:
        found.append(f"{row['programs']} programs do not fit {device.multiprocessors} multiprocessors at once")
    return found


def _table(rows: list[dict[str, Any]]) -> str:
    columns = (
        "kernel",
        "dtype",
        "hidden",
        "batch",
        "registers",
        "spill_bytes",
        "shared_bytes",
        "programs",
        "step_cycles",
        "compile_seconds",
    )
    lines = ["  ".join(f"{name.removesuffix('_seconds'):>12}" for name in (*columns, "resident")) + "  plan"]
    for row in rows:
        values = [row[name] if row[name] is not None else "-" for name in columns]
        resident = "-" if row["resident_fraction"] is None else f"{row['resident_fraction']:.2f}"
        chosen, sizes = row["plan"], ""
        if chosen is not None and "block_batch" in chosen:
            sizes = f"{chosen['block_batch']}x{chosen['block_hidden']} k{chosen['block_k']}/{chosen.get('split_k', 1)}"
        if chosen is not None and "chunks" in chosen:
            sizes += f" g{chosen['group_chunks']}/{chosen['chunks']} w{chosen['num_warps']}"
            sizes += " fused" if chosen["fuse_input"] else ""
        note = "; ".join(problems(row))
        lines.append("  ".join(f"{value:>12}" for value in (*values, resident)) + f"  {sizes}  {note}")
    return "\n".join(lines)


@program("python -m bench.resources", extra="bench")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.resources", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=sorted(DEVICES), metavar="ARCH")
    parser.add_argument("--hidden", nargs="+", type=whole(), default=[64, 128, 256, 384, 512, 768, 1024, 1536, 2048])
    parser.add_argument("--batch", nargs="+", type=whole(), default=[1, 16, 64, 256])
    parser.add_argument(
        "--dtype", nargs="+", default=["tf32", "float16", "bfloat16"], choices=sorted(DTYPES), metavar="DTYPE"
    )
    parser.add_argument("--kernel", nargs="+", default=list(KINDS), choices=(*KINDS, *CELLS, AGAIN))
    parser.add_argument("--ragged", action="store_true", help="the kernels for lengths, packed sequences and resets")
    parser.add_argument("--layers", type=whole(), default=1, help="of a stack whose layers go together in one launch")
    parser.add_argument("--bidirectional", action="store_true", help="both directions of a layer in one launch")
    parser.add_argument("--dropout", action="store_true", help="with dropout on what every layer passes on")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument("--workers", type=whole(), default=os.cpu_count() or 1, help="processes that compile")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    cases = [
        KernelCase(
            kernel,
            arch,
            hidden,
            batch,
            dtype,
            chosen.ragged,
            lanes=2 if chosen.bidirectional else chosen.layers,
            chained=not chosen.bidirectional and chosen.layers > 1,
            dropout=chosen.dropout,
        )
        for arch in chosen.arch
        for kernel in chosen.kernel
        for dtype in chosen.dtype
        for hidden in chosen.hidden
        for batch in chosen.batch
    ]
    rows = list(reports(cases, chosen.workers))
    print(json.dumps(rows, indent=1) if chosen.json else _table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

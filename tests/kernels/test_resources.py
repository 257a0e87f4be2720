"""What the kernels compile to, ahead of time and without a GPU (bench/resources.py)."""

import json
from typing import Any

import pytest

from bench import resources, sass
from tests.support.processes import output_of_python

pytest.importorskip("triton")

FIELDS = {
    "kernel", "arch", "hidden", "batch", "dtype", "registers", "spill_bytes", "shared_bytes", "programs",
    "resident_fraction", "step_cycles",
}  # fmt: skip


def report(*arguments: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(output_of_python("-m", "bench.resources", "--json", *arguments))
    for row in rows:
        print({name: row[name] for name in sorted(FIELDS)})
        assert row.keys() >= FIELDS
    return rows


def test_hopper_holds_what_the_planner_promises() -> None:
    """No spills, within shared memory, one program a multiprocessor, and the weights on the chip wherever they fit."""
    rows = report(
        "--arch", "sm_90", "--hidden", "64", "384", "768", "1024", "2048", "--batch", "16", "256", "--dtype", "tf32",
        "float16",
    )  # fmt: skip
    assert len(rows) == 2 * 2 * 5 * 2
    for row in rows:
        assert resources.problems(row) == []
        if row["hidden"] <= 1024 and row["dtype"] == "float16":
            assert row["resident_fraction"] == 1.0
    headline = next(
        row
        for row in rows
        if (row["kernel"], row["hidden"], row["batch"], row["dtype"]) == ("forward", 768, 16, "float16")
    )
    assert headline["step_cycles"] <= 1500


@pytest.mark.parametrize(
    "arguments",
    [
        ("--hidden", "4096", "--batch", "16", "--dtype", "tf32", "float16"),
        ("--hidden", "512", "--batch", "100000", "--dtype", "float16"),
    ],
    ids=["large layer", "large batch"],
)
def test_hopper_takes_large_sizes(arguments: tuple[str, ...]) -> None:
    """Most of the large layer's weights are read anew at every step; nothing is spilled on the way."""
    rows = report("--arch", "sm_90", *arguments)
    assert {row["kernel"] for row in rows} == {"forward", "backward"}
    for row in rows:
        assert resources.problems(row) == []
        assert (row["resident_fraction"] == 1) == (row["hidden"] == 512)


def test_ragged_kernels_do_not_spill() -> None:
    """Those for lengths, packed sequences and resets, with one batch tile and with several."""
    rows = report("--ragged", "--hidden", "768", "--batch", "16", "256", "--dtype", "float16")
    assert len(rows) == 2 * 2
    for row in rows:
        assert row["ragged"]
        assert resources.problems(row) == []


def test_ragged_kernels_compile_for_ampere() -> None:
    for row in report("--arch", "sm_80", "--ragged", "--hidden", "768", "--batch", "16", "--dtype", "bfloat16"):
        assert row["error"] is None
        assert row["shared_bytes"] <= resources.DEVICES["sm_80"].shared_bytes
        assert row["programs"] <= resources.DEVICES["sm_80"].multiprocessors


@pytest.mark.parametrize(
    "arguments",
    [
        ("--layers", "4", "--hidden", "512", "--dtype", "bfloat16", "--ragged"),
        ("--layers", "2", "--hidden", "512", "--dtype", "tf32"),
        ("--bidirectional", "--hidden", "768", "--dtype", "bfloat16", "--ragged"),
    ],
    ids=["chained", "chained tf32", "both directions"],
)
def test_lanes_with_dropout_do_not_spill(arguments: tuple[str, ...]) -> None:
    """Layers, or both directions, in one launch: all programs at once on the device."""
    rows = report(*arguments, "--batch", "32", "--dropout")
    assert len(rows) == 2
    for row in rows:
        assert row["lanes"] > 1
        assert row["dropout"]
        assert resources.problems(row) == []


@pytest.mark.parametrize("lanes", [("--layers", "2"), ("--bidirectional",)], ids=["chained", "both directions"])
def test_lanes_compile_for_ampere(lanes: tuple[str, ...]) -> None:
    for row in report("--arch", "sm_80", *lanes, "--hidden", "512", "--batch", "32", "--dtype", "bfloat16", "--ragged"):
        assert row["error"] is None
        assert row["shared_bytes"] <= resources.DEVICES["sm_80"].shared_bytes
        assert row["programs"] <= resources.DEVICES["sm_80"].multiprocessors


def test_rows_that_are_not_aligned_are_padded() -> None:
    """Otherwise all weights would be in shared memory, which has no room for them."""
    for row in report("--hidden", "1025", "--batch", "64", "--dtype", "float16"):
        assert resources.problems(row) == []


def test_sizes_that_are_no_multiple_of_anything() -> None:
    for row in report("--hidden", "1", "37", "1000", "--batch", "5", "--dtype", "float32", "bfloat16"):
        assert resources.problems(row) == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_every_kernel_compiles_for_other_gpus(arch: str) -> None:
    for row in report("--arch", arch, "--hidden", "64", "768", "--batch", "16", "--dtype", "float32", "bfloat16"):
        assert row["error"] is None
        assert row["shared_bytes"] <= resources.DEVICES[arch].shared_bytes
        assert row["programs"] <= resources.DEVICES[arch].multiprocessors
        assert (row["step_cycles"] is None) == arch.startswith("gfx")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_cells(arch: str) -> None:
    """No spills, and any number of programs."""
    rows = report(
        "--arch", arch, "--kernel", "cell", "cell_backward", "--hidden", "37", "768", "2048",
        "--batch", "1", "16", "64", "256", "--dtype", "float32", "float16",
    )  # fmt: skip
    assert {row["kernel"] for row in rows} == {"cell", "cell_backward"}
    assert max(row["programs"] for row in rows) > resources.DEVICES[arch].multiprocessors
    for row in rows:
        assert resources.problems(row) == []


@pytest.mark.parametrize("ragged", [[], ["--ragged"]], ids=["dense", "ragged"])
def test_gates_again(ragged: list[str]) -> None:
    for row in report(
        "--kernel", "gates_again", "--hidden", "768", "37", "--batch", "16", "--dtype", "float16", *ragged
    ):
        assert resources.problems(row) == []


def test_problems_are_found() -> None:
    fine: dict[str, Any] = {
        "kernel": "forward",
        "arch": "sm_90",
        "error": None,
        "spill_bytes": 0,
        "shared_bytes": 1,
        "programs": 132,
    }
    assert resources.problems(fine) == []
    assert "spills 8 bytes" in resources.problems({**fine, "spill_bytes": 8})[0]
    assert "shared memory" in resources.problems({**fine, "shared_bytes": 10**6})[0]
    assert "133 programs" in resources.problems({**fine, "programs": 133})[0]


def test_a_size_without_a_plan_is_a_row_that_says_why() -> None:
    row = resources.report(resources.KernelCase("forward", "sm_80", 100_000, 1, "float16"))
    assert "no plan" in row["error"]
    assert row["registers"] is None


LISTING = """
.L_x_1:
        /*0000*/                   LDG.E R2, desc[UR4][R4.64] ;    /* 0x0000000000000000 */
                                                                   /* 0x{load:016x} */
        /*0010*/                   FADD R3, R2, R2 ;               /* 0x0000000000000000 */
                                                                   /* 0x{add:016x} */
        /*0020*/                   @P0 BRA `(.L_x_2) ;             /* 0x0000000000000000 */
                                                                   /* 0x{branch:016x} */
.L_x_3:
        /*0030*/                   LDG.E.STRONG.SYS R2, desc[UR4][R4.64] ; /* 0x0000000000000000 */
                                                                   /* 0x{slow:016x} */
        /*0038*/                   @!P0 BRA `(.L_x_3) ;            /* 0x0000000000000000 */
                                                                   /* 0x{slow:016x} */
.L_x_2:
        /*0040*/                   @P1 BRA `(.L_x_4) ;             /* 0x0000000000000000 */
                                                                   /* 0x{branch:016x} */
        /*0048*/                   NOP ;                           /* 0x0000000000000000 */
                                                                   /* 0x{add:016x} */
.L_x_4:
        /*0050*/                   BRA `(.L_x_1) ;                 /* 0x0000000000000000 */
                                                                   /* 0x{branch:016x} */
"""


def control(stall: int, sets: int = 7, waits: int = 0) -> int:
    return (stall | sets << 5 | 7 << 8 | waits << 11) << 41


def test_step_cycles_follow_stalls_and_scoreboards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of 600 cycles that the addition waits for; the poll, which is jumped over, does not count."""
    listing = LISTING.format(load=control(2, sets=0), add=control(4, waits=1), branch=control(5), slow=control(15))
    monkeypatch.setattr(sass, "run_on_cubin", lambda *arguments: listing)
    assert sass.step_cycles(b"") == 600 + 4 + 5 + 5 + 4 + 5


LAYOUTS = r"""
import json, re
from bench import resources

found = []
for arch, dtype, hidden, batch, ragged in (
    ("sm_90", "float16", 1, 1, False), ("sm_90", "float16", 768, 16, False), ("sm_90", "bfloat16", 2048, 64, True),
    ("sm_90", "tf32", 37, 3, True), ("sm_90", "tf32", 512, 16, False), ("sm_80", "bfloat16", 37, 20, True),
):
    for kind in resources.KINDS:
        plan = resources.plan_of(resources.KernelCase(kind, arch, hidden, batch, dtype))
        code = resources.compiled(kind, arch, hidden, resources.DTYPES[dtype][0], plan, ragged).asm["ttgir"]
        layout = r"^(#blocked\d*) = #ttg.blocked<{sizePerThread = \[1, (\d+)\], .*, order = \[1, 0\]"
        wait = r'inline_asm "[^"]*ld\.relaxed[^"]*" .*packed_element = (\d+).*tensor<\d+x\d+x\w+, (#\w+)>'
        layouts = dict(re.findall(layout, code, re.MULTILINE))
        waits = [(int(elements), int(layouts[name])) for elements, name in re.findall(wait, code)]
        found.append((plan.thread_elements, resources.DTYPES[dtype][0].itemsize, waits))
print(json.dumps(found))
"""


def test_a_thread_waits_for_vectors_that_lie_side_by_side() -> None:
    """What kernels/spin.py takes for granted: how the compiler deals a tile out among the threads."""
    for thread_elements, itemsize, waits in json.loads(output_of_python("-c", LAYOUTS)):
        assert waits
        for elements, side_by_side in waits:
            assert elements == thread_elements
            assert side_by_side == min(elements, 16 // itemsize)

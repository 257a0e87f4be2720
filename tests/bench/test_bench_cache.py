"""The kernels that `python -m bench cache` packs are those that a launch looks up (bench/cache.py, bench/hits.py).

A launch goes the whole way here, from lstm_triton.LSTM through Triton's own launcher, into a driver that runs nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from bench import cache
from tests.support.processes import ROOT, output_of_python

triton = pytest.importorskip("triton")

KERNELS = ["forward_scan", "backward_scan", "cell_forward", "exchange_scan", "exchange_scan", "exchange_scan"]
COOPERATIVE = {"2": 1}  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE: all programs run at the same time, or the launch is refused
HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def build_stub(folder: Path) -> None:
    """The driver. Triton compiles its launcher too, hence Python.h."""
    if COMPILER is None:
        pytest.skip("needs a C compiler, as Triton's launcher does")
    for header in (Path(sysconfig.get_paths()["include"], "Python.h"), HEADERS / "cuda.h"):
        if not header.exists():
            pytest.skip(f"needs {header}, as Triton's launcher does")
    source, target = ROOT / "tests" / "support" / "stub_libcuda.c", folder / "libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", f"-I{HEADERS}", "-o", target, source], check=True)


def hits(*arguments: str, project: Path = ROOT) -> list[dict[str, list[str]]]:
    """`bench.hits.Hits` as dicts: of the launches in real_launches.py, and of those with another option."""
    printed = output_of_python("-m", "tests.support.real_launches", "launch", *arguments, cwd=project)
    return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's cache, of processes with the stub of a driver."""
    build_stub(tmp_path)
    for name, value in {
        "TRITON_CACHE_DIR": tmp_path / "cache",
        "TRITON_LIBCUDA_PATH": tmp_path,
        "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "LAUNCHES": tmp_path / "launches.jsonl",
        "OMP_NUM_THREADS": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path / "cache"


def cubins(folder: Path) -> set[Path]:
    return set(folder.rglob("*.cubin"))


def test_a_launch_finds_what_was_packed_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "cache.tar.xz"
    printed = output_of_python("-m", "tests.support.real_launches", "fill", str(archive))
    packed = cubins(folder)
    assert len(packed) == len(KERNELS)
    assert re.search(rf"^{len(packed)} kernels compiled in [1-9]\d* seconds of processor time", printed)
    assert re.search(rf"^{archive}: {len(packed)} kernels, 0.0 MB, \d{{4}} bytes a kernel$", printed, re.MULTILINE)

    # Another machine, with nothing but what was packed.
    shutil.rmtree(folder)
    shutil.unpack_archive(archive, "/", "xztar")
    assert cubins(folder) == packed
    as_packed, otherwise = hits("otherwise")
    assert as_packed == {"found": KERNELS, "compiled": []}
    assert otherwise == {"found": [], "compiled": ["forward_scan"]}
    assert len(cubins(folder) - packed) == 1

    launches = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    assert {launch["kernel"] for launch in launches} == set(KERNELS)
    for launch in launches:
        waits = launch["kernel"] != "cell_forward"
        assert launch["attributes"] == (COOPERATIVE if waits else {})
        assert launch["programs"][0] > 1

    # Files in another folder have the same kernels; with a line more above one it is another kernel.
    copy = tmp_path / "copy"
    for name in ("lstm_triton", "bench", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    source = copy / "lstm_triton" / "kernels" / "cell.py"
    source.write_text("# A line more.\n" + source.read_text())
    [as_packed] = hits(project=copy)
    assert as_packed == {"found": [name for name in KERNELS if name != "cell_forward"], "compiled": ["cell_forward"]}


def test_the_key_of_another_pythons_triton(tmp_path: Path) -> None:
    """The library is a part of the key, and nothing else in it depends on Python."""
    from triton.runtime.cache import triton_key

    own = cache.triton_key(Path(triton.__file__).parent / "_C" / "libtriton.so")
    assert own == triton_key()
    (tmp_path / "libtriton.so").write_bytes(b"another")
    other = cache.triton_key(tmp_path / "libtriton.so")
    assert sum(mine != theirs for mine, theirs in zip(own.split("-"), other.split("-"), strict=True)) == 1

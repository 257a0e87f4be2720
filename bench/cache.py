"""`python -m bench.cache`: compile, without a GPU, what a GPU machine will look up in Triton's cache.

Compiling is most of what a first run on a GPU does, and GPU time is dearer than CPU time. Triton's cache knows a kernel
by a key that depends on the kernel's source, its constants and options, and on Triton itself, but not on a GPU, a
driver or PyTorch. So the cache can be filled on any machine and carried.

Two things have to agree on both machines: the versions of Triton (and of Python, unless `--libtriton` names the
library of the other Python's wheel, which is part of the key), and the path of the cache folder, since Triton writes
absolute paths into its files.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pkgutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from . import cases, gpu, measure
from .devices import Cpu
from .results import ROOT

GPU_TESTS = ("tests/test_gpu.py", "tests/test_gpu_pytorch.py")
NEEDED = (".json", ".cubin")  # of the files that Triton writes for a kernel


class Pretended(Cpu):
    """The CPU, taken for a GPU by everything that chooses what to launch."""

    name = "cuda"


def triton_key(libtriton: Path) -> str:
    """What Triton's cache keys say of Triton, where the compiled library is another one (triton.runtime.cache)."""
    import triton
    from triton.runtime import cache

    root = Path(triton.__file__).parent

    def hash_of(path: str | Path) -> str:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def modules(part: str) -> Iterator[str]:
        for each in pkgutil.walk_packages([str(root / part)], prefix=f"triton.{part}."):
            yield hash_of(each.module_finder.find_spec(each.name).origin)  # type: ignore[call-arg,union-attr,arg-type]

    hashes = [hash_of(cache.__file__), *modules("compiler"), *modules("backends"), hash_of(libtriton)]
    return triton.__version__ + "-".join([*hashes, *modules("language")])


@dataclass
class Compiled:
    """Triton's hashes of kernels, and a line for each that did not compile."""

    hashes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.hashes.clear()
        self.errors.clear()


@contextmanager
def compiling(arch: str, libtriton: str | Path | None) -> Iterator[Compiled]:
    """Kernels that CPU tensors launch are compiled for the architecture into Triton's cache. Yields which."""
    import triton.compiler
    from triton.runtime import cache

    from lstm_triton import ops

    from .overhead import Compilations, pretended_gpu

    compile, compiled = triton.compiler.compile, Compiled()

    class Compiling(Compilations):
        def __call__(self, source: Any, target: Any = None, options: Any = None, **others: Any) -> Any:
            try:
                compiled.hashes.append(compile(source, target=target, options=options, **others).hash)
            except Exception as error:
                compiled.errors.append(f"{type(error).__name__}: {str(error)[:200]}")
            return super().__call__(source, target, options, **others)

    with ExitStack() as stack:
        if libtriton is not None:
            own = Path(triton.__file__).parent / "_C" / "libtriton.so"
            if triton_key(own) != cache.triton_key():
                raise RuntimeError(f"Triton {triton.__version__} makes its keys in another way than this function")
            key = triton_key(Path(libtriton))
            stack.enter_context(mock.patch.object(cache, "triton_key", return_value=key))
        stack.enter_context(pretended_gpu(arch, Compiling()))
        # Products of matrices launch none of this library's kernels, and would take a CPU long.
        stack.enter_context(mock.patch.object(ops, "project", return_value=None))
        stack.enter_context(
            mock.patch.object(
                ops, "matmul", lambda left, right, exact=False: left.new_empty((left.shape[0], right.shape[1]))
            )
        )
        yield compiled


def compile_cases(wanted: list[cases.Case], arch: str, libtriton: Path | None) -> tuple[list[str], float]:
    """The hashes of what the cases launch, and the seconds of processor time that it took."""
    torch.set_num_threads(1)
    start = time.process_time()
    with compiling(arch, libtriton) as compiled:
        for case in wanted:
            if not measure.compile_kernels(case, Pretended()):
                print(f"fails: {case}", file=sys.stderr, flush=True)
    for error in compiled.errors:
        print(f"does not compile: {error}", file=sys.stderr, flush=True)
    return compiled.hashes, time.process_time() - start


def fill(wanted: Iterable[cases.Case], arch: str, libtriton: Path | None, jobs: int) -> tuple[set[str], float]:
    """`compile_cases` in several processes."""
    found: set[str] = set()
    seconds = 0.0
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(compile_cases, [case], arch, libtriton) for case in dict.fromkeys(wanted)]
        for future in futures:
            hashes, took = future.result()
            found.update(hashes)
            seconds += took
    return found, seconds


def compile_tests(arch: str, libtriton: Path | None, jobs: int, *more: str) -> int:
    """Compile what the gpu tests launch, in a pytest with bench.pretend. Returns its exit status.

    Args:
        jobs: processes, which need pytest-xdist if there are several.
        more: arguments of pytest, such as `-k test_layer`.
    """
    command = [sys.executable, "-m", "pytest", *GPU_TESTS, "-m", "gpu", "-q", "-p", "bench.pretend", "--arch", arch]
    command += [] if libtriton is None else ["--libtriton", str(libtriton.resolve())]
    command += [] if jobs == 1 else ["-n", str(jobs), "--dist", "worksteal"]
    return subprocess.run([*command, *more], cwd=ROOT).returncode


def pack(folder: Path, target: Path) -> int:
    """The cache folder as a .tar.xz with absolute names, of only what a hit needs. Returns its bytes."""
    with tarfile.open(target, "w:xz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.name.endswith(NEEDED):
                archive.add(path, arcname=str(path.resolve()).lstrip("/"))
    return target.stat().st_size


def wanted_cases(stages: Iterable[str]) -> Iterator[cases.Case]:
    """The cases of some stages of `bench gpu` in which the kernels take part."""
    for name in stages:
        stage = gpu.GRID_STAGES[name]
        for case, systems in cases.work_list(stage.grid, blocks=stage.blocks):
            if cases.OURS in stage.systems(systems):
                yield case


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cache", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="sm_90", help="of the GPU")
    parser.add_argument("--stages", default="headline,common,stacks", help="stages of `bench gpu`; or tests")
    parser.add_argument("--libtriton", type=Path, help="triton/_C/libtriton.so of the other machine's Triton")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True, help="a .tar.xz, to be unpacked with `tar xJf FILE -C /`")
    chosen = parser.parse_args(arguments)
    folder = os.environ.get("TRITON_CACHE_DIR")
    if folder is None or not Path(folder).is_absolute():
        parser.error("TRITON_CACHE_DIR must name a folder by its whole path, the same as on the other machine")
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    stages = chosen.stages.split(",")
    if unknown := [name for name in stages if name not in (*gpu.GRID_STAGES, "tests")]:
        parser.error(f"unknown stage {unknown[0]!r}: choose from {', '.join([*gpu.GRID_STAGES, 'tests'])}")
    start = time.monotonic()
    grids = [name for name in stages if name != "tests"]
    if grids:
        hashes, seconds = fill(wanted_cases(grids), chosen.arch, chosen.libtriton, chosen.jobs)
        print(f"{len(hashes)} kernels of {', '.join(grids)}: {seconds:.0f} seconds of processor time")
    if "tests" in stages:
        compile_tests(chosen.arch, chosen.libtriton, chosen.jobs)
    size = pack(Path(folder), chosen.out)
    print(f"{chosen.out}: {size / 1e6:.1f} MB after {time.monotonic() - start:.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())

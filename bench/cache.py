"""`python -m bench cache`: compile, without a GPU, what a GPU machine will look up in Triton's cache.

A first run on a GPU spends most of its time compiling, and GPU time costs more than CPU time. Triton's cache finds a
kernel by a key. The key depends on the kernel's source, constants and options, and on Triton itself. It does not depend
on a GPU, a driver or PyTorch. So the cache can be filled on any machine, and copied.

Both machines need
- one version of Triton.
- one version of Python, since Triton's compiled library is part of the key. `--libtriton` names the library of the
  wheel for another Python.
- one path of the cache folder, since Triton writes absolute paths into its files.

Plans are chosen for the GPUs of bench.resources. A GPU with fewer multiprocessors launches other kernels.
tests/bench/test_bench_cache.py shows that a real launch finds the kernels that are packed here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import os
import pkgutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.machinery import FileFinder
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lstm_triton.command_line import check_output_file, whole_file
from lstm_triton.ending import Mistake

from . import cases, contact_cases, gpu, measure, results
from .devices import Cpu
from .pool import processes

GPU_TESTS = ("tests/gpu/test_gpu.py", "tests/gpu/test_gpu_pytorch.py")
NEEDED = (".json", ".cubin")  # of the files that Triton writes for a kernel
GROUP = "__grp__"  # with this begins the name of the file in which Triton lists the other files


def cases_of(stage: gpu.Stage) -> list[cases.BenchCase]:
    """The cases of a stage of `bench gpu` in which the kernels take part."""
    work = cases.work_list(stage.grid, blocks=stage.blocks)
    return [case for case, systems in work if cases.OURS in stage.systems(systems)]


# The cases that each stage launches. There is also the stage "tests": see compile_tests.
STAGES: dict[str, Iterable[cases.BenchCase]] = {
    "contact": contact_cases.CASES,
    **{name: found for name, stage in gpu.GRID_STAGES.items() if (found := cases_of(stage))},
}
# Launch on a device what a stage launches besides its cases.
BESIDES: dict[str, Callable[[Cpu], None]] = {"contact": contact_cases.launch_besides}
TESTS = "tests"


class CannotFill(Mistake):
    """The cache cannot be filled. The message is one line."""


class Pretended(Cpu):
    """The CPU, but everything that chooses what to launch takes it for a GPU."""

    name = "cuda"


@functools.cache
def triton_key(libtriton: Path) -> str:
    """The part of Triton's cache keys for Triton itself with another compiled library (see triton.runtime.cache)."""
    import triton
    from triton.runtime import cache

    root = Path(triton.__file__).parent

    def hash_of(path: str | Path) -> str:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def modules(part: str) -> Iterator[str]:
        for each in pkgutil.walk_packages([str(root / part)], prefix=f"triton.{part}."):
            assert isinstance(each.module_finder, FileFinder)
            spec = each.module_finder.find_spec(each.name)
            assert spec is not None
            assert spec.origin is not None
            yield hash_of(spec.origin)

    hashes = [hash_of(cache.__file__), *modules("compiler"), *modules("backends"), hash_of(libtriton)]
    return f"{triton.__version__}{'-'.join([*hashes, *modules('language')])}"


@dataclass
class Compiled:
    """Triton's hashes of the kernels that were compiled, and a line for each kernel that was not."""

    hashes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.hashes.clear()
        self.errors.clear()


@contextmanager
def compiling(arch: str, libtriton: str | Path | None) -> Iterator[Compiled]:
    """Compile kernels that CPU tensors launch for an architecture, into Triton's cache. Yields what was compiled."""
    import triton.compiler
    from triton.runtime import cache

    from lstm_triton.scan import products

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
        stack.enter_context(mock.patch.object(products, "project", return_value=None))
        stack.enter_context(
            mock.patch.object(
                products, "matmul", lambda left, right, exact=False: left.new_empty((left.shape[0], right.shape[1]))
            )
        )
        yield compiled


def compile_cases(wanted: Iterable[cases.BenchCase], arch: str, libtriton: Path | None) -> int:
    """Compile what the cases launch. Prints each error, and returns the number of errors."""
    return compile_launched(
        lambda device: [case for case in wanted if not measure.compile_kernels(case, device)], arch, libtriton
    )


def compile_besides(stage: str, arch: str, libtriton: Path | None) -> int:
    """Compile what a stage launches besides its cases. Returns the number of errors."""
    return compile_launched(BESIDES[stage], arch, libtriton)


def compile_launched(launch: Callable[[Cpu], list[cases.BenchCase] | None], arch: str, libtriton: Path | None) -> int:
    """Compile what a function launches, which returns the cases that failed. Returns the number of errors."""
    torch.set_num_threads(1)
    with compiling(arch, libtriton) as compiled:
        errors = [f"fails: {case}" for case in launch(Pretended()) or ()]
    errors += [f"does not compile: {error}" for error in compiled.errors]
    for error in errors:
        print(error, file=sys.stderr, flush=True)
    return len(errors)


def fill(stages: Iterable[str], arch: str, libtriton: Path | None, jobs: int) -> int:
    """Compile what stages launch, in several processes. Returns the number of errors."""
    wanted = [case for name in stages for case in STAGES[name]]
    different = {replace(case, T=min(2, case.T)): None for case in wanted}  # measure.compile_kernels goes no further
    with processes(jobs) as pool:
        futures = [pool.submit(compile_besides, name, arch, libtriton) for name in stages if name in BESIDES]
        futures += [pool.submit(compile_cases, [case], arch, libtriton) for case in different]
        return sum(future.result() for future in futures)


def compile_tests(arch: str, libtriton: Path | None, jobs: int, *more: str) -> int:
    """Compile what the gpu tests launch, in a pytest with bench.pretend. Returns its exit status.

    Args:
        jobs: processes, which need pytest-xdist if there are several.
        more: arguments of pytest, such as `-k test_layer`.
    """
    command = [sys.executable, "-m", "pytest", *GPU_TESTS, "-m", "gpu", "-q", "-p", "bench.pretend", "--arch", arch]
    command += [] if libtriton is None else ["--libtriton", str(libtriton.resolve())]
    command += [] if jobs == 1 else ["-n", str(jobs), "--dist", "worksteal"]
    return subprocess.run([*command, *more], cwd=results.ROOT).returncode


def pack(folder: Path, target: Path) -> None:
    """Pack the files of the cache folder that Triton needs into a .tar.xz with absolute names."""
    with whole_file(target) as file, tarfile.open(fileobj=file, mode="w:xz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.name.endswith(NEEDED):
                content = path.read_bytes()
                if path.name.startswith(GROUP):
                    content = without_unneeded(content)
                entry = tarfile.TarInfo(str(path).lstrip("/"))
                entry.size, entry.mtime = len(content), int(time.time())
                archive.addfile(entry, io.BytesIO(content))


def without_unneeded(group: bytes) -> bytes:
    """Triton's list of a kernel's files, without files that are not packed. Triton 3.9 wants all that are listed."""
    listed = json.loads(group)
    listed["child_paths"] = {name: path for name, path in listed["child_paths"].items() if name.endswith(NEEDED)}
    return json.dumps(listed).encode()


def processor_seconds() -> float:
    """Processor time of this process, and of the processes that it started and that are over."""
    return sum(os.times()[:4])


def cache_folder() -> Path:
    """Triton's cache folder, which the user has to name. Raises CannotFill where it cannot be filled."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    if folder is None or not Path(folder).is_absolute():
        raise CannotFill("TRITON_CACHE_DIR must name a folder by its whole path, the same as on the other machine")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CannotFill("TRITON_INTERPRET=1 is set: interpreted kernels are not compiled")
    if importlib.util.find_spec("triton") is None:
        raise CannotFill("needs the package triton")
    return Path(folder)


def fill_and_pack(stages: list[str], arch: str, out: Path, libtriton: Path | None, jobs: int) -> int:
    """Compile what the stages launch, and pack the cache folder. Returns 1 if anything did not compile, else 0."""
    if unknown := [name for name in stages if name not in (*STAGES, TESTS)]:
        raise cases.UnknownName(f"unknown stage {unknown[0]!r}: choose from {', '.join([*STAGES, TESTS])}")
    if libtriton is not None and not libtriton.is_file():
        raise CannotFill(f"no such file: {libtriton}")
    if libtriton is not None:
        with libtriton.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                raise CannotFill(f"not a shared library: {libtriton}")
    folder = cache_folder()
    results.require_writable(folder)
    results.require_writable(out.resolve().parent)
    check_output_file(out)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    there = len(list(folder.rglob("*.cubin")))
    start, seconds = time.monotonic(), processor_seconds()
    failed = fill([name for name in stages if name != TESTS], arch, libtriton, jobs)
    if TESTS in stages:
        failed += compile_tests(arch, libtriton, jobs) != 0
    kernels = len(list(folder.rglob("*.cubin")))
    print(
        f"{kernels - there} kernels compiled in {processor_seconds() - seconds:.0f} seconds of processor time, "
        f"{time.monotonic() - start:.0f} seconds by the clock; {there} were there before"
    )
    pack(folder, out)
    size = out.stat().st_size
    print(f"{out}: {kernels} kernels, {size / 1e6:.1f} MB, {size / max(1, kernels):.0f} bytes a kernel")
    print(f"unpack it with: tar xJf {out.name} -C /   and set TRITON_CACHE_DIR={folder}")
    return int(failed > 0)

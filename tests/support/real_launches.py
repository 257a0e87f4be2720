"""Layers of CPU tensors whose kernels Triton launches as on a GPU, through its own launcher (for test_bench_cache.py).

    python -m tests.support.real_launches fill FILE           `python -m bench cache` for CASES
    python -m tests.support.real_launches launch [otherwise]  run CASES, and one of them with another compiler option

The latter prints a line of JSON for each: the kernels that Triton found in its cache, and those that it compiled.

The driver is stub_libcuda.c, built as a libcuda.so.1 that LD_LIBRARY_PATH and TRITON_LIBCUDA_PATH name. Nothing else is
changed but what bench.overhead pretends: CPU tensors are taken for a GPU's.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from unittest import mock

import torch
import triton.compiler
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

import lstm_triton
from bench import cache, hits, measure
from bench.__main__ import main
from bench.cases import BenchCase
from bench.devices import tf32
from bench.overhead import pretended_gpu
from bench.resources import DTYPES
from lstm_triton.scan import launch as scan_launch

CASES = (
    BenchCase("forward+backward", "float16", T=7, B=3, I=24, H=64),
    BenchCase("inference", "tf32", T=1, B=5, I=9, H=9),
)


@contextmanager
def real_launches() -> Iterator[None]:
    """Launches go through Triton's own driver and launcher. PyTorch is not asked for the device: it sees none."""
    with pretended_gpu("sm_90", triton.compiler.compile):
        cuda = CudaDriver()
        cuda.get_current_device = cuda.get_current_stream = lambda *device: 0
        cuda.get_device_capability = lambda device: (9, 0)
        with mock.patch.object(driver, "_active", cuda):
            yield


def run(case: BenchCase) -> None:
    """What a user's program does."""
    dtype, allows_tf32 = DTYPES[case.dtype]
    with tf32(allows_tf32), torch.set_grad_enabled(case.backward):
        module = lstm_triton.LSTM(case.I, case.H, dtype=dtype)
        output, _ = module(torch.randn(case.T, case.B, case.I, dtype=dtype, requires_grad=case.backward))
        if case.backward:
            output.sum().backward()


def launch() -> None:
    for case in CASES:
        run(case)
    for case in CASES:  # what `bench` measures besides: the exchange alone
        measure.compile_kernels(case, cache.Pretended())


def otherwise() -> None:
    plain = scan_launch.launch_options
    with mock.patch.object(scan_launch, "launch_options", lambda plan: {**plain(plan), "maxnreg": 248}):
        run(replace(CASES[0], mode="forward"))


if __name__ == "__main__":
    command, *more = sys.argv[1:]
    if command == "fill":
        cache.STAGES["small"] = CASES
        sys.exit(main(["cache", "--stages", "small", "--jobs", "1", "--out", *more]))
    with real_launches():
        for call in (launch, otherwise)[: 1 + len(more)]:
            with hits.counting() as kernels:
                call()
            print(json.dumps(asdict(kernels)))

"""`python -m lstm_triton info`: versions, devices, and which path an LSTM takes on each of them and why."""

from __future__ import annotations

import platform
import warnings

import torch

import lstm_triton
from lstm_triton import target, triton_package
from lstm_triton.routing import try_kernels
from lstm_triton.target import Device

# Pairs of PyTorch and Triton that the tests ran with: `.ci/versions`, and `.ci/run`. README.md names the same pairs.
TESTED = (("2.9.1", "3.5.1"), ("2.11.0", "3.6.0"), ("2.13.0", "3.9.0"), ("2.14.1", "3.8.0"))
SEQ_LEN, BATCH_SIZE, SIZE = 16, 16, 512  # of the example whose path is explained
TRIED_SIZE = 16  # hidden_size of the kernels that are run, to know whether Triton and the driver do so


def run() -> int:
    """Prints what a report of a problem should contain; returns exit code 0."""
    print(f"lstm-triton {lstm_triton.__version__}")
    print(f"Python      {platform.python_version()} on {platform.platform()}")
    print(f"PyTorch     {torch.__version__}, {accelerator_libraries()}")
    print(f"Triton      {triton_package.described()}")
    print(f"This pair   {tested(torch.__version__, triton_package.version())}")

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        properties = torch.cuda.get_device_properties(device)
        described = Device.of(device)
        print(
            f"\n{device}: {described.name} ({described.arch}), {described.multiprocessors} multiprocessors, "
            f"{described.shared_bytes / 1024:.0f} KiB shared memory each, {properties.total_memory / 2**30:.0f} GiB"
        )
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            print_path(device, dtype)
    if not devices:
        print("\nno GPU: torch.cuda.is_available() is False")
    print(f"\ncpu: {torch.get_num_threads()} threads")
    print_path(torch.device("cpu"), torch.float32)
    return 0


def accelerator_libraries() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda:
        cudnn = torch.backends.cudnn.version()
        return f"CUDA {torch.version.cuda}, cuDNN {cudnn or 'not usable here'}"
    return "built without CUDA and ROCm"


def tested(pytorch: str, triton: str | None) -> str:
    """A text: was this release of lstm-triton tested with these versions? If not, it names the tested versions."""
    if (pytorch.split("+")[0], triton) in TESTED:  # whatever it was built for: "2.11.0+cu130"
        return "tested with this release"
    return f"not tested with this release; tested: {tested_pairs()}"


def tested_pairs() -> str:
    return ", ".join(f"PyTorch {pytorch} with Triton {triton}" for pytorch, triton in TESTED)


def print_path(device: torch.device, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the explanation says it
        if target.current().takes(device) and target.current().may_refuse(device):
            try_kernels(device, dtype, TRIED_SIZE)
        print_explanation(device, dtype)


def print_explanation(device: torch.device, dtype: torch.dtype) -> None:
    lstm = lstm_triton.LSTM(SIZE, SIZE, device=device, dtype=dtype)
    print(lstm_triton.explain(lstm, torch.empty(SEQ_LEN, BATCH_SIZE, SIZE, device="meta", dtype=dtype)))

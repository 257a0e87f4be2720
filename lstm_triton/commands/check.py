"""`python -m lstm_triton check`: do the Triton kernels agree with nn.LSTM on this machine?

Both are compared with nn.LSTM in float64 on the CPU. Different ways of computing round differently. So the error of the
kernels is compared with the error that nn.LSTM itself makes: see `Comparison`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten

import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton.commands.threads import choose_threads, is_command


@dataclass(frozen=True)
class CheckCase:
    """Sizes of one comparison."""

    dtype: torch.dtype
    seq_len: int
    batch_size: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    tf32: bool = False

    def __str__(self) -> str:
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        stack = f" layers={self.num_layers}" if self.num_layers > 1 else ""
        both = " bidirectional" if self.bidirectional else ""
        return f"{dtype:9}T={self.seq_len} B={self.batch_size} I={self.input_size} H={self.hidden_size}{stack}{both}"


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED_CASES = [
    *(CheckCase(dtype, seq_len=5, batch_size=3, input_size=7, hidden_size=33) for dtype in FLOATS),
    CheckCase(torch.float32, seq_len=1, batch_size=1, input_size=1, hidden_size=1),
    CheckCase(torch.float32, seq_len=4, batch_size=18, input_size=16, hidden_size=16),
    CheckCase(torch.float32, seq_len=3, batch_size=2, input_size=5, hidden_size=20, num_layers=2, bidirectional=True),
    CheckCase(torch.float32, seq_len=4, batch_size=5, input_size=6, hidden_size=24, num_layers=3),
]
GPU_CASES = [
    *(
        CheckCase(dtype, seq_len=64, batch_size=batch_size, input_size=hidden_size, hidden_size=hidden_size, tf32=tf32)
        for dtype, tf32 in (*((dtype, False) for dtype in FLOATS), (torch.float32, True))
        for batch_size, hidden_size in ((16, 64), (1, 251), (16, 768), (37, 1024), (16, 2048))
    ),
    CheckCase(torch.float32, seq_len=1, batch_size=1, input_size=1, hidden_size=1),
    CheckCase(torch.float16, seq_len=1000, batch_size=5, input_size=3, hidden_size=160),
    CheckCase(torch.float32, seq_len=50, batch_size=9, input_size=40, hidden_size=96, num_layers=2, bidirectional=True),
    CheckCase(torch.bfloat16, seq_len=64, batch_size=32, input_size=80, hidden_size=512, num_layers=4),
]


@dataclass(frozen=True)
class Comparison:
    """Relative errors (2-norm) of one tensor against float64: of the kernels, and of nn.LSTM in the same dtype."""

    error: float
    their_error: float
    allowed: float

    @staticmethod
    def of(ours: Tensor, theirs: Tensor, reference: Tensor, in_tf32: bool = False) -> Comparison:
        """Allowed is twice nn.LSTM's error, but at least four units in the last place: nn.LSTM may be exact by luck.

        in_tf32: use the units of TF32. For small layers cuDNN computes in float32, even if TF32 is allowed.
        """
        error, their_error = (
            torch.linalg.norm(tensor.cpu().double() - reference).item() / torch.linalg.norm(reference).item()
            for tensor in (ours, theirs)
        )
        unit = 2**-10 if in_tf32 else torch.finfo(ours.dtype).eps
        return Comparison(error, their_error, max(2 * their_error, 4 * unit))

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    @property
    def severity(self) -> tuple[bool, float]:
        return not self.agrees, self.error / self.allowed


Named = dict[str, Tensor]


def values_and_gradients(lstm: nn.RNNBase, tensors: Named) -> tuple[Named, Named]:
    """The results and gradients of one forward and backward pass, on the module's device and in its dtype."""
    weight = next(lstm.parameters())
    leaves = {
        name: tensor.to(weight, copy=True).requires_grad_() for name, tensor in tensors.items() if name[:4] != "grad"
    }
    output, (h_n, c_n) = lstm(leaves["input"], (leaves["h_0"], leaves["c_0"]))
    values = {"output": output, "h_n": h_n, "c_n": c_n}
    leaves.update(lstm.named_parameters())
    cotangents = [tensors[f"grad {name}"].to(weight) for name in values]
    gradients = torch.autograd.grad(list(values.values()), list(leaves.values()), cotangents)
    detached = {name: value.detach() for name, value in values.items()}
    return detached, {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def compare(case: CheckCase, device: torch.device, seed: int) -> tuple[dict[str, Comparison], dict[str, Comparison]]:
    """The comparisons of values and of gradients of one case, by name. The caller is inside `kernels_on`."""
    torch.manual_seed(seed)
    sizes = (case.input_size, case.hidden_size, case.num_layers)
    theirs = nn.LSTM(*sizes, bidirectional=case.bidirectional).to(case.dtype)
    ours = lstm_triton.LSTM(*sizes, bidirectional=case.bidirectional).to(case.dtype)
    ours.load_state_dict(theirs.state_dict())
    reference = nn.LSTM(*sizes, bidirectional=case.bidirectional).double()
    reference.load_state_dict(theirs.state_dict())

    directions = 2 if case.bidirectional else 1
    state = (directions * case.num_layers, case.batch_size, case.hidden_size)
    output = (case.seq_len, case.batch_size, directions * case.hidden_size)
    shapes = {"input": (case.seq_len, case.batch_size, case.input_size), "h_0": state, "c_0": state}
    shapes |= {"grad output": output, "grad h_n": state, "grad c_n": state}
    tensors = {
        name: torch.randn(shape, dtype=torch.float32, device="cpu").to(case.dtype) for name, shape in shapes.items()
    }

    expected = values_and_gradients(reference, tensors)
    in_tf32 = case.tf32 and device.type == "cuda"
    with tf32(case.tf32):
        found = values_and_gradients(theirs.to(device), tensors)
        with lstm_triton.backend("triton"):
            computed = values_and_gradients(ours.to(device), tensors)
    values, gradients = (
        {
            name: Comparison.of(computed[part][name], found[part][name], expected[part][name], in_tf32)
            for name in expected[part]
        }
        for part in (0, 1)
    )
    return values, gradients


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let cuDNN's LSTM and ours round float32 to TF32 inside the `with` block, or forbid it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def kernels_on(device: torch.device, seed: int) -> Iterator[str]:
    """Inside the `with` block, the kernels take the device's tensors. Yields a description of how the kernels run."""
    if device.type == "cuda":
        os.environ["TRITON_INTERPRET"] = "0"
        import triton

        yield f"Triton {triton.__version__} on {torch.cuda.get_device_name(device)}"
        return
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, here for the first time
    import greenlet  # noqa: F401 (the interpreter needs it; better missed here than in every case)
    import triton

    from lstm_triton.interpreter import interpret

    with interpret(seed):
        yield f"Triton {triton.__version__}, interpreted on the CPU"


def run(device: torch.device, seed: int) -> int:
    """Prints one line per case; returns exit code 1 when anything disagrees, else 0."""
    choose_threads(device, program=is_command())
    cases = GPU_CASES if device.type == "cuda" else INTERPRETED_CASES
    disagreements = 0
    with kernels_on(device, seed) as how:
        print(f"lstm_triton.LSTM: {how}. Relative errors against float64 (2-norm), the worst of each case:\n")
        print(f"{'case':50}{'values':>10}{'nn.LSTM':>10}{'gradients':>12}{'nn.LSTM':>10}  verdict")
        for case in cases:
            try:
                parts = compare(case, device, seed)
            except Exception as error:  # one case must not hide the others; its line says what happened
                verdict = f"failed: {type(error).__name__}: {shorten(str(error), 100)}"
                print(f"{case!s:50}{'':42}  {verdict}", flush=True)
                disagreements += 1
                continue
            worst = [max(part.values(), key=lambda comparison: comparison.severity) for part in parts]
            numbers = [f"{number:.1e}" for one in worst for number in (one.error, one.their_error)]
            wrong = [name for part in parts for name, comparison in part.items() if not comparison.agrees]
            verdict = f"DISAGREES: {', '.join(wrong)}" if wrong else "agrees"
            print(f"{case!s:50}{numbers[0]:>10}{numbers[1]:>10}{numbers[2]:>12}{numbers[3]:>10}  {verdict}", flush=True)
            disagreements += bool(wrong)
    agreeing = len(cases) - disagreements
    print(f"\n{agreeing} of {len(cases)} cases agree: at most twice the error of nn.LSTM, or four roundings")
    return 1 if disagreements else 0

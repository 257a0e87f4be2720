"""`python -m lstm_triton demo | info | check`: see `--help` of each."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from lstm_triton import __version__

COMES_WITH = dict.fromkeys(("greenlet", "matplotlib", "numpy", "sklearn", "tqdm"), 'pip install "lstm-triton[demo]"')
COMES_WITH["triton"] = 'pip install "lstm-triton[interpreter]", on Linux'


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake gets one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def usable_device(text: str) -> torch.device:
    """A device that can hold tensors on this machine. It is tested by using it."""
    try:
        device = torch.device(text)
        torch.zeros(1, dtype=torch.float32, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    return device


def kernel_device(text: str) -> torch.device:
    device = usable_device(text)
    if device.type not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"{text!r} runs no Triton kernels: 'cuda' does, 'cpu' in the interpreter")
    return device


def writable_png(text: str) -> Path:
    """A path to which a picture can be written. It is tested now, before the work that the picture shows."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    try:
        if path.exists():
            path.open("r+b").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from error
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m lstm_triton", description="A drop-in torch.nn.LSTM in fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"lstm-triton {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | info | check")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    demo = commands.add_parser(
        "demo",
        help="train with nn.LSTM and with lstm_triton.LSTM, compare the two and draw the result",
        description="Trains a classifier of handwritten digits, read pixel by pixel, with torch.nn.LSTM and with "
        "lstm_triton.LSTM, from one seed on the same batches. Prints accuracy, agreement and times; draws a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--epochs", type=positive, default=40, help="passes over the training digits")
    demo.add_argument("--hidden-size", type=positive, default=128, help="hidden units of the LSTM")
    demo.add_argument("--seed", type=int, default=0, help="seed of the split, the weights and the batches")
    demo.add_argument("--device", type=usable_device, default=device, help="where to train")
    demo.add_argument("--out", type=writable_png, default="lstm_triton_demo.png", help="PNG file to draw into")

    commands.add_parser(
        "info",
        help="versions, devices, and which path an LSTM takes here and why",
        description="Prints versions and devices, and which path an LSTM takes on each of them and why.",
    )

    check = commands.add_parser(
        "check",
        help="compare the Triton kernels with nn.LSTM on this machine",
        description="Runs the Triton kernels (on the GPU, or interpreted on the CPU at small sizes) and nn.LSTM, and "
        "compares the values and gradients of both with float64. Exit code 1 when a case disagrees.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    check.add_argument("--device", type=kernel_device, default=device, help="where to run the kernels")
    check.add_argument("--seed", type=int, default=0, help="seed of weights and inputs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit code 0: fine, 1: something disagrees, 2: the user has to correct something first."""
    options = parse(argv)
    try:
        # Each command imports what only it needs.
        if options.command == "demo":
            from lstm_triton.commands import demo

            return demo.run(options.epochs, options.hidden_size, options.seed, options.device, options.out)
        if options.command == "check":
            from lstm_triton.commands import check

            return check.run(options.device, options.seed)
        from lstm_triton.commands import info

        return info.run()
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in COMES_WITH:
            raise
        message = f"{package} is not installed; it comes with {COMES_WITH[package]}"
        print(f"python -m lstm_triton {options.command}: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

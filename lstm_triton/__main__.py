"""`python -m lstm_triton demo | info | check`: see `--help` of each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from lstm_triton import __version__
from lstm_triton.command_line import Parser, picture_file, seed, usable_device, whole
from lstm_triton.ending import program


def kernel_device(text: str) -> torch.device:
    device = usable_device(text)
    if device.type not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"{text!r} runs no Triton kernels: 'cuda' does, 'cpu' in the interpreter")
    return device


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
    demo.add_argument("--epochs", type=whole(), default=40, help="passes over the training digits")
    demo.add_argument("--hidden-size", type=whole(), default=128, help="hidden units of the LSTM")
    demo.add_argument("--seed", type=seed, default=0, help="seed of the split, the weights and the batches")
    demo.add_argument("--device", type=usable_device, default=device, help="where to train")
    demo.add_argument("--out", type=picture_file(), default="lstm_triton_demo.png", help="PNG file to draw into")

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
    check.add_argument("--seed", type=seed, default=0, help="seed of weights and inputs")
    return parser.parse_args(argv)


@program("python -m lstm_triton", commands=("demo", "info", "check"))
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit code 0: fine, 1: something disagrees, 2: the user has to correct something first."""
    options = parse(argv)
    # Each command imports what only it needs.
    if options.command == "demo":
        from lstm_triton.commands import demo

        return demo.run(options.epochs, options.hidden_size, options.seed, options.device, options.out)
    if options.command == "check":
        from lstm_triton.commands import check

        return check.run(options.device, options.seed)
    from lstm_triton.commands import info

    return info.run()


if __name__ == "__main__":
    sys.exit(main())

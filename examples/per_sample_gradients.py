"""Per-sample gradients of an LSTM, as differentially private training clips them (Abadi et al., 2016).

Computed by `torch.func.vmap` over `lstm_triton.LSTM`, by Opacus (its DPLSTM, hooks on step-by-step Linear layers), and
by a loop over the samples; compared in results and time.

    pip install "lstm-triton[examples]"
    python examples/per_sample_gradients.py --batch-size 64
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lstm_triton import LSTM
from lstm_triton.command_line import Parser, check_memory, usable_device, whole
from lstm_triton.commands.threads import choose_threads
from lstm_triton.ending import program

Gradients = dict[str, Tensor]  # by the name of a weight, (B, ...)


def loss_of(output: Tensor) -> Tensor:
    """Of the last output of one sequence, or, summed, of many."""
    return output.square().sum()


def by_vmap(lstm: LSTM, inputs: Tensor) -> Gradients:
    """One scan forward and one backward where the kernels run; inputs are (B, T, I)."""

    def loss(weights: dict[str, Tensor], input: Tensor) -> Tensor:
        output, _ = functional_call(lstm, weights, (input,))
        return loss_of(output[-1])

    weights = {name: weight.detach() for name, weight in lstm.named_parameters()}
    gradients: Gradients = vmap(grad(loss), in_dims=(None, 0))(weights, inputs)
    return gradients


def by_loop(lstm: nn.RNNBase, inputs: Tensor) -> Gradients:
    names = [name for name, _ in lstm.named_parameters()]
    samples = [torch.autograd.grad(loss_of(lstm(input)[0][-1]), list(lstm.parameters())) for input in inputs]
    return {name: torch.stack(gradients) for name, gradients in zip(names, zip(*samples, strict=True), strict=True)}


def by_opacus(lstm: LSTM, inputs: Tensor) -> Gradients:
    from opacus.grad_sample import GradSampleModule
    from opacus.layers import DPLSTM

    layer = DPLSTM(lstm.input_size, lstm.hidden_size, lstm.num_layers, batch_first=True).to(inputs.device)
    layer.load_state_dict(lstm.state_dict())
    module = GradSampleModule(layer, loss_reduction="sum")
    output, _ = module(inputs)
    loss_of(output[:, -1]).backward()
    return {name: parameter.grad_sample for name, parameter in layer.named_parameters()}


def clipped_sum(gradients: Gradients, largest_norm: float) -> Gradients:
    """What a private optimizer adds its noise to: every sample's gradient cut to a length, and summed."""
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
    factors = (largest_norm / norms).clamp(max=1)
    return {name: torch.einsum("b,b...->...", factors, gradient) for name, gradient in gradients.items()}


def milliseconds(function: Callable[[], object], device: torch.device, repetitions: int = 5) -> float:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e3 * sorted(times)[len(times) // 2]


def compare(batch_size: int, time_steps: int, size: int, device: torch.device) -> None:
    gradients = batch_size * (8 * size * size + 8 * size)
    sequences = batch_size * time_steps * 8 * size
    check_memory(4 * (gradients + sequences), device, "--batch-size, --time-steps and --size")
    torch.manual_seed(0)
    lstm = LSTM(size, size, batch_first=True, device=device)
    inputs = torch.randn(batch_size, time_steps, size, device=device)
    expected = clipped_sum(by_loop(lstm, inputs), 1.0)
    for method in (by_loop, by_opacus, by_vmap):
        sums = clipped_sum(method(lstm, inputs), 1.0)
        difference = max((sums[name] - expected[name]).abs().max().item() for name in expected)
        elapsed = milliseconds(lambda method=method: method(lstm, inputs), device)
        print(f"{method.__name__:<10} {elapsed:>9.1f} ms   largest difference from the loop {difference:.1e}")


@program(extra="examples")
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=whole(), default=64)
    parser.add_argument("--time-steps", type=whole(), default=50)
    parser.add_argument("--size", type=whole(), default=64, help="of the input and of the hidden state")
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    operations = 2 * arguments.batch_size * 4 * arguments.size**2
    choose_threads(arguments.device, operations=operations, program=__name__ == "__main__")
    import opacus  # noqa: F401 (better missed here than after the loop)

    compare(arguments.batch_size, arguments.time_steps, arguments.size, arguments.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())

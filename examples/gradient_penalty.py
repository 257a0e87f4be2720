"""A Wasserstein GAN with gradient penalty (Gulrajani et al., 2017) of short sequences, whose critic is an LSTM.

The penalty is a loss on a gradient: training the critic takes second derivatives of the LSTM.

    python examples/gradient_penalty.py --steps 200
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import torch
from torch import Tensor, nn

from lstm_triton import LSTM
from lstm_triton.command_line import Parser, usable_device, whole
from lstm_triton.commands.threads import choose_threads
from lstm_triton.ending import program

TIME_STEPS, NOISE_SIZE, PENALTY_WEIGHT = 12, 8, 10.0


class Critic(nn.Module):
    """Rates sequences (T, B, 1): the more real, the higher."""

    def __init__(self, hidden_size: int = 32) -> None:
        super().__init__()
        self.lstm = LSTM(1, hidden_size)
        self.rating = nn.Linear(hidden_size, 1)

    def forward(self, sequences: Tensor) -> Tensor:
        _, (h_n, _) = self.lstm(sequences)
        return self.rating(h_n[-1])


class Generator(nn.Module):
    """Makes sequences (T, B, 1) of noise (T, B, NOISE_SIZE)."""

    def __init__(self, hidden_size: int = 32) -> None:
        super().__init__()
        self.lstm = LSTM(NOISE_SIZE, hidden_size)
        self.value = nn.Linear(hidden_size, 1)

    def forward(self, noise: Tensor) -> Tensor:
        output, _ = self.lstm(noise)
        return self.value(output)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """How far the critic's gradient between real and generated sequences is from length 1."""
    share = torch.rand(1, real.shape[1], 1, device=real.device)
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.transpose(0, 1).flatten(1).norm(dim=1) - 1).square().mean()


def real_sequences(batch_size: int, device: torch.device | str) -> Tensor:
    """Sine waves of random phase and speed."""
    phase, speed = torch.rand(2, 1, batch_size, 1, device=device)
    times = torch.arange(TIME_STEPS, device=device).view(-1, 1, 1)
    return torch.sin(6.28 * phase + (0.3 + 0.5 * speed) * times)


def train(steps: int, batch_size: int = 32, device: torch.device | str = "cpu") -> list[float]:
    """Returns the critic's estimate of the distance between real and generated sequences, step by step."""
    critic, generator = Critic().to(device), Generator().to(device)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    distances = []
    for _ in range(steps):
        for _ in range(5):
            real = real_sequences(batch_size, device)
            fake = generator(torch.randn(TIME_STEPS, batch_size, NOISE_SIZE, device=device)).detach()
            distance = critic(real).mean() - critic(fake).mean()
            loss = -distance + PENALTY_WEIGHT * gradient_penalty(critic, real, fake)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
        fake = generator(torch.randn(TIME_STEPS, batch_size, NOISE_SIZE, device=device))
        generator_optimizer.zero_grad()
        (-critic(fake).mean()).backward()
        generator_optimizer.step()
        distances.append(distance.item())
    return distances


@program(extra="examples")
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=whole(), default=200)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    choose_threads(arguments.device, program=__name__ == "__main__")
    torch.manual_seed(0)
    distances = train(arguments.steps, device=arguments.device)
    for step in range(0, len(distances), max(1, len(distances) // 10)):
        print(f"step {step:>4}  critic's distance {distances[step]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

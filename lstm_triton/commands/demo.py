"""`python -m lstm_triton demo`: one classifier trained twice side by side, with nn.LSTM and with lstm_triton.LSTM.

The data are scikit-learn's 1797 handwritten digits of 8 x 8 pixels, which come with the package. A digit is read pixel
by pixel, row after row: 64 steps of one number. The model must remember the first rows until the last step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import lstm_triton
from lstm_triton.command_line import check_memory, save_picture
from lstm_triton.commands.check import tf32
from lstm_triton.commands.threads import choose_threads, is_command

BATCH_SIZE = 64
TEST_DIGITS = 360
PEAK_LEARNING_RATE = 1e-2
PATHS = {"triton": "in Triton kernels", "aten": "in PyTorch's own function, the fallback"}


class DigitReader(nn.Module):
    """Reads (B, 64, 1) pixels and gives (B, 10) scores from the last hidden state."""

    def __init__(self, lstm: nn.RNNBase) -> None:
        super().__init__()
        self.lstm = lstm
        self.scores = nn.Linear(lstm.hidden_size, 10)
        with torch.no_grad():
            # The forget gate starts open, so that gradients reach the first pixels from the first epoch on.
            lstm.get_parameter("bias_ih_l0")[lstm.hidden_size : 2 * lstm.hidden_size] = 1.0

    def forward(self, pixels: Tensor) -> Tensor:
        _, (last_hidden, _) = self.lstm(pixels)
        scores: Tensor = self.scores(last_hidden[-1])
        return scores


@dataclass
class Contestant:
    """A model in training, with what is recorded on the way."""

    name: str
    model: DigitReader
    total_steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, PEAK_LEARNING_RATE, self.total_steps)

    def train_step(self, pixels: Tensor, labels: Tensor) -> None:
        started = synchronized_clock(pixels.device)
        loss = nn.functional.cross_entropy(self.model(pixels), labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(synchronized_clock(pixels.device) - started)
        self.schedule.step()
        self.losses.append(loss.item())

    def predict(self, pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            scores: Tensor = self.model(pixels)
        return scores.argmax(1)


def synchronized_clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """Standardised pixels (1797, 64, 1) and labels (1797,), in random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), device="cpu")
    pixels = torch.tensor(data.data, dtype=torch.float32, device="cpu")[order].unsqueeze(2)
    labels = torch.tensor(data.target, dtype=torch.int64, device="cpu")[order]
    return ((pixels - pixels.mean()) / pixels.std()).to(device), labels.to(device)


def batches(digit_count: int, epochs: int) -> Iterator[Tensor]:
    """Indices (BATCH_SIZE,), every digit at most once an epoch."""
    for _ in range(epochs):
        order = torch.randperm(digit_count, device="cpu")
        yield from order[: digit_count // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE)


def run(epochs: int, hidden_size: int, seed: int, device: torch.device, out: Path) -> int:
    """Trains both, prints how they compare and draws it into `out`; returns exit code 0.

    Both compute in float32 without TF32. For small layers cuDNN takes float32 even if it may take TF32. This difference
    alone would make the two learning curves part after some steps.
    """
    weights = 4 * hidden_size * (hidden_size + 3)
    activations = BATCH_SIZE * 64 * 8 * hidden_size
    # Two models, each with weights, gradients and the two moments of Adam.
    check_memory(4 * (2 * 4 * weights + activations), device, f"--hidden-size {hidden_size}")
    choose_threads(device, operations=2 * BATCH_SIZE * 4 * hidden_size**2, program=is_command())
    with tf32(False):
        return compare(epochs, hidden_size, seed, device, out)


def compare(epochs: int, hidden_size: int, seed: int, device: torch.device, out: Path) -> int:
    """`run`, in the precision that PyTorch is set to."""
    torch.manual_seed(seed)
    pixels, labels = digits(device)
    test_pixels, test_labels = pixels[:TEST_DIGITS], labels[:TEST_DIGITS]
    train_pixels, train_labels = pixels[TEST_DIGITS:], labels[TEST_DIGITS:]
    steps_per_epoch = len(train_labels) // BATCH_SIZE

    contestants = []
    lstm_classes: dict[str, Callable[..., nn.RNNBase]] = {"nn.LSTM": nn.LSTM, "lstm_triton.LSTM": lstm_triton.LSTM}
    for name, lstm_class in lstm_classes.items():
        torch.manual_seed(seed)
        model = DigitReader(lstm_class(1, hidden_size, batch_first=True)).to(device)
        contestants.append(Contestant(name, model, epochs * steps_per_epoch))
    theirs, ours = contestants

    explanation = lstm_triton.explain(ours.model.lstm, train_pixels[:BATCH_SIZE])
    print(f"{len(train_labels)} digits to learn, {len(test_labels)} to be tested on, each 64 steps of one pixel")
    print(f"{hidden_size} hidden units on {device_name(device)}; lstm_triton.LSTM takes this path:\n\n{explanation}\n")

    torch.manual_seed(seed)
    redraw_seconds = 0.2 if sys.stderr.isatty() else 10.0  # a log file is not a terminal
    with tqdm(total=epochs * steps_per_epoch, unit="step", desc="training", mininterval=redraw_seconds) as progress:
        for chosen in batches(len(train_labels), epochs):
            for contestant in contestants:  # in turn, so that other load on the machine slows both
                contestant.train_step(train_pixels[chosen], train_labels[chosen])
            progress.set_postfix({c.name: f"{c.losses[-1]:.4f}" for c in contestants}, refresh=False)
            progress.update()

    predictions = [contestant.predict(test_pixels) for contestant in contestants]
    accuracies = [(predicted == test_labels).double().mean().item() for predicted in predictions]
    same_predictions = (predictions[0] == predictions[1]).double().mean().item()
    loss_difference = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))

    print(f"\n{'':24}{'nn.LSTM':>18}{'lstm_triton.LSTM':>18}")
    rows = {
        "test accuracy": [f"{accuracy:.1%}" for accuracy in accuracies],
        "last loss": [f"{contestant.losses[-1]:.4f}" for contestant in contestants],
        "training, all steps": [f"{sum(contestant.seconds):.2f} s" for contestant in contestants],
        "one step, median": [f"{1e3 * median(contestant.seconds):.2f} ms" for contestant in contestants],
        "first step": [f"{1e3 * contestant.seconds[0]:.2f} ms" for contestant in contestants],
    }
    for label, values in rows.items():
        print(f"{label:24}" + "".join(f"{value:>18}" for value in values))
    print(f"\nlargest difference between the two loss curves: {loss_difference:.2g}")
    print(f"test digits on which both agree: {same_predictions:.1%}")
    print(f"speed: {median(theirs.seconds) / median(ours.seconds):.2f} x nn.LSTM")

    where = f"{hidden_size} hidden units on {device_name(device)}"
    title = (
        f"Handwritten digits, read pixel by pixel: {where}\nlstm_triton.LSTM ran {PATHS[explanation.layers[0].path]}"
    )
    picture = draw(contestants, accuracies, steps_per_epoch, title)
    save_picture(picture, out, dpi=150)
    print(f"picture: {out}")
    return 0


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    return f"the {device.type.upper()}{threads}"


def draw(contestants: list[Contestant], accuracies: list[float], steps_per_epoch: int, title: str) -> Figure:
    """The loss curves on top of each other, and what a training step takes."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    loss_axes, time_axes = figure.subplots(1, 2, width_ratios=[5, 2])
    figure.suptitle(title, fontsize=12)
    styles = [
        {"color": "#f2a65a", "linewidth": 4.5, "solid_capstyle": "round"},
        {"color": "#1d3f72", "linewidth": 1.1},
    ]

    for contestant, accuracy, style in zip(contestants, accuracies, styles, strict=True):
        epochs = [step / steps_per_epoch for step in range(len(contestant.losses))]
        label = f"{contestant.name}: {accuracy:.1%} of test digits right"
        loss_axes.plot(epochs, contestant.losses, label=label, **style)
    loss_axes.set(yscale="log", xlabel="epoch", ylabel="cross entropy of each batch", title="Training loss")
    loss_axes.set_xlim(0)
    loss_axes.legend(frameon=False)

    milliseconds = [1e3 * median(contestant.seconds) for contestant in contestants]
    bars = time_axes.bar(
        [contestant.name for contestant in contestants],
        milliseconds,
        width=0.6,
        color=[style["color"] for style in styles],
    )
    time_axes.bar_label(bars, fmt="%.2f ms", padding=3)
    time_axes.margins(x=0.12, y=0.12)
    time_axes.set(ylabel="milliseconds", title="One training step (median)")

    for axes in (loss_axes, time_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    loss_axes.grid(alpha=0.25)
    return figure

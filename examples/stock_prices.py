"""One LSTM unit, explained on the stock prices of two companies; and why it remembers what a plain RNN forgets.

    python examples/stock_prices.py --out pictures

Both companies were worth 0.5, 0.25 and 1 on days 2 to 4. They differ on day 1 only: company A was worth 0, company B 1.
On day 5, A is worth 0 again and B 1. Whoever is to predict day 5 has to remember day 1 until then.

1. A unit whose weights are known does it. Every step is printed: what percentage of the long-term memory is kept, what
   potential memory there is and how much of it is added, and what becomes the new short-term memory, which after the
   last day is the prediction. The same weights serve every day, so that any number of days can be unrolled (`--days`;
   after day 4 the four prices come again, and the last short-term memory predicts nothing any more).
2. The same unit learns it from random weights.
3. What training needs for that is a gradient that reaches day 1. How much of it does, through 1 to 500 steps, is
   measured for plain RNNs and for LSTMs that start by keeping more or less of their long-term memory.

Pictures: company_a.png, company_b.png, training.png, gradients.png. Needs the extra "demo". Exit code 1: the unit did
not learn it from this seed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton.command_line import Parser, check_memory, output_folder, save_picture, seed, usable_device, whole
from lstm_triton.commands.threads import choose_threads
from lstm_triton.ending import packages_of, program

with packages_of("demo"):
    from matplotlib.figure import Figure

PRICES = {"A": (0.0, 0.5, 0.25, 1.0), "B": (1.0, 0.5, 0.25, 1.0)}
NEXT_PRICE = {"A": 0.0, "B": 1.0}
COLORS = {"A": "#2f5d9b", "B": "#c8553d"}

# (weight of the input, weight of the short-term memory, bias), in the order in which nn.LSTM keeps the gates.
KNOWN_WEIGHTS = {
    "input gate": (1.65, 2.00, 0.62),
    "forget gate": (1.63, 2.70, 1.62),
    "potential memory": (0.94, 1.41, -0.32),
    "output gate": (-0.19, 4.38, 0.59),
}

BYTES_PER_DAY = 2000  # about what the story of a day takes
CLOSE_ENOUGH = 0.05  # what a prediction may be off after training
MOST_UPDATES = 2000
UPDATES_BETWEEN_LINES = 100

LENGTHS = (1, 10, 100, 500)
DRAWN_LENGTHS = (1, 10, 50, 100, 200, 350, 500)  # LENGTHS, and some between
HIDDEN_SIZE = 64
DRAWS = 4  # of random weights
SEQUENCES = 16  # for each of them


def known_unit() -> lstm_triton.LSTM:
    """One hidden unit with the known weights."""
    unit = lstm_triton.LSTM(input_size=1, hidden_size=1)
    weights = torch.tensor(list(KNOWN_WEIGHTS.values()))
    with torch.no_grad():
        unit.weight_ih_l0.copy_(weights[:, :1])
        unit.weight_hh_l0.copy_(weights[:, 1:2])
        unit.bias_ih_l0.copy_(weights[:, 2])
        unit.bias_hh_l0.zero_()
    return unit


def random_unit(seed: int) -> lstm_triton.LSTM:
    """One hidden unit with normally distributed weights, and biases of zero."""
    torch.manual_seed(seed)
    unit = lstm_triton.LSTM(input_size=1, hidden_size=1)
    with torch.no_grad():
        for name, parameter in unit.named_parameters():
            parameter.normal_() if name.startswith("weight") else parameter.zero_()
    return unit


def prices(days: int = 4, device: torch.device | None = None) -> Tensor:
    """(days, 2, 1): the companies side by side; after four days, the four prices once more."""
    sequences = [list(islice(cycle(known), days)) for known in PRICES.values()]
    return torch.tensor(sequences, device=device).t().unsqueeze(2)


# --- Part 1: every step ---


def story(inside: lstm_triton.Trace[Tensor], inputs: Tensor, sequence: int) -> str:
    """One sequence of a single unit, day by day, as one would explain it."""
    unit = inside.layer()
    lines = []
    long_term = short_term = 0.0
    for day in range(len(inputs)):
        keep, add, show, potential, new_long_term, new_short_term = (
            values[day, sequence, 0].item()
            for values in (
                unit.forget_gate,
                unit.input_gate,
                unit.output_gate,
                unit.candidate,
                unit.cell_state,
                unit.hidden_state,
            )
        )
        lines += [
            f"Day {day + 1}: the price is {inputs[day, sequence, 0].item():g}, the long-term memory {long_term:.3f}, "
            f"the short-term memory {short_term:.3f}",
            f"  forget gate   {keep:7.1%} of the long-term memory is kept: {keep * long_term:.3f}",
            f"  input gate    {add:7.1%} of the potential memory {potential:.3f} is added: {add * potential:+.3f}",
            f"                          the new long-term memory is {new_long_term:.3f}",
            f"  output gate   {show:7.1%} of its tanh is the new short-term memory: {new_short_term:.3f}",
        ]
        long_term, short_term = new_long_term, new_short_term
    return "\n".join(lines)


def explain(days: int, device: torch.device, out: Path) -> None:
    unit, inputs = known_unit().to(device), prices(days, device)
    inside = lstm_triton.trace(unit, inputs)
    print(f"{'=' * 20} One unit with known weights, {days} days {'=' * 20}")
    for index, company in enumerate(PRICES):
        print(f"\nCompany {company}\n{story(inside, inputs, index)}")
        last = f"Company {company} ends with a short-term memory of {inside.h_n[0, index, 0].item():.3f}"
        prediction = f": on day 5 it is worth {NEXT_PRICE[company]:g}" if days == 4 else ""
        print(f"{last}{prediction}")
        figure = inside.plot(sequence=index, title=f"{last}{prediction}")
        save(figure, out / f"company_{company.lower()}.png")


# --- Part 2: training ---


def train(unit: lstm_triton.LSTM, device: torch.device) -> list[list[float]]:
    """Train until both predictions are close enough, or for MOST_UPDATES; the predictions before every update."""
    inputs = prices(device=device)
    targets = torch.tensor(list(NEXT_PRICE.values()), device=device)
    optimizer = torch.optim.Adam(unit.parameters(), lr=0.05)
    history: list[list[float]] = []
    while True:
        _, (short_term, _) = unit(inputs)
        predictions = short_term[0, :, 0]
        history.append(predictions.tolist())
        update, close = len(history) - 1, bool(((predictions - targets).abs() < CLOSE_ENOUGH).all())
        if update % UPDATES_BETWEEN_LINES == 0 or close:
            predicted = ", ".join(f"{name} {value:.3f}" for name, value in zip(PRICES, history[-1], strict=True))
            print(f"  after {update:>4} updates: {predicted}")
        if close or update == MOST_UPDATES:
            return history
        loss = (predictions - targets).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def has_learnt(history: list[list[float]]) -> bool:
    return all(abs(a - b) < CLOSE_ENOUGH for a, b in zip(history[-1], NEXT_PRICE.values(), strict=True))


def draw_training(history: list[list[float]]) -> Figure:
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for company, predicted in zip(PRICES, zip(*history, strict=True), strict=True):
        axes.plot(predicted, color=COLORS[company], label=f"company {company}: predicted for day 5")
        axes.axhline(NEXT_PRICE[company], color=COLORS[company], linestyle=":", label=f"company {company}: in truth")
    axes.set(xlabel="updates of the weights", ylabel="price", title="One LSTM unit learns from random weights")
    axes.legend(frameon=False, loc="center right")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# --- Part 3: the gradient that reaches the first step ---


def plain_rnn() -> nn.RNNBase:
    return nn.RNN(1, HIDDEN_SIZE, dtype=torch.float64)


def orthogonal_rnn() -> nn.RNNBase:
    rnn = plain_rnn()
    nn.init.orthogonal_(rnn.get_parameter("weight_hh_l0"))
    return rnn


def lstm_that_keeps(forget_bias: float) -> Callable[[], nn.RNNBase]:
    def build() -> nn.RNNBase:
        lstm = lstm_triton.LSTM(1, HIDDEN_SIZE, dtype=torch.float64)
        with torch.no_grad():
            lstm.bias_ih_l0[HIDDEN_SIZE : 2 * HIDDEN_SIZE] = forget_bias
            lstm.bias_hh_l0[HIDDEN_SIZE : 2 * HIDDEN_SIZE] = 0.0
        return lstm

    return build


NETWORKS: dict[str, tuple[Callable[[], nn.RNNBase], str]] = {
    "tanh RNN": (plain_rnn, "#222222"),
    "tanh RNN, orthogonal": (orthogonal_rnn, "#8c8c8c"),
    "LSTM, forget bias 1": (lstm_that_keeps(1.0), "#f2a65a"),
    "LSTM, forget bias 3": (lstm_that_keeps(3.0), "#2a7f62"),
    "LSTM, forget bias 5": (lstm_that_keeps(5.0), "#2f5d9b"),
}


def gradient_at_first_step(build: Callable[[], nn.RNNBase], steps: int, seed: int, device: torch.device) -> float:
    """How strongly the short-term memory after so many steps depends on the input of the first one.

    That is the length of the gradient, with regard to x_1, of the last h along a random direction. It spans many orders
    of magnitude, so that its logarithm is averaged, over several draws of the weights and many sequences. In float64:
    what vanishes would be zero in float32, and nothing could be said about it.
    """
    logarithms = []
    for draw in range(DRAWS):
        torch.manual_seed(DRAWS * seed + draw)  # the same weights for every length
        network = build().to(device)
        inputs = torch.randn(steps, SEQUENCES, 1, dtype=torch.float64).to(device).requires_grad_()
        direction = nn.functional.normalize(torch.randn(SEQUENCES, HIDDEN_SIZE, dtype=torch.float64), dim=1)
        output, _ = network(inputs)
        (gradient,) = torch.autograd.grad((output[-1] * direction.to(device)).sum(), inputs)
        logarithms.append(gradient[0].norm(dim=1).log().mean())
    return torch.stack(logarithms).mean().exp().item()


def draw_gradients(found: dict[str, dict[int, float]]) -> Figure:
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for name, gradients in reversed(found.items()):
        label = f"{name}: {gradients[LENGTHS[-1]]:.0e} through {LENGTHS[-1]} steps"
        axes.plot(gradients.keys(), gradients.values(), "o-", color=NETWORKS[name][1], label=label)
    smallest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    axes.axhspan(0, smallest, color="black", alpha=0.08, linewidth=0)
    axes.text(4, smallest / 1e2, "down here it is zero in float32", va="top", fontsize=9)
    axes.set(yscale="log", xlabel="length of the sequence in steps", ylabel="gradient that reaches the first step")
    axes.set_ylim(1e-130, 1e4)
    title = "Multiplied at every step by less than one, a gradient vanishes;"
    axes.set_title(f"{title}\nthrough a long-term memory that is kept, it lasts")
    axes.legend(frameon=False, loc="lower left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def compare_gradients(seed: int, device: torch.device, out: Path) -> None:
    print(f"\n{'=' * 20} The gradient that reaches the first step {'=' * 20}\n")
    print(f"{HIDDEN_SIZE} hidden units, geometric mean over {DRAWS} x {SEQUENCES} random networks and sequences\n")
    print(f"{'':22}" + "".join(f"{f'{length} step' + 's' * (length > 1):>12}" for length in LENGTHS))
    found = {}
    for name, (build, _) in NETWORKS.items():
        found[name] = {length: gradient_at_first_step(build, length, seed, device) for length in DRAWN_LENGTHS}
        print(f"{name:22}" + "".join(f"{found[name][length]:12.1e}" for length in LENGTHS))
    print("\nThrough the long-term memory it is multiplied at every step by the forget gate, at first sigmoid(bias):")
    for bias in (1.0, 3.0, 5.0):
        kept = torch.tensor(bias, dtype=torch.float64).sigmoid().item()
        print(f"  bias {bias:g}: {kept:.1%}, through 499 steps {kept**499:.1e}")
    print("More than that arrives, since the short-term memory is a second way.\n")
    save(draw_gradients(found), out / "gradients.png")


# --- All of it ---


def save(figure: Figure, path: Path) -> None:
    save_picture(figure, path, dpi=120)
    print(f"picture: {path}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=output_folder, default="stock_prices", help="folder for the pictures")
    parser.add_argument("--days", type=whole(), default=4, help="how many days to unroll in the first part")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the random weights")
    parser.add_argument("--device", type=usable_device, default=device, help="where to compute")
    return parser.parse_args(argv)


@program()
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    check_memory(BYTES_PER_DAY * options.days, torch.device("cpu"), f"--days {options.days}")
    choose_threads("cpu", program=__name__ == "__main__")  # everything here is small, on a GPU, too
    options.out.mkdir(parents=True, exist_ok=True)

    explain(options.days, options.device, options.out)

    print(f"\n{'=' * 20} The same unit learns it from random weights {'=' * 20}\n")
    history = train(random_unit(options.seed).to(options.device), options.device)
    save(draw_training(history), options.out / "training.png")
    if not has_learnt(history):
        print(f"error: not learnt in {MOST_UPDATES} updates from seed {options.seed}: try another", file=sys.stderr)
        return 1
    print("It predicts both companies.")

    compare_gradients(options.seed, options.device, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

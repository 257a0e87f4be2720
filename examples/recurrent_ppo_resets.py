"""Recurrent PPO in which episodes end inside the training sequence: `resets=` against the usual loop over steps.

    pip install ".[examples]" && python examples/recurrent_ppo_resets.py

A pole is to be balanced on a cart (gymnasium's CartPole-v1), but the agent sees only where the cart is and how the pole
leans, not how fast they move: it has to remember. Many carts run side by side, and whenever an episode ends, the next
one begins in the same row of the rollout, in the middle of the sequence that the LSTM is trained on. There its memory
must start anew.

The same training is run twice, from the same seed. First with `lstm_triton.LSTM`, which takes the whole sequence at
once and is told where to start anew (`resets=`); then as it has to be written with `nn.LSTM`, step by step, masking the
state at every step. Both compute the same numbers. Printed and drawn are the learning curves and the time.

PPO is that of Schulman et al. (2017), "Proximal Policy Optimization Algorithms", with the advantages of Schulman et al.
(2016), "High-Dimensional Continuous Control Using Generalized Advantage Estimation".
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import lstm_triton
from lstm_triton.command_line import Parser, picture_file, save_picture, seed, usable_device, whole
from lstm_triton.commands.threads import choose_threads
from lstm_triton.ending import packages_of, program

with packages_of("examples"):
    import gymnasium
    import numpy as np
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure

ENVIRONMENTS, STEPS = 32, 128  # a rollout: B carts, T steps each
EPOCHS, MINIBATCHES = 4, 2  # each minibatch has the whole sequences of some carts
HIDDEN_SIZE = 64
LEARNING_RATE, CLIP, ENTROPY_BONUS, VALUE_WEIGHT, MAX_GRADIENT = 3e-3, 0.2, 0.01, 0.5, 0.5
DISCOUNT, TRACE = 0.98, 0.95  # gamma and lambda of the advantages
REWARD_SCALE = 0.1
VISIBLE = (0, 2)  # of (position, velocity, angle, angular velocity)
OBSERVATION_SCALE = (1.0, 10.0)

State = tuple[Tensor, Tensor]


class Agent(nn.Module):
    """An LSTM with two heads: what to do, and what return to expect. B carts, T steps, H hidden units."""

    def __init__(self, lstm: nn.RNNBase) -> None:
        super().__init__()
        self.lstm = lstm
        self.policy = nn.Linear(lstm.hidden_size, 2)
        self.value = nn.Linear(lstm.hidden_size, 1)
        nn.init.orthogonal_(self.policy.weight, 0.01)

    def forward(self, observations: Tensor, state: State, begins: Tensor) -> tuple[Tensor, Tensor, State]:
        """Observations (T, B, 2), and begins (T, B), where True an episode starts -> logits (T, B, 2), values (T, B)
        and the last state (1, B, H).
        """
        memory, state = self.remember(observations, state, begins)
        return self.policy(memory), self.value(memory).squeeze(-1), state

    def remember(self, observations: Tensor, state: State, begins: Tensor) -> tuple[Tensor, State]:
        """The usual loop: one call for each step, and the state masked before it."""
        memory = []
        for observation, begin in zip(observations.split(1), begins, strict=True):
            keep = (~begin).to(observation.dtype).view(1, -1, 1)
            output, state = self.lstm(observation, (state[0] * keep, state[1] * keep))
            memory.append(output)
        return torch.cat(memory), state


class SequenceAgent(Agent):
    """In training, all steps in one call."""

    def remember(self, observations: Tensor, state: State, begins: Tensor) -> tuple[Tensor, State]:
        if len(observations) == 1:  # acting
            return super().remember(observations, state, begins)
        return self.lstm(observations, state, resets=begins)


@dataclass
class Rollout:
    """T steps of B carts. All (T, B), observations (T, B, 2)."""

    observations: Tensor
    begins: Tensor  # whether an episode begins with this observation
    actions: Tensor
    log_probabilities: Tensor
    advantages: Tensor
    returns: Tensor
    counts: Tensor  # False where the environment ignored the action, to show the end of an episode
    state: State  # before the first step

    def of(self, carts: Tensor) -> "Rollout":
        state = (self.state[0][:, carts], self.state[1][:, carts])
        return Rollout(*(each[:, carts] for name, each in vars(self).items() if name != "state"), state)


class Carts:
    """The environments, and the memory with which the agent acts in them."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        # Computed all at once in NumPy. After the end of an episode it shows the last observation, ignores the next
        # action, and then shows the first observation of the next episode.
        self.environments = gymnasium.make_vec(
            "CartPole-v1", num_envs=ENVIRONMENTS, vectorization_mode="vector_entry_point"
        )
        observation, _ = self.environments.reset(seed=seed)
        self.observation = self.seen(observation)
        self.begins = torch.ones(ENVIRONMENTS, dtype=torch.bool, device=device)
        self.ended = torch.zeros(ENVIRONMENTS, dtype=torch.bool, device=device)
        zeros = torch.zeros(1, ENVIRONMENTS, HIDDEN_SIZE, device=device)
        self.state: State = (zeros, zeros)
        self.lengths = np.zeros(ENVIRONMENTS)

    def seen(self, observation: np.ndarray) -> Tensor:
        visible = torch.as_tensor(observation[:, VISIBLE], dtype=torch.float32) * torch.tensor(OBSERVATION_SCALE)
        return visible.to(self.device)

    @torch.no_grad()
    def act(self, agent: Agent, random: torch.Generator) -> tuple[Rollout, list[float]]:
        """STEPS steps, one call of the LSTM each; and the returns of the episodes that ended meanwhile."""
        before = self.state
        columns: list[tuple[Tensor, ...]] = []
        finished: list[float] = []
        for _ in range(STEPS):
            logits, value, self.state = agent(self.observation[None], self.state, self.begins[None])
            policy = Categorical(logits=logits[0])
            action = torch.multinomial(policy.probs, 1, generator=random).squeeze(1)
            observation, reward, terminated, truncated, _ = self.environments.step(action.cpu().numpy())
            ended = terminated | truncated
            self.lengths += reward
            finished += self.lengths[ended].tolist()
            self.lengths[ended] = 0
            numbers = (torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in (reward, terminated, ended))
            columns.append(
                (self.observation, self.begins, action, policy.log_prob(action), value[0], ~self.ended, *numbers)
            )
            self.begins, self.ended = self.ended, torch.as_tensor(ended, device=self.device)
            self.observation = self.seen(observation)
        _, next_value, _ = agent(self.observation[None], self.state, self.begins[None])

        stacked = [torch.stack(column) for column in zip(*columns, strict=True)]
        observations, begins, actions, log_probabilities, values, counts, rewards, terminated, ended = stacked
        advantages = torch.zeros_like(values)
        advantage, later = torch.zeros_like(next_value[0]), torch.cat([values[1:], next_value])
        for t in reversed(range(STEPS)):
            surprise = REWARD_SCALE * rewards[t] + DISCOUNT * (1 - terminated[t]) * later[t] - values[t]
            advantage = surprise + DISCOUNT * TRACE * (1 - ended[t]) * advantage
            advantages[t] = advantage
        returns = advantages + values
        rollout = Rollout(observations, begins, actions, log_probabilities, advantages, returns, counts, before)
        return rollout, finished


def loss_of(agent: Agent, rollout: Rollout) -> Tensor:
    """PPO's: clipped policy gradient, error of the values, and a bonus for entropy."""
    logits, values, _ = agent(rollout.observations, rollout.state, rollout.begins)
    policy = Categorical(logits=logits)
    counts = rollout.counts
    advantages = rollout.advantages[counts]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = torch.exp(policy.log_prob(rollout.actions)[counts] - rollout.log_probabilities[counts])
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    error = (values - rollout.returns)[counts].square().mean()
    return -gain + VALUE_WEIGHT * error - ENTROPY_BONUS * policy.entropy()[counts].mean()


class Training:
    """One agent with its carts, and what was recorded of it, update by update."""

    def __init__(self, name: str, agent_class: type[Agent], lstm_class: type[nn.RNNBase], args: argparse.Namespace):
        self.name, self.updates, self.device = name, args.updates, args.device
        torch.manual_seed(args.seed)  # of the initial weights
        self.agent = agent_class(lstm_class(len(VISIBLE), HIDDEN_SIZE)).to(self.device)
        self.random = torch.Generator(self.device).manual_seed(args.seed)
        self.carts = Carts(args.seed, self.device)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), LEARNING_RATE)
        self.losses: list[float] = []
        self.returns: list[float] = []  # means of the episodes that ended in a rollout
        self.acting_seconds: list[float] = []
        self.training_seconds: list[float] = []

    def update(self) -> None:
        started = self.clock()
        rollout, finished = self.carts.act(self.agent, self.random)
        acted = self.clock()
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - len(self.losses) / self.updates)
        losses = []
        for _ in range(EPOCHS):
            order = torch.randperm(ENVIRONMENTS, device=self.device, generator=self.random)
            for some in order.chunk(MINIBATCHES):
                loss = loss_of(self.agent, rollout.of(some))
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), MAX_GRADIENT)
                self.optimizer.step()
                losses.append(loss.detach())
        self.training_seconds.append(self.clock() - acted)
        self.acting_seconds.append(acted - started)
        self.losses.append(torch.stack(losses).mean().item())
        self.returns.append(float(np.mean(finished)) if finished else math.nan)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def agreement(ours: Training, theirs: Training) -> int:
    """For how many updates from the first one on losses and returns are equal up to rounding."""
    same = np.isclose(ours.losses, theirs.losses, rtol=1e-3, atol=1e-4)
    same &= np.isclose(ours.returns, theirs.returns, rtol=1e-6, equal_nan=True)
    return len(same) if same.all() else int(same.argmin())


def draw(trainings: tuple[Training, Training], where: str, out: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, times = figure.subplots(1, 2, width_ratios=(2, 1))
    colors = ("#d97706", "#1d4ed8")
    for training, color, width, style in zip(trainings, colors, (5, 1.8), ("-", "--"), strict=True):
        updates = range(1, len(training.returns) + 1)
        curves.plot(updates, training.returns, style, color=color, linewidth=width, label=training.name)
    together = agreement(*trainings)
    curves.axvspan(1, max(together, 1), color="#0000000d")
    curves.text(1.2, 0.97, "equal up to rounding", transform=curves.get_xaxis_transform(), va="top", color="0.35")
    curves.set(
        title="CartPole with velocities hidden: mean return of an episode",
        xlabel=f"update ({ENVIRONMENTS} carts x {STEPS} steps each)",
        xlim=(1, max(trainings[0].updates, 2)),
        ylim=(0, None),
    )
    curves.legend(loc="center left")
    for at, (training, color) in enumerate(zip(trainings, colors, strict=True)):
        acting, learning = sum(training.acting_seconds), sum(training.training_seconds)
        times.bar(at, acting, 0.6, color=color, alpha=0.45)
        times.bar(at, learning, 0.6, bottom=acting, color=color)
        times.text(at, acting / 2, f"acting {acting:.1f} s", ha="center", va="center")
        times.text(at, acting + learning / 2, f"training {learning:.1f} s", ha="center", va="center", color="white")
    times.set_xticks((0, 1), [training.name.replace(", ", ",\n") for training in trainings])
    times.set(title=f"Seconds, {where}", ylabel="seconds")
    for axes in (curves, times):
        axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, out, dpi=150)


@program(extra="examples")
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    picture = picture_file(FigureCanvasBase.get_supported_filetypes())
    parser.add_argument("--updates", type=whole(), default=40, help="rollouts, each followed by training on it")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=picture, default="recurrent_ppo_resets.png", help="where to draw the curves")
    args = parser.parse_args(argv)

    choose_threads(args.device, program=__name__ == "__main__")

    ours = Training("lstm_triton.LSTM, resets=", SequenceAgent, lstm_triton.LSTM, args)
    theirs = Training("nn.LSTM, step by step", Agent, nn.LSTM, args)
    print(f"{'':>6}  {ours.name:^27}  {theirs.name:^27}")
    print(f"update  {'loss':>12}  {'mean return':>13}  {'loss':>12}  {'mean return':>13}")
    for update in range(1, args.updates + 1):
        for training in (ours, theirs):
            training.update()
        row = (f"{each.losses[-1]:>+12.6f}  {each.returns[-1]:>13.2f}" for each in (ours, theirs))
        print(f"{update:>6}  {'  '.join(row)}", flush=True)

    together = agreement(ours, theirs)
    difference = max(map(abs, np.subtract(ours.losses, theirs.losses)[:together]), default=math.nan)
    print(f"\nequal up to rounding for the first {together} updates: their losses differ by {difference:.0e} at most")
    for training in (ours, theirs):
        acting, learning = sum(training.acting_seconds), sum(training.training_seconds)
        print(f"{training.name:<27} acting {acting:6.2f} s, training {learning:6.2f} s")
    ratio = sum(theirs.training_seconds) / sum(ours.training_seconds)
    where = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    path = lstm_triton.explain(ours.agent.lstm, torch.empty(STEPS, ENVIRONMENTS, len(VISIBLE), device="meta")).layers[0]
    print(f"training step by step takes {ratio:.2f} times as long ({where}; path {path.path!r}: {path.reason})")
    draw((ours, theirs), where, args.out)
    print(f"drawn into {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

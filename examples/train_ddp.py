"""Train on one machine or many, on CPUs or GPUs, with a checkpoint to go on from.

    torchrun --nproc-per-node 2 examples/train_ddp.py                        # one machine with a CPU, or two GPUs
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 examples/train_ddp.py

The task is the adding problem (Hochreiter & Schmidhuber, 1997): of a sequence of numbers, two are marked, and their sum
is asked for at the end. The processes share out each batch, so the same global batch gives the same training, to
rounding, whatever the number of processes.

Every `--save-every` steps the first process writes the weights, the optimizer and the number of steps into
`--checkpoint`, under another name first: whenever the run is killed, the file is a whole one. Started again with the
same command, the run goes on from there and ends bit by bit where it would have ended, on as many processes as before.

On GPUs: a scan of lstm_triton starts when all of its programs can run at once, so it waits for the multiprocessors that
a kernel of NCCL holds at that time. That costs the time of that kernel, and is no deadlock as long as every process
launches its work in the same order, as NCCL itself demands: then NCCL's kernels finish on their own.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lstm_triton
from lstm_triton.command_line import Parser, above_zero, check_memory, output_file, seed, whole
from lstm_triton.ending import Mistake, program


class Adder(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.lstm = lstm_triton.LSTM(2, hidden_size)
        self.sum = nn.Linear(hidden_size, 1)

    def forward(self, input: Tensor) -> Tensor:
        """(T, B, 2) -> (B,)"""
        output, _ = self.lstm(input)
        return self.sum(output[-1]).squeeze(1)


def adding_problem(time_steps: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences (T, B, 2) of a number and a mark, one marked in each half of a sequence, and the sums (B,)."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(time_steps, batch_size, generator=generator)
    marks = torch.zeros(time_steps, batch_size)
    half = time_steps // 2
    for begin, end in ((0, half), (half, time_steps)):
        marks.scatter_(0, torch.randint(begin, end, (1, batch_size), generator=generator), 1.0)
    return torch.stack((numbers, marks), dim=2), (numbers * marks).sum(0)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A whole file or none: it is renamed when all of it has been written."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        hidden = error.__context__  # by torch.save, whose RuntimeError does not tell why
        raise Mistake(f"cannot write {path}: {hidden if isinstance(hidden, OSError) else error}") from error


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """The number of steps that have been made."""
    if not path.exists():
        return 0
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])
    except Exception as error:  # whatever a file that is no checkpoint, or of another model, makes of it
        raise Mistake(f"--checkpoint {path} is no checkpoint of this model: {error}") from error


def train(options: argparse.Namespace) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if options.batch_size % world_size:
        raise Mistake(f"--batch-size must be a multiple of the {world_size} processes, got {options.batch_size}")
    weights = 4 * options.hidden_size * (options.hidden_size + 4)
    sequences = options.time_steps * options.batch_size * (3 + 8 * options.hidden_size // world_size)
    check_memory(4 * (4 * weights + sequences), device, "--hidden-size, --batch-size and --time-steps")

    torch.manual_seed(options.seed)
    model = Adder(options.hidden_size).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    first_step = load(options.checkpoint, model, optimizer, device)
    parallel = DistributedDataParallel(model)
    if rank == 0:
        print(f"{world_size} processes on {device.type}, from step {first_step} to {options.steps}", flush=True)

    for step in range(first_step + 1, options.steps + 1):
        # Made of the seed and the number of the step, the data go on where they stopped, too.
        sequences, sums = adding_problem(options.time_steps, options.batch_size, options.seed + step)
        share = slice(rank, None, world_size)
        loss = nn.functional.mse_loss(parallel(sequences[:, share].to(device)), sums[share].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if rank == 0:
            if step % options.print_every == 0:
                print(f"step {step}: loss of this process {loss.item():.4f}", flush=True)
            if step % options.save_every == 0 or step == options.steps:
                save(options.checkpoint, model, optimizer, step)

    if rank == 0:
        sequences, sums = adding_problem(options.time_steps, 500, options.seed)
        with torch.inference_mode():
            error = nn.functional.mse_loss(model(sequences.to(device)), sums.to(device))
        print(f"mean squared error on 500 other sequences: {error.item():.4f} (always answering 1: 0.1667)", flush=True)


@program(extra="examples")
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=whole(), default=600, help="of the optimizer, all in all")
    parser.add_argument("--batch-size", type=whole(), default=64, help="of all processes together")
    parser.add_argument("--time-steps", type=whole(2), default=30, help="a number is marked in each half of them")
    parser.add_argument("--hidden-size", type=whole(), default=64)
    parser.add_argument("--learning-rate", type=above_zero, default=1e-2)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--checkpoint", type=output_file, default="train_ddp.pt", help="on a disk that all machines see"
    )
    parser.add_argument("--save-every", type=whole(), default=50, metavar="STEPS")
    parser.add_argument("--print-every", type=whole(), default=50, metavar="STEPS")
    options = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/train_ddp.py")

    # torchrun ends its processes with SIGTERM, which has to work while they wait for each other outside of Python.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise Mistake(f"the processes do not find each other; start them with torchrun: {error}") from error
    train(options)
    dist.barrier()  # nobody leaves while others are at work
    backend = dist.get_backend()
    dist.destroy_process_group()
    if backend == "gloo":  # whose threads sometimes abort a process while Python takes itself apart
        sys.stdout.flush()
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())

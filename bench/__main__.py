"""`python -m bench contact | run | gpu | cache | tune | report | status`: see `--help` of each."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

START = time.monotonic()  # before the imports, which count towards a budget

from lstm_triton.command_line import Parser, above_zero, target_of, whole  # noqa: E402
from lstm_triton.ending import program  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("contact", "run", "gpu", "cache", "tune", "report", "status")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from . import cache, cases, devices, gpu, resources

    parser = Parser(
        prog="python -m bench",
        description="Is every case right, and how fast is it against every alternative?",
        epilog="grids: " + "; ".join(f"{name}: {grid.about}" for name, grid in cases.GRIDS.items()),
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    device = devices.default_device()
    defaults = argparse.ArgumentDefaultsHelpFormatter

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, formatter_class=defaults)

    run = add("run", "measure one grid in this process, on pytest-benchmark")
    run.add_argument("--grid", default="smoke", help=f"one of {', '.join(cases.GRIDS)}")
    run.add_argument("--device", default=device, help=f"one of {', '.join(devices.DEVICES)}")
    run.add_argument("--systems", help=f"some of {','.join(cases.SYSTEMS)}; otherwise those that the grid names")
    run.add_argument("--seconds", type=above_zero, default=0.3, help="how long to time each system in each case")
    run.add_argument("--out", type=Path, help="results file; rows of the same kernels and machine in it are kept")
    run.add_argument("--plugin", help="a module to import first, which may add to bench.systems.REGISTRY")

    everything = add(
        "gpu", "everything a GPU is needed for, within a budget; a later call goes on where this one stopped"
    )
    everything.add_argument("--budget", type=above_zero, required=True, help="seconds until the command has ended")
    everything.add_argument("--out", type=Path, required=True, help="folder of the results")
    everything.add_argument("--device", default="cuda", help="cuda; interpreter or cpu: a rehearsal at tiny sizes")
    everything.add_argument("--stages", default=",".join(gpu.STAGES), help="which, in this order")
    everything.add_argument(
        "--timeout", type=above_zero, default=90.0, help="seconds without a sign of life before a child is killed"
    )
    everything.add_argument("--seconds", type=above_zero, default=0.3, help="how long to time each system in each case")
    everything.add_argument(
        "--compilers",
        type=whole(0),
        help="processes that compile ahead; 0 where the kernel cache is filled (bench cache)",
    )
    everything.add_argument("--tests", default="tests", help="what pytest -m gpu is run on")
    everything.add_argument("--resume", type=Path, help="folder of an earlier call, to go on from in an empty --out")
    everything.add_argument(
        "--retry", action="store_true", help="run again what failed or was wrong with these kernels"
    )
    everything.add_argument(
        "--plugin", help="a module that every child imports first, which may add to bench.systems.REGISTRY"
    )

    contact = add("contact", "the first command for any GPU: is everything right, how fast is it, and if not, why?")
    contact.add_argument("--budget", type=above_zero, default=300.0, help="seconds until the command has ended")
    contact.add_argument("--out", type=Path, required=True, help="folder of the findings")
    contact.add_argument("--device", default="cuda", help="cuda, or interpreter: a rehearsal at tiny sizes")
    contact.add_argument("--seconds", type=above_zero, default=0.05, help="how long to time each system in each case")
    contact.add_argument(
        "--timeout", type=above_zero, default=30.0, help="seconds without a sign of life before a child is killed"
    )
    contact.add_argument("--tests", default="tests", help="what pytest -m gpu is run on; none: no tests")
    contact.add_argument("--plugin", help="a module that every child imports first")

    filled = add("cache", "compile, without a GPU, what a GPU machine will look up in Triton's cache, and pack it")
    archs = [name for name in resources.DEVICES if name.startswith("sm_")]
    filled.add_argument("--arch", default="sm_90", choices=archs, help="of the GPU")
    filled.add_argument(
        "--stages", default="headline,common,stacks", help=f"some of {','.join([*cache.STAGES, cache.TESTS])}"
    )
    filled.add_argument("--libtriton", type=Path, help="triton/_C/libtriton.so of the other machine's Triton")
    filled.add_argument("--jobs", type=whole(), default=os.cpu_count() or 1, help="processes that compile side by side")
    filled.add_argument("--out", type=Path, required=True, help="a .tar.xz, to be unpacked with `tar xJf FILE -C /`")

    tune = add("tune", "measure the planner's candidates and write the table of plans it prefers on this device")
    tune.add_argument("--hidden", type=whole(), nargs="+", default=[256, 512, 768, 1024], help="hidden sizes")
    tune.add_argument(
        "--batch", type=whole(), nargs="+", default=[1, 16, 64, 256], help="batch sizes, each with each hidden size"
    )
    tune.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float16", "tf32"], choices=cases.DTYPES, help="dtypes"
    )
    tune.add_argument("--steps", type=whole(), default=256, help="T of the timed layer")
    tune.add_argument(
        "--candidates", type=whole(), default=8, help="how many to run for each scan, most promising first"
    )
    tune.add_argument("--seconds", type=above_zero, default=0.2, help="how long to time each candidate")
    tune.add_argument("--budget", type=above_zero, default=540.0, help="seconds until the command has ended")
    tune.add_argument(
        "--timeout", type=above_zero, default=60.0, help="seconds without a sign of life before a child is killed"
    )
    tune.add_argument("--device", default="cuda", help="cuda, or interpreter to rehearse")
    tune.add_argument("--out", type=Path, help="the table; the one the planner reads if not given")

    report = add("report", "tables and pictures from results files, and the README's performance section")
    report.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the results files")
    report.add_argument("--out", type=Path, help="folder of the report; that of the results if not given")
    report.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the section to fill in")

    status = add("status", "which results belong to the kernels as they are, and what a GPU would be needed for")
    status.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the results files")
    return parser.parse_args(argv)


def run_tune(arguments: argparse.Namespace) -> int:
    import tempfile

    import torch

    from . import devices
    from .watchdog import MARGIN, Watchdog

    devices.require(arguments.device)
    if arguments.device == "cpu":
        raise devices.UnusableDevice("device 'cpu': the kernels do not run on it")
    from lstm_triton.scan.planner import table_path
    from lstm_triton.target import Device

    from .tune import tune

    device = Device.of(torch.device("cuda" if arguments.device == "cuda" else "cpu"))
    with tempfile.TemporaryDirectory(prefix="bench-tune-") as folder:
        deadline = START + arguments.budget - MARGIN
        watchdog = Watchdog(arguments.device, Path(folder) / "worker.log", deadline, arguments.timeout)
        return tune(
            [(hidden_size, batch_size) for hidden_size in arguments.hidden for batch_size in arguments.batch],
            arguments.dtype,
            watchdog,
            device,
            arguments.out or table_path(device),
            steps=arguments.steps,
            limit=arguments.candidates,
            seconds=arguments.seconds,
        )


def run_contact(arguments: argparse.Namespace) -> int:
    from . import devices
    from .contact import Contact, contact
    from .gpu import require_tests
    from .systems import require_plugin
    from .watchdog import MARGIN

    if arguments.device == "cpu":
        raise devices.UnusableDevice("device 'cpu': the kernels do not run on it; interpreter rehearses")
    require_plugin(arguments.plugin)
    if arguments.tests != "none":
        require_tests(arguments.tests)
    return contact(
        Contact(
            out=target_of(arguments.out),
            device_name=arguments.device,
            start=START,
            deadline=START + arguments.budget - MARGIN,
            seconds=arguments.seconds,
            silent=arguments.timeout,
            plugin=arguments.plugin,
            tests=None if arguments.tests == "none" else arguments.tests,
            processes=test_workers_of(arguments.device),
        )
    )


def test_workers_of(device: str) -> int:
    """How many processes run the gpu tests."""
    return min(max((os.cpu_count() or 1) - 4, 1), 10) if device == "cuda" else 1


def dispatch(arguments: argparse.Namespace) -> int:
    if arguments.command == "run":
        from .run import run

        return run(
            arguments.grid, arguments.device, arguments.systems, arguments.out, arguments.seconds, arguments.plugin
        )
    if arguments.command == "gpu":
        from . import cases, gpu
        from .systems import require_plugin
        from .watchdog import MARGIN, Watchdog

        stages = arguments.stages.split(",")
        if unknown := [stage for stage in stages if stage not in gpu.STAGES]:
            raise cases.UnknownName(f"unknown stage {unknown[0]!r}: choose from {', '.join(gpu.STAGES)}")
        require_plugin(arguments.plugin)
        if "tests" in stages:
            gpu.require_tests(arguments.tests)
        out = target_of(arguments.out)
        watchdog = Watchdog(
            arguments.device, out / "gpu.log", START + arguments.budget - MARGIN, arguments.timeout, arguments.plugin
        )
        session = gpu.Session(out, watchdog, arguments.seconds, arguments.tests, arguments.retry, START)
        if arguments.resume is not None:
            session.resume(arguments.resume)
        if arguments.device == "cuda":  # elsewhere nothing is compiled
            several = min((os.cpu_count() or 1) - 2, 12) if (os.cpu_count() or 1) >= 4 else 0
            session.compilers = several if arguments.compilers is None else arguments.compilers
            session.test_workers = test_workers_of(arguments.device)
        return gpu.gpu(session, [stage for stage in gpu.STAGES if stage in stages])
    if arguments.command == "contact":
        return run_contact(arguments)
    if arguments.command == "cache":
        from .cache import fill_and_pack

        stages = arguments.stages.split(",")
        return fill_and_pack(stages, arguments.arch, arguments.out, arguments.libtriton, arguments.jobs)
    if arguments.command == "tune":
        return run_tune(arguments)
    if arguments.command == "report":
        from .report import report

        return report(arguments.results, arguments.out or arguments.results, arguments.readme)
    from .report import status

    return status(arguments.results)


@program("python -m bench", extra="bench", commands=COMMANDS)
def main(argv: Sequence[str] | None = None) -> int:
    return dispatch(parse(argv))


if __name__ == "__main__":
    sys.exit(main())

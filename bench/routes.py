"""`python -m bench.routes --results FILE`: where nn.LSTM was faster, for `backend="auto"` (lstm_triton/routes.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lstm_triton.command_line import Parser, check_output_file
from lstm_triton.ending import program
from lstm_triton.routes import SLOWER, table_path_of
from lstm_triton.target import Device

from . import results
from .machine import Machine

# Where inference was not measured, the forward pass of training stands for it. It does a little more.
ROUTE_MODES = {"forward": "inference", "forward+backward": "training", "inference": "inference"}


def measured(machine: Machine) -> list[list[object]]:
    """[mode, dtype, H, B, time of the kernels / time of nn.LSTM] of single dense layers.

    If a layer was measured with several numbers of steps, the one with the most steps counts.
    """
    ratios: dict[tuple[str, str, int, int], tuple[bool, int, float]] = {}
    for comparison in machine.comparisons():
        case, faster = comparison.case, comparison.speedup
        single = case.layers == 1 and not case.bidirectional and case.layout == "dense" and not case.proj_size
        if not single or case.mode not in ROUTE_MODES or case.memory != "full" or case.T == 1 or faster is None:
            continue
        key = (ROUTE_MODES[case.mode], case.dtype, case.H, case.B)
        ratios[key] = max(ratios.get(key, (False, 0, 0.0)), (case.mode != "forward", case.T, round(1 / faster, 3)))
    return [[*key, ratio] for key, (_, _, ratio) in sorted(ratios.items())]


@program("python -m bench.routes", extra="bench")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.routes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="a results file of bench gpu")
    parser.add_argument("--out", type=Path, help="the file to write; otherwise the one that the library reads")
    chosen = parser.parse_args(arguments)
    machine = Machine(chosen.results, results.Results.read(chosen.results), slug="")
    device = Device(machine.results.provenance["gpu"], arch="", multiprocessors=0, shared_bytes=0)
    path = chosen.out or table_path_of(device)
    rows = measured(machine)
    results.require_writable(path.parent)
    check_output_file(path)
    results.write_atomically(path, "[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n")
    slower = [row for row in rows if float(str(row[-1])) >= SLOWER]
    print(f"{path}: {len(rows)} sizes, the kernels slower in {len(slower)}:")
    for row in slower:
        print("  ", *row)
    return 0


if __name__ == "__main__":
    sys.exit(main())

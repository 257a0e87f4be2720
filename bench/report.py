"""`python -m bench report` and `status`, from results files. Nothing is measured.

report writes tables, pictures and the README's performance section. status tells what is not measured yet.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from lstm_triton.command_line import target_of

from . import cases, journal, results
from .cases import Row
from .machine import Machine, load, speedup
from .results import ResultsError
from .run import MissingPackage

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COMMAND = "python -m bench gpu --budget 600 --out DIR"


# Figures as text


def microseconds(value: float | None) -> str:
    if value is None:
        return ""
    for limit, unit, factor in ((1e3, "us", 1.0), (1e6, "ms", 1e3), (math.inf, "s", 1e6)):
        if value < limit:
            return f"{value / factor:.3g} {unit}"
    return ""


def mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f} MiB" if value >= 2**18 else f"{value / 2**10:.1f} KiB"


def speedup_text(value: float | None) -> str:
    """A speed-up. A loss is as easy to see as a win."""
    if value is None:
        return ""
    return f"**{value:.2f}x**" if value >= 1 else f"**{value:.2f}x (slower)**"


def time_text(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return f"{row['status']}"
    if row["median_us"] is None:
        return "values right"
    return f"{microseconds(row['median_us'])} ({microseconds(row['p20_us'])} .. {microseconds(row['p80_us'])})"


def error_text(row: Row | None) -> str:
    return "" if row is None or row["error"] is None else f"{row['error']:.1e}"


def fraction_of_floor(row: Row | None) -> str:
    if row is None or not row["median_us"] or not row["floor_us"]:
        return ""
    return f"{100 * row['floor_us'] / row['median_us']:.0f} %"


def markdown_table(head: list[str], lines: Iterable[list[str]]) -> str:
    """A table in Markdown, without columns that are empty in every line."""
    lines = list(lines)
    kept = [column for column in range(len(head)) if any(line[column] for line in lines)]

    def render(cells: list[str]) -> str:
        return "| " + " | ".join(cells[column].replace("|", "\\|") for column in kept) + " |"

    return "\n".join([render(head), "|" + " --- |" * len(kept), *map(render, lines)])


# Parts of the report


def facts(machine: Machine) -> str:
    origin = machine.results.provenance
    names = {"driver": "driver", "torch": "PyTorch", "triton": "Triton", "cudnn": "cuDNN", "commit": "commit"}
    parts = [f"{names[key]} {origin[key]}" for key in names if origin[key] is not None]
    parts += [f"kernels {origin['kernel_hash']}", str(origin["date"])]
    if rates := origin.get("rates"):
        products = ", ".join(f"{dtype} {rate:g}" for dtype, rate in rates["product_tflops"].items())
        parts.append(f"measured rates: products in TFLOP/s: {products}; copy {rates['copy_gbps']:g} GB/s")
    return "; ".join(parts) + "."


def verdicts(machine: Machine) -> str:
    """Wins and losses against nn.LSTM in one paragraph."""
    comparisons = machine.comparisons()
    if not comparisons:
        return "lstm_triton was not measured."
    counts: dict[str, int] = {}
    for comparison in comparisons:
        counts[comparison.verdict] = counts.get(comparison.verdict, 0) + 1
    order = ("faster", "no different", "slower", "wrong", "error", "timeout", "not compared")
    text = f"lstm_triton against nn.LSTM in {len(comparisons)} cases: "
    text += ", ".join(f"**{counts[verdict]} {verdict}**" for verdict in order if verdict in counts) + "."
    timed = sorted(
        ((comparison.speedup, comparison) for comparison in comparisons if comparison.speedup is not None),
        key=lambda pair: pair[0],
    )
    if timed:
        mean = math.exp(sum(math.log(value) for value, _ in timed) / len(timed))
        worst, best = timed[0], timed[-1]
        text += f" Geometric mean {mean:.2f}x; best {best[0]:.2f}x ({best[1].case}), "
        text += f"worst {worst[0]:.2f}x ({worst[1].case})."
    return text


def losses(machine: Machine) -> str:
    """All cases in which lstm_triton is slower, wrong, or gives nothing, the worst first."""
    bad = [
        comparison
        for comparison in machine.comparisons()
        if comparison.verdict not in ("faster", "no different", "not compared")
    ]
    if not bad:
        return "None."
    bad.sort(key=lambda comparison: comparison.speedup or 0.0)
    head = ["grid", "case", "lstm_triton", "nn.LSTM", "speed-up", "message"]
    lines = []
    for one in bad:
        times = [time_text(one.ours), time_text(one.baseline)]
        lines.append([one.grid, str(one.case), *times, speedup_text(one.speedup), one.ours["message"]])
    return markdown_table(head, lines)


def grid_table(machine: Machine, grid: str) -> str:
    """All cases and systems of a grid."""
    by_case = machine.rows_by_case(grid)
    names = [name for name in cases.SYSTEMS if any(name in rows for rows in by_case.values())]
    peers = [name for name in names if name != cases.OURS]
    head = ["case", "dtype", "mode", cases.OURS, *peers, "lstm_triton against nn.LSTM", "of the floor"]
    head += ["error", "nn.LSTM's error", "kept for backward", "nn.LSTM's", "peak", "nn.LSTM's", "notes"]
    lines = []
    for (_, case), rows in by_case.items():
        ours, baseline = rows.get(cases.OURS), rows.get(cases.BASELINE)
        line = [case.shape, case.dtype, case.mode, time_text(ours), *(time_text(rows.get(name)) for name in peers)]
        line += [speedup_text(speedup(ours, baseline)), fraction_of_floor(ours), error_text(ours), error_text(baseline)]
        for key in ("kept_bytes", "peak_bytes"):
            line += [mebibytes(None if row is None else row[key]) for row in (ours, baseline)]
        line.append("; ".join(f"{name}: {row['message']}" for name, row in rows.items() if row["message"]))
        lines.append(line)
    return markdown_table(head, lines)


def test_outcomes(machine: Machine) -> str:
    """The outcomes of `pytest -m gpu`, of the call of `bench gpu` that wrote the results file."""
    entries = journal.read(machine.path.parent / "gpu-tests.jsonl")
    header = {key: machine.results.provenance[key] for key in ("kernel_hash", "gpu")}
    if not entries or entries[0] != header:
        return ""
    outcomes = list(journal.outcomes_of(entries).values())
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
    unfinished = "" if any("end" in entry for entry in entries) else " (not all were run)"
    return f"GPU tests: {counts or 'none'}{unfinished}."


def machine_section(machine: Machine, pictures: dict[str, Path], out: Path) -> str:
    parts = [f"## {machine.name}"]
    parts += [f"> **{machine.warning}.**"] if machine.warning else []
    parts += [facts(machine), test_outcomes(machine), verdicts(machine)]
    parts += [f"![{title}]({os.path.relpath(path, out)})" for title, path in pictures.items()]
    parts += ["### Where lstm_triton is slower, wrong or gives nothing", losses(machine)]
    grids = list(dict.fromkeys(row["grid"] for row in machine.results.rows))
    for grid in sorted(
        grids, key=lambda name: list(cases.GRIDS).index(name) if name in cases.GRIDS else len(cases.GRIDS)
    ):
        about = cases.GRIDS[grid].about if grid in cases.GRIDS else ""
        parts += [f"### {grid}", f"{about[:1].upper()}{about[1:]}." if about else "", grid_table(machine, grid)]
    return "\n\n".join(part for part in parts if part)


EXPLANATION = """\
Times are medians, with the range from 20 % to 80 % of the samples. A system is timed in a case only if its values are
right: its largest relative error against float64, over results and gradients, is at most twice that of nn.LSTM in the
same dtype (or four units of that dtype's rounding, where nn.LSTM is nearer than that). lstm_triton and nn.LSTM are
measured in one process, in turns. "No different": the two ranges overlap. "Of the floor" is the floor over the time,
and the floor the largest of what the exchange between programs alone takes, the products at the device's measured
rate, and the tensors' bytes at its measured copying rate. It can be above 100 %: without arithmetic, the exchange alone
is out of step with what its programs wait for."""


def report_text(machines: list[Machine], pictures: dict[Path, dict[str, Path]], out: Path) -> str:
    parts = ["# Results", "Written by `python -m bench report` from the JSON files; change those, not this."]
    if not any(machine.on_gpu for machine in machines):
        parts.append(f"No GPU has been measured yet. `{COMMAND}` does that.")
    parts += [EXPLANATION] if machines else []
    parts += [machine_section(machine, pictures[machine.path], out) for machine in machines]
    return "\n\n".join(parts) + "\n"


def headline_table(machine: Machine) -> str:
    """FlashRNN's case in every dtype and mode, microseconds per step."""
    blocks = cases.GRIDS["headline"].blocks[:1]
    wanted = {case for block in blocks for case in block.cases}
    shown = {key: rows for key, rows in machine.rows_by_case("headline").items() if key[1] in wanted}
    names = [
        name for name in cases.SYSTEMS if any(name in rows and rows[name]["status"] == "ok" for rows in shown.values())
    ]
    names = [name for name in names if name != cases.FLOOR]

    def step(case: cases.BenchCase, row: Row | None) -> str:
        if row is None:
            return ""
        return f"{row['median_us'] / case.T:.2f}" if row["status"] == "ok" else row["status"]

    lines = [
        [
            case.dtype,
            case.mode,
            *(step(case, rows.get(name)) for name in names),
            speedup_text(speedup(rows.get(cases.OURS), rows.get(cases.BASELINE))),
            fraction_of_floor(rows.get(cases.OURS)),
        ]
        for (_, case), rows in shown.items()
    ]
    head = ["dtype", "mode", *names, "lstm_triton against nn.LSTM", "of the floor"]
    return markdown_table(head, lines) if lines else ""


def readme_section(machines: list[Machine], pictures: dict[Path, dict[str, Path]], out: Path, readme: Path) -> str:
    """The README's section: GPUs measured with these kernels.

    Where there are none, the section says so. Then it shows other machines, with a warning.
    """
    link = os.path.relpath(out / "README.md", readme.resolve().parent)
    chosen = [machine for machine in machines if machine.on_gpu and machine.current]
    parts = []
    if not chosen:
        parts.append(f"No GPU has been measured with these kernels yet; `{COMMAND}` does that.")
        chosen = [machine for machine in machines if machine.on_gpu] or machines
    for machine in chosen:
        parts.append(f"**{machine.name}**" + (f" ({machine.warning})" if machine.warning else ""))
        if headline := headline_table(machine):
            parts += ["Microseconds per step, one layer, T=1024, B=16, H=768 (FlashRNN's published case):", headline]
        parts.append(verdicts(machine))
        for title, path in pictures[machine.path].items():
            parts.append(f"![{machine.name}: {title}]({os.path.relpath(path, readme.resolve().parent)})")
    if machines:
        parts.append(f"All figures, the losses too: [{link}]({link}).")
    return "\n\n".join(parts)


def fill_in(readme: Path, section: str) -> str:
    """The text of the file with the section between the markers. Raises ResultsError where there are no markers."""
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot read {readme}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"{readme} is no text in UTF-8: {error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ResultsError(f"{readme} needs the lines {BEGIN} and {END}, once each, for the section")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def report(folder: Path, out: Path, readme: Path, say: Callable[[str], None] = print) -> int:
    """`python -m bench report`: write the report on a folder's results files, and the section in the README."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage("report needs the package matplotlib: pip install '.[bench]'")
    from . import pictures

    machines = load(folder)
    fill_in(readme, "")  # before anything is written
    results.require_writable(out)
    drawn = {machine.path: pictures.draw(machine, target_of(out)) for machine in machines}
    results.write_atomically(out / "README.md", report_text(machines, drawn, target_of(out)))
    results.write_atomically(readme, fill_in(readme, readme_section(machines, drawn, target_of(out), readme)))
    count = sum(len(found) for found in drawn.values())
    say(f"{len(machines)} results files, {count} pictures: {out / 'README.md'}; section in {readme}")
    return 0


def status(folder: Path) -> int:
    """`python -m bench status`: print which results are of these kernels, and what is not measured yet."""
    machines = load(folder) if folder.exists() else []
    for machine in machines:
        origin = machine.results.provenance
        fits = "these kernels" if machine.current else f"other kernels ({origin['kernel_hash']})"
        counts = Counter(row["status"] for row in machine.results.rows)
        statuses = ", ".join(f"{number} {name}" for name, number in counts.items()) or "no rows"
        print(f"{machine.path.relative_to(folder)}: {machine.name}, {origin['date']}, {fits}: {statuses}")
        if outcomes := test_outcomes(machine):
            print(f"  {outcomes}")
    if not machines:
        print(f"no results files in {folder}")
    current = [machine for machine in machines if machine.on_gpu and machine.current]
    print("a GPU is needed for:")
    needed = False
    if not any("not all" not in outcomes for machine in current if (outcomes := test_outcomes(machine))):
        needed = True
        print("  tests: pytest -m gpu has not been run to its end with these kernels")
    for name, grid in cases.GRIDS.items():
        if name == "smoke":
            continue
        wanted = {case for case, _ in grid}
        measured = {
            case
            for machine in current
            for (_, case), rows in machine.rows_by_case(name).items()
            if cases.OURS in rows and rows[cases.OURS]["status"] != "missing"
        }
        if absent := len(wanted - measured):
            needed = True
            print(f"  {name}: {absent} of {len(wanted)} cases are not measured with these kernels ({grid.about})")
    print(f"  `{COMMAND}` does it" if needed else "  nothing")
    return 0

"""The report's pictures. Each is about cases that differ only in what it shows: the largest set of such cases."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from . import cases
from .cases import BASELINE, FLOOR, MODES, OURS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .report import Machine

STYLE = {
    OURS: ("#1b6ca8", "o", "-"),
    BASELINE: ("#d9822b", "s", "-"),
    "nn.LSTM+compile": ("#5a9e4b", "^", "-"),
    "flashrnn-triton": ("#8e63b8", "v", "-"),
    "flashrnn-cuda": ("#c2477f", "D", "-"),
    "torchrl-triton": ("#8a6d4f", "P", "-"),
    "floor": ("#555555", "", "--"),
}
PANEL = (4.0, 3.3)  # inches
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.dpi": 110,
}

Rows = dict[cases.Case, dict[str, Row]]  # case -> system -> row


def plain(machine: Machine) -> Rows:
    """Timed cases of one dense layer in one direction, I = H where there are such: what the pictures are about."""
    chosen: Rows = {}
    for (grid, case), rows in machine.rows_by_case().items():
        timed = grid not in cases.GRIDS or cases.GRIDS[grid].timed
        simple = case.layers == 1 and not case.bidirectional and case.layout == "dense" and not case.proj_size
        if timed and simple:
            chosen.setdefault(case, {}).update(rows)
    square = {case: rows for case, rows in chosen.items() if case.I == case.H}
    return square or chosen


def fullest(rows: Rows, fixed: Callable[[cases.Case], tuple[int, ...]]) -> Rows:
    """Of the sets of cases that agree in `fixed`, the one with the most cases (the largest if several)."""
    sets: dict[tuple[int, ...], Rows] = defaultdict(dict)
    for case, systems in rows.items():
        sets[fixed(case)][case] = systems
    return max(sets.values(), key=lambda one: (len(one), max(case.T * case.B * case.H for case in one))) if sets else {}


def panels(
    machine: Machine, title: str, rows: Rows, modes: list[str], dtypes: list[str]
) -> tuple[Figure, Iterator[tuple[Axes, Rows]]]:
    """A figure with a panel for each mode (down) and dtype (across), and (panel, its rows) for each."""
    figure = Figure(figsize=(PANEL[0] * max(2, len(dtypes)), PANEL[1] * len(modes) + 0.9), layout="constrained")
    grid = figure.subplots(len(modes), len(dtypes), squeeze=False, sharey="row")
    name = f"{title}: {machine.name}"
    figure.suptitle(
        f"{name}\n{machine.warning}" if machine.warning else name,
        fontweight="bold",
        fontsize=12,
        color="#b3261e" if machine.warning else "black",
    )

    def each() -> Iterator[tuple[Axes, Rows]]:
        for mode, line in zip(modes, grid, strict=True):
            for dtype, axes in zip(dtypes, line, strict=True):
                axes.set_title(f"{dtype}, {mode}")
                yield axes, {case: one for case, one in rows.items() if (case.mode, case.dtype) == (mode, dtype)}

    return figure, each()


def present(rows: Rows, shown: Callable[[cases.Case], object]) -> tuple[list[str], list[str]]:
    """The modes (training first) and dtypes worth a panel: more than one point, and a quarter of the fullest's."""
    points = {case: shown(case) for case in rows}

    def worth(names: tuple[str, ...], name_of: Callable[[cases.Case], str]) -> list[str]:
        counts = {name: len({points[case] for case in rows if name_of(case) == name}) for name in names}
        most = max(counts.values())
        return [name for name in names if 4 * counts[name] > most and (counts[name] > 1 or most == 1)]

    return worth((MODES[1], MODES[0], MODES[2]), lambda case: case.mode)[:2], worth(
        cases.DTYPES, lambda case: case.dtype
    )


def time_of(systems: dict[str, Row], name: str) -> float | None:
    row = systems.get(name)
    return row["median_us"] if row is not None and row["status"] == "ok" else None


def draw_speedup(machine: Machine) -> Figure | None:
    """Heat map: lstm_triton against nn.LSTM, hidden size by batch size."""
    rows = plain(machine)
    rows = {case: systems for case, systems in rows.items() if OURS in systems}
    rows = fullest(rows, lambda case: (case.T,))
    if not rows:
        return None
    modes, dtypes = present(rows, lambda case: (case.H, case.B))
    hidden = sorted({case.H for case in rows})
    batches = sorted({case.B for case in rows})
    length = next(iter(rows)).T
    figure, each = panels(machine, f"Speed-up over nn.LSTM, T={length}", rows, modes, dtypes)
    figure.set_size_inches(
        max(3.2, 0.5 * len(batches) + 0.8) * max(2, len(dtypes)) + 1.2, (0.3 * len(hidden) + 1.1) * len(modes) + 0.9
    )
    colours = mpl.colormaps["RdBu"].with_extremes(bad="#ececec")
    norm = TwoSlopeNorm(0.0, -2.0, 2.0)
    for axes, shown in each:
        values = [[math.nan] * len(batches) for _ in hidden]
        words = [[""] * len(batches) for _ in hidden]
        for case, systems in shown.items():
            y, x = hidden.index(case.H), batches.index(case.B)
            ours, baseline = time_of(systems, OURS), time_of(systems, BASELINE)
            if ours and baseline:
                values[y][x] = math.log2(baseline / ours)
                words[y][x] = f"{baseline / ours:.2f}"
            else:
                words[y][x] = systems[OURS]["status"] if systems[OURS]["status"] != "ok" else "?"
        image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", origin="lower")
        for y, line in enumerate(words):
            for x, word in enumerate(line):
                dark = abs(values[y][x]) > 1.2
                axes.text(x, y, word, ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
        axes.set(xticks=range(len(batches)), xticklabels=batches, yticks=range(len(hidden)), yticklabels=hidden)
        axes.set(xlabel="batch size B", ylabel="hidden size H")
        axes.label_outer()
        axes.grid(False)
        axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, aspect=30, pad=0.01, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["4x slower", "2x slower", "equal", "2x faster", "4x faster"])
    bar.outline.set_visible(False)
    return figure


def draw_lines(
    axes: Axes,
    rows: Rows,
    x: Callable[[cases.Case], int],
    figures: dict[str, Callable[[cases.Case, Row], float | None]],
) -> None:
    """A line for each of `figures`: (system, or "floor") -> what its row says of a case."""
    ticks: set[int] = set()
    for name, value in figures.items():
        points = []
        for case, systems in rows.items():
            row = systems.get(OURS if name == "floor" else name)
            if row is not None and (row["status"] == "ok" or name == "floor") and (y := value(case, row)):
                points.append((x(case), y))
        if points:
            colour, marker, line = STYLE[name]
            axes.plot(
                *zip(*sorted(points), strict=True),
                line,
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=1.6,
                label=name,
            )
            ticks |= {point[0] for point in points}
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)], rotation=45 if len(ticks) > 6 else 0)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda tick, _: f"{tick:g}")


def with_legend(figure: Figure) -> Figure:
    """One legend for all panels, below them."""
    found = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found))
    return figure


def timed(rows: Rows) -> list[str]:
    """The systems that have a time anywhere."""
    return [
        name for name in cases.SYSTEMS if name != FLOOR and any(time_of(systems, name) for systems in rows.values())
    ]


def draw_steps(machine: Machine) -> Figure | None:
    """Microseconds per step over the hidden size, with the floor."""
    rows = fullest(plain(machine), lambda case: (case.T, case.B))
    if not timed(rows):
        return None
    modes, dtypes = present(rows, lambda case: case.H)
    first = next(iter(rows))
    figure, each = panels(machine, f"Time per step over H, T={first.T}, B={first.B}", rows, modes, dtypes)
    for axes, shown in each:
        lines = {name: lambda case, row: row["median_us"] and row["median_us"] / case.T for name in timed(rows)}
        draw_lines(
            axes,
            shown,
            lambda case: case.H,
            lines | {"floor": lambda case, row: row["floor_us"] and row["floor_us"] / case.T},
        )
        axes.set(xlabel="hidden size H")
    figure.supylabel("us per step", fontsize=10)
    return with_legend(figure)


def draw_lengths(machine: Machine) -> Figure | None:
    """Time over T."""
    rows = fullest(plain(machine), lambda case: (case.H, case.B))
    if not timed(rows):
        return None
    modes, dtypes = present(rows, lambda case: case.T)
    first = next(iter(rows))
    figure, each = panels(machine, f"Time over T, B={first.B}, H={first.H}", rows, modes, dtypes)
    for axes, shown in each:
        lines = {name: lambda case, row: row["median_us"] and row["median_us"] / 1e3 for name in timed(rows)}
        draw_lines(
            axes,
            shown,
            lambda case: case.T,
            lines | {"floor": lambda case, row: row["floor_us"] and row["floor_us"] / 1e3},
        )
        axes.set(xlabel="steps T")
    figure.supylabel("ms", fontsize=10)
    return with_legend(figure)


def draw_memory(machine: Machine) -> Figure | None:
    """What stays allocated between forward and backward (solid), and the peak (dotted), over T."""
    rows = {case: systems for case, systems in plain(machine).items() if case.backward}
    rows = {
        case: systems
        for case, systems in rows.items()
        if any(row["kept_bytes"] is not None for row in systems.values())
    }
    rows = fullest(rows, lambda case: (case.H, case.B))
    if not rows:
        return None
    modes, dtypes = present(rows, lambda case: case.T)
    first = next(iter(rows))
    figure, each = panels(machine, f"Memory over T, B={first.B}, H={first.H} (dotted: peak)", rows, modes, dtypes)
    for axes, shown in each:
        lines = {name: lambda case, row: row["peak_bytes"] and row["peak_bytes"] / 2**20 for name in timed(rows)}
        draw_lines(axes, shown, lambda case: case.T, lines)
        for line in axes.lines:
            line.set(linestyle=":", label="_nolegend_", markersize=0)
        lines = {name: lambda case, row: row["kept_bytes"] and row["kept_bytes"] / 2**20 for name in timed(rows)}
        draw_lines(axes, shown, lambda case: case.T, lines)
        axes.set(xlabel="steps T")
    figure.supylabel("MiB", fontsize=10)
    return with_legend(figure)


PICTURES = {
    "speed-up over nn.LSTM": ("speedup", draw_speedup),
    "time per step over the hidden size": ("steps", draw_steps),
    "time over the length": ("lengths", draw_lengths),
    "memory over the length": ("memory", draw_memory),
}


def draw(machine: Machine, out: Path) -> dict[str, Path]:
    """Title -> PNG file, for the pictures that there are figures for."""
    drawn = {}
    with mpl.rc_context(SETTINGS):
        for title, (name, function) in PICTURES.items():
            figure = function(machine)
            if figure is not None:
                path = out / f"{machine.slug}-{name}.png"
                figure.savefig(path, metadata={"Software": None})  # the same rows give the same file
                drawn[title] = path
    return drawn

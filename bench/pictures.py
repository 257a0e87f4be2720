"""The pictures of the report. A picture shows the largest set of cases that differ only in what the picture shows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lstm_triton.command_line import whole_file

from . import cases
from .cases import BASELINE, MODES, OURS
from .machine import Machine, Rows, time_of, timed_systems

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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

Points = tuple[list[int], list[float]]  # sizes, and a figure for each


def plain(machine: Machine) -> Rows:
    """The cases that pictures show: timed ones of a dense layer in one direction, those with I = H if there are any."""
    chosen: Rows = {}
    for (grid, case), rows in machine.rows_by_case().items():
        timed = grid not in cases.GRIDS or cases.GRIDS[grid].timed
        simple = case.layers == 1 and not case.bidirectional and case.layout == "dense" and not case.proj_size
        if timed and simple:
            chosen.setdefault(case, {}).update(rows)
    square = {case: rows for case, rows in chosen.items() if case.I == case.H}
    return square or chosen


def fullest(rows: Rows, fixed: Callable[[cases.BenchCase], tuple[int, ...]]) -> Rows:
    """Among the sets of cases that agree in `fixed`, the one with the most cases; of equal ones the larger."""
    sets: dict[tuple[int, ...], Rows] = defaultdict(dict)
    for case, systems in rows.items():
        sets[fixed(case)][case] = systems
    return max(sets.values(), key=lambda one: (len(one), max(case.T * case.B * case.H for case in one))) if sets else {}


def panels(
    machine: Machine, title: str, rows: Rows, modes: list[str], dtypes: list[str]
) -> tuple[Figure, Iterator[tuple[Axes, Rows]]]:
    """A figure with a panel for each mode (down) and dtype (across), and (panel, rows) of each panel."""
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


def present(rows: Rows, shown: Callable[[cases.BenchCase], object]) -> tuple[list[str], list[str]]:
    """The modes (training first) and dtypes that get panels.

    A panel has more than one point, and more than a quarter of the points that the fullest has.
    """
    points = {case: shown(case) for case in rows}

    def worth(names: tuple[str, ...], name_of: Callable[[cases.BenchCase], str]) -> list[str]:
        counts = {name: len({points[case] for case in rows if name_of(case) == name}) for name in names}
        most = max(counts.values())
        return [name for name in names if 4 * counts[name] > most and (counts[name] > 1 or most == 1)]

    return worth((MODES[1], MODES[0], MODES[2]), lambda case: case.mode)[:2], worth(
        cases.DTYPES, lambda case: case.dtype
    )


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


@dataclass(frozen=True)
class LinePicture:
    """Lines over one size of the cases: one line for each system, and one for the floor.

    Attributes:
        title: names in braces the sizes in which all cases agree.
        agree: these sizes, fields of BenchCase.
        over: the size on the x axis, a field of BenchCase.
        x_label: the label of the x axis.
        y_label: the label of the y axis.
        unit: the figures of a case are divided by it.
        solid: the key of a row whose figures are the system's solid line.
        dotted: the key of a row whose figures are the system's dotted line.
        floor: the key of a row of lstm_triton whose figures are the line of the floor.
        modes: only cases in these modes are shown.
    """

    title: str
    agree: tuple[str, ...]
    over: str
    x_label: str
    y_label: str
    unit: Callable[[cases.BenchCase], float]
    solid: str
    dotted: str | None = None
    floor: str | None = None
    modes: tuple[str, ...] = MODES

    def size(self, case: cases.BenchCase) -> int:
        return int(getattr(case, self.over))

    def draw(self, machine: Machine) -> Figure | None:
        """The figure. None where nothing was measured."""
        rows = {case: systems for case, systems in plain(machine).items() if case.mode in self.modes}
        rows = {
            case: systems
            for case, systems in rows.items()
            if any(row[self.solid] is not None for row in systems.values())
        }
        rows = fullest(rows, lambda case: tuple(getattr(case, name) for name in self.agree))
        systems = timed_systems(rows)
        if not systems:
            return None
        modes, dtypes = present(rows, self.size)
        title = self.title.format_map(asdict(next(iter(rows))))
        figure, each = panels(machine, title, rows, modes, dtypes)
        for axes, shown in each:
            ticks: set[int] = set()
            for (sizes, figures), style in self.lines(shown, systems):
                if sizes:
                    axes.plot(sizes, figures, linewidth=1.6, **style)
                    ticks.update(sizes)
            scale_axes(axes, sorted(ticks))
            axes.set(xlabel=self.x_label)
        figure.supylabel(self.y_label, fontsize=10)
        return with_legend(figure)

    def lines(self, rows: Rows, systems: list[str]) -> Iterator[tuple[Points, dict[str, Any]]]:
        """The points and the style of every line."""
        if self.dotted is not None:
            for name in systems:
                yield self.points(rows, name, self.dotted), {"color": STYLE[name][0], "linestyle": ":"}
        for name in systems:
            yield self.points(rows, name, self.solid), style_of(name)
        if self.floor is not None:
            yield self.points(rows, OURS, self.floor, right_only=False), style_of("floor")

    def points(self, rows: Rows, system: str, key: str, right_only: bool = True) -> Points:
        """The points of a system's line. right_only: leave out cases in which the system is not right."""
        points = []
        for case, systems in rows.items():
            row = systems.get(system)
            if row is not None and row[key] and (row["status"] == "ok" or not right_only):
                points.append((self.size(case), row[key] / self.unit(case)))
        points.sort()
        return [x for x, _ in points], [y for _, y in points]


def style_of(name: str) -> dict[str, Any]:
    """The style of a line that the legend names: a system or the floor."""
    colour, marker, line = STYLE[name]
    return {"color": colour, "marker": marker, "markersize": 4.5, "linestyle": line, "label": name}


def scale_axes(axes: Axes, ticks: list[int]) -> None:
    """Logarithmic axes, with a tick at each size that was measured."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
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


PICTURES: dict[str, tuple[str, Callable[[Machine], Figure | None]]] = {
    "speed-up over nn.LSTM": ("speedup", draw_speedup),
    "time per step over the hidden size": ("steps", LinePicture(
        "Time per step over H, T={T}, B={B}", agree=("T", "B"), over="H", x_label="hidden size H",
        y_label="us per step", unit=lambda case: case.T, solid="median_us", floor="floor_us",
    ).draw),
    "time over the length": ("lengths", LinePicture(
        "Time over T, B={B}, H={H}", agree=("H", "B"), over="T", x_label="steps T",
        y_label="ms", unit=lambda case: 1e3, solid="median_us", floor="floor_us",
    ).draw),
    # What stays allocated between forward and backward, and the peak.
    "memory over the length": ("memory", LinePicture(
        "Memory over T, B={B}, H={H} (dotted: peak)", agree=("H", "B"), over="T", x_label="steps T",
        y_label="MiB", unit=lambda case: 2**20, solid="kept_bytes", dotted="peak_bytes", modes=("forward+backward",),
    ).draw),
}  # fmt: skip


def draw(machine: Machine, out: Path) -> dict[str, Path]:
    """Draw the pictures for which there are figures. Returns title -> PNG file."""
    drawn = {}
    with mpl.rc_context(SETTINGS):
        for title, (name, function) in PICTURES.items():
            figure = function(machine)
            if figure is not None:
                path = out / f"{machine.slug}-{name}.png"
                with whole_file(path) as file:
                    figure.savefig(file, metadata={"Software": None})  # the same rows give the same file
                drawn[title] = path
    return drawn

"""Pictures of gates and memories over time. This file imports matplotlib, so only `Trace.plot` imports this file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

MOST_LINES = 4  # hidden units side by side; more become heat maps
MARKED_STEPS = 40  # with more steps, markers would hide the lines

# The order, the names and the meaning of the gates and memories, in all pictures.
GATES = {
    "forget_gate": ("forget gate", "how much of the long-term memory is kept", "#c8553d"),
    "input_gate": ("input gate", "how much of the potential memory is added", "#2a7f62"),
    "output_gate": ("output gate", "how much becomes the new short-term memory", "#2f5d9b"),
}
MEMORIES = {
    "candidate": ("potential memory", "what could be added", "#8fae3c"),
    "cell_state": ("long-term memory", "the cell state c", "#c8553d"),
    "hidden_state": ("short-term memory", "the hidden state h, the output", "#2f5d9b"),
}


def draw(tensors: Mapping[str, Tensor], units: Sequence[int], title: str) -> Figure:
    """Draw one sequence of a layer: lines for a few units, heat maps for many units.

    Args:
        tensors: by the names in GATES and MEMORIES, (steps, H); "hidden_state" may be projected, (steps, P).
        units: the hidden units to draw.
    """
    values = {name: tensors[name].detach().to("cpu", torch.float64).numpy() for name in (*GATES, *MEMORIES)}
    steps, hidden_size = values["cell_state"].shape
    projected = values["hidden_state"].shape[1] != hidden_size
    for name in values:
        if name != "hidden_state" or not projected:  # a projected feature belongs to no unit
            values[name] = values[name][:, list(units)]
    as_lines = len(units) <= MOST_LINES and not projected
    figure = _lines(values, steps, units) if as_lines else _heat_maps(values, steps, units, projected)
    figure.suptitle(title, fontsize=13)
    return figure


def _lines(values: dict[str, NDArray[Any]], steps: int, units: Sequence[int]) -> Figure:
    """The gates above, the memories below, a column for each unit."""
    figure = Figure(figsize=(max(8.5, 1.5 + 3.6 * len(units)), 7.5), layout="constrained")
    grid = figure.add_gridspec(4, len(units), height_ratios=[0.28, 1, 0.28, 1])
    style = {"marker": "o"} if steps <= MARKED_STEPS else {"linewidth": 1.2}
    for row, kinds in ((1, GATES), (3, MEMORIES)):
        first: Axes | None = None  # of the row
        for column, unit in enumerate(units):
            axes = first = figure.add_subplot(grid[row, column], sharex=first, sharey=first)
            for name, (label, meaning, color) in kinds.items():
                dots: dict[str, Any] = {"linestyle": ":"} if name == "candidate" else {}
                line = values[name][:, column]
                axes.plot(range(steps), line, color=color, label=f"{label}: {meaning}", **style, **dots)
            if kinds is GATES:
                axes.set(ylim=(-0.04, 1.04), ylabel="percentage")
                axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
            else:
                axes.axhline(0, color="black", linewidth=0.8, zorder=1)
                axes.set_ylabel("value")
            if len(units) > 1:
                axes.set_title(f"unit {unit}", fontsize=10)
            _time_axis(axes, steps)
            axes.label_outer()
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        # The legend has a place of its own above the row, since it may be wider than a column.
        caption = figure.add_subplot(grid[row - 1, :])
        caption.set_axis_off()
        caption.legend(*axes.get_legend_handles_labels(), loc="lower left", frameon=False, borderaxespad=0)
    return figure


def _heat_maps(values: dict[str, NDArray[Any]], steps: int, units: Sequence[int], projected: bool) -> Figure:
    """A panel for each gate and memory, time to the right, units downwards."""
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    panels = figure.subplots(3, 2, sharex=True)
    for panel, name in zip(panels.T.flat, (*GATES, *MEMORIES), strict=True):
        label, meaning, _ = (GATES | MEMORIES)[name]
        panel.set_title(f"{label}: {meaning}", fontsize=10.5)
        if name in GATES:
            scale: dict[str, Any] = {"vmin": 0.0, "vmax": 1.0, "cmap": "viridis"}
        else:
            finite = values[name][np.isfinite(values[name])]
            largest = 1.0 if name == "candidate" else float(np.abs(finite).max(initial=0.0)) or 1.0
            scale = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}
        image = panel.imshow(values[name].T, aspect="auto", interpolation="nearest", **scale)
        figure.colorbar(image, ax=panel, format=PercentFormatter(xmax=1, decimals=0) if name in GATES else None)
        panel.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        if name == "hidden_state" and projected:
            panel.set_ylabel("projected feature")
        else:
            panel.yaxis.set_major_formatter(lambda row, _: str(units[int(row)]) if 0 <= row < len(units) else "")
            panel.set_ylabel("unit")
    for panel in panels[-1]:
        _time_axis(panel, steps)
    return figure


def _time_axis(axes: Axes, steps: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("time step t")

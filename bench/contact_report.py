"""Puts into words what `python -m bench contact` found."""

from __future__ import annotations

from typing import NamedTuple

from .results import JsonObject


class TimeRow(NamedTuple):
    """Microseconds of one case. None where a system does not take part."""

    name: str
    ours: float
    theirs: float | None
    exchange: float | None

    def __str__(self) -> str:
        parts = [f"lstm_triton {self.ours:.1f} us"]
        if self.theirs is not None:
            parts.append(f"nn.LSTM {self.theirs:.1f} us ({self.theirs / self.ours:.2f} x as long)")
        if self.exchange is not None:
            parts.append(f"the exchange alone {self.exchange:.1f} us")
        return f"{self.name}: {', '.join(parts)}"


def time_table(rows: list[TimeRow]) -> list[str]:
    """The lines of a table of times."""
    if not rows:
        return []
    width = max(len(row.name) for row in rows)
    lines = [f"{'microseconds':{width}} {'ours':>10} {'nn.LSTM':>10} {'exchange':>10} {'nn.LSTM / ours':>15}"]
    for row in rows:
        numbers = [f"{number:10.1f}" if number is not None else f"{'-':>10}" for number in row[1:]]
        against = f"{row.theirs / row.ours:15.2f}" if row.theirs is not None else f"{'-':>15}"
        lines.append(f"{row.name:{width}} {' '.join(numbers)} {against}")
    return lines


def is_right(outcome: JsonObject) -> bool:
    """Whether a check came to its end with right values."""
    if "result" not in outcome:
        return False
    return not any("wrong" in row for kind in ("forward", "backward") for row in outcome["result"][kind])


def verdict_of(outcome: JsonObject) -> str:
    """The outcome of a check."""
    where = f" in {outcome['in']}" if outcome.get("in") else ""
    for name, text in (("timeout", "NO ANSWER"), ("crash", "CRASHED"), ("error", "FAILED")):
        if name in outcome:
            return f"{text}{where}: {outcome[name]}"
    if "hang" in outcome:
        return f"DOES NOT END in {outcome['hang']['in']}: " + "; ".join(
            map(missing_in_words, outcome["hang"]["missing"])
        )
    parts = []
    for kind in ("forward", "backward"):
        rows = outcome["result"][kind]
        worst = max(rows, key=error_ratio)
        parts.append(f"{kind} {worst['error']:.1e}, {error_ratio(worst):.2f} x nn.LSTM's")
        parts += [f"WRONG {row['name']}: {wrong_in_words(row['wrong'])}" for row in rows if "wrong" in row]
    return "; ".join(parts)


def error_ratio(row: JsonObject) -> float:
    """An error divided by the error of nn.LSTM."""
    if not row["error"] >= 0:
        return float("inf")
    return float(row["error"] / max(row["nn.LSTM"], 1e-12))


def wrong_in_words(wrong: JsonObject) -> str:
    """Where values are wrong."""
    text = f"{wrong['far_off']} of {wrong['of']} elements are far off"
    if wrong["not_finite"]:
        text += f", {wrong['not_finite']} are not finite"
    if not wrong["far_off"]:
        return "all elements are a little off"
    rows = f", rows {ranges(wrong['rows'])}" if "rows" in wrong else ""
    columns = f", columns {ranges(wrong['columns'])}" if "columns" in wrong else ""
    return f"{text}, the first at index {wrong['first']}{rows}{columns}"


def missing_in_words(missing: JsonObject | str) -> str:
    """What programs wait for, in a scan that does not end."""
    if isinstance(missing, str):
        return missing
    rows = f"{missing['rows_missing']} of {missing['of_rows']} rows"
    lane = f"{missing['scan']} scan, lane {missing['lane']}: {rows} missing"
    units = ranges(missing["units"])
    if "first_row" in missing:
        return f"{lane}, the first is row {missing['first_row']}, units {units}"
    programs = f", of program {', '.join(map(str, missing['programs']))}" if "programs" in missing else ""
    return f"{lane}, first in step {missing['step']}: batch rows {ranges(missing['rows'])}, units {units}{programs}"


def ranges(spans: list[list[int]]) -> str:
    """Runs of numbers, each given as [first, last]."""
    return ", ".join(f"{first} to {last}" if first < last else f"{first}" for first, last in spans)

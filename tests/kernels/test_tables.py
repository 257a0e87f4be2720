"""Tables of measured plans are checked before they are used: a bad table is ignored, and a warning says why."""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lstm_triton import routes
from lstm_triton.scan import planner, tables
from lstm_triton.scan.plan import Plan, ScanShape
from lstm_triton.scan.planner import candidates, plan
from lstm_triton.target import Device

DEVICE = Device("NVIDIA Measured", "sm_90", 132, 232448)
SHAPE = ScanShape("forward", 16, 64, 256, torch.float16, DEVICE, allow_tf32=False)
BACKWARD = replace(SHAPE, kind="backward", lanes=2, chained=True)


def clear() -> None:
    for cached in (planner._table, planner._best, planner._launches, routes.measured_on, routes.why_stock):
        cached.cache_clear()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The table of DEVICE."""
    found = tmp_path / "table.json"
    monkeypatch.setattr(planner, "table_path", lambda device: found)
    monkeypatch.setattr(routes, "table_path_of", lambda device: found)
    clear()
    yield found
    clear()


def second() -> Plan:
    """A plan that only a table chooses."""
    return candidates(SHAPE)[1]


def table(**changes: Any) -> dict[str, Any]:
    """A right table, but for these fields of its first plan."""
    return {
        tables.ABOUT: tables.about(DEVICE),
        SHAPE.key: {**asdict(second()), **changes},
        BACKWARD.key: asdict(candidates(BACKWARD)[-1]),
    }


@pytest.mark.parametrize("changes", [{}, {"hold": 0}, {"thread_elements": 0}, {"predicted_cycles": 1}], ids=str)
def test_a_right_table(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(table(**changes)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan(SHAPE) == replace(second(), **changes)
        assert plan(BACKWARD) == candidates(BACKWARD)[-1]


def test_a_table_of_an_earlier_version(path: Path) -> None:
    """It says nothing of itself, and lacks a field that does not change the speed."""
    entry = asdict(second())
    del entry["tf32_rounding"]
    path.write_text(json.dumps({SHAPE.key: entry}))
    assert plan(SHAPE) == second()


def assert_ignored(path: Path, reason: str) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        assert plan(SHAPE) == candidates(SHAPE)[0]
    [warning] = [str(each.message) for each in caught]
    assert str(path) in warning
    assert reason in warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(BACKWARD)  # not again


FIELDS: list[tuple[str, list[Any]]] = [
    ("groups", [0, -1, 2.0, "1", None, True, 1000, float("nan")]),
    ("resident_chunks", [0, -1, 10**6]),
    ("chunks", [0, 999]),
    ("slices", [0, 1, 133]),
    ("batch_tiles", [0, 7]),
    ("block_batch", [0, 3, 16.5, 1024]),
    ("block_hidden", [0, 48, 4096]),
    ("block_k", [0, 1, 8192]),
    ("block_input", [0, 4096]),
    ("split_k", [0, 64]),
    ("num_warps", [0, 3, 64]),
    ("group_chunks", [0, 64]),
    ("accumulators", [0, 64]),
    ("register_chunks", [-1, 64]),
    ("thread_elements", [1, -1]),
    ("hold", [-1, 10**9, 1.5]),
    ("predicted_cycles", [-1, "many"]),
    ("lanes", [0, 2]),
    ("chained", [True, 0]),
    ("packed", [False]),
    ("fuse_input", ["yes"]),
    ("dot_precision", ["", "tf64", "tf32"]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FIELDS for value in values])
def test_every_field_is_checked(path: Path, name: str, value: Any) -> None:
    path.write_text(json.dumps(table(**{name: value})))
    assert_ignored(path, f"{name} {json.loads(json.dumps(value))!r}")


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[SHAPE.key].pop(name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("groups"), "is not complete"),
        (without("block_batch"), "is not complete"),
        (lambda content: content.update({SHAPE.key: [1, 2]}), "must be an object"),
        (lambda content: content.update({"forward float64 B=16 I=64 H=256": {}}), "is no key of a plan"),
        (lambda content: content.update({"forward float16 B=16 H=256": {}}), "is no key of a plan"),
        (lambda content: content.update({"forward float16 B=0 I=64 H=256": {}}), "is no key of a plan"),
        (lambda content: content.update({f"backward float16 B=1 H={'9' * 5000}": {}}), "is no key of a plan"),
        (lambda content: content.update({"forward float16 B=17 I=64 H=256": content[SHAPE.key]}), "is right"),
        (lambda content: content.update({tables.ABOUT: None}), "must be an object"),
        (lambda content: content[tables.ABOUT].update(schema=0), "measured with schema 0, and here it is 1"),
        (lambda content: content[tables.ABOUT].update(kernels="older"), "measured with kernels 'older'"),
        (lambda content: content[tables.ABOUT].update(multiprocessors=114), "with multiprocessors 114, and here it is"),
        (lambda content: content[tables.ABOUT].pop("kernels"), "measured with kernels None"),
    ],
)
def test_other_faults(path: Path, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    content = table()
    change(content)
    path.write_text(json.dumps(content))
    assert_ignored(path, reason)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "[" * 100_000, '{"forward', "\0"])
def test_files_that_are_no_tables(path: Path, text: str) -> None:
    path.write_text(text)
    assert_ignored(path, "it ")


def test_files_that_are_cut_short(path: Path) -> None:
    whole = json.dumps(table())
    for length in range(1, len(whole), 97):
        clear()
        path.write_text(whole[:length])
        assert_ignored(path, "it is no JSON")
    clear()
    path.write_bytes(b"\xff\xfe")
    assert_ignored(path, "it is no JSON")
    clear()
    path.unlink()
    path.mkdir()
    assert_ignored(path, "it cannot be read")


ROW = ["training", "float16", 256, 16, 1.5]


@pytest.mark.parametrize(
    "content",
    [
        {},
        None,
        [1],
        [ROW[:4]],
        [[*ROW, 1]],
        [[*ROW[:4], "1.5"]],
        [[*ROW[:4], 0]],
        [[*ROW[:4], float("nan")]],
        [["training", "float16", 0, 16, 1.5]],
        [["training", "float16", 256, -1, 1.5]],
        [["training", 16, 256, 16, 1.5]],
        [["training", "float16", "256", 16, 1.5]],
        "cut",
    ],
)
def test_tables_of_measured_times(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content)[: 3 if content == "cut" else None])
    question = ("training", torch.float16, False, 256, 16, DEVICE)
    with pytest.warns(RuntimeWarning, match="the table of measured times .*table.json is ignored: "):
        assert routes.why_stock(*question) is None
    clear()
    path.write_text(json.dumps([ROW]))
    assert "1.50 times as fast" in str(routes.why_stock(*question))

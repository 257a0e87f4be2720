"""bench.contact: whatever a layer does to its process, the report says it, says where, and goes on."""

import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import contact, hang
from bench.cases import BenchCase
from bench.contact import Contact

pytest.importorskip("greenlet")
pytest.importorskip("triton")

BOTH = "forward+backward"
ONE = BenchCase(BOTH, "float32", T=3, B=2, I=3, H=8)
FAULTY = BenchCase(BOTH, "float32", T=4, B=3, I=3, H=7)  # what the plugins do something to

# Of the changes to a layer that failed only this one is tried.
ONE_CHANGE = """
    from bench import contact_worker

    contact_worker.CHANGES = {"one slice": {"slices": 1}}
"""
HANG = """
    import time
    from bench import contact_worker

    check = contact_worker.check

    def hanging(case, *others):
        if case.H == 7:
            time.sleep(1000)
        return check(case, *others)

    contact_worker.check = hanging
"""
CRASH = HANG.replace("time.sleep(1000)", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
WRONG = """
    import torch
    from dataclasses import replace
    from bench import contact_worker

    ours = contact_worker.ours

    def wrong(problem):
        [runner] = ours(problem)
        if problem.case.H != 7:
            return [runner]

        def call(leaf):
            output, h_n, c_n = runner.call(leaf)
            off = torch.zeros_like(output)
            off[2:, 1, 3:5] = 1
            return output + off, h_n, c_n

        return [replace(runner, call=call)]

    contact_worker.ours = wrong
"""
# Program 1 keeps to itself what it computes.
NEVER_ENDS = """
    import triton
    import triton.language as tl
    from lstm_triton.kernels import forward

    publish = forward.publish

    @triton.jit
    def losing(pointers, value, mask):
        publish(pointers, value, mask & (mask.to(tl.int32) + tl.program_id(0) != 2))

    forward.publish = losing
"""

Run = Callable[..., tuple[Contact, int]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(plugin source, checks=, timed=, budget=, tests=): a whole call of the command, and its exit code."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(
        plugin: str = "",
        checks: tuple[BenchCase, ...] = (FAULTY, ONE),
        timed: tuple[BenchCase, ...] = (),
        budget: float = 300.0,
        tests: str | None = None,
    ) -> tuple[Contact, int]:
        (tmp_path / "contact_plugin.py").write_text(textwrap.dedent(ONE_CHANGE) + textwrap.dedent(plugin))
        monkeypatch.setattr(contact, "CHECKS", checks)
        monkeypatch.setattr(contact, "TIMED", timed)
        monkeypatch.setattr(contact, "EXPLAINED", 1)
        if not timed:
            for step in ("ask_questions", "time_layers"):
                monkeypatch.setattr(Contact, step, lambda found: None)
        monkeypatch.setattr(Contact, "sizes", lambda found, wanted: tuple(wanted))
        monkeypatch.setattr(contact, "HOST", ONE)
        now = time.monotonic()
        found = Contact(
            tmp_path / "out", "interpreter", now, now + budget, 0.01, silent=20.0, plugin="contact_plugin", tests=tests
        )
        return found, contact.contact(found)

    return call


def findings(found: Contact, step: str) -> list[dict]:
    lines = (found.out / "contact.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["step"] == step]


def printed(found: Contact) -> str:
    return (found.out / "contact.txt").read_text()


@pytest.mark.interpreted
def test_the_whole_way(run: Run, tmp_path: Path) -> None:
    (tmp_path / "test_tiny.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_one():\n    pass\n")
    forward = BenchCase("forward", "float32", T=3, B=2, I=3, H=8)
    found, code = run(checks=(ONE,), timed=(forward, ONE, BenchCase("inference", "float32", T=2, B=1, I=3, H=8)),
                tests=str(tmp_path / "test_tiny.py"))  # fmt: skip
    text = printed(found)
    assert code == 0, text
    assert "everything that was tried is right" in text
    assert "layers: 1 right, 0 failed" in text
    assert "not done" not in text
    for step in ("environment", "check", "handoff", "host", "plans", "times", "end"):
        assert findings(found, step), step
    assert findings(found, "environment")[0]["kernel_hash"]
    [check] = findings(found, "check")
    assert {row["name"] for row in check["result"]["backward"]} >= {"input", "weight_hh_l0"}
    assert "tests marked gpu: 1 passed" in text
    assert "hand" not in findings(found, "handoff")[0].get("error", "")
    measured = {row.name: row for row in found.times}
    assert len(measured) > 3  # other plans beside the three cases
    assert all(row.ours > 0 and row.theirs > 0 for row in measured.values())


@pytest.mark.interpreted
@pytest.mark.parametrize(("plugin", "says"), [(HANG, "NO ANSWER in"), (CRASH, "CRASHED in")], ids=["hang", "crash"])
def test_a_child_that_is_lost(run: Run, plugin: str, says: str) -> None:
    """Every time: the layer's own check, and when it is tried again."""
    found, code = run(plugin)
    text = printed(found)
    assert code == 1
    assert text.count(says) == 3  # in its turn, alone, and in the summary; with one unit a program there is one slice
    assert found.right == 1
    assert f"{ONE}: forward" in text


@pytest.mark.interpreted
def test_wrong_values_are_located(run: Run) -> None:
    found, code = run(WRONG)
    [wrong, right, again] = findings(found, "check")
    assert code == 1
    [row] = [row for row in wrong["result"]["forward"] if "wrong" in row]
    assert row["name"] == "output"
    assert row["wrong"] == {"far_off": 4, "of": 84, "not_finite": 0, "first": 2, "columns": [[3, 4]], "rows": [[1, 1]]}
    assert not any("wrong" in row for row in wrong["result"]["backward"])
    assert not any("wrong" in row for row in right["result"]["forward"])
    assert again["case"] == wrong["case"]
    assert "WRONG output: 4 of 84 elements are far off, the first at index 2, rows 1, columns 3 to 4" in printed(found)


@pytest.mark.interpreted
def test_a_kernel_that_never_ends(run: Run) -> None:
    """What is missing is named, and with one program for all units it ends."""
    case = BenchCase(BOTH, "float32", T=4, B=3, I=3, H=14)  # two programs of 8 units
    found, _ = run(NEVER_ENDS, checks=(case, ONE))
    stuck, right, *again = findings(found, "check")
    assert "result" in right
    assert stuck["hang"]["in"] == "forward"
    [missing] = stuck["hang"]["missing"]
    assert missing["scan"] == "forward"
    assert missing["step"] == 0
    assert missing["units"] == [[8, 13]]
    assert missing["programs"] == [1]
    alone, with_one_slice = again
    assert "hang" in alone
    assert with_one_slice["change"] == "one slice"
    assert "result" in with_one_slice
    text = printed(found)
    assert "DOES NOT END in forward: forward scan, lane 0" in text
    assert "units 8 to 13, of program 1" in text


@pytest.mark.interpreted
def test_no_time_left(run: Run) -> None:
    found, code = run(budget=0.5)
    text = printed(found)
    assert code == 1
    assert found.right == 0
    assert "not done, as the time was up: the machine, layers" in text
    assert text.splitlines()[-1] == "nothing was tried"


# What is said about a scan that does not end


def test_what_is_missing() -> None:
    case = BenchCase(BOTH, "float32", T=4, B=2, I=3, H=6)
    empty = torch.zeros(2 + 8 + 2, 16, dtype=torch.bool)
    empty[-2:] = True  # the other direction's initial states
    empty[:, 6:] = True  # padding
    assert hang.missing_of_lane(empty, case, "forward", 0, None) is None
    steps = empty[2:10].view(4, 2, 16)
    steps[3] = True
    steps[2, 1, 4:6] = True
    found = hang.missing_of_lane(empty, case, "forward", 1, None)
    assert found == {
        "scan": "forward", "lane": 1, "rows_missing": 3, "of_rows": 8, "step": 2, "rows": [[1, 1]], "units": [[4, 5]]
    }  # fmt: skip
    steps[:] = torch.flip(steps, (0,))  # taken from the last step on, as backward does
    assert hang.missing_of_lane(empty, case, "forward", 1, None) == {**found, "step": 1}


def test_what_is_missing_of_rows_in_an_order_of_their_own() -> None:
    """Of sequences of different lengths: padded, each has a row for each of T steps."""
    case = BenchCase(BOTH, "float32", T=5, B=3, I=3, H=4, layout="lengths")
    empty = torch.zeros(15 + 9, 16, dtype=torch.bool)
    empty[3 + 14, 1:3] = True
    assert hang.missing_of_lane(empty, case, "forward", 0, None) == {
        "scan": "forward", "lane": 0, "rows_missing": 1, "of_rows": 15, "first_row": 14, "units": [[1, 2]]
    }  # fmt: skip


def test_a_step_that_fails_does_not_cost_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(found: Contact) -> None:
        raise KeyError("unheard of")

    monkeypatch.setattr(Contact, "environment", lambda found: setattr(found.checking, "origin", {}))
    monkeypatch.setattr(Contact, "check_layers", fail)
    monkeypatch.setattr(Contact, "explain_failures", fail)
    monkeypatch.setattr(contact.Watchdog, "time_left", lambda watchdog: 1.0)
    found, code = run()
    assert code == 1
    for step in ("layers", "what failures depend on"):
        assert f"{step}: this step failed: KeyError: 'unheard of'" in printed(found)


def test_spans() -> None:
    assert hang.spans(torch.tensor([True, True, False, True])) == [[0, 1], [3, 3]]
    assert hang.spans(torch.tensor([False])) == []

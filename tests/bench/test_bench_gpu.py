"""bench.gpu and bench.watchdog: whatever a system or a test does to its process, everyone else is measured, in time."""

import json
import queue
import shutil
import subprocess
import sys
import textwrap
import time
import types
from dataclasses import replace
from typing import ClassVar

import pytest

from bench import cases, gpu, journal, measure, results, watchdog
from bench.cases import BenchCase, Block, Grid
from bench.watchdog import CannotStart, Crew, OutOfBudget, Watchdog

CASE = BenchCase("inference", "float32", T=2, B=2, I=3, H=4)
OTHER = BenchCase("inference", "float32", T=3, B=2, I=3, H=4)

# Stands in for the peers in the children, which import it first.
PLUGIN = """
    import os, signal, time
    from dataclasses import replace
    from bench import cases, systems

    def put(name, act):
        def runners(problem):
            [runner] = systems.baseline(problem)
            call = runner.call
            return [replace(runner, call=lambda leaf: act(problem.case, call, leaf))]

        systems.REGISTRY[name] = systems.System(name, runners)

    def hang(case, call, leaf):
        time.sleep(1000)

    def crash(case, call, leaf):
        os.kill(os.getpid(), signal.SIGSEGV)

    def leave(case, call, leaf):
        os._exit(7)

    def be_wrong(case, call, leaf):
        output, h_n, c_n = call(leaf)
        return output + 1, h_n, c_n

    def exhaust(case, call, leaf):
        print("this goes to the log, not between the answers")
        raise MemoryError("out of memory")

    put("flashrnn-triton", hang)
    put("flashrnn-cuda", crash)
    put("torchrl-triton", be_wrong)
    put("nn.LSTM+compile", exhaust)
"""
SLOW_PLUGIN = """
    import time
    from bench import systems
    from dataclasses import replace

    def slow(problem):
        [runner] = systems.baseline(problem)
        call = runner.call
        return [replace(runner, call=lambda leaf: (time.sleep(0.4), call(leaf))[1])]

    systems.REGISTRY["lstm_triton"] = systems.System("lstm_triton", slow)
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
    """session(plugin source, **changes): a call of the command, about the grid "smoke" of two cases."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(
        plugin: str = "", budget: float = 100.0, timeout: float = 2.5, device: str = "cpu", **changes
    ) -> gpu.Session:
        (tmp_path / "bench_test_plugin.py").write_text(textwrap.dedent(plugin))
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        watchdog = Watchdog(device, out / "gpu.log", time.monotonic() + budget, timeout, "bench_test_plugin")
        return gpu.Session(out, watchdog, seconds=0.01, tests=changes.pop("tests", "tests"), **changes)

    return make


def with_systems(monkeypatch, *names: str, found=(CASE, OTHER)) -> None:
    monkeypatch.setitem(cases.GRIDS, "smoke", Grid("a test's", (Block(found, names),)))


def rows_of(session: gpu.Session) -> dict[tuple[BenchCase, str], cases.Row]:
    rows = results.Results.read(session.results_file).rows
    found = {(results.case_of(row), row["system"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_hang_a_crash_a_wrong_value_and_an_error_are_rows_and_the_rest_goes_on(session, monkeypatch, capsys) -> None:
    with_systems(monkeypatch, *cases.SYSTEMS[:6], found=(CASE,))
    one = session(PLUGIN)
    assert gpu.gpu(one, ["smoke"]) == 0
    rows = rows_of(one)
    assert {name: row["status"] for (_, name), row in rows.items()} == {
        "lstm_triton": "ok",
        "nn.LSTM": "ok",
        "nn.LSTM+compile": "error",
        "flashrnn-triton": "timeout",
        "flashrnn-cuda": "error",
        "torchrl-triton": "wrong",
    }
    assert rows[CASE, "nn.LSTM"]["median_us"] > 0
    assert rows[CASE, "flashrnn-triton"]["message"] == "silent for 2 s, in values of flashrnn-triton"
    assert rows[CASE, "flashrnn-cuda"]["message"] == "the process was ended by SIGSEGV, in values of flashrnn-cuda"
    assert rows[CASE, "nn.LSTM+compile"]["message"] == "MemoryError: out of memory"
    assert rows[CASE, "torchrl-triton"]["error"] > 0.1
    assert "this goes to the log" in one.watchdog.log.read_text()
    assert "complete" in capsys.readouterr().out


def test_a_call_ends_in_time_and_the_next_one_goes_on(session, monkeypatch, capsys) -> None:
    with_systems(monkeypatch, "lstm_triton", "nn.LSTM")
    first = session(SLOW_PLUGIN)
    child = first.watchdog.started()
    child.ask(compile=cases.as_dict(CASE), systems=["lstm_triton"])
    assert child.answer(60.0) == {"compiled": True}
    first.watchdog.deadline = time.monotonic() + 5.5  # enough for one case of eight slow calls, not for two
    assert gpu.gpu(first, ["smoke"]) == 0
    assert time.monotonic() < first.watchdog.deadline + 2.0
    assert first.watchdog.child is not None
    assert first.watchdog.child.process.poll() is not None  # nobody is left behind
    assert "out of budget" in capsys.readouterr().out
    before = rows_of(first)
    assert set(before) == {(CASE, "lstm_triton"), (CASE, "nn.LSTM")}

    asked = fake_watchdog(monkeypatch, ok_rows)
    second = session()
    second.found = second.open_results(first.found.provenance)
    second.run_grid(gpu.Stage("smoke"))
    assert asked == [["lstm_triton", "nn.LSTM"]]
    after = rows_of(second)
    assert {key: after[key] for key in before} == before
    assert {case for case, _ in after} == {CASE, OTHER}
    second.run_grid(gpu.Stage("smoke"))
    assert len(asked) == 1  # nothing is left to do


def test_a_call_goes_on_from_another_folder(session, tmp_path) -> None:
    earlier, one = tmp_path / "earlier", session()
    earlier.mkdir()
    origin = dict.fromkeys(results.PROVENANCE_KEYS, "x")
    results.Results(origin).write(earlier / one.results_file.name)
    (earlier / one.journal.name).write_text("{}\n")
    one.resume(earlier)
    assert results.Results.read(one.results_file).provenance == origin
    one.journal.write_text("its own\n")
    one.resume(earlier)
    assert one.journal.read_text() == "its own\n"
    with pytest.raises(results.ResultsError, match="no such folder"):
        one.resume(tmp_path / "nowhere")


def fake_watchdog(monkeypatch, answers) -> list[list[str]]:
    """Answer instead of children; returns the systems of every question."""
    asked = []

    def answer(self, grid_name, case, names, seconds):
        asked.append(list(names))
        return answers(case, names)

    monkeypatch.setattr(Watchdog, "measure", answer)
    return asked


def ok_rows(case, names):
    return [measure.new_row("smoke", case, name, "ok", "") | {"median_us": 1.0} for name in names], None


def in_memory(session, origin="x") -> gpu.Session:
    session.found = results.Results(dict.fromkeys(results.PROVENANCE_KEYS, origin))
    return session


def test_a_system_that_keeps_crashing_is_given_up_but_never_ours(session, monkeypatch) -> None:
    several = tuple(BenchCase("inference", "float32", T=length, B=1, I=1, H=1) for length in range(1, 6))
    with_systems(monkeypatch, "lstm_triton", "nn.LSTM", "flashrnn-cuda", found=several)

    def answers(case, names):
        for name in ("flashrnn-cuda", "lstm_triton"):
            if name in names:
                return [], {"status": "timeout", "message": "silent", "phase": "times", "system": name}
        return ok_rows(case, names)

    asked = fake_watchdog(monkeypatch, answers)
    one = in_memory(session(device="cuda"))  # nothing is started on it
    one.run_grid(gpu.Stage("smoke"))
    assert sum("flashrnn-cuda" in names for names in asked) == gpu.STRIKES
    assert sum("lstm_triton" in names for names in asked) == len(several) + gpu.STRIKES
    rows = rows_of(one)
    assert [rows[case, "flashrnn-cuda"]["status"] for case in several] == ["timeout"] * 3 + ["error"] * 2
    assert "not run" in rows[several[-1], "flashrnn-cuda"]["message"]
    assert {rows[case, "nn.LSTM"]["status"] for case in several} == {"ok"}
    assert one.failures == len(several)


def test_when_the_reference_falls_everyone_of_the_case_falls(session, monkeypatch) -> None:
    with_systems(monkeypatch, "lstm_triton", "nn.LSTM", found=(CASE,))
    failure = {"status": "error", "message": "gone", "phase": "values", "system": "reference"}
    asked = fake_watchdog(monkeypatch, lambda case, names: ([], failure))
    (one := in_memory(session())).run_grid(gpu.Stage("smoke"))
    assert len(asked) == 1
    assert {row["status"] for row in rows_of(one).values()} == {"error"}


def test_a_lost_device_costs_its_system_and_the_others_are_measured_again(session, monkeypatch) -> None:
    with_systems(monkeypatch, "lstm_triton", "nn.LSTM", "flashrnn-cuda", found=(CASE,))

    def answers(case, names):
        if "flashrnn-cuda" in names:
            return [measure.new_row("smoke", case, "flashrnn-cuda", "error", "the device was lost")], None
        return ok_rows(case, names)

    asked = fake_watchdog(monkeypatch, answers)
    (one := in_memory(session())).run_grid(gpu.Stage("smoke"))
    assert asked == [["lstm_triton", "nn.LSTM", "flashrnn-cuda"], ["lstm_triton", "nn.LSTM"]]
    assert rows_of(one)[CASE, "nn.LSTM"]["status"] == "ok"


def test_only_what_is_missing_is_measured_and_ours_never_without_the_baseline(session, monkeypatch) -> None:
    one = in_memory(session())
    names = ("lstm_triton", "nn.LSTM", "flashrnn-cuda")
    assert one.todo("smoke", CASE, names) == list(names)
    one.found.add(ok_rows(CASE, ["nn.LSTM", "flashrnn-cuda"])[0])
    assert one.todo("smoke", CASE, names) == ["lstm_triton", "nn.LSTM"]
    one.found.add(ok_rows(CASE, ["lstm_triton"])[0])
    assert one.todo("smoke", CASE, names) == []
    assert one.todo("smoke", OTHER, names) == list(names)
    absent = measure.new_row("smoke", CASE, "flashrnn-cuda", "missing", "the package flashrnn is not installed")
    one.found.add([absent])
    assert one.todo("smoke", CASE, names) == []
    monkeypatch.setattr(gpu.REGISTRY["flashrnn-cuda"].__class__, "installed", lambda self: True)
    assert one.todo("smoke", CASE, names) == ["flashrnn-cuda"]


def test_results_of_other_kernels_are_moved_aside_and_failures_retried_on_request(session) -> None:
    one = session()
    origin = dict.fromkeys(results.PROVENANCE_KEYS, "x")
    rows = ok_rows(CASE, ["nn.LSTM"])[0] + [measure.new_row("smoke", CASE, "lstm_triton", "timeout", "")]
    results.Results(origin, rows).write(one.results_file)
    assert len(one.open_results(origin).rows) == 2
    one.retry = True
    assert [row["system"] for row in one.open_results(origin).rows] == ["nn.LSTM"]
    assert one.open_results(origin | {"kernel_hash": "new"}).rows == []
    assert not one.results_file.exists()
    assert len(results.Results.read(one.out / "results-x.json").rows) == 2


def test_a_worker_that_cannot_start_is_one_line(session, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(CannotStart, match=r"no worker starts on device 'cpu'; see the end of .*gpu\.log"):
        session().watchdog.started()


def test_no_time_is_no_child(session, monkeypatch) -> None:
    with pytest.raises(OutOfBudget):
        session(budget=-1.0).watchdog.started()


class FakeChild:
    """Answers at once, except that a case of 2 steps ends it and one of 3 makes it silent for ever."""

    compiled: ClassVar[list[int]] = []

    def __init__(self, *arguments: object) -> None:
        self.process = types.SimpleNamespace(ended=False)
        self.answers: list[dict | None] = [{"ready": {}}]

    def ask(self, compile: dict, systems: list[str]) -> None:
        assert systems == ["lstm_triton"]
        if compile["T"] == 2:
            self.answers.append(None)
        elif compile["T"] != 3:
            self.compiled.append(compile["T"])
            self.answers.append({"compiled": True})

    def answer(self, timeout: float) -> dict | None:
        if not self.answers:
            raise queue.Empty
        return self.answers.pop(0)


def test_a_crew_compiles_until_nobody_of_it_is_left(session, monkeypatch) -> None:
    monkeypatch.setattr(watchdog, "Child", FakeChild)
    monkeypatch.setattr(watchdog, "end", lambda process: setattr(process, "ended", True))
    monkeypatch.setattr(FakeChild, "compiled", [])
    crew = Crew(session(timeout=0.05).watchdog, 2)
    processes = [child.process for child in crew.starting]
    crew.compile({replace(CASE, T=length): ["lstm_triton"] for length in (1, 4, 5, 2, 6, 3, 7)}, 60.0)
    assert FakeChild.compiled == [1, 4, 5, 6]
    assert all(process.ended for process in processes)
    crew.compile({CASE: ["lstm_triton"]}, 60.0)  # nobody is waited for


def test_a_crew_stops_in_time_and_ends_who_is_in_the_middle_of_something(session, monkeypatch) -> None:
    monkeypatch.setattr(watchdog, "Child", FakeChild)
    monkeypatch.setattr(watchdog, "end", lambda process: setattr(process, "ended", True))
    crew = Crew(session(timeout=60.0).watchdog, 2)
    processes = [child.process for child in crew.starting]
    started = time.monotonic()
    crew.compile({replace(CASE, T=3): ["lstm_triton"]}, 0.1)
    assert time.monotonic() - started < 5.0
    assert sorted(process.ended for process in processes) == [False, True]
    crew.stop()
    assert all(process.ended for process in processes)


def test_cases_are_compiled_before_they_are_measured_except_where_the_first_call_counts(session, monkeypatch) -> None:
    one = in_memory(session())
    one.compilers = 2
    compiled: list[BenchCase] = []
    fake_crew = types.SimpleNamespace(compile=lambda wanted, seconds: compiled.extend(wanted))
    monkeypatch.setattr(gpu, "Crew", lambda watchdog, size: fake_crew)
    compiled_first: list[bool] = []

    def answers(case, names):
        compiled_first.append(case in compiled)
        return ok_rows(case, names)

    fake_watchdog(monkeypatch, answers)
    with_systems(monkeypatch, "lstm_triton", "nn.LSTM")
    one.run_grid(gpu.Stage("smoke"))
    assert compiled == [CASE, OTHER]
    assert compiled_first == [True, True]
    monkeypatch.setitem(cases.GRIDS, "smoke", Grid("first", (Block((CASE,), ("lstm_triton",)),), first_call=True))
    compiled.clear()
    one.found.rows.clear()
    fake_watchdog(monkeypatch, ok_rows)
    one.run_grid(gpu.Stage("smoke"))
    assert compiled == []


TESTS = """
    import os, signal, time
    import pytest

    pytestmark = pytest.mark.gpu

    def test_fine():
        pass

    def test_wrong():
        assert 1 == 2

    def test_crash():
        os.kill(os.getpid(), signal.SIGSEGV)

    def test_hang():
        time.sleep(1000)

    @pytest.mark.skip(reason="not today")
    def test_skipped():
        pass

    def test_last():
        pass
"""


def test_a_test_that_hangs_while_others_run(session, tmp_path) -> None:
    pytest.importorskip("pytest_timeout")
    (tmp_path / "gpu_tests").mkdir()
    source = """
        import time
        import pytest

        pytestmark = pytest.mark.gpu

        def test_hang():
            time.sleep(1000)

        @pytest.mark.parametrize("number", range(24))
        def test_slow(number):
            time.sleep(0.5)
    """
    (tmp_path / "gpu_tests" / "test_some.py").write_text(textwrap.dedent(source))
    one = in_memory(session(tests=str(tmp_path / "gpu_tests"), timeout=2.0))
    one.test_workers = 2
    one.run_tests()
    assert one.test_outcomes() == {"passed": 24, "crashed": 1}
    assert one.failures == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_the_gpu_tests_survive_a_test_that_crashes_or_hangs(session, tmp_path, workers: int) -> None:
    folder = tmp_path / "gpu_tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(textwrap.dedent(TESTS))
    one = in_memory(session(tests=str(folder), timeout=3.0))
    one.test_workers = workers
    one.run_tests()

    def outcomes() -> dict[str, str]:
        found = journal.outcomes_of(journal.read(one.journal))
        return {test.split("::")[1]: outcome for test, outcome in found.items()}

    expected = {
        "test_fine": "passed",
        "test_wrong": "failed",
        "test_crash": "crashed",
        "test_hang": "timeout",
        "test_skipped": "skipped",
        "test_last": "passed",
    }
    assert outcomes() == expected
    assert one.failures == 3
    assert any("assert 1 == 2" in entry.get("message", "") for entry in journal.read(one.journal))
    # The next call has nothing to do; with --retry it runs what failed.
    size = one.journal.stat().st_size
    one.run_tests()
    assert one.journal.stat().st_size == size
    (folder / "test_some.py").write_text(textwrap.dedent(TESTS).replace("1 == 2", "1 == 1").replace("1000", "0"))
    one.retry = True
    one.run_tests()
    assert outcomes() == expected | {"test_wrong": "passed", "test_hang": "passed"}


def test_tests_that_cannot_even_be_collected_are_a_failure(session, tmp_path, capsys) -> None:
    one = in_memory(session(tests=str(tmp_path / "nowhere")))
    one.run_tests()
    entries = journal.read(one.journal)
    assert journal.outcomes_of(entries) == {}
    assert not any("end" in entry for entry in entries)  # the next call tries again
    assert one.failures == 1
    assert "pytest did not run" in capsys.readouterr().out


def test_a_journal_cut_short_is_read_as_far_as_it_goes(tmp_path) -> None:
    path = tmp_path / "journal"
    journal.append(path, {"test": "one", "outcome": "passed"})
    with path.open("a") as file:
        file.write('{"test": "two", "outc')
    journal.append(path, {"test": "three", "outcome": "failed"})
    assert journal.outcomes_of(journal.read(path)) == {"one": "passed", "three": "failed"}


@pytest.mark.interpreted
def test_the_whole_command_rehearsed_on_the_interpreter(tmp_path) -> None:
    """From the command line, real kernels, real children, at the interpreter's sizes."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench", "gpu", "--device", "interpreter", "--budget", "120", "--seconds", "0.01"]
    command += ["--out", str(out), "--stages", "stacks", "--timeout", "60"]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.Results.read(out / "results.json")
    assert found.provenance["gpu"] == "none: interpreter"
    ours = [row for row in found.rows if row["system"] == "lstm_triton" and row["status"] == "ok"]
    assert {row["layers"] for row in found.rows} == {1, 2}
    assert ours
    assert any(row["message"] == "" and row["error"] > 0 for row in ours)
    assert any(row["system"] == "exchange-floor" and row["status"] == "ok" for row in found.rows)


def damaged_and_foreign() -> list[str]:
    return ["{", json.dumps({"schema": 7, "provenance": {}, "rows": []})]


@pytest.mark.parametrize("text", damaged_and_foreign())
def test_damaged_results_are_refused_and_left_alone(session, text: str) -> None:
    one = session()
    one.results_file.write_text(text)
    with pytest.raises(results.ResultsError):
        gpu.gpu(one, ["smoke"])
    assert one.results_file.read_text() == text

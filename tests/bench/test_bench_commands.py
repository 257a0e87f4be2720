"""python -m bench run, report, status and tune, and pytest bench/: what a user types, right or wrong."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from dataclasses import asdict, replace

import pytest
import torch

from bench import cases, conftest, measure, results, tune
from bench.__main__ import main
from bench.cases import BenchCase
from bench.watchdog import Watchdog
from lstm_triton import target
from lstm_triton.scan import planner, tables
from lstm_triton.scan.plan import Plan, ScanShape

HEADLINE = BenchCase("forward+backward", "bfloat16", T=1024, B=16, I=768, H=768)
HEADLINE_CASES = {case: None for case, _ in cases.work_list("headline")}
README = "# Title\n\n## Performance\n\n<!-- bench:begin -->\nold text\n<!-- bench:end -->\n\n## After\n"


def bench(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *arguments]
    # pytest-benchmark measures nothing where it believes to be a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run(
        command, cwd=results.ROOT, env=environment, capture_output=True, text=True, timeout=120, **options
    )


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--grid", "huge"], "run: unknown grid 'huge': choose from smoke"),
        (["run", "--systems", "lstm_triton,keras"], "run: unknown system 'keras': choose from lstm_triton"),
        (["run", "--systems", "nn.LSTM,nn.LSTM"], "run: a system is named twice in 'nn.LSTM,nn.LSTM'"),
        (
            ["run", "--device", "cpu", "--plugin", "no.such"],
            "run: cannot find the plugin 'no.such': ModuleNotFoundError",
        ),
        (["run", "--device", "cpu", "--plugin", "nosuch"], "run: cannot find the plugin 'nosuch': no such module"),
        (["run", "--device", "cpu", "--plugin", ""], "run: cannot find the plugin '': ValueError: "),
        (["run", "--device", "cpu", "--out", "bench"], "run: cannot write 'bench': Is a directory"),
        (["run", "--device", "cpu", "--out", "a" * 300], "File name too long"),
        (["run", "--device", "tpu"], "run: unknown device 'tpu': choose from cpu"),
        (["run", "--out", "/proc/nowhere/results.json"], "run: cannot write into /proc/nowhere"),
        (["run", "--seconds", "-1"], "run: argument --seconds: must be a number above 0, got '-1'"),
        (["gpu", "--out", "x"], "gpu: the following arguments are required: --budget"),
        (
            ["gpu", "--budget", "9", "--out", "x", "--stages", "tests,dance"],
            "gpu: unknown stage 'dance': choose from headline",
        ),
        (["gpu", "--budget", "9", "--out", "/proc/nowhere", "--device", "cpu"], "gpu: cannot write into /proc/nowhere"),
        (
            ["gpu", "--budget", "9", "--out", "x", "--device", "cpu", "--plugin", "nosuch"],
            "gpu: cannot find the plugin 'nosuch': no such module",
        ),
        (
            ["gpu", "--budget", "9", "--out", "x", "--device", "cpu", "--tests", "nosuch"],
            "gpu: there are no tests 'nosuch'",
        ),
        (
            ["gpu", "--budget", "9", "--out", "x", "--compilers", "-1"],
            "argument --compilers: must be a whole number of",
        ),
        (["gpu", "--budget", "1e300", "--out", "x"], "argument --budget: must be a number of at most 1000000000"),
        (["gpu", "--budget", "soon", "--out", "x"], "gpu: argument --budget: must be a number above 0, got 'soon'"),
        (["cache", "--out", "x", "--stages", "dance"], "cache: unknown stage 'dance': choose from contact"),
        (["cache", "--out", "x", "--arch", "gfx942"], "cache: argument --arch: invalid choice: 'gfx942'"),
        (["cache", "--out", "x", "--libtriton", "/nowhere"], "cache: no such file: /nowhere"),
        (["cache", "--out", "x", "--libtriton", "README.md"], "cache: not a shared library: README.md"),
        (["cache", "--out", "x"], "cache: TRITON_CACHE_DIR must name a folder by its whole path"),
        (["contact", "--out", "x", "--device", "cpu"], "contact: device 'cpu': the kernels do not run on it"),
        (["contact", "--out", "/proc/nowhere", "--device", "interpreter"], "contact: cannot write into /proc/nowhere"),
        (
            ["contact", "--out", "x", "--device", "interpreter", "--tests", "nosuch::test"],
            "contact: there are no tests 'nosuch::test'",
        ),
        (
            ["tune", "--batch", "9" * 30],
            "tune: argument --batch: must be a whole number of at most 1000000000, got '99",
        ),
        (["tune", "--hidden", "0"], "tune: argument --hidden: must be a whole number of at least 1, got '0'"),
        (["tune", "--device", "cpu"], "tune: device 'cpu': the kernels do not run on it"),
        (["report", "--results", "/nowhere"], "report: cannot read /nowhere: no such folder"),
        (["report", "--results", "README.md"], "report: cannot read README.md: not a folder"),
        (["status", "--results", "README.md"], "status: cannot read README.md: not a folder"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "the following arguments are required"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(results.ROOT)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("python -m bench")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("overhead", ["--seconds", "nan"], "argument --seconds: must be a number above 0, got 'nan'"),
        ("overhead", ["--compilations", "0"], "argument --compilations: must be a whole number of at least 1, got '0'"),
        ("overhead", ["--fallback", "--compilations", "64"], "--compilations: not allowed with argument --fallback"),
        ("resources", ["--hidden", "64", "-1"], "argument --hidden: must be a whole number of at least 1, got '-1'"),
        ("resources", ["--workers", "0"], "argument --workers: must be a whole number of at least 1, got '0'"),
        ("digest", ["--compare", "/nowhere"], "cannot read /nowhere: No such file"),
        ("digest", ["--compare", "README.md"], "README.md has no digests"),
        ("digest", ["--out", "bench"], "argument --out: cannot write 'bench': Is a directory"),
        ("digest", ["--only", "nothing"], "no case has 'nothing' in its name"),
        ("routes", ["--results", "/nowhere"], "cannot read /nowhere: No such file"),
        ("routes", ["--dance"], "the following arguments are required: --results"),
    ],
)
def test_a_mistake_with_a_tool_is_one_line(capsys, monkeypatch, tool: str, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(results.ROOT)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    try:
        code = importlib.import_module(f"bench.{tool}").main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.startswith(f"python -m bench.{tool}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("arguments", [["run", "--device", "cuda"], ["gpu", "--budget", "9", "--out", "x"], ["tune"]])
def test_no_gpu_is_one_line(capsys, tmp_path, monkeypatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ['{"schema": 1, "prov', '{"schema": 2}'])
def test_a_file_that_is_no_results_file_is_never_overwritten(capsys, tmp_path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    readme = tmp_path / "README.md"
    readme.write_text(README)
    for arguments in (
        ["run", "--device", "cpu", "--out", str(path)],
        ["report", "--results", str(tmp_path), "--readme", str(readme)],
        ["status", "--results", str(tmp_path)],
    ):
        assert main(arguments) == 2
        assert str(path) in capsys.readouterr().err
        assert path.read_text() == text
        assert readme.read_text() == README


@pytest.mark.parametrize(
    ("act", "code", "line"),
    [
        ("raise OSError(28, 'No space left on device')", 2, "cannot write {out}: No space left on device"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "ended by SIGTERM"),
    ],
)
def test_a_run_that_is_stopped_is_one_line_and_keeps_its_rows(tmp_path, act: str, code: int, line: str) -> None:
    """None of these is a fault of pytest, which the run drives. The plugin acts when the second row is written."""
    (tmp_path / "stopping.py").write_text(
        "import os, signal\n"
        "plain_sync, calls = os.fsync, []\n"
        "def sync(handle):\n"
        "    calls.append(handle)\n"
        "    if len(calls) == 2:\n"
        f"        {act}\n"
        "    plain_sync(handle)\n"
        "os.fsync = sync\n"
    )
    out = tmp_path / "results.json"
    options = [
        "--device",
        "cpu",
        "--systems",
        "nn.LSTM",
        "--seconds",
        "0.01",
        "--plugin",
        "stopping",
        "--out",
        str(out),
    ]
    done = bench("bench", "run", *options, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{results.ROOT}"})
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == f"python -m bench run: {line.format(out=out)}\n"
    assert "INTERNALERROR" not in done.stdout
    assert len(results.Results.read(out).rows) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["results.json", "stopping.py"]


@pytest.mark.interpreted
def test_tuning_that_is_ended_leaves_no_folder(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def ended(*arguments: object, **options: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tune, "tune", ended)
    assert main(["tune", "--device", "interpreter"]) == 143
    assert capsys.readouterr().err == "python -m bench tune: ended by SIGTERM\n"
    assert list(tmp_path.iterdir()) == []


# From measuring to the report, on this machine's CPU

EARLIER = measure.new_row("headline", HEADLINE, "nn.LSTM", "missing", "from an earlier run")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of a smoke run's results, and what the run printed. A row was there before."""
    folder = tmp_path_factory.mktemp("smoke")
    results.Results(results.provenance("none: CPU", None), [EARLIER]).write(folder / "cpu.json")
    command = ["bench", "run", "--device", "cpu", "--grid", "smoke", "--seconds", "0.01"]
    done = bench(*command, "--out", str(folder / "cpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_smoke_run_measures_us_and_the_baseline_and_says_who_is_missing(smoke) -> None:
    folder, printed = smoke
    found = results.Results.read(folder / "cpu.json")
    assert found.provenance["gpu"] == "none: CPU"
    new = found.rows[1:]
    by_system = {name: {row["status"] for row in new if row["system"] == name} for name in cases.SYSTEMS}
    assert by_system["lstm_triton"] == by_system["nn.LSTM"] == {"ok"}
    assert by_system["flashrnn-cuda"] == by_system["torchrl-triton"] == by_system["exchange-floor"] == {"missing"}
    expected = sum(len(names) for _, names in cases.work_list("smoke"))
    assert found.rows[0] == EARLIER
    assert len(found.rows) == 1 + expected
    assert f"{expected} rows" in printed
    assert "Median" in printed  # pytest-benchmark's table


def test_pytest_bench_gives_pytest_benchmarks_own_json(tmp_path) -> None:
    (tmp_path / "lies.py").write_text(
        "from dataclasses import replace\n"
        "from bench import systems\n"
        "def runners(problem):\n"
        "    [runner] = systems.baseline(problem)\n"
        "    return [replace(runner, call=lambda leaf: tuple(value + 1 for value in runner.call(leaf)))]\n"
        "systems.REGISTRY['lstm_triton'] = systems.System('lstm_triton', runners)\n"
    )
    path = tmp_path / "benchmark.json"
    done = bench(
        *("pytest", "bench", "-q", "-p", "no:cacheprovider", f"--benchmark-json={path}", "--bench-device=cpu"),
        *("--bench-systems=lstm_triton,nn.LSTM", "--bench-seconds=0.01", "--bench-plugin=lies"),
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "lstm_triton is wrong: error" in done.stdout
    benchmarks = json.loads(path.read_text())["benchmarks"]
    assert len(benchmarks) == len(cases.work_list("smoke"))
    for one in benchmarks:
        row = one["extra_info"]
        assert row["system"] == "nn.LSTM"  # the others have no time
        assert one["stats"]["median"] * 1e6 == pytest.approx(row["median_us"], abs=0.01)
        assert one["stats"]["rounds"] >= 5


def test_pytest_bench_refuses_an_unknown_grid() -> None:
    options = {"--bench-grid": "huge", "--bench-device": "cpu", "--bench-systems": None}
    config = types.SimpleNamespace(getoption=options.__getitem__)
    with pytest.raises(pytest.UsageError, match="unknown grid 'huge'"):
        conftest.pytest_generate_tests(types.SimpleNamespace(config=config, fixturenames=["measured"]))


def test_the_report_of_a_cpu_says_so_everywhere(smoke, tmp_path, capsys) -> None:
    folder = tmp_path / "results"
    shutil.copytree(smoke[0], folder)
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert main(["report", "--results", str(folder), "--readme", str(readme)]) == 0
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == ["cpu-lengths.png", "cpu-speedup.png", "cpu-steps.png"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    report = (folder / "README.md").read_text()
    section = readme.read_text()
    for text in (report, section):
        assert "CPU figures: a check that everything runs, no statement about a GPU" in text
        assert "No GPU has been measured" in text
        assert "cpu-speedup.png" in text
    assert section.startswith("# Title\n\n## Performance\n\n<!-- bench:begin -->\n")
    assert section.endswith("<!-- bench:end -->\n\n## After\n")
    assert "old text" not in section
    # Once more gives the same files.
    before = {path: path.read_bytes() for path in [readme, *folder.iterdir()]}
    assert main(["report", "--results", str(folder), "--readme", str(readme)]) == 0
    assert {path: path.read_bytes() for path in [readme, *folder.iterdir()]} == before


# The report of a GPU, from invented figures


def timed(grid: str, case: BenchCase, system: str, time: float, **changes) -> cases.Row:
    figures = {"median_us": time, "p20_us": 0.99 * time, "p80_us": 1.01 * time, "error": 1e-3, "floor_us": 500.0}
    return (
        measure.new_row(grid, case, system, "ok", "") | figures | {"kept_bytes": 2**20, "peak_bytes": 2**21} | changes
    )


def gpu_rows() -> list[cases.Row]:
    rows = []
    for case in HEADLINE_CASES:
        ours = 4000.0 if case.dtype == "float16" else 1000.0
        for name, time in {"lstm_triton": ours, "nn.LSTM": 2000.0, "exchange-floor": 500.0}.items():
            rows.append(timed("headline", case, name, time * case.T / 1024))
        rows.append(measure.new_row("headline", case, "flashrnn-triton", "error", "out of shared | memory"))
    packed = replace(HEADLINE, layout="packed")
    rows += [
        measure.new_row("stacks", packed, "lstm_triton", "timeout", "silent"),
        timed("stacks", packed, "nn.LSTM", 1.0),
    ]
    same = replace(HEADLINE, layers=2)
    return [*rows, timed("stacks", same, "lstm_triton", 1.0), timed("stacks", same, "nn.LSTM", 1.01)]


@pytest.fixture
def gpu_results(tmp_path):
    """(folder, README): results of an invented GPU under these kernels."""
    origin = results.provenance("Invented GPU", "1.0")
    (tmp_path / "results").mkdir()
    results.Results(origin, gpu_rows()).write(tmp_path / "results" / "invented.json")
    (tmp_path / "README.md").write_text(README)
    return tmp_path / "results", tmp_path / "README.md"


def test_losses_are_shown_as_plainly_as_wins(gpu_results) -> None:
    folder, readme = gpu_results
    assert main(["report", "--results", str(folder), "--readme", str(readme)]) == 0
    report, section = (folder / "README.md").read_text(), readme.read_text()
    total = len(HEADLINE_CASES) + 2
    lost = sum(case.dtype == "float16" for case in HEADLINE_CASES)
    counts = f"in {total} cases: **{total - lost - 2} faster**, **1 no different**, **{lost} slower**, **1 timeout**"
    assert counts in report
    assert counts in section
    assert "| float16 | forward+backward | 3.91 | 1.95 | **0.50x (slower)** | 12 % |" in section
    assert "| bfloat16 | forward+backward | 0.98 | 1.95 | **2.00x** | 50 % |" in section
    losses = report.split("slower, wrong or gives nothing")[1].split("\n### ")[0]
    assert len(re.findall(r"^\| (headline|stacks) ", losses, re.MULTILINE)) == lost + 1
    assert losses.index("silent") < losses.index("0.50x")  # nothing at all comes first
    assert "out of shared \\| memory" in report
    for name in ("speedup", "steps", "lengths", "memory"):
        assert (folder / f"invented-{name}.png").stat().st_size > 5000
        assert f"results/invented-{name}.png" in section


def test_results_of_older_kernels_are_marked_and_not_called_current(gpu_results, capsys) -> None:
    folder, readme = gpu_results
    path = folder / "invented.json"
    path.write_text(path.read_text().replace(results.kernel_hash("Invented GPU"), "0123456789abcdef"))
    assert main(["report", "--results", str(folder), "--readme", str(readme)]) == 0
    for text in ((folder / "README.md").read_text(), readme.read_text()):
        assert "Measured with other kernels than those in this checkout" in text
    assert "No GPU has been measured with these kernels yet" in readme.read_text()
    capsys.readouterr()
    assert main(["status", "--results", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "invented.json: Invented GPU" in printed
    assert "other kernels (0123456789abcdef)" in printed
    assert "headline: 66 of 66 cases are not measured with these kernels" in printed


def test_status_tells_what_a_gpu_is_still_needed_for(gpu_results, capsys) -> None:
    folder, _ = gpu_results
    header = {key: results.provenance("Invented GPU", None)[key] for key in ("kernel_hash", "gpu")}
    entries = [header, {"test": "a", "outcome": "passed"}, {"test": "b", "outcome": "failed"}, {"end": True}]
    (folder / "gpu-tests.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert main(["status", "--results", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "Invented GPU" in printed
    assert "these kernels:" in printed
    assert "GPU tests: 1 passed, 1 failed." in printed
    assert "headline:" not in printed
    assert "tests: pytest" not in printed
    assert "full: 432 of 432 cases" in printed
    assert main(["status", "--results", str(folder / "nowhere")]) == 0
    assert "tests: pytest -m gpu has not been run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["no markers", README + README, README.replace("begin", "END").replace("bench:end", "bench:begin")]
)
def test_a_readme_without_a_place_is_refused_before_anything_is_written(gpu_results, capsys, text: str) -> None:
    folder, readme = gpu_results
    readme.write_text(text)
    assert main(["report", "--results", str(folder), "--readme", str(readme)]) == 2
    assert "needs the lines <!-- bench:begin -->" in capsys.readouterr().err
    assert readme.read_text() == text
    assert [path.name for path in folder.iterdir()] == ["invented.json"]


def test_without_results_the_section_says_so(tmp_path) -> None:
    (tmp_path / "results").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert main(["report", "--results", str(tmp_path / "results"), "--readme", str(readme)]) == 0
    assert "No GPU has been measured with these kernels yet" in readme.read_text()
    assert "png" not in readme.read_text()


# Tuning

GPU = target.Device("Invented GPU", "sm_90", 132, 232448)


SHAPE = ScanShape("forward", 2, 256, 256, torch.float32, GPU, allow_tf32=False)


def found_candidates() -> list[Plan]:
    return planner.candidates(SHAPE)


def test_what_spills_or_does_not_fit_or_compile_is_never_run(monkeypatch) -> None:
    first, second, third, fourth, *_ = found_candidates()
    findings = {first: (8, 1000), second: (0, GPU.shared_bytes + 1), fourth: (0, GPU.shared_bytes)}

    def compiled(kind, arch, hidden, dtype, plan):
        assert (kind, arch, hidden, dtype) == ("forward", "sm_90", 256, torch.float32)
        if plan == third:
            raise RuntimeError("PassManager::run failed")
        return plan

    def needs(plan):
        spill_bytes, shared_bytes = findings.get(plan, (0, 0))
        return {"spill_bytes": spill_bytes, "shared_bytes": shared_bytes}

    monkeypatch.setattr(tune.resources, "compiled", compiled)
    monkeypatch.setattr(tune.resources, "resources", needs)
    said: list[str] = []
    case = BenchCase("forward", "float32", T=8, B=2, I=256, H=256)
    assert tune.kept_candidates("forward", case, GPU, 1, said.append) == [fourth]
    reasons = [line.strip().split(":")[0] for line in said]
    assert reasons == [
        "not run, spills 8 bytes",
        "not run, needs 232449 bytes of shared memory",
        "not run, does not compile",
    ]


def tuned(monkeypatch, tmp_path, answer) -> tuple[int, dict, list[str]]:
    """(exit code, table, what was said) of tuning one size, the children's answers being answer(kind, plan)."""

    def measured(self, grid_name, case, names, seconds, forced):
        assert (grid_name, names) == ("tune", ["lstm_triton"])
        assert case.mode == tune.SCAN_MODES[forced["kind"]]
        return answer(forced["kind"], Plan(**forced["plan"]))

    monkeypatch.setattr(Watchdog, "measure", measured)
    monkeypatch.setattr(tune, "refusal", lambda *arguments: None)
    path, said = tmp_path / "plans" / "gpu.json", []
    code = tune.tune([(256, 2)], ["float32"], Watchdog("cpu", path, 0.0, 1.0), GPU, path, limit=3, say=said.append)
    return code, json.loads(path.read_text()) if path.exists() else {}, said


def row_of(time: float | None, status: str = "ok"):
    return [measure.new_row("tune", HEADLINE, "lstm_triton", status, "") | {"median_us": time}], None


def test_the_fastest_right_candidate_goes_into_the_table_that_the_planner_reads(monkeypatch, tmp_path) -> None:
    first, second, third = found_candidates()[:3]
    times = {first: row_of(3.0), second: row_of(None, "wrong"), third: row_of(2.0)}

    def answer(kind, plan):
        if kind == "backward":
            return [], {"status": "timeout", "message": "silent", "phase": "values", "system": "lstm_triton"}
        return times[plan]

    code, table, said = tuned(monkeypatch, tmp_path, answer)
    assert code == 0
    assert table == {tables.ABOUT: tables.about(GPU), SHAPE.key: asdict(third)}
    assert any("wrong" in line for line in said)
    assert any("timeout" in line for line in said)
    # The planner prefers it to its formula.
    monkeypatch.setattr(planner, "table_path", lambda device: tmp_path / "plans" / "gpu.json")
    device = replace(GPU, name="Invented GPU, tuned")
    assert planner.plan(replace(SHAPE, device=device)) == third


def test_plans_of_other_kernels_are_dropped(monkeypatch, tmp_path) -> None:
    """They would count as measured with the present ones."""
    path, plan = tmp_path / "plans" / "gpu.json", found_candidates()[0]
    path.parent.mkdir()
    for multiprocessors, kept in ((132, True), (114, False)):
        device = replace(GPU, multiprocessors=multiprocessors)
        tune.write_table(path, {"forward float32 B=1 I=1 H=1": asdict(plan)}, device)
        _, table, said = tuned(monkeypatch, tmp_path, lambda kind, plan: row_of(1.0))
        assert ("forward float32 B=1 I=1 H=1" in table, any("dropped" in line for line in said)) == (kept, not kept)


def test_nothing_found_leaves_the_table_as_it_was(monkeypatch, tmp_path) -> None:
    path = tmp_path / "plans" / "gpu.json"
    path.parent.mkdir()
    before = {"forward float32 B=1 I=1 H=1": asdict(found_candidates()[0])}
    tune.write_table(path, before)
    code, table, _ = tuned(monkeypatch, tmp_path, lambda kind, plan: row_of(None, "error"))
    assert code == 1
    assert table == before


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {"block_batch": 8}}'])
def test_a_damaged_table_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(results.ResultsError, match="is not a table of plans"):
        tune.read_table(path)
    assert path.read_text() == text


@pytest.mark.interpreted
def test_tuning_rehearsed_on_the_interpreter(tmp_path) -> None:
    """Real candidates in a real child: both scans get a plan."""
    path = tmp_path / "table.json"
    sizes = ["--hidden", "8", "--batch", "2", "--dtype", "float32", "--steps", "2", "--candidates", "1"]
    done = bench("bench", "tune", "--device", "interpreter", *sizes, "--seconds", "0.01", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [key.split()[0] for key in tune.read_table(path)] == ["backward", "forward"]

"""The scripts in examples/ run, and show what they say."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lstm_triton
from tests.support.processes import ROOT

FOLDER = ROOT / "examples"


def module_of(name: str) -> ModuleType:
    """An example as a module: examples/ is no package."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_example(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """An example as its users start it, from another folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, FOLDER / f"{name}.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_example_is_tested() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for path in FOLDER.glob("*.py"):
        assert f'"{path.stem}"' in tests or f'"{path.name}"' in tests or f"examples/{path.name}" in tests, path
        assert f"examples/{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


# --- stock_prices ---


@pytest.fixture(scope="module")
def stock_prices() -> ModuleType:
    return module_of("stock_prices")


def test_stock_prices(tmp_path: Path) -> None:
    finished = run_example("stock_prices", "--device", "cpu", "--out", "pictures", folder=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    printed = finished.stdout
    assert finished.stderr == ""
    assert "Company A ends with a short-term memory of 0.006: on day 5 it is worth 0" in printed
    assert "Company B ends with a short-term memory of 0.969: on day 5 it is worth 1" in printed
    assert printed.count("of the long-term memory is kept") == 8

    learnt = re.findall(r"after +\d+ updates: A (\S+), B (\S+)", printed)
    assert float(learnt[-1][0]) == pytest.approx(0, abs=0.05)
    assert float(learnt[-1][1]) == pytest.approx(1, abs=0.05)
    assert "It predicts both companies." in printed

    table = {name: [float(cell) for cell in cells.split()] for name, cells in rows_of(printed)}
    assert [len(row) for row in table.values()] == [4] * 5
    first, *_, last = zip(*table.values(), strict=True)
    assert min(first) > 1e-3, "through one step, every network lets something pass"
    assert table["tanh RNN"][-1] < 1e-100
    assert table["tanh RNN, orthogonal"][-1] < 1e-10
    assert table["tanh RNN"] == sorted(table["tanh RNN"], reverse=True)
    assert last[2] < last[3] < last[4], "the more is kept, the more arrives"
    assert table["LSTM, forget bias 5"][-1] > 1e-3

    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["company_a.png", "company_b.png", "gradients.png", "training.png"]
    assert all((tmp_path / "pictures" / name).stat().st_size > 10_000 for name in pictures)


def rows_of(printed: str) -> list[tuple[str, str]]:
    """The table of gradients: names, and the cells after them."""
    return re.findall(r"^((?:tanh RNN|LSTM)[^\n]*?) +((?:\d\.\de[-+]\d+ *)+)$", printed, flags=re.MULTILINE)


def test_stock_prices_says_what_is_wrong(tmp_path: Path) -> None:
    finished = run_example("stock_prices", "--days", "0", folder=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == "stock_prices.py: argument --days: must be a whole number of at least 1, got '0'\n"


def mistakes() -> Iterator[tuple[str, list[str], str]]:
    """(example, arguments, message)"""
    for name in ("gradient_penalty", "per_sample_gradients", "recurrent_ppo_resets", "stock_prices"):
        for device in ("nope", "cuda:99", "meta", "vulkan", ""):
            yield name, ["--device", device], f"argument --device: '{device}' cannot be used here: "
    counted = {
        "gradient_penalty": ["--steps"],
        "per_sample_gradients": ["--batch-size", "--time-steps", "--size"],
        "recurrent_ppo_resets": ["--updates"],
        "stock_prices": ["--days"],
        "train_ddp": ["--steps", "--batch-size", "--time-steps", "--hidden-size", "--save-every", "--print-every"],
    }
    for name, options in counted.items():
        for option in options:
            for value in ("0", "-1", "many", "1.5", "9" * 30):
                yield name, [option, value], f"argument {option}: must be a whole number of at "
    for name in ("recurrent_ppo_resets", "stock_prices", "train_ddp"):
        for value in ("-1", str(2**64), "x"):
            yield name, ["--seed", value], "argument --seed: must be a whole number of at "
    for value in ("0", "-1", "nan", "inf", "x", "1e300"):
        yield "train_ddp", ["--learning-rate", value], "argument --learning-rate: must be a number "
    for name in ("missing/x.png", "file/x.png", "folder.png", "circle.png", "a" * 300 + ".png"):
        yield "recurrent_ppo_resets", ["--out", name], "argument --out: cannot write "
        yield "train_ddp", ["--checkpoint", name], "argument --checkpoint: cannot write "
    for name in ("", "x", "x.xyz"):
        yield "recurrent_ppo_resets", ["--out", name], f"argument --out: '{name}' does not end in ."
    for name in ("", "file", "file/x", "circle.png", "a" * 300):
        yield "stock_prices", ["--out", name], "argument --out: cannot write into "
    yield "per_sample_gradients", ["--size", "9000000"], "would need "
    yield "per_sample_gradients", ["--batch-size", "900000000"], "would need "
    yield "stock_prices", ["--days", "900000000"], "--days 900000000 would need "
    yield "train_ddp", [], "start it with torchrun"


@pytest.mark.parametrize("name", sorted({name for name, _, _ in mistakes()}))
def test_a_mistake_gets_one_line_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    Path("file").touch()
    Path("folder.png").mkdir()
    Path("circle.png").symlink_to("circle.png")
    there = set(tmp_path.iterdir())
    example = module_of(name)
    for _, arguments, message in (mistake for mistake in mistakes() if mistake[0] == name):
        try:
            code = example.main(arguments)
        except SystemExit as leaving:
            code = leaving.code
        printed = capsys.readouterr()
        assert code == 2, arguments
        assert message in printed.err, arguments
        assert printed.err.startswith(f"{name}.py: ")
        assert printed.err.count("\n") == 1, printed.err
        assert len(printed.err) < 500
        assert printed.out == ""
        assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    ("name", "package"), [("stock_prices", "matplotlib"), ("recurrent_ppo_resets", "gymnasium"),
                          ("per_sample_gradients", "opacus")]
)  # fmt: skip
def test_a_missing_package_gets_one_line(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    for module in [package, *(module for module in sys.modules if module.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    try:
        code = module_of(name).main(["--device", "cpu"])
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2
    assert re.fullmatch(rf'{name}.py: {package} is not installed; it comes with pip install "lstm-triton\[\w+\]"\n',
                        capsys.readouterr().err)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_known_unit(stock_prices: ModuleType, dtype: torch.dtype) -> None:
    inputs = stock_prices.prices().to(dtype)
    assert inputs[:, :, 0].t().tolist() == [[0, 0.5, 0.25, 1], [1, 0.5, 0.25, 1]]
    _, (short_term, _) = stock_prices.known_unit().to(dtype)(inputs)
    assert short_term[0, :, 0].tolist() == pytest.approx([0.006, 0.969], abs=5e-4)


def test_the_same_weights_for_any_number_of_days(stock_prices: ModuleType) -> None:
    unit = stock_prices.known_unit()
    four, ten = stock_prices.prices(4), stock_prices.prices(10)
    torch.testing.assert_close(ten, torch.cat([four, four, four])[:10], rtol=0, atol=0)
    torch.testing.assert_close(unit(ten)[0][:4], unit(four)[0])
    told = stock_prices.story(lstm_triton.trace(unit, ten), ten, 0)
    assert [line.split(":")[0] for line in told.splitlines() if line.startswith("Day")] == [
        f"Day {day}" for day in range(1, 11)
    ]


def test_the_story_adds_up(stock_prices: ModuleType) -> None:
    """Day 4 of company B, of which the explanation is known."""
    inputs = stock_prices.prices()
    told = stock_prices.story(lstm_triton.trace(stock_prices.known_unit(), inputs), inputs, 1).splitlines()[-5:]
    assert told == [
        "Day 4: the price is 1, the long-term memory 1.481, the short-term memory 0.867",
        "  forget gate     99.6% of the long-term memory is kept: 1.475",
        "  input gate      98.2% of the potential memory 0.951 is added: +0.934",
        "                          the new long-term memory is 2.409",
        "  output gate     98.5% of its tanh is the new short-term memory: 0.969",
    ]


def test_a_unit_that_does_not_learn_is_reported(
    stock_prices: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(stock_prices, "MOST_UPDATES", 3)
    assert stock_prices.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: not learnt in 3 updates from seed 0: try another\n"


def test_the_gradient_is_that_of_the_formula(stock_prices: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network without a nonlinearity at work: h_T = W^(T-1) w x_1 + ..., with W = 0.5."""
    monkeypatch.setattr(stock_prices, "HIDDEN_SIZE", 1)

    def build() -> torch.nn.RNN:
        rnn = torch.nn.RNN(1, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            rnn.weight_ih_l0.fill_(1e-6)
            rnn.weight_hh_l0.fill_(0.5)
        return rnn

    for steps in (1, 2, 30):
        gradient = stock_prices.gradient_at_first_step(build, steps, 0, torch.device("cpu"))
        assert gradient == pytest.approx(1e-6 * 0.5 ** (steps - 1), rel=1e-6)


def test_the_lstms_keep_what_their_bias_says(stock_prices: ModuleType) -> None:
    lstm = stock_prices.lstm_that_keeps(3.0)()
    inside = lstm_triton.trace(lstm, torch.zeros(1, 1, 1, dtype=torch.float64))
    expected = torch.tensor(3.0, dtype=torch.float64).sigmoid()
    torch.testing.assert_close(inside.layers[0].forget_gate.flatten(), expected.expand(stock_prices.HIDDEN_SIZE))

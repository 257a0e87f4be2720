"""The public surface as a type checker and a reader of docstrings see it."""

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

import lstm_triton

api = pytest.importorskip("mypy.api")

RIGHT = """
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import lstm_triton
from lstm_triton import LSTM


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, device="cpu", dtype=torch.float32)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> Tensor:
        output, (h_n, c_n) = self.lstm.forward(input, hx, lengths=torch.tensor([1]))
        return output


def tensors(lstm: LSTM, input: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    return lstm.with_cells(input)


def packed(lstm: LSTM, input: PackedSequence) -> PackedSequence:
    output, _ = lstm.forward(input)
    return output


def function(input: Tensor, weights: list[Tensor]) -> Tensor:
    output, (h_n, c_n) = lstm_triton.functional.lstm(input, None, weights, batch_first=True, backend="aten")
    more, _, cells = lstm_triton.functional.lstm(input, (h_n, c_n), weights, return_cells=True)
    return output + more + cells[0]


def reference(input: Tensor, weight_ih: Tensor, weight_hh: Tensor) -> Tensor:
    return lstm_triton.reference.lstm_layer(input, None, None, weight_ih, weight_hh, reverse=True)[0]


with lstm_triton.backend("triton"):
    launches: int = lstm_triton.explain(LSTM(3, 4), torch.empty(5, 2, 3, device="meta")).launches
version: str = lstm_triton.__version__
"""

WRONG = {
    'LSTM("3", 4)': "arg-type",
    "LSTM(3, 4, num_layer=2)": "call-arg",
    "LSTM(3, 4).forward(torch.zeros(5, 2, 3), torch.zeros(1, 2, 4))": "arg-type",
    "LSTM(3, 4).forward(torch.zeros(5, 2, 3), lengths=[1, 2])": "arg-type",
    "lstm_triton.functional.lstm(torch.zeros(5, 2, 3), None, [], hidden=3)": "call-overload",
    "a: int = LSTM(3, 4).forward(torch.zeros(5, 2, 3))[0]": "assignment",
    "lstm_triton.explain(torch.nn.Linear(3, 4), torch.zeros(5, 2, 3))": "arg-type",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def checked(code: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """What mypy says of a file of a user, strictly, and its exit code."""
    root = str(Path(lstm_triton.__file__).parents[1])
    monkeypatch.setenv("MYPYPATH", root)
    monkeypatch.chdir(folder)  # away from the settings of this project
    (folder / "user.py").write_text(code)
    options = ["--strict", "--allow-untyped-calls", "--cache-dir", str(cache), "--follow-imports=silent"]
    output, problems, code_of_exit = api.run([*options, "--python-executable", sys.executable, "user.py"])
    assert not problems
    return output, code_of_exit


def test_right_use(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, code = checked(RIGHT, tmp_path, cache, monkeypatch)
    assert code == 0, output


def test_wrong_use(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["import torch", "import lstm_triton", "from lstm_triton import LSTM", *WRONG]
    output, _ = checked("\n".join(lines), tmp_path, cache, monkeypatch)
    for number, (statement, kind) in enumerate(WRONG.items(), start=4):
        assert any(f"user.py:{number}: error" in line and f"[{kind}]" in line for line in output.splitlines()), (
            statement,
            output,
        )


def public() -> list[Any]:
    """All classes and functions that a user is meant to call, each with a name for the report."""
    found: list[tuple[str, Any]] = []
    for name in lstm_triton.__all__:
        thing = getattr(lstm_triton, name)
        found.append((name, thing))
        if inspect.isclass(thing):
            own = {key: value for key, value in vars(thing).items() if not key.startswith("_") and callable(value)}
            found += [
                (f"{name}.{key}", value) for key, value in own.items() if value.__module__.startswith("lstm_triton")
            ]
    found += [
        ("functional.lstm", lstm_triton.functional.lstm),
        ("reference.lstm_layer", lstm_triton.reference.lstm_layer),
    ]
    return [pytest.param(thing, id=name) for name, thing in found if name not in ("__version__", "LSTM.forward")]


@pytest.mark.parametrize("thing", public())
def test_docstrings(thing: Any) -> None:
    """What it is; shapes or values of arguments and results; errors. `LSTM` speaks for its forward."""
    text = inspect.getdoc(thing)
    assert text
    if inspect.isfunction(inspect.unwrap(thing)) and inspect.signature(thing).parameters.keys() - {"self"}:
        assert any(section in text for section in ("Args:", "Returns:")), text


def test_the_formula_has_its_source() -> None:
    for thing in (lstm_triton.LSTM, lstm_triton.functional.lstm, lstm_triton.reference):
        text = inspect.getdoc(thing)
        assert text is not None
        assert "Hochreiter & Schmidhuber" in text
        assert "Gers" in text

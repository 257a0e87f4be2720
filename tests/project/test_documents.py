"""What is written: the README's commands, examples and links; and the tests that documents name."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT

TESTS = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "bench").glob("test_*.py")]
# Where tests are named: documents, docstrings, and what runs them.
NAMING = ("*.md", "pyproject.toml", ".ci/*", "docs/**/*.md", "bench/**/*.md", "bench/*.py", "kernels/*.py",
          "lstm_triton/**/*.py")  # fmt: skip
MENTION = re.compile(
    r"(?<![\w/])(?P<path>tests/[\w/.{},]*\w|(?:\w+/)*test_\w+\.py)(?P<names>(?:::\w+)*)"
    r"|(?<![\w/:.])`?(?:::)?(?P<name>test_\w+)(?=`)"
)


def with_choices(path: str) -> Iterator[str]:
    """As the shell expands a/{b,c}/d."""
    if (choice := re.search(r"{([^{}]*)}", path)) is None:
        yield path
        return
    for each in choice[1].split(","):
        yield from with_choices(path[: choice.start()] + each + path[choice.end() :])


def missing(text: str, beside: Path = ROOT) -> list[str]:
    """The tests, and files of tests, that a text names although they do not exist.

    Paths begin in the project's folder, in tests/, or beside the text. In code spans, a name without a path is that of
    a test in the file that was named last in its line. Where no file was named, any test may have the name.
    """
    found = []
    for line in text.splitlines():
        files = TESTS
        for mention in MENTION.finditer(line):
            for path in with_choices(mention["path"] or ""):
                places = (ROOT / path, ROOT / "tests" / path, beside / path)
                there = [each for each in places if path and each.exists()]
                if path and not there:
                    found.append(path)
                files = [each for each in there if each.is_file()] or files
            for name in (mention["names"] or mention["name"] or "").split("::"):
                defined = re.compile(rf"^ *(?:def|class) {name}\b", re.MULTILINE)
                if name and not any(defined.search(file.read_text(encoding="utf-8")) for file in files):
                    found.append(name)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`tests/project/test_documents.py` and tests/support/, `project/test_documents.py`", []),
        ("bench/test_bench.py, tests/{project,kernels}/test_{cli,cell}.py", ["tests/project/test_cell.py",
                                                                             "tests/kernels/test_cli.py"]),
        ("(`tests/test_documents.py`)", ["tests/test_documents.py"]),
        ("`test_documents.py`", ["test_documents.py"]),
        ("`project/test_documents.py::test_other`, `test_missing`", ["test_other"]),
        ("`project/test_documents.py::TestReadme::test_links_lead_somewhere[1]`", []),
        ("`test_missing` and `test_nothing_of_this_name`, not test_this, `test_a*` or `latest_b`",
         ["test_nothing_of_this_name"]),
        ("`project/test_documents.py`, `::test_missing`, `::test_the_import_brings_nothing_heavy`",
         ["test_the_import_brings_nothing_heavy"]),
        ("`tests/gone/`", ["tests/gone"]),
    ],
)  # fmt: skip
def test_missing(text: str, expected: list[str]) -> None:
    assert missing(text) == expected


def test_tests_that_are_named_exist() -> None:
    paths = {path for pattern in NAMING for path in ROOT.glob(pattern)}
    assert ROOT / "README.md" in paths
    found = [
        f"{path.relative_to(ROOT)} names {each}"
        for path in sorted(paths)
        for each in missing(path.read_text(encoding="utf-8"), path.parent)
    ]
    assert not found, "\n".join(found)


class TestReadme:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def test_gives_the_two_commands(self):
        for command in (
            'pip install ".[demo]" && python -m lstm_triton demo',
            'pip install ".[test]" && pytest',
        ):
            assert f"\n{command}\n" in self.text

    def test_continuous_integration_runs_them(self):
        script = (ROOT / ".ci" / "run").read_text()
        assert 'pip install ".[test]"' in script
        assert script.rstrip().splitlines()[-1].startswith("pytest"), "the summary of the tests comes last"
        assert "python -m lstm_triton demo" in script

    def test_examples_run(self):
        examples = re.findall(r"```python\n(.*?)```", self.text, flags=re.DOTALL)
        assert examples
        for example in examples:
            exec(compile(example, "README.md", "exec"), {})

    def test_links_lead_somewhere(self):
        targets = re.findall(r"\]\(([^)#]+)\)", self.text)
        missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
        assert targets
        assert missing == []

    def test_named_tests_exist(self):
        """The table of what the library works with names a test in every row."""
        table = self.text.split("## Works with")[1].split("\n## ")[0]
        rows = [line for line in table.splitlines() if line.startswith("|")][2:]
        assert rows
        for row in rows:
            named = row.split("|")[-2]
            assert "test_" in named, row
            assert missing(named) == []

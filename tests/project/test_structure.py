"""The layout: which files import which, and how long files and lists of arguments may be.

Each rule is a function that lists what breaks it. Each is first applied to a made-up tree that breaks it, then to ours.
"""

import ast
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import ROOT

PACKAGES = {"lstm_triton": "lstm_triton", "lstm_triton.kernels": "kernels", "bench": "bench"}  # name -> folder
MOST_LINES = 400
MOST_ARGUMENTS = 11
# Functions whose arguments are each given by name, in one list that users know from torch.nn.LSTM.
MAY_TAKE_MORE = ("check_arguments", "lstm", "lstm_layer")
OPERATORS = ("custom_op", "register_fake")  # decorators: PyTorch wants the arguments of an operator one by one


@dataclass(frozen=True)
class Import:
    """A line that imports a module of the tree, wherever in a file it stands."""

    importer: str
    imported: str
    place: str

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported} ({self.place})"


@dataclass
class Tree:
    """The modules of some packages."""

    root: Path
    packages: Mapping[str, str]

    def __post_init__(self) -> None:
        self.files: dict[str, Path] = {}
        for package, folder in self.packages.items():
            for path in sorted((self.root / folder).rglob("*.py")):
                parts = [*package.split("."), *path.relative_to(self.root / folder).with_suffix("").parts]
                # A file that is found twice, through a link, too, has one name and counts once.
                self.files[".".join(parts).removesuffix(".__init__")] = path
        self.sources = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}

    def place(self, module: str, line: int) -> str:
        return f"{self.files[module].relative_to(self.root)}:{line}"

    def names(self, module: str, node: ast.stmt) -> Iterator[tuple[str, str]]:
        """(module, name in it or "") for everything that a statement imports."""
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if self.files[module].stem == "__init__" else module.split(".")[:-1]
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((source, alias.name) for alias in node.names)

    def imports(self) -> list[Import]:
        """Those of other modules of the tree. A package that a module lies in is none: it is always loaded first."""
        found = []
        for module, source in self.sources.items():
            for node in ast.walk(source):
                for imported, name in self.names(module, node) if isinstance(node, ast.stmt) else ():
                    known = f"{imported}.{name}" if f"{imported}.{name}" in self.files else imported
                    if known in self.files and known != module:
                        found.append(Import(module, known, self.place(module, node.lineno)))
        return found

    def functions(self, module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.sources[module]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def circles(imports: list[Import]) -> list[str]:
    """Of each module that imports itself by way of others, the shortest way; each circle once."""
    onward: dict[str, dict[str, Import]] = {}
    for each in imports:
        onward.setdefault(each.importer, {}).setdefault(each.imported, each)
    found: dict[frozenset[str], str] = {}
    for start in sorted(onward):
        ways = deque([[each] for each in onward[start].values()])
        seen: set[str] = set()
        while ways:
            way = ways.popleft()
            if way[-1].imported == start:
                found.setdefault(frozenset(each.importer for each in way), "\n    ".join(map(str, way)))
                break
            if way[-1].imported not in seen:
                seen.add(way[-1].imported)
                ways.extend([*way, each] for each in onward.get(way[-1].imported, {}).values())
    return [f"a circle of {len(modules)} modules:\n    {text}" for modules, text in found.items()]


def long_files(tree: Tree) -> list[str]:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in tree.files.values()}
    return [f"{path.relative_to(tree.root)}: {lines} lines" for path, lines in lengths.items() if lines > MOST_LINES]


def names_in(decorators: list[ast.expr]) -> set[str]:
    nodes = [node for decorator in decorators for node in ast.walk(decorator)]
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def long_argument_lists(tree: Tree) -> list[str]:
    """But of MAY_TAKE_MORE, of operators, and of kernels that no other kernel calls: those are launched."""
    functions = [(module, function) for module in tree.files for function in tree.functions(module)]
    kernels = [function for _, function in functions if "jit" in names_in(function.decorator_list)]
    calls = [node.func for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.Call)]
    called = names_in(calls)  # type: ignore[arg-type]
    found = []
    for module, function in functions:
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        names = [each.arg for each in arguments if each.arg not in ("self", "cls")]
        decorators = names_in(function.decorator_list)
        is_launched = "jit" in decorators and function.name not in called
        is_operator = not decorators.isdisjoint(OPERATORS)
        if len(names) > MOST_ARGUMENTS and function.name not in MAY_TAKE_MORE and not (is_launched or is_operator):
            found.append(f"{tree.place(module, function.lineno)} {function.name}: {len(names)} arguments")
    return found


def imports_beside_triton(tree: Tree) -> list[str]:
    """Everything that is imported but triton, typing (of NamedTuple) and the tree's own modules."""
    own = {package.partition(".")[0] for package in tree.packages}
    return [
        f"{tree.place(module, node.lineno)} imports {imported}"
        for module, source in tree.sources.items()
        for node in ast.walk(source)
        if isinstance(node, ast.stmt)
        for imported, _ in tree.names(module, node)
        if imported.partition(".")[0] not in {"triton", "typing", *own}
        or (imported in own and isinstance(node, ast.Import))
    ]


def imports_of_tests(tree: Tree) -> list[str]:
    return [str(each) for each in tree.imports() if each.imported.rpartition(".")[2].startswith("test_")]


# --- Made-up trees ---


def made_up(folder: Path, packages: Mapping[str, str], **files: str) -> Tree:
    """A tree of these files: "some__module" is some/module.py."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Tree(folder, packages)


@pytest.mark.parametrize(
    "back",
    [
        "from . import low",
        "from .low import something",
        "import some.low",
        "import some.low as other",
        "from some.low import something",
        "from some import low",
        "def function():\n    from .low import something",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .low import something",
    ],
)
def test_every_way_to_import_makes_a_circle(tmp_path: Path, back: str) -> None:
    tree = made_up(tmp_path, {"some": "some"}, some__low="from .middle import x", some__middle="from . import high",
                   some__high=back, some__above="from .high import y")  # fmt: skip
    line = back.count("\n") + 1
    assert circles(tree.imports()) == [
        "a circle of 3 modules:\n"
        f"    some.high -> some.low (some/high.py:{line})\n"
        "    some.low -> some.middle (some/low.py:1)\n"
        "    some.middle -> some.high (some/middle.py:1)"
    ]


def test_circles_across_folders_and_through_the_package(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    tree = made_up(
        tmp_path,
        {"some": "some", "some.inner": "inner", "other": "other"},
        some__use="from some.inner import first",
        some__path__deep="from ..use import x",
        inner__first="from ..path.deep import y",
        other__one="from some import use\nfrom other import one",
    )
    [found] = circles(tree.imports())
    assert found.startswith("a circle of 3 modules:\n    some.inner.first -> some.path.deep (inner/first.py:1)")
    (tmp_path / "some" / "__init__.py").write_text("from .use import x")
    assert circles(Tree(tmp_path, {"some": "some"}).imports()) == []
    (tmp_path / "some" / "use.py").write_text("from some import x")
    [found] = circles(Tree(tmp_path, {"some": "some"}).imports())
    assert found.startswith("a circle of 2 modules:\n    some -> some.use (some/__init__.py:1)\n    some.use -> some")


def test_a_file_behind_a_link_counts_once(tmp_path: Path) -> None:
    packages = {"some": "some", "some.inner": "inner"}
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "inner").symlink_to("../inner")
    tree = made_up(tmp_path, packages, inner__first="\n" * (MOST_LINES + 1), some__use="")
    assert sorted(tree.files) == ["some.inner.first", "some.use"]
    assert long_files(tree) == [f"inner/first.py: {MOST_LINES + 1} lines"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f({}): ...", "1 f"),
        ("class A:\n    def f(self, {}): ...", "2 f"),
        ("def lstm({}): ...", None),
        ("class A:\n    def f(self, {most}): ...", None),
        ("@torch.library.custom_op('some::f')\ndef f({}): ...\n@f.register_fake\ndef _({}): ...", None),
        ("@triton.jit\ndef f({}): ...", None),
        ("@triton.jit(do_not_specialize=['a0'])\ndef f({}): ...", None),
        ("@triton.jit\ndef f({}): ...\n@triton.jit\ndef g(): f()", "2 f"),
        ("@triton.jit\ndef f({}): ...\ndef g(): f[(1,)]()", None),
    ],
)
def test_long_argument_lists(tmp_path: Path, text: str, found: str | None) -> None:
    names = [f"a{number}" for number in range(MOST_ARGUMENTS + 1)]
    text = text.replace("{}", ", ".join(names)).replace("{most}", ", ".join(names[1:]))
    tree = made_up(tmp_path, {"some": "some"}, some__file=text)
    line = found and f"some/file.py:{found}: {MOST_ARGUMENTS + 1} arguments"
    assert long_argument_lists(tree) == ([line] if line else [])


def test_imports_beside_triton(tmp_path: Path) -> None:
    tree = made_up(
        tmp_path,
        {"some.kernels": "kernels"},
        kernels__good="import triton\nimport triton.language as tl\nfrom .bad import x",
        kernels__bad="import torch\ndef f():\n    from numpy import array\nimport some",
    )
    assert sorted(imports_beside_triton(tree)) == [
        "kernels/bad.py:1 imports torch", "kernels/bad.py:3 imports numpy", "kernels/bad.py:4 imports some",
    ]  # fmt: skip


def test_tests_that_import_tests(tmp_path: Path) -> None:
    tree = made_up(tmp_path, {"tests": "tests"}, tests__a__test_one="from tests.b import test_two\nimport tests.help",
                   tests__b__test_two="", tests__help="")  # fmt: skip
    assert imports_of_tests(tree) == ["tests.a.test_one -> tests.b.test_two (tests/a/test_one.py:1)"]


# Functions that make a tensor on the default device, and those of them whose dtype may be the default dtype.
INTEGERS = {"arange", "randint", "randperm"}
FACTORIES = INTEGERS | {"as_tensor", "asarray", "empty", "eye", "full", "linspace", "normal", "ones", "rand", "randn"}
FACTORIES |= {"empty_strided", "logspace", "scalar_tensor", "tensor", "zeros"}


def tensors_by_default(tree: Tree) -> list[str]:
    """Calls of PyTorch's factories that leave the device or the dtype to PyTorch's defaults, which users may set."""
    found = []
    for module, source in tree.sources.items():
        for node in ast.walk(source):
            function = node.func if isinstance(node, ast.Call) else None
            if not isinstance(function, ast.Attribute) or function.attr not in FACTORIES:
                continue
            if isinstance(function.value, ast.Name) and function.value.id == "torch":
                wanted = {"device"} if function.attr in INTEGERS else {"device", "dtype"}
                missing = wanted - {keyword.arg for keyword in node.keywords}
                if missing:
                    place, names = tree.place(module, node.lineno), " and ".join(sorted(missing))
                    found.append(f"{place}: torch.{function.attr} without {names}")
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("torch.eye(3)", "torch.eye without device and dtype"),
        ("torch.arange(3)", "torch.arange without device"),
        ("torch.zeros(3, device=d)", "torch.zeros without dtype"),
        ("torch.zeros(3, device=d, dtype=t); torch.arange(3, device=d); like.new_zeros(3); tl.zeros(3)", None),
    ],
)
def test_factories_that_take_defaults(tmp_path: Path, text: str, found: str | None) -> None:
    tree = made_up(tmp_path, {"some": "some"}, some__file=text)
    assert tensors_by_default(tree) == ([] if found is None else [f"some/file.py:1: {found}"])


# --- Ours ---


def assert_none(found: list[str]) -> None:
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_kernels_import_triton_only() -> None:
    tree = Tree(ROOT, {"lstm_triton.kernels": "kernels"})
    assert tree.files
    assert_none(imports_beside_triton(tree))


def test_no_test_file_imports_another() -> None:
    tree = Tree(ROOT, {"tests": "tests"})
    assert tree.imports()
    assert_none(imports_of_tests(tree))


def test_imports_make_no_circle() -> None:
    assert_none(circles(Tree(ROOT, PACKAGES).imports()))


def test_files_are_short() -> None:
    tree = Tree(ROOT, {package: folder for package, folder in PACKAGES.items() if package != "bench"})
    assert_none(long_files(tree))


def test_no_tensor_is_made_by_default() -> None:
    """The user's default device and default dtype are for the user's tensors."""
    assert_none(tensors_by_default(Tree(ROOT, {"lstm_triton": "lstm_triton"})))


def test_argument_lists_are_short() -> None:
    assert_none(long_argument_lists(Tree(ROOT, PACKAGES)))

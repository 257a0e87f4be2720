"""What is shipped: the wheel, the source distribution, and the cost of the import."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lstm_triton
from tests.support.processes import ROOT

KERNELS = {path.name for path in (ROOT / "kernels").glob("*.py")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a wheel built from the checkout (wheel/), a source distribution and a wheel built from it (sdist/).

    From a copy: setuptools leaves a build folder behind, from which files that are gone would come back.
    """
    folder = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignored)
    for outdir, what in (("wheel", ["--wheel"]), ("sdist", [])):
        command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", folder / outdir, source]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "Warning" not in finished.stdout + finished.stderr, finished.stdout + finished.stderr
        shutil.rmtree(source / "build", ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    [path] = (built / "wheel").glob("*.whl")
    return path


def files_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_has_the_package_the_kernels_and_the_types(wheel):
    files = files_in(wheel)
    assert KERNELS, "there are kernels"
    assert {f"lstm_triton/kernels/{name}" for name in KERNELS} <= files
    assert {f"lstm_triton/{path.name}" for path in (ROOT / "lstm_triton").glob("*.py")} <= files
    assert {f"lstm_triton/{path.name}" for path in (ROOT / "lstm_triton").glob("*.json")} <= files
    assert "lstm_triton/py.typed" in files


def test_the_wheel_has_no_other_top_level_package(wheel):
    """Above all none named `kernels`: another distribution ships one, which ours would shadow or overwrite."""
    assert {name.split("/")[0] for name in files_in(wheel)} == {
        "lstm_triton",
        f"lstm_triton-{lstm_triton.__version__}.dist-info",
    }


def test_the_metadata_say_what_is_needed(wheel):
    dist_info = f"lstm_triton-{lstm_triton.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{dist_info}/METADATA"))
    assert metadata["Name"] == "lstm-triton"
    assert metadata["Version"] == lstm_triton.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert f"{dist_info}/licenses/LICENSE" in files_in(wheel)
    required = [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]
    assert required == ["torch>=2.9"], "a Triton would overwrite the one that PyTorch's build brought"
    extras = {"bench", "demo", "examples", "gpu-test", "interpreter", "models", "test"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    brings_triton = [each for each in metadata.get_all("Requires-Dist") if each.startswith("triton")]
    assert brings_triton == ['triton>=3.6; platform_system == "Linux" and extra == "interpreter"']


def test_the_source_distribution_gives_the_same_wheel_and_has_its_tests(built, wheel, tmp_path):
    [from_sdist] = (built / "sdist").glob("*.whl")
    assert files_in(from_sdist) == files_in(wheel)
    [sdist] = (built / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    folders = ("tests", "bench", "examples", "lstm_triton/kernels")
    for path in (path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")):
        assert (unpacked / path.relative_to(ROOT)).is_file(), path
    for path in (path for path in ROOT.glob("docs/**/*") if path.is_file()):
        assert (unpacked / path.relative_to(ROOT)).is_file(), path
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_installed_wheel_is_found_with_its_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    names = sorted(f"lstm_triton.kernels.{Path(name).stem}" for name in KERNELS)
    program = (
        "import importlib.util, lstm_triton; print(lstm_triton.__file__);"
        f"[print(importlib.util.find_spec(name).origin) for name in {names}];"
        "print(importlib.util.find_spec('kernels'))"
    )
    printed = python("-c", program, cwd=tmp_path, PYTHONPATH=str(site)).stdout.split("\n")
    assert printed[0] == str(site / "lstm_triton" / "__init__.py")
    assert printed[1:-2] == [str(site / "lstm_triton" / "kernels" / f"{name.rsplit('.')[-1]}.py") for name in names]
    assert printed[-2] == "None", "no second way to import the kernels"


def test_the_kernels_are_one_folder_under_two_names():
    link = ROOT / "lstm_triton" / "kernels"
    if link.is_symlink():
        assert os.readlink(link) == os.path.join("..", "kernels")
    else:  # unpacked from a source distribution
        assert {path.name: path.read_bytes() for path in link.glob("*.py")} == {
            path.name: path.read_bytes() for path in (ROOT / "kernels").glob("*.py")
        }
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("statement", ["import kernels", "from kernels import forward", "import kernels.forward"])
def test_the_linter_refuses_a_second_copy_of_the_kernels(statement):
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "tests/x.py", "-"]
    finished = subprocess.run(command, input=f"{statement}\n", cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 1
    assert "TID251" in finished.stdout


def test_the_import_brings_nothing_heavy():
    """`import lstm_triton` costs little beside `import torch`, because it adds only its own small modules."""
    program = (
        "import sys, torch; before = set(sys.modules); import lstm_triton;"
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    added = set(python("-c", program, cwd=ROOT).stdout.split())
    assert "lstm_triton.module" in added
    foreign = {name for name in added if name.split(".")[0] not in {"lstm_triton", *sys.stdlib_module_names}}
    assert foreign == set()
    for needed_later in ("kernels", "ops", "autograd", "check", "demo", "info"):
        assert f"lstm_triton.{needed_later}" not in added


def test_the_cost_of_the_import(record_property):
    """A report (`-X importtime`), no assertion on times: what keeps it small is asserted above."""
    program = "import torch; import lstm_triton"
    lines = python("-X", "importtime", "-c", program, cwd=ROOT).stderr.splitlines()
    pattern = re.compile(r"import time:\s+\d+ \|\s+(\d+) \| (\w+)$")  # the outermost imports are not indented
    cumulative = {match[2]: int(match[1]) for line in lines if (match := pattern.match(line))}
    share = cumulative["lstm_triton"] / cumulative["torch"]
    record_property("import_microseconds", cumulative["lstm_triton"])
    print(f"import lstm_triton: {cumulative['lstm_triton'] / 1e3:.1f} ms, {share:.1%} of import torch")


def python(*arguments, cwd, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=True)

"""`python -m lstm_triton demo | info | check`: what they print, exit codes, and one clear line for every mistake."""

import contextlib
import errno
import os
import re
import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread

from lstm_triton import __version__, triton_package
from lstm_triton.__main__ import main
from lstm_triton.commands import check, demo, info
from lstm_triton.commands.threads import SETTINGS, choose_threads
from tests.support.processes import ROOT


def run(*arguments, without=(), **environment):
    """A fresh interpreter, in which the modules named by `without` cannot be imported."""
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in without)
    start = f"import runpy, sys; {hidden}runpy.run_module('lstm_triton', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True)


class TestDemo:
    def test_trains_compares_and_draws(self, tmp_path, capsys):
        picture = tmp_path / "picture.png"
        assert main(["demo", "--epochs", "1", "--hidden-size", "8", "--device", "cpu", "--out", str(picture)]) == 0
        printed = capsys.readouterr()
        for expected in ("test accuracy", "one step, median", "aten", "x nn.LSTM", str(picture)):
            assert expected in printed.out
        # On the CPU both are the same function of the same numbers.
        assert "difference between the two loss curves: 0\n" in printed.out
        assert "on which both agree: 100.0%" in printed.out
        assert "22/22" in printed.err, "the progress bar reaches the end"
        height, width, _ = imread(picture).shape
        assert width > height > 500

    def test_a_different_model_shows(self, tmp_path, capsys, monkeypatch):
        class Forgetful(torch.nn.LSTM):
            def forward(self, input, hx=None):
                return super().forward(input[:, 32:], hx)

        monkeypatch.setattr("lstm_triton.LSTM", Forgetful)
        main(["demo", "--epochs", "1", "--hidden-size", "8", "--device", "cpu", "--out", str(tmp_path / "it.png")])
        assert "difference between the two loss curves: 0\n" not in capsys.readouterr().out

    def test_both_start_from_the_same_weights_and_learn(self):
        torch.manual_seed(0)
        pixels, labels = demo.digits(torch.device("cpu"))
        assert pixels.shape == (1797, 64, 1)
        assert pixels.mean().abs() < 1e-5
        contestant = demo.Contestant("nn.LSTM", demo.DigitReader(torch.nn.LSTM(1, 16, batch_first=True)), 20)
        for _ in range(20):
            contestant.train_step(pixels[:64], labels[:64])
        assert contestant.losses[-1] < contestant.losses[0]

    @pytest.mark.gpu
    def test_takes_the_kernels_on_a_gpu(self, tmp_path, capsys):
        assert main(["demo", "--epochs", "2", "--device", "cuda", "--out", str(tmp_path / "picture.png")]) == 0
        printed = capsys.readouterr().out
        assert "triton" in printed
        same = float(re.search(r"both agree: ([\d.]+)%", printed)[1])
        assert same > 90


class TestThreads:
    """Small work takes one thread: several wait for each other at every step, for long on a busy machine."""

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, 1),
            ({"operations": 2 * 64 * 4 * 128**2}, 1),  # the demo's
            ({"operations": 200_000_000}, 3),
            ({"operations": 10**12}, 8),
            ({"operations": 0, "program": False}, 8),  # called by another program
            ({"operations": 0, "device": "cuda"}, 8),
        ],
    )
    def test_choice(self, options, expected, monkeypatch):
        threads = [8]
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
        monkeypatch.setattr(torch, "set_num_threads", threads.append)
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        choose_threads(**{"device": "cpu", "program": True} | options)
        assert threads[-1] == expected
        threads[:] = [8]
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        choose_threads(**{"device": "cpu", "program": True} | options)
        assert threads == [8], "the user has chosen"

    def test_the_demo_says_how_many(self, tmp_path):
        options = ("--epochs", "1", "--hidden-size", "4", "--device", "cpu", "--out", tmp_path / "picture.png")
        finished = run("demo", *options, **dict.fromkeys(SETTINGS, ""))
        assert finished.returncode == 0, finished.stderr
        assert "4 hidden units on the CPU, 1 thread(s)" in finished.stdout

    @pytest.mark.parametrize("command", ["demo", "check"])
    def test_a_call_of_main_leaves_the_threads_as_they_are(self, command, monkeypatch, capsys):
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("the threads were changed"))
        monkeypatch.setattr(demo, "compare", lambda *_: 0)
        monkeypatch.setattr(check, "INTERPRETED_CASES", [])
        stand_in_kernels(monkeypatch, torch.nn.LSTM)
        assert main([command, "--device", "cpu"]) == 0


class TestInfo:
    def test_names_versions_and_the_path(self, capsys):
        assert main(["info"]) == 0
        printed = capsys.readouterr().out
        for expected in (f"lstm-triton {__version__}", f"PyTorch     {torch.__version__}", "Triton ", "aten"):
            assert expected in printed

    def test_says_whether_the_pair_was_tested(self, capsys, monkeypatch):
        assert info.tested("2.11.0+cu130", "3.6.0") == info.tested("2.14.1", "3.8.0") == "tested with this release"
        for pair in (("2.11.0", "3.5.1"), ("2.14.2", "3.8.0"), ("2.11.0", None)):
            assert info.tested(*pair) == f"not tested with this release; tested: {info.tested_pairs()}"
        monkeypatch.setattr(triton_package, "version", lambda: "3.5")
        for pytorch, expected in ((torch.__version__.split("+")[0], "tested"), ("2.0.0", "not tested")):
            monkeypatch.setattr(info, "TESTED", ((pytorch, "3.5"),))
            assert main(["info"]) == 0
            assert f"This pair   {expected} with this release" in capsys.readouterr().out

    def test_readme_names_the_tested_pairs(self):
        readme = (ROOT / "README.md").read_text()
        assert f"Tested: {info.tested_pairs()}." in " ".join(readme.split())

    def test_works_without_triton(self):
        finished = run("info", without=["triton"])
        assert finished.returncode == 0, finished.stderr
        assert "aten" in finished.stdout
        assert (
            f"Triton      not installed: every LSTM takes PyTorch's own path; {triton_package.RANGE}\n"
            in finished.stdout
        )


class TestCheck:
    def test_agrees_on_this_machine(self):
        finished = run("check", "--device", "cpu")
        assert finished.returncode == 0, finished.stdout + finished.stderr
        count = len(check.INTERPRETED_CASES)
        assert f"{count} of {count} cases agree" in finished.stdout
        assert "interpreted on the CPU" in finished.stdout

    @pytest.mark.gpu
    def test_agrees_on_a_gpu(self, capsys, monkeypatch):
        """One layer of each dtype, as every layer is compiled for it: test_gpu.py is about the others."""
        monkeypatch.setattr(
            check, "GPU_CASES", list({(case.dtype, case.tf32): case for case in check.GPU_CASES}.values())
        )
        assert main(["check", "--device", "cuda"]) == 0, capsys.readouterr().out

    def test_a_wrong_result_is_an_exit_code(self, capsys, monkeypatch):
        class Wrong(torch.nn.LSTM):
            def forward(self, input, hx=None):
                output, (h_n, c_n) = super().forward(input, hx)
                return output, (h_n, c_n * 1.1)

        stand_in_kernels(monkeypatch, Wrong)
        assert main(["check", "--device", "cpu"]) == 1
        printed = capsys.readouterr().out
        assert "DISAGREES: c_n" in printed
        assert "0 of " in printed

    def test_a_nan_is_no_agreement(self, capsys, monkeypatch):
        class Undefined(torch.nn.LSTM):
            def forward(self, input, hx=None):
                output, (h_n, c_n) = super().forward(input, hx)
                return output, (h_n * float("nan"), c_n)

        stand_in_kernels(monkeypatch, Undefined)
        assert main(["check", "--device", "cpu"]) == 1
        assert "DISAGREES: h_n" in capsys.readouterr().out

    def test_a_failing_case_is_a_line(self, capsys, monkeypatch):
        class Failing(torch.nn.LSTM):
            def forward(self, input, hx=None):
                raise RuntimeError("out of resources:\n" + "shared memory " * 50)

        stand_in_kernels(monkeypatch, Failing)
        assert main(["check", "--device", "cpu"]) == 1
        assert capsys.readouterr().out.count("failed: RuntimeError: out of resources: shared") == len(
            check.INTERPRETED_CASES
        )

    def test_nn_lstm_itself_agrees(self, capsys, monkeypatch):
        stand_in_kernels(monkeypatch, torch.nn.LSTM)
        assert main(["check", "--device", "cpu"]) == 0

    @pytest.mark.parametrize("module", ["greenlet", "triton"])
    def test_says_what_is_missing(self, module):
        finished = run("check", "--device", "cpu", without=[module])
        assert finished.returncode == 2
        assert one_line(finished.stderr).startswith(f"python -m lstm_triton check: {module} is not installed; ")


def stand_in_kernels(monkeypatch, lstm_class):
    monkeypatch.setattr("lstm_triton.LSTM", lstm_class)
    monkeypatch.setattr(check, "kernels_on", lambda device, seed: contextlib.nullcontext("a stand-in"))


def one_line(text):
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_the_demo_says_what_is_missing(module):
    finished = run("demo", "--device", "cpu", without=[module])
    assert finished.returncode == 2
    expected = f'python -m lstm_triton demo: {module} is not installed; it comes with pip install "lstm-triton[demo]"\n'
    assert one_line(finished.stderr) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: demo | info | check"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["demo", "--epochs", "many"], "argument --epochs: must be a whole number of at least 1, got 'many'"),
        (["demo", "--hidden-size", "-3"], "argument --hidden-size: must be a whole number of at least 1, got '-3'"),
        (["demo", "--seed", "x"], "argument --seed: must be a whole number of at least 0, got 'x'"),
        (["demo", "--seed", "-1"], "argument --seed: must be a whole number of at least 0, got '-1'"),
        (["demo", "--seed", str(2**64)], "argument --seed: must be a whole number of at most 4294967295, got '1844"),
        (["check", "--seed", "9" * 5000], "argument --seed: must be a whole number of at most 4294967295, got '9999"),
        (["demo", "--epochs", "10000000000"], "argument --epochs: must be a whole number of at most 1000000000"),
        (["demo", "--device", "mps:7"], "argument --device: 'mps:7' cannot be used here: "),
        (
            ["demo", "--device", "vulkan"],
            "argument --device: 'vulkan' cannot be used here: this build of PyTorch cannot",
        ),
        (["check", "--device", "mkldnn"], "argument --device: 'mkldnn' cannot be used here: "),
        (["check", "--device", "two\nlines"], "argument --device: 'two\\nlines' cannot be used here: "),
        (["demo", "--device", "gpu7"], "argument --device: 'gpu7' cannot be used here: "),
        (["demo", "--device", "cuda:99"], "argument --device: 'cuda:99' cannot be used here: "),
        (["demo", "--device", "meta"], "argument --device: 'meta' cannot be used here: "),
        (["demo", "--out", "missing-folder/picture.png"], "cannot write 'missing-folder/picture.png': No such file"),
        (["demo", "--out", "a-file/picture.png"], "cannot write 'a-file/picture.png': Not a directory"),
        (["demo", "--out", "folder.png"], "cannot write 'folder.png': Is a directory"),
        (["demo", "--out", "circle.png"], "cannot write 'circle.png': Too many levels of symbolic links"),
        (["demo", "--out", "a" * 300 + ".png"], "File name too long"),
        (["demo", "--out", ""], "argument --out: '' does not end in .png"),
        (["demo", "--out", "picture.jpg"], "argument --out: 'picture.jpg' does not end in .png"),
        (["check", "--device", "gpu7"], "argument --device: 'gpu7' cannot be used here: "),
        (["info", "--verbose"], "unrecognized arguments: --verbose"),
        (["info", "two\nlines"], "unrecognized arguments: two lines"),
    ],
)
def test_a_mistake_gets_one_line_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "circle.png").symlink_to("circle.png")
    monkeypatch.setattr("lstm_triton.commands.demo.run", lambda *_: pytest.fail("work had begun"))
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert message in one_line(printed.err)
    assert printed.out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"a-file", "circle.png", "folder.png"}, (
        "nothing is left behind"
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_one_line(tmp_path, capsys):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--out", str(tmp_path / "picture.png")])
    assert exit.value.code == 2
    assert "Permission denied" in one_line(capsys.readouterr().err)


def test_too_large_a_model_is_refused_before_the_training(capsys, monkeypatch):
    monkeypatch.setattr(demo, "compare", lambda *_: pytest.fail("work had begun"))
    assert main(["demo", "--hidden-size", "10000000", "--device", "cpu"]) == 2
    line = one_line(capsys.readouterr().err)
    assert line.startswith("python -m lstm_triton demo: --hidden-size 10000000 would need ")


def test_a_full_disk_leaves_the_old_picture(tmp_path, capsys, monkeypatch):
    picture = tmp_path / "picture.png"
    picture.write_text("old")
    digits = demo.digits
    monkeypatch.setattr(demo, "digits", lambda device: [tensor[:424] for tensor in digits(device)])  # one step

    def full_disk(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert main(["demo", "--epochs", "1", "--hidden-size", "4", "--device", "cpu", "--out", str(picture)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"python -m lstm_triton demo: cannot write {picture}: No space left on device"
    assert picture.read_text() == "old"
    assert list(tmp_path.iterdir()) == [picture]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"lstm-triton {__version__}\n"

"""Where Triton cannot compile, or the driver refuses a launch, "auto" computes by PyTorch's own function."""

import json
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton import interpreter, refusal, target
from lstm_triton.commands import info
from lstm_triton.refusal import LaunchRefused, refused
from lstm_triton.target import Gpus, KernelLaunch
from tests.support.comparing import assert_same, run, twins
from tests.support.refusing import Refusing

NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."
pytestmark = [
    pytest.mark.filterwarnings("error:Triton:RuntimeWarning", "error:the driver:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*CompiledKernel.__del__"),  # of Triton
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


def no_compiler() -> Exception:
    return RuntimeError(NO_COMPILER)


def not_together() -> Exception:
    return RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    with interpreter.interpret():  # installs the interpreter
        pass
    refusal.forget()
    yield
    refusal.forget()


# --- What counts as the machine's fault ---


def raised(function: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.value


def damaged_metadata(folder: Path, text: str) -> Exception:
    """What Triton raises when it loads an entry of its cache."""
    from triton.compiler.compiler import CompiledKernel

    (folder / "kernel.json").write_text(text)
    (folder / "kernel.cubin").write_bytes(b"")
    group = {path.name: str(path) for path in folder.iterdir()} | {"kernel.ptx": str(folder / "kernel.ptx")}
    return raised(lambda: CompiledKernel(None, group, "0"))


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _: RuntimeError(NO_COMPILER), "install gcc or clang"),
        (lambda _: raised(lambda: subprocess.check_call(["/no/such/compiler"])), "install gcc or clang"),
        (lambda _: raised(lambda: subprocess.check_call(["false"])), "install gcc or clang"),
        (lambda _: raised(lambda: Path("/proc/nothing/here").mkdir()), "TRITON_CACHE_DIR"),
        (lambda _: OSError(28, "No space left on device"), "TRITON_CACHE_DIR"),
        (lambda _: PermissionError(13, "Permission denied", "/root/.triton"), "TRITON_CACHE_DIR"),
        (lambda _: RuntimeError("Could not create or locate cache dir"), "TRITON_CACHE_DIR"),
        (lambda folder: damaged_metadata(folder, '{"hash": '), "remove Triton's cache folder"),
        (lambda folder: damaged_metadata(folder, "{}"), "remove Triton's cache folder"),
        (lambda folder: damaged_metadata(folder, ""), "remove Triton's cache folder"),
        (lambda folder: damaged_metadata(folder, "[]"), "remove Triton's cache folder"),
        (lambda _: ImportError("launcher.so: file too short"), "remove Triton's cache folder"),
        (lambda _: RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "remove Triton's cache folder"),
        (lambda _: RuntimeError("Cannot find ptxas"), "TRITON_PTXAS_PATH"),
        (
            lambda _: RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
            "update the driver",
        ),
        (lambda _: RuntimeError("0 active drivers ([]). There should only be one."), "update the driver"),
        (lambda _: AssertionError("libcuda.so cannot found!\n"), "update the driver"),
        (lambda _: not_together(), "the whole GPU"),
        (lambda _: RuntimeError("Triton Error [CUDA]: too many resources requested for launch"), "please report"),
    ],
)
def test_faults_of_the_machine(make: Callable[[Path], Exception], says: str, tmp_path: Path) -> None:
    error = make(tmp_path)
    found = refused(error)
    assert found is not None, repr(error)
    assert says in found.reason
    assert type(error).__name__ in found.reason


@pytest.mark.interpreted
def test_errors_of_triton_itself() -> None:
    from triton.compiler.errors import CompilationError, CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources

    found = refused(OutOfResources(300_000, 232_448, "shared memory"))
    assert found is not None
    assert "Required: 300000" in found.reason
    assert not found.everywhere
    for error in (CompilationError, CompileTimeAssertionFailure):
        assert refused(error("def kernel(): pass", None, "a fault of the kernel")) is None


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("a fault of a kernel"),
        TypeError("missing a required argument: 'input_ptr'"),
        KeyError("input_ptr"),
        ValueError("Did you forget to add @triton.jit ?"),
        json.JSONDecodeError("of somebody else", "", 0),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=repr,
)
@pytest.mark.interpreted
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert refused(error) is None

    def fail() -> Exception:
        return error

    with target.running_on(Refusing(fail)), pytest.raises(Exception) as caught:  # noqa: PT011
        lstm_triton.LSTM(3, 4)(torch.zeros(5, 2, 3))
    assert caught.value is error or caught.value.__cause__ is error


# --- Falling back ---


@pytest.mark.interpreted
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "dropout": 0.5}, {"proj_size": 2}, {"memory": "low"}], ids=str
)
def test_a_layer_falls_back_once(options: dict[str, Any], trains: bool) -> None:
    memory = options.pop("memory", "full")
    ours, stock = twins(3, 4, **options)
    ours.memory, input = memory, torch.randn(5, 2, 3)
    for module in (ours, stock):
        module.train(trains)

    def results(module: nn.Module) -> Any:
        torch.manual_seed(0)
        if trains:
            return run(module, input)
        with torch.no_grad():
            return module(input)

    refusing = Refusing(no_compiler)
    with target.running_on(refusing):
        with pytest.warns(RuntimeWarning, match=r"install gcc or clang.*computes all LSTM layers on cpu"):
            first = results(ours)
        if "dropout" not in options:  # for which the kernels have drawn a seed
            assert_same(first, results(stock))
        launches = refusing.launches
        assert_same(results(ours), results(stock))  # without a warning
        assert refusing.launches == launches
        explained = str(lstm_triton.explain(ours, input))
        assert "aten    Triton finds no working C compiler" in explained
        assert "install gcc or clang" in explained


@pytest.mark.interpreted
def test_a_layer_falls_back_once_beside_a_smaller_one() -> None:
    """The smaller one runs in the kernels. So the larger one is not tried again, and torch.compile has no new guard."""

    class RefusingLarge(Refusing):
        def run(self, launch: KernelLaunch) -> None:
            self.kernels = (launch.name,) if launch.hidden_size == 5 else ("none",)
            super().run(launch)

    small, large, input = lstm_triton.LSTM(3, 4), lstm_triton.LSTM(4, 5), torch.randn(2, 1, 3)
    refusing, states = RefusingLarge(not_together), set()
    with target.running_on(refusing), torch.no_grad(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            large(small(input)[0])
            states.add(refusal.state)
        told = [each for each in warned if "PyTorch's own function computes" in str(each.message)]
        assert (refusing.launches, len(told), len(states)) == (3 + 1, 1, 1)
        refusing.error = None  # type: ignore[assignment]
        with lstm_triton.backend("triton"):
            large(small(input)[0])
        assert lstm_triton.explain(large, torch.zeros(2, 1, 4)).layers[0].path == "triton"


@pytest.mark.interpreted
def test_a_cell_falls_back_once() -> None:
    torch.manual_seed(0)
    stock = nn.LSTMCell(3, 4)
    ours = lstm_triton.LSTMCell(3, 4)
    ours.load_state_dict(stock.state_dict())
    input = torch.randn(2, 3)
    with target.running_on(Refusing(no_compiler)):
        with pytest.warns(RuntimeWarning, match="install gcc or clang"):
            assert_same(ours(input), stock(input))
        assert_same(ours(input), stock(input))
        assert "C compiler" in str(lstm_triton.explain(ours, input))


@pytest.mark.interpreted
def test_every_way_to_call_falls_back() -> None:
    ours, stock = twins(3, 4)
    input, expected = torch.randn(5, 2, 3), stock(torch.zeros(5, 2, 3))
    with target.running_on(Refusing(no_compiler)):
        with pytest.warns(RuntimeWarning, match="install gcc or clang"), lstm_triton.accelerate():
            assert_same(stock(torch.zeros(5, 2, 3)), expected)
        refusal.forget()
        with pytest.warns(RuntimeWarning, match="install gcc or clang"):
            inside = lstm_triton.trace(ours, input)
        refusal.forget()
        with pytest.warns(RuntimeWarning, match="install gcc or clang"):
            lstm_triton.functional.lstm(input, None, list(ours.parameters()), backend="auto")
    assert inside.path == "aten"
    torch.testing.assert_close(inside.output, stock(input)[0])


@pytest.mark.interpreted
def test_triton_raises_it() -> None:
    """Each time, and it tries each time; when the machine is repaired, "auto" takes the kernels again."""
    ours, cell, input = lstm_triton.LSTM(3, 4), lstm_triton.LSTMCell(3, 4), torch.randn(5, 2, 3)
    refusing = Refusing(no_compiler)
    with target.running_on(refusing):
        for _ in range(2):
            with lstm_triton.backend("triton"):
                with pytest.raises(LaunchRefused, match=r"install gcc or clang.*backend\(\"aten\"\)"):
                    ours(input)
                with pytest.raises(LaunchRefused, match="install gcc or clang"):
                    cell(input[0])
                with pytest.raises(LaunchRefused, match="install gcc or clang"):
                    lstm_triton.trace(ours, input)
            with pytest.raises(LaunchRefused, match="install gcc or clang"):
                lstm_triton.functional.lstm(input, None, list(ours.parameters()), backend="triton")
        with pytest.warns(RuntimeWarning, match="install gcc or clang"):
            ours(input)
        assert lstm_triton.explain(ours, input).layers[0].path == "aten"
        refusing.error = None  # type: ignore[assignment]
        with lstm_triton.backend("triton"):
            ours(input)
        assert lstm_triton.explain(ours, input).layers[0].path == "triton"


@pytest.mark.interpreted
def test_a_layer_that_is_too_large_does_not_stop_others() -> None:
    small, large, input = lstm_triton.LSTM(3, 4), lstm_triton.LSTM(3, 5), torch.randn(5, 2, 3)
    refusing = Refusing(not_together)
    with target.running_on(refusing):
        with pytest.warns(RuntimeWarning, match="computes layers with hidden_size 5 in torch.float32 on cpu"):
            large(input)
        assert lstm_triton.explain(large, input).layers[0].path == "aten"
        assert lstm_triton.explain(small, input).layers[0].path == "triton"


@pytest.mark.interpreted
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"memory": "low"}, {"resets": True}], ids=str)
def test_refused_in_backward(options: dict[str, Any]) -> None:
    """The formula computes the gradients."""
    memory, has_resets = options.pop("memory", "full"), options.pop("resets", False)
    ours, _ = twins(3, 4, num_layers=2, bidirectional=True, **options)
    ours.memory = memory
    input = torch.randn(5, 2, 3, requires_grad=True)
    resets = torch.rand(5, 2) < 0.5 if has_resets else None
    wanted = [input, *ours.parameters()]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ours(input, resets=resets)[0].square().sum(), wanted)

    expected = gradients()
    with target.running_on(Refusing(not_together, "backward_scan")):
        with pytest.warns(RuntimeWarning, match="the whole GPU"):
            torch.testing.assert_close(gradients(), expected)
        torch.testing.assert_close(gradients(), expected)  # all by PyTorch's own function
        with lstm_triton.backend("triton"), pytest.raises(LaunchRefused, match="the whole GPU"):
            gradients()


@pytest.mark.interpreted
def test_refused_in_the_backward_of_a_cell() -> None:
    cell, input = lstm_triton.LSTMCell(3, 4), torch.randn(2, 3, requires_grad=True)
    wanted = [input, *cell.parameters()]
    expected = torch.autograd.grad(cell(input)[0].square().sum(), wanted)
    with target.running_on(Refusing(no_compiler, "cell_backward")):
        with pytest.warns(RuntimeWarning, match="install gcc or clang"):
            torch.testing.assert_close(torch.autograd.grad(cell(input)[0].square().sum(), wanted), expected)
        refusal.forget()
        output = cell(input)[0].square().sum()
        with lstm_triton.backend("triton"), pytest.raises(LaunchRefused, match="install gcc or clang"):
            torch.autograd.grad(output, wanted)


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", [(), ("backward_scan",)], ids=["all", "backward"])
def test_compiled(kernels: tuple[str, ...]) -> None:
    """The kernels are tried before torch.compile puts them into a program."""
    ours, stock = twins(3, 4)
    input = torch.randn(5, 2, 3)
    ours.compile(fullgraph=True, backend="aot_eager")
    with target.running_on(Refusing(no_compiler, *kernels)):
        with pytest.warns(RuntimeWarning, match="install gcc or clang"):
            torch.testing.assert_close(run(ours, input), run(stock, input))
        refusal.forget()
        with lstm_triton.backend("triton"), pytest.raises(Exception, match="install gcc or clang"):
            run(ours, input)


@pytest.mark.interpreted
def test_refused_after_it_was_compiled() -> None:
    """A program with the kernels in it raises, and the next call compiles it without them."""
    cell, stock = lstm_triton.LSTMCell(3, 4), nn.LSTMCell(3, 4)
    stock.load_state_dict(cell.state_dict())
    input = torch.randn(2, 3)
    cell.compile(fullgraph=True, backend="aot_eager")
    refusing = Refusing(no_compiler, "none")
    with target.running_on(refusing), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        torch.testing.assert_close(cell(input), stock(input))
        refusing.kernels = ()
        with pytest.raises(LaunchRefused, match="install gcc or clang"):
            cell(input)
        torch.testing.assert_close(cell(input), stock(input))


@pytest.mark.interpreted
def test_the_interpreters_own_errors_stay() -> None:
    """A kernel that reads a file may fail, too."""
    assert refused(interpreter.Deadlock("3 programs wait")) is None
    assert Gpus().may_refuse(torch.device("cuda"))
    assert not interpreter.Interpreted(0).may_refuse(torch.device("cpu"))


@pytest.mark.interpreted
def test_info_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    with target.running_on(Refusing(no_compiler)):
        info.print_path(torch.device("cpu"), torch.float32)
    assert "install gcc or clang" in capsys.readouterr().out

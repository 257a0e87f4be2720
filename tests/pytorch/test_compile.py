"""torch.compile in its default configuration, torch.export and AOTInductor, on both paths."""

import copy
import shutil
import subprocess
import sys
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.torch_version import TorchVersion

import lstm_triton
from lstm_triton import interpreter
from tests.support.comparing import assert_same, run, twins
from tests.support.processes import output_of_python

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: there is no g++")

PATHS = [
    pytest.param(nullcontext, id="fallback"),
    pytest.param(interpreter.interpret, id="kernels", marks=pytest.mark.interpreted),
]
SIZES = [(5, 2), (4, 3), (7, 4), (3, 6)]  # not 1: PyTorch makes graphs of their own for sizes of 1


# --- torch.compile ---


def test_calls_through_the_kernels_in_one_graph() -> None:
    """Traced for a pretended GPU, also by versions of PyTorch whose Triton cannot interpret the kernels."""
    pytest.importorskip("triton")
    assert output_of_python("-m", "tests.support.traced_calls").splitlines()[-1] == "a cell, training"


@needs_compiler
def test_default_configuration() -> None:
    """Training and inference in one graph each, with eager mode's results, and no more of them for other sizes."""
    ours, stock = twins(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    counter = CompileCounterWithBackend("inductor")
    ours.compile(fullgraph=True, backend=counter)
    for sizes in SIZES:
        input = torch.randn(*sizes, 3)
        torch.testing.assert_close(run(ours, input), run(stock, input))
    assert counter.frame_count <= 2
    counter.frame_count = 0
    for module in (ours, stock):
        module.eval()
    for sizes in SIZES:
        input = torch.randn(*sizes, 3)
        with torch.no_grad():
            torch.testing.assert_close(ours(input), stock(input))
    assert counter.frame_count <= 2


@pytest.mark.interpreted
@pytest.mark.parametrize("training", [True, False])
def test_kernels_for_every_size(training: bool) -> None:
    ours, stock = twins(3, 8, num_layers=2, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")
    ours.compile(fullgraph=True, backend=counter)
    for sizes in SIZES:
        input = torch.randn(*sizes, 3)
        with interpreter.interpret(), torch.set_grad_enabled(training):
            actual = run(ours, input) if training else ours(input)
        torch.testing.assert_close(actual, run(stock, input) if training else stock(input))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("path", PATHS)
def test_a_graph_does_not_grow_with_the_sequence(path: Any) -> None:
    """Neither the forward nor the backward graph, and so neither the time to compile them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def operators(time_steps: int) -> list[int]:
        counts: list[int] = []

        def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            counts.append(len(graph.graph.nodes))
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=count, bw_compiler=count)
        module = torch.compile(lstm_triton.LSTM(3, 4), fullgraph=True, backend=backend)
        module(torch.randn(time_steps, 2, 3, requires_grad=True))[0].sum().backward()
        assert len(counts) == 2
        return counts

    with path():
        assert operators(4) == operators(64)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("given", ["lengths", "resets", "hx"])
def test_other_arguments_in_one_graph(path: Any, given: str) -> None:
    ours = lstm_triton.LSTM(3, 4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for time_steps, batch_size in SIZES[:3]:
        input = torch.randn(time_steps, batch_size, 3)
        options: dict[str, Any] = {
            "lengths": {"lengths": torch.arange(batch_size)},
            "resets": {"resets": torch.rand(time_steps, batch_size) < 0.3},
            "hx": {"hx": (torch.randn(1, batch_size, 4), torch.randn(1, batch_size, 4))},
        }[given]
        expected = ours(input, **options)
        with path():
            torch.testing.assert_close(compiled(input, **options), expected)
    assert counter.frame_count <= 2


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "options",
    [
        {"memory": "low"},
        {"proj_size": 5},
        {"proj_size": 5, "bidirectional": True},
        {"dropout": 0.4},
        {"dropout": 0.4, "memory": "low"},
    ],
    ids=str,
)
def test_kernels_of_other_layers_in_one_graph(options: dict[str, Any]) -> None:
    """Trained, with the results and gradients of eager mode: dropout draws the same seed in both."""
    eager = lstm_triton.LSTM(3, 8, num_layers=2, **options)
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile(fullgraph=True, backend=counter)
    for sizes in SIZES[:2]:
        input = torch.randn(*sizes, 3)
        with interpreter.interpret():
            actual, expected = run(compiled, input), run(eager, input)
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 2  # the second for open sizes


class Shared(nn.Module):
    """Layers, directions and biases that share their weights, and one tensor for all states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_triton.LSTM(6, 6, num_layers=2)
        self.cell = lstm_triton.LSTMCell(6, 6)
        first = self.lstm.weight_ih_l0
        self.lstm.weight_hh_l0 = self.lstm.weight_ih_l1 = self.lstm.weight_hh_l1 = first
        self.lstm.bias_hh_l0 = self.lstm.bias_ih_l1 = self.lstm.bias_ih_l0
        self.cell.bias_hh = self.cell.bias_ih
        self.cell.weight_hh = self.cell.weight_ih

    def forward(self, input: Tensor, state: Tensor, resets: Tensor) -> tuple[Tensor, ...]:
        hx = state, state
        output, (h_n, _) = self.lstm(input, hx, resets=resets, reset_state=hx)
        h, c = self.cell(h_n[0], (h_n[0], h_n[0]))
        return output, *self.cell(h, (h, c))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("training", [True, False])
def test_one_tensor_in_several_places(path: Any, training: bool) -> None:
    """In one graph, with the results and gradients of eager mode."""
    module = Shared()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    given = (torch.randn(2, 2, 6), torch.randn(2, 2, 6), torch.tensor([[False, True], [True, False]]))
    found = []
    with path(), torch.set_grad_enabled(training):
        for each in (compiled, module):
            results = each(*given)
            gradients = ()
            if training:
                loss = sum(result.square().sum() for result in results)
                gradients = torch.autograd.grad(loss, list(module.parameters()))
            found.append((results, gradients))
    torch.testing.assert_close(*found)


# --- torch.export ---


def exported(module: nn.Module, strict: bool, **dynamic: Dim) -> torch.export.ExportedProgram:
    axes = {0: dynamic.get("T"), 1: dynamic.get("B")}
    sizes = {axis: dim for axis, dim in axes.items() if dim is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of deprecated internals
        return torch.export.export(module, (torch.randn(5, 2, 3),), dynamic_shapes=({**sizes},), strict=strict)


def operators_of(program: torch.export.ExportedProgram) -> list[str]:
    names = []
    for graph in (module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)):
        names += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return names


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("given", ["nothing", "resets", "cells"])
def test_results_of_the_fallback_changed_in_place(given: str) -> None:
    module = lstm_triton.LSTM(3, 4, proj_size=2)
    input = torch.randn(4, 2, 3)
    arguments: Any = {"resets": torch.rand(4, 2) < 0.5} if given == "resets" else {}
    call = module.with_cells if given == "cells" else module
    torch._dynamo.reset()
    results = torch.compile(call, backend="eager", fullgraph=True)(input, **arguments)
    for result in (results[0], *results[1], *results[2:]):
        result.mul_(2)
    expected = call(input, **arguments)
    torch.testing.assert_close(results[0], 2 * expected[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_exported_with_open_sizes(path: Any, strict: bool) -> None:
    ours, stock = twins(3, 8, num_layers=2, bidirectional=True, bias=False)
    with path(), torch.no_grad():
        program = exported(ours, strict, T=Dim("T"), B=Dim("B"))
        operators = operators_of(program)
        if path is nullcontext:
            assert operators.count("scan") == 4
            assert not any("lstm_triton" in name for name in operators)
        else:
            assert operators.count("lstm_triton.scan_forward.default") == 1  # of the whole stack
        for sizes in SIZES[1:]:
            input = torch.randn(*sizes, 3)
            torch.testing.assert_close(program.module()(input), stock(input))


@pytest.mark.parametrize("given", ["lengths", "resets", "hx and projections"])
def test_exported_fallback_takes_every_argument(given: str) -> None:
    ours = lstm_triton.LSTM(3, 4, bidirectional=True, proj_size=2 if "proj" in given else 0, dtype=torch.float64)
    input = torch.randn(5, 2, 3, dtype=torch.float64)

    def arguments(time_steps: int, batch_size: int) -> dict[str, Any]:
        return {
            "lengths": {"lengths": torch.arange(batch_size)},
            "resets": {"resets": torch.rand(time_steps, batch_size) < 0.3},
            "hx and projections": {"hx": tuple(torch.randn(2, batch_size, size).double() for size in (2, 4))},
        }[given]

    time, batch = Dim("T", min=3), Dim("B")  # from 3 on: torch.export has lengths of 1 and 2 apart for resets
    shapes: dict[str, Any] = {
        "lengths": {"lengths": {0: batch}},
        "resets": {"resets": {0: time, 1: batch}},
        "hx and projections": {"hx": ({1: batch}, {1: batch})},
    }[given]
    program = torch.export.export(
        ours, (input,), arguments(5, 2), dynamic_shapes={"input": {0: time, 1: batch}, **shapes}
    )
    assert not any("lstm_triton" in name for name in operators_of(program))
    other = arguments(7, 6)
    input = torch.randn(7, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(program.module()(input, **other), ours(input, **other))


@pytest.mark.parametrize("given", ["nothing", "resets and projections"])
def test_gradients_of_an_exported_program_with_open_sizes(given: str) -> None:
    """States that need no gradient themselves still hand on those of the weights, from step to step."""
    options: dict[str, Any] = {} if given == "nothing" else {"bidirectional": True, "proj_size": 2, "bias": False}
    ours = lstm_triton.LSTM(3, 4, dtype=torch.float64, **options)

    def arguments(time_steps: int, batch_size: int) -> tuple[Tensor, ...]:
        input = torch.randn(time_steps, batch_size, 3, dtype=torch.float64)
        return (input, torch.rand(time_steps, batch_size) < 0.3) if options else (input,)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = ours

        def forward(self, input: Tensor, resets: Tensor | None = None) -> Tensor:
            output, (h_n, c_n) = self.lstm(input, resets=resets)
            return output.square().sum() + h_n.sum() + c_n.sin().sum()

    model, example, open_sizes = Model(), arguments(5, 2), {0: Dim("T", min=3), 1: Dim("B")}
    program = torch.export.export(model, example, dynamic_shapes=(open_sizes,) * len(example)).module()
    for sizes in SIZES[1:3]:
        tensors = arguments(*sizes)
        gradients = []
        for module in (program, model):
            parameters = dict(module.named_parameters())
            gradients.append(torch.autograd.grad(module(*tensors), [parameters[name] for name in sorted(parameters)]))
        torch.testing.assert_close(*gradients)


def test_exported_program_runs_without_this_library(tmp_path: Path) -> None:
    ours = lstm_triton.LSTM(3, 4, num_layers=2)
    torch.export.save(exported(ours, False, T=Dim("T"), B=Dim("B")), tmp_path / "lstm.pt2")
    input = torch.randn(9, 4, 3)
    torch.save((input, ours(input)[0].detach()), tmp_path / "expected.pt")
    script = """if True:
        import sys, torch
        program = torch.export.load("lstm.pt2").module()
        input, expected = torch.load("expected.pt")
        torch.testing.assert_close(program(input)[0], expected)
        assert "lstm_triton" not in sys.modules
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, check=True)


@needs_compiler
@pytest.mark.parametrize(
    "open_size",
    [
        pytest.param(
            "T",
            marks=pytest.mark.xfail(
                TorchVersion(torch.__version__) < "2.13",
                raises=(torch._inductor.exc.InductorError, AssertionError),  # 2.11 and 2.9
                reason="AOTInductor of PyTorch 2.9 and 2.11 cannot compile the loop (its `scan`) for open T",
            ),
        ),
        "B",
    ],
)
def test_aot_inductor(open_size: str, tmp_path: Path) -> None:
    """One of both sizes may stay open; PyTorch 2.13 cannot compile the loop (its `scan`) if both are."""
    ours = lstm_triton.LSTM(3, 4)
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        program = exported(ours, False, **{open_size: Dim(open_size)})
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "lstm.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for size in (3, 9):
            input = torch.randn((size, 2, 3) if open_size == "T" else (5, size, 3))
            torch.testing.assert_close(compiled(input), ours(input))


def test_exported_for_one_length_keeps_pytorchs_own_function() -> None:
    program = exported(lstm_triton.LSTM(3, 4, num_layers=2), False, B=Dim("B"))
    assert "aten.lstm.input" in operators_of(program)
    assert "scan" not in operators_of(program)
    assert_same(program.module()(torch.zeros(5, 3, 3))[0].shape, torch.Size([5, 3, 4]))

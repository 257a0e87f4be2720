"""Autograd around the scans, and the whole module through the interpreted kernels."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lstm_triton
from lstm_triton import interpreter
from lstm_triton.reference import lstm_layer
from lstm_triton.scan import backward, forward
from tests.support.comparing import CallCase, assert_results_as_accurate, call_cases, run
from tests.support.lanes import LaneCase, scan_layer

pytestmark = pytest.mark.interpreted

KERNEL_CASES = call_cases(
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    layouts=("batched", "unbatched"),
    projections=False,
    smallest_hidden=6,  # of fewer numbers, a gradient that cancels has no typical error
    dropouts=(0.0, 1.0),
    empty_batches=False,
)


@settings(max_examples=12)
@given(KERNEL_CASES, st.integers(0, 1000))
def test_whole_module(case: CallCase, seed: int) -> None:
    """Layers, directions, layouts and states, as accurate as nn.LSTM."""
    ours, stock = case.twins()
    with interpreter.interpret(seed), lstm_triton.backend("triton"):
        actual = run(ours, case.input, case.hx)
    assert_results_as_accurate(actual, stock, case.input, case.hx)


@pytest.mark.parametrize("frozen", ["weights", "input", "all but c_0"])
def test_only_what_is_asked_for_gets_gradients(frozen: str) -> None:
    tensors = LaneCase(3, 2, 3, 20).tensors()
    wanted = {"weights": (0, 1, 2), "input": (1, 2, 3, 4, 5, 6), "all but c_0": (2,)}[frozen]
    found = {}
    for name, function in (("kernels", scan_layer), ("formula", lstm_layer)):
        arguments = [tensor.detach().requires_grad_(at in wanted) for at, tensor in enumerate(tensors)]
        with interpreter.interpret():
            results = function(*arguments, reverse=False)
            torch.stack([result.sum() for result in results]).sum().backward()
        found[name] = [argument.grad for argument in arguments]
    for at, (kernels, formula) in enumerate(zip(found["kernels"], found["formula"], strict=True)):
        assert (kernels is None) == (formula is None) == (at not in wanted)
        if kernels is not None:
            torch.testing.assert_close(kernels, formula)


@pytest.mark.parametrize("used", ["output", "h_n", "c_n"])
def test_a_loss_on_one_result_alone(used: str) -> None:
    layer = LaneCase(3, 2, 3, 20, reverse=True)
    grads = {}
    for name, function in (("kernels", scan_layer), ("formula", lstm_layer)):
        arguments = [tensor.requires_grad_() for tensor in layer.tensors()]
        with interpreter.interpret():
            results = dict(zip(("output", "h_n", "c_n"), function(*arguments, reverse=True), strict=True))
            grads[name] = torch.autograd.grad(results[used].square().sum(), arguments)
    torch.testing.assert_close(grads["kernels"], grads["formula"])


def test_backward_twice_with_retain_graph() -> None:
    arguments = [tensor.requires_grad_() for tensor in LaneCase(3, 2, 3, 20).tensors()]
    with interpreter.interpret():
        loss = scan_layer(*arguments, reverse=False)[0].sum()
        first = torch.autograd.grad(loss, arguments, retain_graph=True)
        second = torch.autograd.grad(loss, arguments)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("hidden_size", [16, 20], ids=["whole rows", "padded rows"])
def test_changing_the_output_in_place_does_no_harm(hidden_size: int) -> None:
    """It is a copy, which nobody else needs."""
    arguments = [tensor.requires_grad_() for tensor in LaneCase(3, 2, 3, hidden_size).tensors()]
    with interpreter.interpret():
        output, _, _ = scan_layer(*arguments, reverse=False)
        expected = torch.autograd.grad(2 * output.sum(), arguments, retain_graph=True)
        actual = torch.autograd.grad(output.mul_(2).sum(), arguments)
    torch.testing.assert_close(actual, expected)


def gradient_penalty(function: object, arguments: list[Tensor]) -> tuple[Tensor, ...]:
    output, h_n, c_n = function(*arguments, reverse=False)  # type: ignore[operator]
    grads = torch.autograd.grad(output.square().sum() + (h_n * c_n).sum(), arguments, create_graph=True)
    penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
    return torch.autograd.grad(penalty, arguments)


def test_second_derivatives_are_right() -> None:
    arguments = [tensor.requires_grad_() for tensor in LaneCase(3, 2, 3, 20).tensors()]
    with interpreter.interpret():
        actual = gradient_penalty(scan_layer, arguments)
    expected = gradient_penalty(lstm_layer, [tensor.detach().double().requires_grad_() for tensor in arguments])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def dependent(function: object, tensors: list[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
    """First derivatives where one argument depends on another, and one tensor is two arguments."""
    input, _, c_0, weight_ih, weight_hh, bias, _ = tensors
    h_0 = torch.tanh(input[0, :, :1] * c_0)
    results = function(input, h_0, c_0, weight_ih, weight_hh, bias, bias, reverse=False)  # type: ignore[operator]
    loss = torch.stack([result.square().sum() for result in results]).sum()
    return torch.autograd.grad(loss, (input, c_0, weight_ih, weight_hh, bias), create_graph=create_graph)


@pytest.mark.parametrize("create_graph", [False, True])
def test_arguments_that_depend_on_each_other(create_graph: bool) -> None:
    tensors = [tensor.requires_grad_() for tensor in LaneCase(3, 2, 3, 20).tensors()]
    with interpreter.interpret():
        actual = dependent(scan_layer, tensors, create_graph)
    torch.testing.assert_close(actual, dependent(lstm_layer, tensors, False))


def test_encoder_and_decoder_of_one_input() -> None:
    """The decoder's states depend on the encoder's input, which is its own input, too."""
    encoder, decoder = lstm_triton.LSTM(3, 20), lstm_triton.LSTM(3, 20)
    input = torch.randn(3, 2, 3, requires_grad=True)

    def gradient(create_graph: bool) -> Tensor:
        output, _ = decoder(input, encoder(input)[1])
        return torch.autograd.grad(output.square().sum(), input, create_graph=create_graph)[0]

    expected = gradient(False)
    with interpreter.interpret():
        torch.testing.assert_close(gradient(False), expected)
        torch.testing.assert_close(gradient(True), expected)


def test_autocast_around_backward_alone_changes_nothing() -> None:
    tensors = [tensor.requires_grad_() for tensor in LaneCase(3, 2, 3, 20).tensors()]
    with interpreter.interpret():
        expected = torch.autograd.grad(scan_layer(*tensors, reverse=False)[0].sum(), tensors)
        loss = scan_layer(*tensors, reverse=False)[0].sum()
        with torch.autocast("cpu", torch.bfloat16):
            actual = torch.autograd.grad(loss, tensors)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("hidden_size", [16, 21])
def test_operators_keep_their_promises_to_the_compiler(hidden_size: int, save: bool) -> None:
    """PyTorch's own check of custom operators: schemas, fake results, tracing with changing sizes."""
    input, h_0, c_0, *weights = LaneCase(3, 2, 3, hidden_size).tensors()
    given, options = (input, h_0.unsqueeze(0), c_0.unsqueeze(0), weights), (1, True, False)  # type: ignore[union-attr]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    with interpreter.interpret():
        torch.library.opcheck(forward.scan_forward, (*given, *options, save, save, []), test_utils=checks)
        if save:
            _, _, cell, gates, _, _ = forward.scan_forward(*given, *options, True, True, [])
            grads = (torch.randn(3, 2, hidden_size), None, torch.randn(1, 2, hidden_size))
            arguments = (*grads, given[-1], *options, cell, gates, [], 2)
            torch.library.opcheck(backward.scan_backward, arguments, test_utils=checks)


class Seen(TorchDispatchMode):
    """This library's operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lstm_triton":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_operators_are_called_as_such_wherever_that_is_seen() -> None:
    """By modes, and of tensors without data; elsewhere as functions, with the same results."""
    module = lstm_triton.LSTM(3, 16)
    input, step = torch.randn(4, 2, 3), torch.randn(1, 2, 3)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(input)[0].sum(), list(module.parameters()))

    with interpreter.interpret(), lstm_triton.backend("triton"):
        expected = train()
        with Seen() as seen:
            found = train()
            with torch.no_grad():
                module(step)
        assert seen.names == [f"lstm_triton::{name}" for name in ("scan_forward", "scan_backward", "single_step")]
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(input)
        with torch.no_grad():
            assert isinstance(torch.func.functional_call(module, {}, (fake,))[0], FakeTensor)

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train()
        ours = [event for event in profile.events() if event.name.startswith("lstm_triton")]
        assert ours
        assert all(event.is_user_annotation for event in ours)  # names that `invoke` gives, and no operators


def test_compiles_into_one_graph() -> None:
    module = lstm_triton.LSTM(3, 16, num_layers=2, bidirectional=True)
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True, backend="aot_eager")
    input = torch.randn(4, 2, 3)
    with interpreter.interpret():
        torch.testing.assert_close(run(compiled, input), run(module, input))


def test_states_do_not_keep_the_buffers_alive() -> None:
    with interpreter.interpret(), torch.no_grad():
        _, states = lstm_triton.LSTM(3, 16)(torch.randn(40, 2, 3))
    for state in states:
        assert state.untyped_storage().nbytes() == state.numel() * state.itemsize


def test_nothing_is_kept_without_gradients() -> None:
    module = lstm_triton.LSTM(3, 16)
    with interpreter.interpret(), torch.no_grad():
        output, _ = module(torch.randn(4, 2, 3))
    assert output.grad_fn is None
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with interpreter.interpret(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.randn(4, 2, 3))
    assert kept, "the same with gradients keeps something"


def profiled(call: Callable[[], object]) -> set[str]:
    """The names that a profiler shows."""
    with torch.autograd.profiler.profile() as profile, interpreter.interpret():
        call()
    return {event.name for event in profile.function_events}


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"memory": "low"}], ids=str)
def test_a_profiler_shows_the_layer(options: dict[str, Any]) -> None:
    """Forward, backward, and a single step without gradients."""
    module, input = lstm_triton.LSTM(2, 3, **options), torch.randn(2, 2, 2)
    shown = profiled(lambda: module(input)[0].sum().backward())
    assert {"LSTMScan", "LSTMScanBackward", "lstm_triton::scan_forward", "lstm_triton::scan_backward"} <= shown
    assert "lstm_triton::single_step" in profiled(lambda: torch.no_grad()(module)(input[:1]))


def test_a_profiler_shows_the_cell() -> None:
    cell, input = lstm_triton.LSTMCell(2, 3), torch.randn(2, 2)
    shown = profiled(lambda: cell(input)[0].sum().backward())
    assert {"LSTMStep", "LSTMStepBackward", "lstm_triton::cell_forward", "lstm_triton::cell_backward"} <= shown

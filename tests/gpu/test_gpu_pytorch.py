"""PyTorch's own tools around the kernels on a real GPU: CUDA graphs, autocast, compilation, torch.func, derivatives."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_triton
from lstm_triton.commands.check import tf32
from tests.support.comparing import assert_results_as_accurate, assert_same, run, twins

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with tf32(False):
        yield


# --- CUDA graphs ---


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, and the results it will write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("backend", ["triton", "aten"])
@pytest.mark.parametrize("hidden_size", [64, 1000], ids=["one program", "many programs"])
def test_graph_of_forward(backend: str, hidden_size: int) -> None:
    module = lstm_triton.LSTM(32, hidden_size, num_layers=2, bidirectional=True, device=DEVICE)
    input = torch.randn(20, 16, 32, device=DEVICE)
    with torch.no_grad(), lstm_triton.backend(backend):
        graph, (output, (h_n, c_n)) = captured(lambda: module(input))
        for _ in range(3):
            input.normal_()
            graph.replay()
            torch.testing.assert_close((output, (h_n, c_n)), module(input))


@pytest.mark.parametrize("backend", ["triton", "aten"])
@pytest.mark.parametrize("hidden_size", [64, 1000], ids=["one program", "many programs"])
def test_graph_of_forward_and_backward(backend: str, hidden_size: int) -> None:
    module = lstm_triton.LSTM(32, hidden_size, num_layers=2, device=DEVICE)
    input = torch.randn(20, 16, 32, device=DEVICE, requires_grad=True)
    leaves = [input, *module.parameters()]

    def gradients() -> tuple[Tensor, ...]:
        output, (_, c_n) = module(input)
        return torch.autograd.grad(output.square().sum() + c_n.sum(), leaves)

    with lstm_triton.backend(backend):
        graph, found = captured(gradients)
        for _ in range(3):
            with torch.no_grad():
                input.normal_()
                module.weight_hh_l0.mul_(0.9)
            graph.replay()
            torch.testing.assert_close(found, gradients())


def test_graph_of_lengths_and_resets() -> None:
    """Both may differ from replay to replay."""
    module = lstm_triton.LSTM(32, 256, bidirectional=True, device=DEVICE)
    input = torch.randn(20, 16, 32, device=DEVICE, requires_grad=True)
    lengths = torch.full((16,), 20, device=DEVICE)
    resets = torch.zeros(20, 16, dtype=torch.bool, device=DEVICE)

    def results() -> tuple[Tensor, ...]:
        output, (h_n, _) = module(input, lengths=lengths, resets=resets)
        return output, *torch.autograd.grad(output.square().sum() + h_n.sum(), [input, *module.parameters()])

    with lstm_triton.backend("triton"):
        graph, found = captured(results)
        for seed in range(3):
            generator = torch.Generator(DEVICE).manual_seed(seed)
            lengths.random_(0, 21, generator=generator)
            resets.bernoulli_(0.1, generator=generator)
            graph.replay()
            torch.testing.assert_close(found, results())


def test_graphed_callable_in_training() -> None:
    ours = lstm_triton.LSTM(32, 256, device=DEVICE)
    plain = copy.deepcopy(ours)
    sample = torch.randn(20, 16, 32, device=DEVICE, requires_grad=True)
    with lstm_triton.backend("triton"):
        graphed = torch.cuda.make_graphed_callables(ours, (sample,))
        for _ in range(2):
            input = torch.randn(20, 16, 32, device=DEVICE)
            assert_same(run(graphed, input), run(plain, input))


def test_fresh_dropout_at_each_replay() -> None:
    module = lstm_triton.LSTM(32, 64, num_layers=2, dropout=0.5, device=DEVICE)
    input = torch.randn(20, 16, 32, device=DEVICE)
    with torch.no_grad(), lstm_triton.backend("triton"):
        graph, (output, _) = captured(lambda: module(input))
        outputs = []
        for _ in range(3):
            graph.replay()
            outputs.append(output.clone())
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("given", ["nothing", "lengths", "resets"])
def test_nothing_waits_for_the_gpu(given: str) -> None:
    module = lstm_triton.LSTM(32, 256, num_layers=2, bidirectional=True, device=DEVICE)
    input = torch.randn(20, 16, 32, device=DEVICE, requires_grad=True)
    options: dict[str, Any] = {
        "nothing": {},
        "lengths": {"lengths": torch.arange(16, device=DEVICE)},
        "resets": {"resets": torch.zeros(20, 16, dtype=torch.bool, device=DEVICE)},
    }[given]
    with lstm_triton.backend("triton"):
        module(input, **options)[0].sum().backward()  # compiles the kernels
        with no_synchronisation():
            module(input, **options)[0].sum().backward()


# --- torch.compile ---


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    ours, stock = twins(32, 256, num_layers=2, bidirectional=True, device=DEVICE)
    options = {} if mode == "default" else torch._inductor.list_mode_options(mode)
    counter = CompileCounterWithBackend("inductor")

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        counter.frame_count += 1
        return torch._inductor.compile(graph, inputs, options=options)

    ours.compile(fullgraph=True, backend=counting)
    with lstm_triton.backend("triton"):
        for time_steps, batch_size in ((20, 16), (30, 8), (7, 5), (64, 33)):
            input = torch.randn(time_steps, batch_size, 32, device=DEVICE)
            torch.compiler.cudagraph_mark_step_begin()
            assert_results_as_accurate(run(ours, input), stock, input)
    assert counter.frame_count <= 2


def test_exported() -> None:
    ours, stock = twins(32, 256, num_layers=2, device=DEVICE)
    sizes = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    with torch.no_grad(), lstm_triton.backend("triton"):
        program = torch.export.export(ours, (torch.randn(5, 2, 32, device=DEVICE),), dynamic_shapes=(sizes,))
        input = torch.randn(20, 16, 32, device=DEVICE)
        torch.testing.assert_close(program.module()(input), stock(input), rtol=1e-4, atol=1e-5)


# --- autocast ---


@pytest.mark.parametrize("backend", ["triton", "aten"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    ours, stock = twins(32, 256, num_layers=2, bidirectional=True, device=DEVICE)
    input, hx = torch.randn(20, 16, 32, device=DEVICE), tuple(torch.randn(2, 4, 16, 256, device=DEVICE).unbind())
    for states in (None, hx):
        with torch.autocast(DEVICE, dtype):
            expected = run(stock, input, states)
            with lstm_triton.backend(backend):
                actual = run(ours, input, states)
        assert {name: t.dtype for name, t in actual.items()} == {name: t.dtype for name, t in expected.items()}
        assert actual["output"].dtype == dtype
        assert actual["gradient of weight_hh_l0"].dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_gradient_scaler() -> None:
    """A loss scaled too far is skipped and the scale halved; then training goes on in float32 weights."""
    module, head = lstm_triton.LSTM(32, 64, device=DEVICE), nn.Linear(64, 1, device=DEVICE)
    parameters = [*module.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40)
    input, target = torch.randn(20, 16, 32, device=DEVICE), torch.rand(16, 1, device=DEVICE)
    losses, scales, changed = [], [], []
    for _ in range(40):
        before = module.weight_hh_l0.detach().clone()
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16), lstm_triton.backend("triton"):
            loss = (head(module(input)[0][-1]).float() - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        changed.append(not torch.equal(before, module.weight_hh_l0))
    assert not changed[0]
    assert scales[0] == 2.0**39
    assert changed[-1]
    assert losses[-1] < losses[0]
    assert module.weight_hh_l0.dtype == torch.float32


# --- Derivatives ---


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("given", ["nothing", "lengths", "packed"])
def test_second_derivatives_in_float64(options: dict[str, Any], given: str) -> None:
    """PyTorch's own function, which is cuDNN's here, and refuses them and backward in evaluation mode."""
    module = lstm_triton.LSTM(2, 3, dtype=torch.float64, device=DEVICE, **options).eval()
    input = torch.randn(3, 2, 2, dtype=torch.float64, device=DEVICE)
    packed = pack_padded_sequence(input, torch.tensor([3, 1]))
    data = (packed.data if given == "packed" else input).detach().requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def output(data: Tensor, *weights: Tensor) -> Tensor:
        keywords = {"lengths": torch.tensor([3, 1], device=DEVICE)} if given == "lengths" else {}
        argument = packed._replace(data=data) if given == "packed" else data
        result, _ = functional_call(module, dict(zip(names, weights, strict=True)), (argument,), keywords)
        return result.data if given == "packed" else result

    assert torch.autograd.gradcheck(output, (data, *module.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(output, (data, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_backward_in_evaluation_mode(backend: str) -> None:
    ours, stock = twins(32, 256, num_layers=2, dropout=0.5, device=DEVICE)
    input = torch.randn(20, 16, 32, device=DEVICE)
    with lstm_triton.backend(backend):
        actual = run(ours.eval(), input)
    stock.dropout = 0.0  # in training mode: in evaluation mode it has no backward
    assert_results_as_accurate(actual, stock, input)


def test_second_derivative_through_cudnns_dropout() -> None:
    module = lstm_triton.LSTM(3, 4, num_layers=2, dropout=0.5, device=DEVICE)
    input = torch.randn(3, 2, 3, device=DEVICE, requires_grad=True)
    with lstm_triton.backend("aten"):
        loss = module(input)[0].sum()
    with pytest.raises(RuntimeError, match="second derivatives cannot be taken through the dropout"):
        torch.autograd.grad(loss, input, create_graph=True)


@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_torch_func(backend: str) -> None:
    """Per-sample gradients, and a forward-mode derivative against one of differences."""
    module = lstm_triton.LSTM(8, 40, num_layers=2, device=DEVICE)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    inputs = torch.randn(6, 20, 8, device=DEVICE)

    def loss(weights: dict[str, Tensor], input: Tensor) -> Tensor:
        return functional_call(module, weights, (input,))[0].square().sum()

    with lstm_triton.backend(backend):
        actual = vmap(grad(loss), in_dims=(None, 0))(weights, inputs)
        looped = [grad(loss)(weights, input) for input in inputs]
        tangent = torch.randn_like(inputs[0])
        _, directional = jvp(lambda input: loss(weights, input), (inputs[0],), (tangent,))
        gradient = grad(loss, argnums=1)(weights, inputs[0])
    expected = {name: torch.stack([each[name] for each in looped]) for name in weights}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(directional, (gradient * tangent).sum(), rtol=1e-3, atol=1e-3)

"""Derivatives of any order and in either mode, and torch.func's transforms, on both paths."""

import copy
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import lstm_triton
from lstm_triton import interpreter, prepared_call
from lstm_triton.aten import native
from lstm_triton.reference import lstm_layer
from tests.support.comparing import assert_as_accurate, assert_same, floor_of, nudged, run, twins
from tests.support.launches import recorded_launches
from tests.support.processes import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

PATHS = [
    pytest.param(nullcontext, id="fallback"),
    pytest.param(interpreter.interpret, id="kernels", marks=pytest.mark.interpreted),
]
RAGGED = {"lengths": torch.tensor([3, 1]), "resets": torch.tensor([[False, True], [True, False], [False, False]])}
CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {  # a module's options, and a call's
    "plain": ({}, {}),
    "layers and directions": ({"num_layers": 2, "bidirectional": True}, {}),
    "no bias, batch first": ({"bias": False, "batch_first": True}, {}),
    "projections": ({"bidirectional": True, "proj_size": 2}, {}),
    "lengths": ({"bidirectional": True}, {"lengths": RAGGED["lengths"]}),
    "resets": ({"bidirectional": True}, {"resets": RAGGED["resets"]}),
}


def tensors_of(module: nn.RNNBase) -> list[Tensor]:
    """Input (3, 2, 2), h_0 and c_0, and the weights: all that has gradients."""
    generator = torch.Generator().manual_seed(0)
    states, dtype = module.num_layers * (2 if module.bidirectional else 1), module.weight_ih_l0.dtype
    sizes = [(3, 2, 2), (states, 2, module.proj_size or module.hidden_size), (states, 2, module.hidden_size)]
    if module.batch_first:
        sizes[0] = (2, 3, 2)
    given = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return [tensor.detach().requires_grad_() for tensor in (*given, *module.parameters())]


def call(module: nn.RNNBase, tensors: Any, options: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    input, h_0, c_0, *weights = tensors
    names = [name for name, _ in module.named_parameters()]
    output, (h_n, c_n) = functional_call(module, dict(zip(names, weights, strict=True)), (input, (h_0, c_0)), options)
    return output, h_n, c_n


# --- Second derivatives ---


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_in_float64(case: str) -> None:
    module_options, call_options = CASES[case]
    module = lstm_triton.LSTM(2, 3, dtype=torch.float64, **module_options).eval()
    assert gradgradcheck(lambda *given: call(module, given, call_options), tensors_of(module), fast_mode=True)


def penalty(module: nn.RNNBase, tensors: list[Tensor], options: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the squared length of a gradient."""
    output, h_n, c_n = call(module, tensors, options)
    loss = output.square().sum() + (h_n.sum(-1) * c_n.sum(-1)).sum()
    gradients = torch.autograd.grad(loss, tensors, create_graph=True)
    return torch.autograd.grad(torch.stack([gradient.square().sum() for gradient in gradients]).sum(), tensors)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", [case for case in CASES if case != "projections"])
def test_second_derivatives_through_the_kernels(case: str) -> None:
    """As far from float64 as those of PyTorch's own function in float32."""
    module_options, call_options = CASES[case]
    torch.manual_seed(0)
    module = lstm_triton.LSTM(2, 20, **module_options)
    tensors = tensors_of(module)

    def in_float64(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return penalty(module, [change(tensor.detach().double()).requires_grad_() for tensor in tensors], call_options)

    stock, reference = penalty(module, tensors, call_options), in_float64(lambda tensor: tensor)
    sensitive = in_float64(lambda tensor: nudged(tensor, torch.float32))
    with interpreter.interpret(), lstm_triton.backend("triton"):
        actual = penalty(module, tensors, call_options)
    for each in zip(actual, reference, stock, sensitive, strict=True):
        floor = floor_of(each[3], each[1], torch.float32)
        assert_as_accurate(*each[:3], floor=floor)


@pytest.mark.parametrize("path", PATHS)
def test_third_derivative(path: Any) -> None:
    module = lstm_triton.LSTM(2, 3)
    input = torch.randn(3, 1, 2, dtype=torch.float64)

    def third(module: nn.Module, input: Tensor) -> Tensor:
        derivative = input.requires_grad_()
        value = module(input)[0].square().sum()
        for _ in range(3):
            (derivative,) = torch.autograd.grad(value, input, create_graph=True)
            value = derivative.square().sum()
        return derivative

    expected = third(copy.deepcopy(module).double(), input)
    with path():
        actual = third(module, input.detach().float())
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_backward_in_evaluation_mode(path: Any) -> None:
    ours, stock = twins(3, 4, num_layers=2, dropout=0.5)
    ours.eval()
    stock.eval()
    input = torch.randn(3, 2, 3)
    with path():
        actual = run(ours, input)
    torch.testing.assert_close(actual, run(stock, input))


# --- Where PyTorch's own function is cuDNN's ---


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A stand-in that refuses what cuDNN refuses; the list has an entry for each call, whether it was cuDNN's."""

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, training: bool, *results: Tensor) -> tuple[Tensor, ...]:
            ctx.training = training
            return tuple(result.clone() for result in results)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            assert ctx.training, "cudnn RNN backward can only be called in training mode"
            return None, *grads

    calls: list[bool] = []
    own = torch.lstm

    def lstm(*arguments: Any) -> tuple[Tensor, ...]:
        calls.append(torch.backends.cudnn.enabled)
        results = own(*arguments)
        packed = isinstance(arguments[1], Tensor)
        return Refusing.apply(arguments[7 if packed else 6], *results) if calls[-1] else results

    monkeypatch.setattr(torch, "lstm", lstm)
    monkeypatch.setattr(native, "_is_cudnns", lambda tensor: torch.backends.cudnn.enabled)
    prepared_call.forget()  # what was decided of tensors that are not cuDNN's
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_computes_first_derivatives(cudnn: list[bool], training: bool, packed: bool) -> None:
    ours, stock = (module.train(training) for module in twins(3, 4, num_layers=2, bidirectional=True, proj_size=2))
    input: Any = torch.randn(3, 2, 3)
    if packed:
        input = pack_padded_sequence(input, torch.tensor([3, 1]))
    actual = run(ours, input)
    assert cudnn == [True]  # once, and nothing again for backward
    with torch.backends.cudnn.flags(enabled=False):
        assert_same(actual, run(stock, input))


@pytest.mark.parametrize("case", CASES)
def test_cudnn_does_not_compute_second_derivatives(cudnn: list[bool], case: str) -> None:
    module_options, call_options = CASES[case]
    module = lstm_triton.LSTM(2, 3, dtype=torch.float64, **module_options).eval()
    assert gradgradcheck(lambda *given: call(module, given, call_options), tensors_of(module), fast_mode=True)
    assert {True, False} <= set(cudnn)


def test_second_derivative_through_cudnns_dropout(cudnn: list[bool]) -> None:
    module, input = lstm_triton.LSTM(3, 4, num_layers=2, dropout=0.5), torch.randn(3, 2, 3, requires_grad=True)
    module(input)[0].sum().backward()  # the first one is cuDNN's own
    with pytest.raises(RuntimeError, match="second derivatives cannot be taken through the dropout of cuDNN's LSTM"):
        torch.autograd.grad(module(input)[0].sum(), input, create_graph=True)
    module.eval()
    torch.autograd.grad(module(input)[0].sum(), input, create_graph=True)


def test_cudnn_and_what_pytorch_does_to_a_graph(cudnn: list[bool]) -> None:
    """Backward twice, autocast, and torch.func."""
    module, input = lstm_triton.LSTM(3, 4), torch.randn(3, 2, 3, requires_grad=True)
    loss = module(input)[0].sum()
    first, second = (torch.autograd.grad(loss, input, retain_graph=retain) for retain in (True, False))
    assert_same(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(input)[0].float().square().sum()
    (expected,) = torch.autograd.grad(loss, input, retain_graph=True)
    (actual,) = torch.autograd.grad(loss, input, create_graph=True)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    actual.square().sum().backward()
    torch.testing.assert_close(grad(lambda x: module(x)[0].sum())(input.detach()), first[0])


def test_exported_program_contains_the_function_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_is_cudnns", lambda tensor: True)
    program = torch.export.export(lstm_triton.LSTM(3, 4).eval(), (torch.randn(3, 2, 3),))
    (node,) = (node for node in program.graph.nodes if str(node.target) == "aten.lstm.input")
    assert node.args[6] is False  # training


def test_output_changed_in_place_where_it_is_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_is_cudnns", lambda tensor: True)
    prepared_call.forget()
    output, _ = lstm_triton.LSTM(3, 4)(torch.randn(3, 2, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.mul_(2).sum().backward()


# --- Forward mode ---


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"lengths": torch.tensor([3, 1])}], ids=["dense", "lengths"])
def test_forward_mode(path: Any, options: dict[str, Tensor]) -> None:
    module = lstm_triton.LSTM(2, 3, num_layers=2, bidirectional=True)
    input, tangent = torch.randn(2, 3, 2, 2).unbind()

    def output(input: Tensor) -> Tensor:
        return module(input, **options)[0]

    expected = torch.autograd.functional.jvp(output, input, tangent)
    with path():
        torch.testing.assert_close(jvp(output, (input,), (tangent,)), expected)
        with forward_ad.dual_level():
            actual = forward_ad.unpack_dual(output(forward_ad.make_dual(input, tangent)))
        torch.testing.assert_close((actual.primal, actual.tangent), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"lengths": torch.tensor([3, 1])}], ids=["dense", "lengths"])
def test_jacobians_and_hessians(path: Any, options: dict[str, Tensor]) -> None:
    module = lstm_triton.LSTM(2, 3)
    input = torch.randn(3, 2, 2)

    def features(input: Tensor) -> Tensor:
        return module(input, **options)[0].sum((0, 1))

    def loss(input: Tensor) -> Tensor:
        return module(input, **options)[0].square().sum()

    jacobian, second = (
        torch.autograd.functional.jacobian(features, input),
        torch.autograd.functional.hessian(loss, input),
    )
    with path():
        for transform in (jacrev, jacfwd):
            torch.testing.assert_close(transform(features)(input), jacobian)
        for transform in (hessian, lambda loss: jacrev(grad(loss))):
            torch.testing.assert_close(transform(loss)(input), second)


# --- Batched gradients of torch.autograd, which have a vmap of their own ---


@pytest.mark.interpreted
@pytest.mark.parametrize("case", ["layers and directions", "projections", "lengths", "packed", "low memory", "dropout"])
def test_vectorized_jacobians_and_hessians_through_the_kernels(case: str) -> None:
    module_options, call_options = CASES.get(case, ({}, {}))
    extra = {"dropout": {"num_layers": 2, "dropout": 0.4}, "low memory": {"memory": "low"}}.get(case, {})
    module = lstm_triton.LSTM(2, 3, **module_options, **extra)
    input, h_0, c_0 = (tensor.detach() for tensor in tensors_of(module)[:3])

    def results(first: Tensor, h_0: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        read = torch.cat((first, input[..., 1:]), dim=-1)
        if case == "packed":
            packed, (_, c_n) = module(pack_padded_sequence(read, torch.tensor([3, 1])), (h_0, c_0))
            return packed.data.sum(-1), c_n.sum((0, 2))
        output, (_, c_n) = module(read, (h_0, c_0), **call_options)
        return output.sum((-2, -1)), c_n.sum((0, 2))

    def loss(first: Tensor) -> Tensor:
        return sum(result.square().sum() for result in results(first, h_0))

    def derivatives(vectorize: bool = True) -> tuple[Any, Any]:
        given = input[..., :1].clone()
        return (
            torch.autograd.functional.jacobian(results, (given, h_0), vectorize=vectorize),
            torch.autograd.functional.hessian(loss, given, vectorize=vectorize),
        )

    with interpreter.interpret():
        actual = derivatives()
        expected = derivatives(vectorize=False) if case == "dropout" else None
    torch.testing.assert_close(actual, expected or derivatives(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_gradients_of_weights_in_batches(path: Any, kind: str) -> None:
    """Also differentiated again."""
    module = lstm_triton.LSTM(2, 3, bidirectional=True) if kind == "LSTM" else lstm_triton.LSTMCell(2, 3)
    input = torch.randn(3, 2, 2) if kind == "LSTM" else torch.randn(2, 2)
    hx = None if kind == "LSTM" else (torch.randn(2, 3), torch.randn(2, 3))
    weights = list(module.parameters())
    with path():
        output = module(input, hx)[0]
        rows = torch.randn(2, *output.shape)
        options: dict[str, Any] = {"create_graph": True}
        expected = [torch.autograd.grad(output, weights, row, **options) for row in rows]
        actual = torch.autograd.grad(output, weights, rows, is_grads_batched=True, **options)
        torch.testing.assert_close(actual, tuple(torch.stack(each) for each in zip(*expected, strict=True)))
        again = [
            torch.autograd.grad(sum(each.square().sum() for each in gradients), weights, retain_graph=True)
            for gradients in (actual, [each for row in expected for each in row])
        ]
        torch.testing.assert_close(*again)


# --- vmap ---


def per_sample(options: dict[str, Any]) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """A loss of weights, one input (T, I) and its length, and the weights."""
    module = lstm_triton.LSTM(3, 8, **options)

    def loss(weights: dict[str, Tensor], input: Tensor, length: Tensor | None = None) -> Tensor:
        keywords = {} if length is None else {"lengths": length}
        output, (_, c_n) = functional_call(module, weights, (input,), keywords)
        return output.square().sum() + c_n.sum()

    return loss, {name: weight.detach() for name, weight in module.named_parameters()}


def looped(function: Callable[..., dict[str, Tensor]], *entries: Any) -> dict[str, Tensor]:
    results = [function(*entry) for entry in zip(*entries, strict=True)]
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=str)
def test_per_sample_gradients(path: Any, options: dict[str, Any]) -> None:
    loss, weights = per_sample(options)
    inputs = torch.randn(5, 4, 3)
    expected = looped(lambda input: grad(loss)(weights, input), inputs)
    with path():
        actual = vmap(grad(loss), in_dims=(None, 0))(weights, inputs)
        total = grad(lambda weights: vmap(loss, in_dims=(None, 0))(weights, inputs).sum())(weights)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(total, {name: gradient.sum(0) for name, gradient in expected.items()})


@pytest.mark.parametrize("path", PATHS)
def test_per_sample_gradients_of_different_lengths(path: Any) -> None:
    loss, weights = per_sample({})
    inputs, lengths = torch.randn(4, 4, 3), torch.tensor([2, 4, 0, 1])
    expected = looped(lambda input, length: grad(loss)(weights, input, length), inputs, lengths)
    with path():
        actual = vmap(grad(loss), in_dims=(None, 0, 0))(weights, inputs, lengths)
        torch.testing.assert_close(actual, expected)
        with pytest.raises(ValueError, match="lengths must be from 0 to 4, the number of time steps"):
            vmap(loss, in_dims=(None, 0, 0))(weights, inputs, lengths + 1)


@pytest.mark.parametrize("path", PATHS)
def test_ensemble(path: Any) -> None:
    """Stacked weights: one input for all, or an input for each; and their gradients."""
    modules = [lstm_triton.LSTM(3, 8, num_layers=2) for _ in range(3)]
    weights, _ = stack_module_state(modules)
    weights = {name: weight.detach() for name, weight in weights.items()}
    inputs = torch.randn(3, 4, 2, 3)

    def output(weights: dict[str, Tensor], input: Tensor) -> Tensor:
        return functional_call(modules[0], weights, (input,))[0]

    shared = torch.stack([module(inputs[0])[0] for module in modules]).detach()
    own = torch.stack([module(input)[0] for module, input in zip(modules, inputs, strict=True)])
    gradients = torch.autograd.grad(own.square().sum(), [module.weight_hh_l0 for module in modules])
    with path():
        torch.testing.assert_close(vmap(output, in_dims=(0, None))(weights, inputs[0]), shared)
        torch.testing.assert_close(vmap(output)(weights, inputs), own.detach())
        actual = vmap(grad(lambda weights, input: output(weights, input).square().sum()))(weights, inputs)
    torch.testing.assert_close(actual["weight_hh_l0"], torch.stack(gradients))


@pytest.mark.parametrize("path", PATHS)
def test_vmap_over_inputs_and_states(path: Any) -> None:
    module = lstm_triton.LSTM(3, 8, bidirectional=True, batch_first=True)
    inputs, h_0, c_0 = torch.randn(2, 5, 4, 3), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 8)

    def results(input: Tensor, h_0: Tensor) -> Any:
        return module(input, (h_0, c_0))

    expected = [results(inputs[:, at], h_0[:, :, at]) for at in range(5)]
    with path():
        output, (h_n, c_n) = vmap(results, in_dims=(1, 2), out_dims=1)(inputs, h_0[:, :, :5])
    torch.testing.assert_close(output, torch.stack([each[0] for each in expected], 1))
    torch.testing.assert_close(h_n, torch.stack([each[1][0] for each in expected], 1))
    torch.testing.assert_close(c_n, torch.stack([each[1][1] for each in expected], 1))


@pytest.mark.parametrize("path", PATHS)
def test_gradient_of_a_vmap_over_inputs(path: Any) -> None:
    """Inside, the inputs do not tell that they require a gradient."""
    loss, weights = per_sample({})
    inputs = torch.randn(5, 4, 3)

    def total(inputs: Tensor) -> Tensor:
        return vmap(loss, in_dims=(None, 0))(weights, inputs).sum()

    expected = torch.stack([grad(loss, argnums=1)(weights, input) for input in inputs])
    with path():
        torch.testing.assert_close(grad(total)(inputs), expected)


@pytest.mark.interpreted
def test_shared_weights_make_one_launch() -> None:
    loss, weights = per_sample({})
    with interpreter.interpret(), recorded_launches() as launches:
        vmap(grad(loss), in_dims=(None, 0))(weights, torch.randn(7, 4, 3))
    assert launches.kernels == ["forward_scan", "backward_scan"]


@pytest.mark.interpreted
def test_per_sample_gradients_take_no_more_memory_than_they_need() -> None:
    """No tensor on the way is larger than the gradients of one weight."""
    sizes: list[int] = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = func(*args, **(kwargs or {}))
            sizes.extend(
                r.untyped_storage().nbytes() for r in torch.utils._pytree.tree_leaves(results) if isinstance(r, Tensor)
            )
            return results

    loss, weights = per_sample({})
    inputs = torch.randn(7, 4, 3)
    with interpreter.interpret(), Recorded():
        gradients = vmap(grad(loss), in_dims=(None, 0))(weights, inputs)
    states = 6 * 7 * 4 * 16 * 4  # bytes of T + 2 rows of gradients of the gates
    assert max(sizes) <= max(gradients["weight_hh_l0"].nbytes, states)


@pytest.mark.interpreted
def test_matrix_product_of_gpus_under_vmap() -> None:
    """The operator in which float32 products get the precision of cuDNN's setting."""
    left, right = torch.randn(5, 2, 3), torch.randn(3, 5, 4)
    product = torch.ops.lstm_triton.matmul
    torch.testing.assert_close(vmap(product, in_dims=(0, 1))(left, right), left @ right.movedim(1, 0))
    torch.testing.assert_close(vmap(product, in_dims=(0, None))(left, right[:, 0]), left @ right[:, 0])


# --- Examples ---


def example(name: str) -> Any:
    """A file of examples/ as a module."""
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gradient_penalty_example() -> None:
    """It runs, and its penalty has the gradients of one computed in PyTorch's plain operations."""
    found = example("gradient_penalty")
    assert len(found.train(steps=2, batch_size=4)) == 2
    critic = found.Critic(4).double()
    real, fake = torch.randn(2, 5, 3, 1, dtype=torch.float64).unbind()

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return torch.autograd.grad(found.gradient_penalty(critic, real, fake), list(critic.lstm.parameters()))

    expected = gradients()
    weights = list(critic.lstm.parameters())
    critic.lstm.forward = lambda input: (None, (lstm_layer(input, None, None, *weights)[1].unsqueeze(0), None))
    torch.testing.assert_close(gradients(), expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("path", PATHS)
def test_per_sample_gradients_example(path: Any) -> None:
    """The same as Opacus', and as a loop's."""
    pytest.importorskip("opacus", reason="needs Opacus, of the extra 'examples'")
    found = example("per_sample_gradients")
    lstm, inputs = lstm_triton.LSTM(3, 8, num_layers=2, batch_first=True), torch.randn(4, 5, 3)
    expected, of_opacus = found.by_loop(lstm, inputs), found.by_opacus(lstm, inputs)
    with path():
        actual = found.by_vmap(lstm, inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual, of_opacus)
    norms = found.clipped_sum({"only": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}, 1.0)
    torch.testing.assert_close(norms, {"only": torch.tensor([0.9, 1.2])})

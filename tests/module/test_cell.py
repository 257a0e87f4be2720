"""lstm_triton.LSTMCell against torch.nn.LSTMCell: the module, the path that it takes, and torch.func."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils._pytree import tree_map

import lstm_triton
from lstm_triton import interpreter
from lstm_triton.reference import lstm_layer
from lstm_triton.scan.cell import plan_of_cell
from tests.support.cells import cell_arguments, cell_twins, run_cell
from tests.support.comparing import assert_same

Z = torch.zeros
interpreted = pytest.mark.interpreted


# --- A drop-in, on the CPU bit by bit ---


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dtype": torch.float64}])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (0,)], ids=str)
@pytest.mark.parametrize("states", [True, False], ids=["states", "zeros"])
def test_results_and_gradients(options: dict[str, Any], batch: tuple[int, ...], states: bool) -> None:
    ours, stock = cell_twins(3, 5, **options)
    dtype = options.get("dtype", torch.float32)
    tensors = [torch.randn(*batch, size, dtype=dtype) for size in ((3, 5, 5) if states else (3,))]
    assert_same(run_cell(ours, *tensors), run_cell(stock, *tensors))


def test_a_module_like_nn_lstm_cell() -> None:
    for options in ({}, {"bias": False}, {"dtype": torch.float64}, {"device": "meta"}):
        ours, stock = cell_twins(3, 5, **options)
        assert repr(ours) == repr(stock)
        assert list(ours.state_dict()) == list(stock.state_dict())
        assert ours.__constants__ == stock.__constants__
        assert isinstance(ours, nn.LSTMCell)
        if "device" not in options:
            assert_same(dict(ours.state_dict()), dict(stock.state_dict()))
            stock.load_state_dict(ours.state_dict())
            ours.load_state_dict(nn.LSTMCell(3, 5, **options).state_dict())


@pytest.mark.parametrize(
    "args", [(-1, 2), (3, -1), (3.0, 4), (3, 4, True, "nowhere"), (3, 4, True, None, torch.int8), (3,), (3, 4, 1)]
)
def test_constructor(args: tuple[Any, ...]) -> None:
    def outcome(cls: type[nn.LSTMCell]) -> object:
        try:
            return repr(cls(*args))
        except Exception as error:
            return type(error), str(error)

    assert outcome(lstm_triton.LSTMCell) == outcome(nn.LSTMCell)


REFUSED: dict[str, tuple[Any, ...]] = {
    "3-D input": (Z(1, 2, 3),),
    "0-D input": (Z(()),),
    "input size": (Z(2, 7),),
    "input size, unbatched": (Z(7),),
    "input dtype": (Z(2, 3).double(),),
    "integers": (Z(2, 3).long(),),
    "no tensor": (None,),
    "3-D states": (Z(2, 3), (Z(1, 2, 5), Z(1, 2, 5))),
    "batch of h": (Z(2, 3), (Z(3, 5), Z(2, 5))),
    "batch of c": (Z(2, 3), (Z(2, 5), Z(3, 5))),
    "not broadcast": (Z(2, 3), (Z(1, 5), Z(1, 5))),
    "size of h": (Z(2, 3), (Z(2, 4), Z(2, 5))),
    "size of c": (Z(2, 3), (Z(2, 5), Z(2, 4))),
    "dtype of h": (Z(2, 3), (Z(2, 5).double(), Z(2, 5))),
    "unbatched states": (Z(2, 3), (Z(5), Z(5))),
    "batched states": (Z(3), (Z(2, 5), Z(2, 5))),
    "one state": (Z(2, 3), (Z(2, 5),)),
    "three states": (Z(2, 3), (Z(2, 5), Z(2, 5), Z(2, 5))),
    "stacked states": (Z(2, 3), Z(2, 2, 5)),
    "device": (torch.zeros(2, 3, device="meta"),),
}


def refusal(function: Callable[..., object], *args: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(*args)
    return caught.type, str(caught.value).splitlines()[0]


@pytest.mark.parametrize("args", REFUSED.values(), ids=REFUSED.keys())
def test_errors_are_nn_lstm_cells(args: tuple[Any, ...]) -> None:
    ours, stock = cell_twins(3, 5)
    assert refusal(ours, *args) == refusal(stock, *args)


@interpreted
@pytest.mark.parametrize(
    "name", [name for name in REFUSED if "dtype" not in name and name not in ("integers", "device")]
)
def test_errors_before_the_kernel(name: str) -> None:
    """A wrong size is refused in nn.LSTMCell's words also where the kernel would take the call, and by explain."""
    ours, stock = cell_twins(3, 5)
    expected = refusal(stock, *REFUSED[name])
    with interpreter.interpret():
        assert refusal(ours, *REFUSED[name]) == expected
        assert refusal(lstm_triton.explain, ours, *REFUSED[name]) == expected


def test_weights_of_another_size_are_left_to_pytorch() -> None:
    ours, stock = cell_twins(3, 5)
    for cell in (ours, stock):
        cell.weight_hh = nn.Parameter(torch.zeros(20, 6))
    assert refusal(ours, Z(2, 3)) == refusal(stock, Z(2, 3))


def test_copies() -> None:
    ours, stock = cell_twins(3, 5)
    tensors = cell_arguments(2, 3, 5)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.double().float()):
        assert_same(run_cell(other, *tensors), run_cell(stock, *tensors))


def test_autocast() -> None:
    ours, stock = cell_twins(3, 5)
    tensors = cell_arguments(2, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run_cell(ours, *tensors), run_cell(stock, *tensors))


def test_compiled_without_kernels() -> None:
    ours, stock = cell_twins(3, 5)
    tensors = cell_arguments(2, 3, 5)
    ours.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run_cell(ours, *tensors), run_cell(stock, *tensors))


# --- Which path ---


def test_backends() -> None:
    cell = lstm_triton.LSTMCell(3, 5)
    with (
        lstm_triton.backend("triton"),
        pytest.raises(RuntimeError, match="the kernels run on NVIDIA GPUs, not on 'cpu'"),
    ):
        cell(Z(2, 3))
    explanation = lstm_triton.explain(cell, Z(2, 3))
    assert str(explanation).splitlines() == [
        "LSTMCell(3, 5) on cpu, torch.float32, T=1, B=2",
        "layer  direction  path    why",
        "    0  forward    aten    the kernels run on NVIDIA GPUs, not on 'cpu' tensors",
    ]
    assert explanation.launches == 0


@interpreted
def test_explained() -> None:
    cell = lstm_triton.LSTMCell(3, 5)
    with interpreter.interpret():
        explanation = lstm_triton.explain(cell, Z(2, 3))
        assert lstm_triton.explain(cell, torch.zeros(2, 3, device="meta")) == explanation
        assert lstm_triton.explain(nn.LSTMCell(3, 5), Z(2, 3)).layers == explanation.layers
        for input, why in ((Z(0, 3), "the batch is empty"), (Z(2, 3).double(), "several dtypes")):
            assert why in lstm_triton.explain(cell, input).layers[0].reason
        with lstm_triton.backend("aten"):
            assert lstm_triton.explain(cell, Z(2, 3)).launches == 0
    (layer,), (forward, backward) = explanation.layers, explanation.scans
    assert layer.path == "triton"
    assert (forward.kind, forward.plan) == ("cell", plan_of_cell(Z(2, 3), 5, "matmul"))
    assert (backward.kind, backward.plan) == ("cell backward", None)
    assert str(explanation).splitlines()[-3:] == [
        "launch 1: cell: 2 programs of 4 warps (tiles of 8 rows x 4 units)",
        "launch 2: cell backward",
        "launches in all: 2",
    ]


# --- torch.func ---


PATHS = [pytest.param(nullcontext, id="fallback"), pytest.param(interpreter.interpret, id="kernels", marks=interpreted)]


def loss_and_plain(bias: bool = True) -> tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Tensor]]:
    """The loss of a step of a cell given its weights, the same by the formula, and the weights."""
    cell, _ = cell_twins(3, 8, bias=bias)

    def loss(weights: dict[str, Tensor], *given: Tensor) -> Tensor:
        return loss_of(functional_call(cell, weights, (given[0], given[1:] or None)))

    def plain(weights: dict[str, Tensor], *given: Tensor) -> Tensor:
        rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in given]
        states = rows[1:] or [None, None]
        return loss_of(lstm_layer(rows[0].unsqueeze(0), *states, *weights.values())[1:])

    def loss_of(results: Any) -> Tensor:
        return results[0].square().sum() + (results[0] * results[1]).sum()

    return loss, plain, {name: weight.detach() for name, weight in cell.named_parameters()}


@pytest.mark.parametrize("batch", [(), (2,)], ids=["unbatched", "batched"])
@pytest.mark.parametrize("states", [True, False], ids=["states", "zeros"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("path", PATHS)
def test_vmap(path: Any, bias: bool, states: bool, batch: tuple[int, ...]) -> None:
    """Values, per-sample gradients, gradients of a mapped sum, and an ensemble of weights."""
    loss, plain, weights = loss_and_plain(bias)
    given = [torch.randn(4, *batch, size) for size in ((3, 8, 8) if states else (3,))]
    each = (0,) * len(given)
    samples = [tuple(tensor[entry] for tensor in given) for entry in range(4)]
    everything = tuple(range(1 + len(given)))
    with path():
        values = vmap(loss, in_dims=(None, *each))(weights, *given)
        gradients = vmap(grad(loss, everything), in_dims=(None, *each))(weights, *given)
        total = grad(lambda weights: vmap(loss, in_dims=(None, *each))(weights, *given).sum())(weights)
        ensemble = {name: torch.stack([weight, weight / 2]) for name, weight in weights.items()}
        of_ensemble = vmap(grad(loss), in_dims=(0, *(None for _ in given)))(ensemble, *samples[0])
    torch.testing.assert_close(values, torch.stack([plain(weights, *sample) for sample in samples]))
    expected = [grad(plain, everything)(weights, *sample) for sample in samples]
    for entry, right in enumerate(expected):
        torch.testing.assert_close(tree_map(lambda tensor, at=entry: tensor[at], gradients), right)
    torch.testing.assert_close(total, grad(lambda weights: sum(plain(weights, *each) for each in samples))(weights))
    for entry in range(2):
        right = grad(plain)({name: weight[entry] for name, weight in ensemble.items()}, *samples[0])
        torch.testing.assert_close({name: tensor[entry] for name, tensor in of_ensemble.items()}, right)


@pytest.mark.parametrize("states", [True, False], ids=["states", "zeros"])
def test_autocast_under_vmap(states: bool) -> None:
    """Without kernels: nn.LSTMCell's dtypes, and about its values."""
    ours, stock = cell_twins(3, 8)
    given = [torch.randn(4, 2, size) for size in ((3, 8, 8) if states else (3,))]

    def results(cell: nn.Module, input: Tensor, *hx: Tensor) -> Any:
        return cell(input, hx or None)

    with torch.autocast("cpu", torch.bfloat16):
        actual = vmap(partial(results, ours))(*given)
        expected = [results(stock, *(tensor[entry] for tensor in given)) for entry in range(4)]
    stacked = tuple(torch.stack(each) for each in zip(*expected, strict=True))
    torch.testing.assert_close(actual, stacked, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("path", PATHS)
def test_higher_derivatives_by_torch_func(path: Any) -> None:
    """Per-sample gradients of a penalty on a gradient, a Hessian, and forward mode."""
    loss, plain, weights = loss_and_plain()
    given = [torch.randn(3, size) for size in (3, 8, 8)]

    def derivatives(function: Callable[..., Tensor]) -> tuple[Any, ...]:
        sample = [tensor[0] for tensor in given]

        def penalty(weights: dict[str, Tensor], *given: Tensor) -> Tensor:
            return grad(function, 1)(weights, *given).square().sum()

        return (
            vmap(grad(penalty), in_dims=(None, 0, 0, 0))(weights, *given),
            hessian(function, 1)(weights, *sample),
            jacrev(grad(function, 2), 3)(weights, *sample),
            jvp(lambda input: function(weights, input, *given[1:]), (given[0],), (torch.ones(3, 3),)),
        )

    with path():
        found = derivatives(loss)
    torch.testing.assert_close(found, derivatives(plain))

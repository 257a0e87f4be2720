"""lstm_triton.LSTMCell against torch.nn.LSTMCell, and its kernels, interpreted, against float64."""

import copy
import mmap
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils._pytree import tree_map

import lstm_triton
from lstm_triton import interpreter
from lstm_triton.commands.check import tf32
from lstm_triton.reference import lstm_layer
from lstm_triton.scan import cell, planner
from lstm_triton.scan.cell import step
from lstm_triton.scan.planner import CellPlan
from lstm_triton.scan.products import matmul_precision
from lstm_triton.target import Device

from .comparing import assert_as_accurate, assert_same, floor_of, nudged
from .kernel_cases import DTYPES

Z = torch.zeros
interpreted = pytest.mark.interpreted


def twins(*args: Any, **kwargs: Any) -> tuple[lstm_triton.LSTMCell, nn.LSTMCell]:
    """Ours and PyTorch's, made from the same seed."""
    cells = []
    for cls in (lstm_triton.LSTMCell, nn.LSTMCell):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            cells.append(cls(*args, **kwargs))
    return cells[0], cells[1]


def run(cell: nn.Module, *tensors: Tensor) -> dict[str, Tensor]:
    """Results and gradients of one step by name, given (input,) or (input, h, c); what flows back is random."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    cell.zero_grad()
    results = cell(leaves[0], tuple(leaves[1:]) or None)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator).bfloat16().to(r.device, r.dtype) for r in results]
    torch.autograd.backward(results, grads)
    found = dict(zip(("h_1", "c_1"), results, strict=True))
    named = {**dict(zip(("input", "h_0", "c_0"), leaves, strict=False)), **dict(cell.named_parameters())}
    found |= {f"gradient of {name}": leaf.grad for name, leaf in named.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def arguments(batch_size: int, input_size: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """(input, h, c)"""
    generator = torch.Generator().manual_seed(hidden_size)
    sizes = (input_size, hidden_size, hidden_size)
    return [torch.randn(batch_size, size, generator=generator).to(dtype) for size in sizes]


# --- A drop-in, on the CPU bit by bit ---


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dtype": torch.float64}])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (0,)], ids=str)
@pytest.mark.parametrize("states", [True, False], ids=["states", "zeros"])
def test_results_and_gradients(options: dict[str, Any], batch: tuple[int, ...], states: bool) -> None:
    ours, stock = twins(3, 5, **options)
    dtype = options.get("dtype", torch.float32)
    tensors = [torch.randn(*batch, size, dtype=dtype) for size in ((3, 5, 5) if states else (3,))]
    assert_same(run(ours, *tensors), run(stock, *tensors))


def test_a_module_like_nn_lstm_cell() -> None:
    for options in ({}, {"bias": False}, {"dtype": torch.float64}, {"device": "meta"}):
        ours, stock = twins(3, 5, **options)
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
    ours, stock = twins(3, 5)
    assert refusal(ours, *args) == refusal(stock, *args)


@interpreted
@pytest.mark.parametrize(
    "name", [name for name in REFUSED if "dtype" not in name and name not in ("integers", "device")]
)
def test_errors_before_the_kernel(name: str) -> None:
    """A wrong size is refused in nn.LSTMCell's words also where the kernel would take the call, and by explain."""
    ours, stock = twins(3, 5)
    expected = refusal(stock, *REFUSED[name])
    with interpreter.interpret():
        assert refusal(ours, *REFUSED[name]) == expected
        assert refusal(lstm_triton.explain, ours, *REFUSED[name]) == expected


def test_weights_of_another_size_are_left_to_pytorch() -> None:
    ours, stock = twins(3, 5)
    for each in (ours, stock):
        each.weight_hh = nn.Parameter(torch.zeros(20, 6))
    assert refusal(ours, Z(2, 3)) == refusal(stock, Z(2, 3))


def test_copies() -> None:
    ours, stock = twins(3, 5)
    tensors = arguments(2, 3, 5)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.double().float()):
        assert_same(run(other, *tensors), run(stock, *tensors))


def test_autocast() -> None:
    ours, stock = twins(3, 5)
    tensors = arguments(2, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(ours, *tensors), run(stock, *tensors))


def test_compiled_without_kernels() -> None:
    ours, stock = twins(3, 5)
    tensors = arguments(2, 3, 5)
    ours.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(ours, *tensors), run(stock, *tensors))


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
    assert (forward.kind, forward.plan) == ("cell", cell.plan_of_cell(Z(2, 3), 5, "matmul"))
    assert (backward.kind, backward.plan) == ("cell backward", None)
    assert str(explanation).splitlines()[-3:] == [
        "launch 1: cell: 2 programs of 4 warps (tiles of 8 rows x 4 units)",
        "launch 2: cell backward",
        "launches in all: 2",
    ]


def test_a_plan_for_every_size() -> None:
    """Tiles that Triton takes, covering all rows and units, in the shared memory set aside for them."""
    devices = [Device("", "sm_80", 108, 166912), Device("", "sm_86", 82, 101376), Device("", "sm_90", 132, 232448)]
    for device in devices:
        for dtype in DTYPES:
            for batch_size in (1, 8, 9, 100, 100_000):
                for hidden_size in (1, 5, 64, 1000, 20_000):
                    plan = planner.plan_cell(
                        batch_size=batch_size, input_size=hidden_size + 3, hidden_size=hidden_size, dtype=dtype,
                        device=device, allow_tf32=False,
                    )  # fmt: skip
                    for size in (plan.block_batch, plan.block_hidden, plan.block_k, plan.block_input):
                        assert size & (size - 1) == 0
                    assert plan.block_k >= 16 <= plan.block_input
                    assert 4 * plan.block_hidden >= 16
                    tiles = -(-batch_size // plan.block_batch) * -(-hidden_size // plan.block_hidden)
                    assert plan.programs == tiles < 2**31
                    rows = 4 * plan.block_hidden + plan.block_batch
                    bytes_under_way = plan.num_stages * rows * max(plan.block_k, plan.block_input) * dtype.itemsize
                    assert bytes_under_way <= planner.CELL_TILE_BYTES
                    if batch_size * hidden_size >= 64 * 1000:
                        assert plan.programs >= device.multiprocessors


# --- The kernels, interpreted ---


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that are launched."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    interpreter._install()
    plain = InterpretedFunction.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    return names


def check(tensors: list[Tensor], hidden_size: int, bias: bool = True, seed: int = 0) -> None:
    """The kernels are as accurate as nn.LSTMCell, in results and gradients."""
    ours, stock = twins(tensors[0].shape[-1], hidden_size, bias=bias, dtype=tensors[0].dtype)
    with interpreter.interpret(seed), lstm_triton.backend("triton"):
        actual = run(ours, *tensors)
    assert_cell_as_accurate(actual, stock, *tensors)


def assert_cell_as_accurate(actual: dict[str, Tensor], stock: nn.LSTMCell, *tensors: Tensor) -> None:
    """`assert_as_accurate` for every entry of `run(cell, *tensors)`, given the nn.LSTMCell of the same weights."""

    def in_float64(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        cell = copy.deepcopy(stock).double()
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.copy_(change(parameter))
        return run(cell, *(change(tensor.double()) for tensor in tensors))

    expected, reference = run(stock, *tensors), in_float64(lambda tensor: tensor)
    dtype = tensors[0].dtype
    sensitive = in_float64(lambda tensor: nudged(tensor, dtype))
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        floor = floor_of(sensitive[name], reference[name], dtype)
        assert_as_accurate(tensor, reference[name], expected[name], floor=floor, name=name)


@interpreted
@settings(max_examples=10)
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 50)),
    dtype=st.sampled_from(DTYPES),
    states=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_sizes(sizes: tuple[int, int, int], dtype: torch.dtype, states: bool, bias: bool, seed: int) -> None:
    tensors = arguments(*sizes, dtype)
    check(tensors if states else tensors[:1], sizes[2], bias, seed)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (70, 33, 37), (9, 140, 67)], ids=str)
def test_odd_sizes(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """More rows than a tile, and more columns than a chunk."""
    check(arguments(*sizes, dtype), sizes[2])


@interpreted
@pytest.mark.parametrize("hidden_size", [3, 32])
def test_tiles_of_every_height_and_width(hidden_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for block_batch, block_hidden, block in ((8, 32, 16), (32, 8, 32), (64, 4, 128)):
        programs = -(-40 // block_batch) * -(-hidden_size // block_hidden)
        plan = CellPlan(block_batch, block_hidden, programs, block, block, "ieee", "", 2, 4)
        monkeypatch.setattr(cell, "plan_of_cell", lambda *_, plan=plan: plan)
        check(arguments(40, 20, hidden_size), hidden_size)


@interpreted
def test_one_launch_each_way(launches: list[str]) -> None:
    cell = lstm_triton.LSTMCell(3, 5)
    with interpreter.interpret():
        with torch.no_grad():
            cell(Z(2, 3), (Z(2, 5), Z(2, 5)))
            assert launches == ["cell_forward"]
        run(cell, *arguments(2, 3, 5))
    assert launches[1:] == ["cell_forward", "cell_backward"]


@interpreted
def test_float32_is_as_precise_as_what_it_stands_in_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.LSTMCell multiplies as torch.matmul does, nn.LSTM as cuDNN's LSTM may."""
    asked: list[bool] = []
    plain = planner.plan_cell

    def recorded(allow_tf32: bool, **sizes: Any) -> CellPlan:
        asked.append(allow_tf32)
        return plain(allow_tf32=allow_tf32, **sizes)

    monkeypatch.setattr(planner, "plan_cell", recorded)
    with interpreter.interpret(), torch.no_grad():
        for cudnn in (True, False):
            with tf32(cudnn):
                lstm_triton.LSTMCell(3, 5)(Z(2, 3))
                lstm_triton.LSTM(3, 5)(Z(1, 2, 3))
        with matmul_precision("tf32"):
            lstm_triton.LSTMCell(3, 5)(Z(2, 3))
    assert asked == [False, True, False, False, True]


@interpreted
def test_arguments_of_any_strides() -> None:
    spaced = [torch.randn(4, 2 * size)[:, ::2] for size in (6, 20, 20)]
    transposed = [torch.randn(size, 4).t() for size in (6, 20, 20)]
    rows = [torch.randn(4, 3, size)[:, 1] for size in (6, 20, 20)]
    expanded = [torch.randn(1, size).expand(4, size) for size in (6, 20, 20)]
    ours, _ = twins(6, 20)
    with torch.no_grad():
        ours.weight_ih.set_(ours.weight_ih.t().contiguous().t())
        ours.weight_hh.set_(ours.weight_hh.t().contiguous().t())
    plain = lstm_triton.LSTMCell(6, 20)
    plain.load_state_dict({name: weight.contiguous() for name, weight in ours.state_dict().items()})
    with interpreter.interpret():
        for tensors in (spaced, transposed, rows, expanded):
            actual, expected = run(ours, *tensors), run(plain, *(tensor.contiguous() for tensor in tensors))
            torch.testing.assert_close(actual, expected)
            assert torch.equal(actual["h_1"], expected["h_1"])


@interpreted
def test_offsets_beyond_32_bits() -> None:
    """Two rows that lie more than 2^31 elements apart, in memory of which only the touched pages exist."""
    stride = 2**31 + 16
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (stride + 64)), dtype=torch.float16)
    far = memory.as_strided((2, 16), (stride, 1))
    cell = lstm_triton.LSTMCell(16, 20, dtype=torch.float16)
    with interpreter.interpret(), torch.no_grad():
        far.copy_(torch.randn(2, 16))
        assert_same(cell(far), cell(far.contiguous()))


@interpreted
def test_unbatched() -> None:
    ours, stock = twins(3, 20)
    tensors = [torch.randn(size) for size in (3, 20, 20)]
    with interpreter.interpret(), lstm_triton.backend("triton"):
        torch.testing.assert_close(run(ours, *tensors), run(stock, *tensors))
        torch.testing.assert_close(run(ours, *tensors[:1]), run(stock, *tensors[:1]))


@interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "h", "c"])
def test_values_that_are_no_numbers(which: int, value: float) -> None:
    """They reach exactly what they reach in nn.LSTMCell: their row."""
    ours, stock = twins(3, 20)
    tensors = arguments(4, 3, 20)
    tensors[which][2, 1] = value
    with interpreter.interpret(), torch.no_grad():
        actual = ours(tensors[0], (tensors[1], tensors[2]))
    for one, other in zip(actual, stock(tensors[0], (tensors[1], tensors[2])), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@interpreted
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3, 4), (5,), (6,)], ids=str)
def test_only_what_is_asked_for_gets_gradients(wanted: tuple[int, ...]) -> None:
    tensors = [*arguments(3, 4, 20), *(weight.detach() for weight in twins(4, 20)[1].parameters())]
    found = []
    for function in (step, lambda input, *others: lstm_layer(input.unsqueeze(0), *others)[1:]):
        leaves = [tensor.detach().requires_grad_(at in wanted) for at, tensor in enumerate(tensors)]
        with interpreter.interpret():
            h, c = function(*leaves)
            (h.sum() + c.square().sum()).backward()
        assert [leaf.grad is not None for leaf in leaves] == [at in wanted for at in range(7)]
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(found[0], found[1])


@interpreted
@pytest.mark.parametrize("used", [0, 1], ids=["h", "c"])
def test_a_loss_on_one_result_alone(used: int) -> None:
    ours, stock = twins(3, 20)
    gradients = []
    for each in (ours, stock):
        with interpreter.interpret():
            each(*arguments(2, 3, 20)[:1])[used].square().sum().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@interpreted
def test_second_derivatives_are_right() -> None:
    tensors = [*arguments(3, 4, 20), *(weight.detach() for weight in twins(4, 20)[1].parameters())]

    def penalty(function: Callable[..., Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        h, c = function(*leaves)
        grads = torch.autograd.grad(h.square().sum() + (h * c).sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([grad.square().sum() for grad in grads]).sum(), leaves)

    with interpreter.interpret():
        actual = penalty(step, torch.float32)
    expected = penalty(lambda input, *others: lstm_layer(input.unsqueeze(0), *others)[1:], torch.float64)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@interpreted
def test_changing_c_in_place_is_noticed() -> None:
    with interpreter.interpret():
        _, c = lstm_triton.LSTMCell(3, 20)(torch.randn(2, 3))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            c.mul_(2).sum().backward()


@interpreted
def test_autocast_with_kernels() -> None:
    """Everything is computed in autocast's dtype; gradients are of the parameters' own."""
    ours, _ = twins(3, 20)
    tensors = arguments(2, 3, 20)
    with interpreter.interpret(), torch.autocast("cpu", torch.bfloat16):
        actual = run(ours, *tensors)
        lower = copy.deepcopy(ours).bfloat16()
        with torch.autocast("cpu", enabled=False):
            expected = run(lower, *(tensor.bfloat16() for tensor in tensors))
    for name, tensor in actual.items():
        assert tensor.dtype == (torch.float32 if "gradient" in name else torch.bfloat16), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@interpreted
def test_compiled_with_kernels() -> None:
    ours, stock = twins(3, 20)
    tensors = arguments(2, 3, 20)
    expected = run(stock, *tensors)
    ours.compile(fullgraph=True, backend="aot_eager")
    with interpreter.interpret():
        torch.testing.assert_close(run(ours, *tensors), expected)


@interpreted
@pytest.mark.parametrize("states", [True, False], ids=["states", "zeros"])
def test_operators(states: bool) -> None:
    input, h, c = arguments(3, 4, 20)
    weights = [weight.detach() for weight in twins(4, 20)[1].parameters()]
    state = (h, c) if states else (None, None)
    with interpreter.interpret():
        for keep_gates in (True, False):
            sample = (input, *state, *weights, keep_gates, "matmul")
            torch.library.opcheck(torch.ops.lstm_triton.cell_forward, sample)
        _, c_1, gates = cell.cell_forward(input, *state, *weights, True, "matmul")
        torch.library.opcheck(torch.ops.lstm_triton.cell_backward, (h, c, state[1], c_1, gates))
        stacked = [each.expand(2, -1, -1).contiguous() for each in state] if states else state
        torch.library.opcheck(torch.ops.lstm_triton.single_step, (input, *stacked, weights * 2, 2, True))


# --- torch.func ---


PATHS = [pytest.param(nullcontext, id="fallback"), pytest.param(interpreter.interpret, id="kernels", marks=interpreted)]


def loss_and_plain(bias: bool = True) -> tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Tensor]]:
    """The loss of a step of a cell given its weights, the same by the formula, and the weights."""
    cell, _ = twins(3, 8, bias=bias)

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
    ours, stock = twins(3, 8)
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


# --- The cell and the layer ---


@interpreted
def test_a_loop_of_cells_is_a_layer() -> None:
    torch.manual_seed(0)
    layer, cell = lstm_triton.LSTM(6, 20), lstm_triton.LSTMCell(6, 20)
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in layer.state_dict().items()})
    input, hx = torch.randn(5, 3, 6), None
    with interpreter.interpret(), lstm_triton.backend("triton"):
        output, (h_n, c_n) = layer(input)
        outputs = []
        for each in input:
            hx = cell(each, hx)
            outputs.append(hx[0])
        torch.testing.assert_close(torch.stack(outputs), output)
        torch.testing.assert_close(hx, (h_n[0], c_n[0]))
        gradients = [torch.autograd.grad(r.square().sum(), list(m.parameters())) for r, m in
                     ((output, layer), (torch.stack(outputs), cell))]  # fmt: skip
    torch.testing.assert_close(gradients[0], gradients[1])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_steps_of_a_layer(dtype: torch.dtype, launches: list[str]) -> None:
    """Without gradients, one cell launch a layer and direction; as accurate as the scan would be."""
    torch.manual_seed(0)
    ours = lstm_triton.LSTM(6, 20, num_layers=2, bidirectional=True, dtype=dtype)
    stock = nn.LSTM(6, 20, num_layers=2, bidirectional=True, dtype=dtype)
    stock.load_state_dict(ours.state_dict())
    input = torch.randn(1, 3, 6).to(dtype)
    states = tuple(torch.randn(4, 3, 20).to(dtype) for _ in range(2))
    exact = [state.double() for state in states]
    for hx, reference in ((None, None), (states, exact)):
        launches.clear()
        with interpreter.interpret(), lstm_triton.backend("triton"), torch.no_grad():
            output, (h_n, c_n) = ours(input, hx)
        assert launches == ["cell_forward"] * 4
        with torch.no_grad():
            expected, (h, c) = stock(input, hx)
            correct, (right_h, right_c) = copy.deepcopy(stock).double()(input.double(), reference)
        assert_as_accurate(output, correct, expected)
        assert_as_accurate(h_n, right_h, h)
        assert_as_accurate(c_n, right_c, c)
        assert output.data_ptr() != h_n.data_ptr()


@interpreted
def test_single_steps_under_vmap() -> None:
    module, input = lstm_triton.LSTM(6, 20, num_layers=2), torch.randn(3, 1, 2, 6)
    with interpreter.interpret(), lstm_triton.backend("triton"), torch.no_grad():
        output, (h_n, c_n) = torch.func.vmap(module)(input)
        expected = [module(each) for each in input]
    for entry, (one_output, states) in enumerate(expected):
        torch.testing.assert_close((output[entry], (h_n[entry], c_n[entry])), (one_output, states))


@interpreted
def test_which_steps_take_the_cell(launches: list[str]) -> None:
    lstm, input = lstm_triton.LSTM(6, 20), torch.randn(2, 3, 6)
    with interpreter.interpret(), lstm_triton.backend("triton"):
        lstm(input[:1])  # will need gradients
        with torch.inference_mode():
            lstm(input)
            lstm(input[:1], lengths=torch.tensor([1, 0, 1]))
            assert "cell_forward" not in launches
            output, (_, c_n), cells = lstm.with_cells(input[:1])
            assert launches[-1] == "cell_forward"
    assert torch.equal(cells, c_n.unsqueeze(1))
    assert output.shape == (1, 3, 20)

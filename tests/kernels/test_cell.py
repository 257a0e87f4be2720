"""The kernels of lstm_triton.LSTMCell, interpreted, against float64, and single steps of a layer, which take them."""

import copy
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lstm_triton
from lstm_triton import interpreter
from lstm_triton.commands.check import tf32
from lstm_triton.reference import lstm_layer
from lstm_triton.scan import cell, planner
from lstm_triton.scan.plan import CellPlan
from lstm_triton.scan.products import MatmulPrecision
from lstm_triton.scan.step import step
from lstm_triton.target import Device
from tests.support.cells import cell_arguments, cell_twins, check_cell, run_cell
from tests.support.comparing import assert_as_accurate, assert_same
from tests.support.lanes import DTYPES
from tests.support.launches import Launches, recorded_launches

Z = torch.zeros
interpreted = pytest.mark.interpreted


@pytest.fixture
def launches() -> Iterator[Launches]:
    """What is launched."""
    with recorded_launches() as found:
        yield found


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
    tensors = cell_arguments(*sizes, dtype)
    check_cell(tensors if states else tensors[:1], sizes[2], bias, seed)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (70, 33, 37), (9, 140, 67)], ids=str)
def test_odd_sizes(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """More rows than a tile, and more columns than a chunk."""
    check_cell(cell_arguments(*sizes, dtype), sizes[2])


@interpreted
@pytest.mark.parametrize("hidden_size", [3, 32])
def test_tiles_of_every_height_and_width(hidden_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for block_batch, block_hidden, block in ((8, 32, 16), (32, 8, 32), (64, 4, 128)):
        programs = -(-40 // block_batch) * -(-hidden_size // block_hidden)
        plan = CellPlan(block_batch, block_hidden, programs, block, block, "ieee", "", 2, 4)
        monkeypatch.setattr(cell, "plan_of_cell", lambda *_, plan=plan: plan)
        check_cell(cell_arguments(40, 20, hidden_size), hidden_size)


@interpreted
def test_one_launch_each_way(launches: Launches) -> None:
    cell = lstm_triton.LSTMCell(3, 5)
    with interpreter.interpret():
        with torch.no_grad():
            cell(Z(2, 3), (Z(2, 5), Z(2, 5)))
            assert launches.kernels == ["cell_forward"]
        run_cell(cell, *cell_arguments(2, 3, 5))
    assert launches.kernels[1:] == ["cell_forward", "cell_backward"]


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
        with MatmulPrecision("tf32"):
            lstm_triton.LSTMCell(3, 5)(Z(2, 3))
    assert asked == [False, True, False, False, True]


@interpreted
def test_arguments_of_any_strides() -> None:
    spaced = [torch.randn(4, 2 * size)[:, ::2] for size in (6, 20, 20)]
    transposed = [torch.randn(size, 4).t() for size in (6, 20, 20)]
    rows = [torch.randn(4, 3, size)[:, 1] for size in (6, 20, 20)]
    expanded = [torch.randn(1, size).expand(4, size) for size in (6, 20, 20)]
    ours, _ = cell_twins(6, 20)
    with torch.no_grad():
        ours.weight_ih.set_(ours.weight_ih.t().contiguous().t())
        ours.weight_hh.set_(ours.weight_hh.t().contiguous().t())
    plain = lstm_triton.LSTMCell(6, 20)
    plain.load_state_dict({name: weight.contiguous() for name, weight in ours.state_dict().items()})
    with interpreter.interpret():
        for tensors in (spaced, transposed, rows, expanded):
            actual, expected = run_cell(ours, *tensors), run_cell(plain, *(tensor.contiguous() for tensor in tensors))
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
    ours, stock = cell_twins(3, 20)
    tensors = [torch.randn(size) for size in (3, 20, 20)]
    with interpreter.interpret(), lstm_triton.backend("triton"):
        torch.testing.assert_close(run_cell(ours, *tensors), run_cell(stock, *tensors))
        torch.testing.assert_close(run_cell(ours, *tensors[:1]), run_cell(stock, *tensors[:1]))


@interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "h", "c"])
def test_values_that_are_no_numbers(which: int, value: float) -> None:
    """They reach exactly what they reach in nn.LSTMCell: their row."""
    ours, stock = cell_twins(3, 20)
    tensors = cell_arguments(4, 3, 20)
    tensors[which][2, 1] = value
    with interpreter.interpret(), torch.no_grad():
        actual = ours(tensors[0], (tensors[1], tensors[2]))
    for one, other in zip(actual, stock(tensors[0], (tensors[1], tensors[2])), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@interpreted
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3, 4), (5,), (6,)], ids=str)
def test_only_what_is_asked_for_gets_gradients(wanted: tuple[int, ...]) -> None:
    tensors = [*cell_arguments(3, 4, 20), *(weight.detach() for weight in cell_twins(4, 20)[1].parameters())]
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
    ours, stock = cell_twins(3, 20)
    gradients = []
    for each in (ours, stock):
        with interpreter.interpret():
            each(*cell_arguments(2, 3, 20)[:1])[used].square().sum().backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@interpreted
def test_second_derivatives_are_right() -> None:
    tensors = [*cell_arguments(3, 4, 20), *(weight.detach() for weight in cell_twins(4, 20)[1].parameters())]

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
    ours, _ = cell_twins(3, 20)
    tensors = cell_arguments(2, 3, 20)
    with interpreter.interpret(), torch.autocast("cpu", torch.bfloat16):
        actual = run_cell(ours, *tensors)
        lower = copy.deepcopy(ours).bfloat16()
        with torch.autocast("cpu", enabled=False):
            expected = run_cell(lower, *(tensor.bfloat16() for tensor in tensors))
    for name, tensor in actual.items():
        assert tensor.dtype == (torch.float32 if "gradient" in name else torch.bfloat16), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@interpreted
def test_compiled_with_kernels() -> None:
    ours, stock = cell_twins(3, 20)
    tensors = cell_arguments(2, 3, 20)
    expected = run_cell(stock, *tensors)
    ours.compile(fullgraph=True, backend="aot_eager")
    with interpreter.interpret():
        torch.testing.assert_close(run_cell(ours, *tensors), expected)


@interpreted
@pytest.mark.parametrize("states", [True, False], ids=["states", "zeros"])
def test_operators(states: bool) -> None:
    input, h, c = cell_arguments(3, 4, 20)
    weights = [weight.detach() for weight in cell_twins(4, 20)[1].parameters()]
    state = (h, c) if states else (None, None)
    with interpreter.interpret():
        for keep_gates in (True, False):
            sample = (input, *state, *weights, keep_gates, "matmul")
            torch.library.opcheck(torch.ops.lstm_triton.cell_forward, sample)
        _, c_1, gates = cell.cell_forward(input, *state, *weights, True, "matmul")
        torch.library.opcheck(torch.ops.lstm_triton.cell_backward, (h, c, state[1], c_1, gates))
        stacked = [each.expand(2, -1, -1).contiguous() for each in state] if states else state
        torch.library.opcheck(torch.ops.lstm_triton.single_step, (input, *stacked, weights * 2, 2, True))


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
def test_single_steps_of_a_layer(dtype: torch.dtype, launches: Launches) -> None:
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
        assert launches.kernels == ["cell_forward"] * 4
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
def test_which_steps_take_the_cell(launches: Launches) -> None:
    lstm, input = lstm_triton.LSTM(6, 20), torch.randn(2, 3, 6)
    with interpreter.interpret(), lstm_triton.backend("triton"):
        lstm(input[:1])  # will need gradients
        with torch.inference_mode():
            lstm(input)
            lstm(input[:1], lengths=torch.tensor([1, 0, 1]))
            assert "cell_forward" not in launches.kernels
            output, (_, c_n), cells = lstm.with_cells(input[:1])
            assert launches.kernels[-1] == "cell_forward"
    assert torch.equal(cells, c_n.unsqueeze(1))
    assert output.shape == (1, 3, 20)

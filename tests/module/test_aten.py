"""PyTorch's own LSTM function as one operator, through which torch.compile sees the path without kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_triton
from lstm_triton import reference
from lstm_triton.aten import lane, operator
from lstm_triton.ragged import dense
from tests.support.comparing import assert_same, run, stock_in_autocast
from tests.support.lanes import as_layer

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def arguments(bias: bool = True, projected: bool = False) -> list[Tensor | None]:
    """input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr; T=5, B=2, I=3, H=4, P=2 or 4."""
    output_size = 2 if projected else 4
    sizes = [(5, 2, 3), (2, output_size), (2, 4), (16, 3), (16, output_size), (16,), (16,), (2, 4)]
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor | None] = [
        torch.randn(size, dtype=torch.float64, generator=generator, requires_grad=True) for size in sizes
    ]
    if not bias:
        tensors[5:7] = [None, None]
    return tensors if projected else tensors[:7]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_layer_is_the_reference_layer(reverse: bool, bias: bool, states: bool) -> None:
    tensors = arguments(bias)
    if not states:
        tensors[1:3] = [None, None]
    leaves = [tensor for tensor in tensors if tensor is not None]
    results, gradients = [], []
    for scan_layer in (as_layer(operator.operator_lane), reference.lstm_layer):
        results.append(scan_layer(*tensors, reverse=reverse))
        loss = sum(result.square().sum() for result in results[-1])
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 5])], ids=["all steps", "lengths"])
@pytest.mark.parametrize("projected", [False, True])
def test_layer_that_starts_anew_is_the_reference_layer(reverse: bool, lengths: Tensor | None, projected: bool) -> None:
    input, *others = arguments(projected=projected)
    others[0:0] = [input.flatten(0, 1)]
    output_size = 2 if projected else 4
    reset = [torch.randn(2, size, dtype=torch.float64, requires_grad=True) for size in (output_size, 4)]
    resets = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [0, 0]]).bool()
    ragged = dense(lengths, resets, 5, 2, torch.device("cpu"))
    for states in ({}, {"h_reset": reset[0], "c_reset": reset[1]}):
        leaves, results, gradients = [input, *others[1:], *(reset if states else ())], [], []
        for scan_layer in (as_layer(lane.native_lane), reference.lstm_layer):
            results.append(scan_layer(*others, reverse=reverse, ragged=ragged, **states))
            loss = sum(result.square().sum() for result in results[-1])
            gradients.append(torch.autograd.grad(loss, leaves))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*gradients)


def test_second_derivative_is_refused() -> None:
    tensors = arguments()
    output, _, _ = as_layer(operator.operator_lane)(*tensors, reverse=False)
    (gradient,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_operator_is_what_pytorch_expects(reverse: bool, projected: bool) -> None:
    tensors = arguments(projected=projected)
    weight_hr = () if projected else (None,)
    lengths, resets = torch.tensor([3, 0]), torch.arange(10).view(5, 2) % 3 == 0
    input, *others = tensors
    for ragged in (None, dense(lengths, resets, 5, 2, torch.device("cpu"))):
        rows = input if ragged is None else input.detach().flatten(0, 1).requires_grad_()
        reset, tables = (None, None), ragged or (None,) * 4
        for return_cells in (False, True):
            given = (rows, *others, *weight_hr, *reset, *tables, reverse, return_cells)
            torch.library.opcheck(torch.ops.lstm_triton.aten_layer, given)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"num_layers": 2, "proj_size": 2, "bias": False},
    ],
    ids=str,
)
def test_compiled_in_one_graph(options: dict[str, Any]) -> None:
    """Twice at most for inputs of any length: once for the first, once for all others."""
    ours, stock = lstm_triton.LSTM(3, 4, **options), nn.LSTM(3, 4, **options)
    ours.load_state_dict(stock.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for size in (5, 6, 7, 8):
        input = torch.randn(size, size, 3)  # no gradient: PyTorch alone would fail here
        results = []
        for module in (compiled, stock):
            module.zero_grad()
            output, (h_n, c_n) = module(input)
            (output.square().sum() + h_n.sum() + c_n.sin().sum()).backward()
            results.append((output, h_n, c_n, [parameter.grad for parameter in module.parameters()]))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


def test_compiled_with_states_autocast_and_dropout() -> None:
    ours, stock = lstm_triton.LSTM(3, 4, num_layers=2, dropout=1.0), nn.LSTM(3, 4, num_layers=2, dropout=1.0)
    ours.load_state_dict(stock.state_dict())
    input, hx = torch.randn(5, 2, 3), (torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    expected = run(stock, input, hx)
    expected_in_bfloat16 = stock_in_autocast(stock, input, hx)
    ours.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(ours, input, hx), expected)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = run(ours, input, hx), expected_in_bfloat16
    torch.testing.assert_close(actual, expected)
    assert actual["output"].dtype == torch.bfloat16


@pytest.mark.parametrize("hx", [None, (torch.randn(1, 2, 4), torch.randn(1, 2, 4))], ids=["zeros", "states"])
def test_compiled_with_packed_input(hx: tuple[Tensor, Tensor] | None) -> None:
    """As with nn.LSTM, at the price of a graph break."""
    ours = lstm_triton.LSTM(3, 4)
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([3, 5]), enforce_sorted=False)
    expected = run(ours, packed, hx)
    ours.compile(backend="eager")
    assert_same(run(ours, packed, hx), expected)


def test_exported_program_needs_only_pytorch() -> None:
    ours = lstm_triton.LSTM(3, 4, num_layers=2)
    input = torch.randn(5, 2, 3)
    exported = torch.export.export(ours, (input,))
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "aten.lstm.input" in operators
    assert not any("lstm_triton" in operator for operator in operators)
    assert_same(exported.module()(input), ours(input))


def test_backend_chosen_inside_and_outside() -> None:
    ours, input = lstm_triton.LSTM(3, 4), torch.randn(5, 2, 3)

    @torch.compile(fullgraph=True, backend="eager")
    def on_aten(input: Tensor) -> Tensor:
        with lstm_triton.backend("aten"):
            return ours(input)[0]

    with torch.no_grad():  # as inside an operator: what is kept for backward may be rounded differently
        expected = ours(input)[0]
    assert_same(on_aten(input), expected)
    compiled = torch.compile(ours, backend="eager")
    compiled(input)
    with lstm_triton.backend("triton"), pytest.raises(RuntimeError, match="the kernels run on NVIDIA GPUs"):
        compiled(input)  # what was compiled for another backend is not used
    with torch.no_grad():  # what raised is not compiled any more
        assert_same(compiled(input)[0], expected)

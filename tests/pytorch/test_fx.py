"""torch.fx: layers are leaves of a graph, as those of torch.nn are."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lstm_triton


class Model(nn.Module):
    """Layers as attributes, in a list, with states, called twice; of PyTorch or of this library."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, 4)
        self.lstm = library.LSTM(4, 5, num_layers=2)
        self.others = nn.ModuleList(library.LSTM(5, 5) for _ in range(2))
        self.cell = library.LSTMCell(5, 5)

    def forward(self, input: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        output, (h, c) = self.lstm(self.embedding(input), hx=(h, c))
        for other in self.others:
            output, _ = other(output)
        h, c = self.cell(output[-1], [h[0], c[0]])
        h, c = self.cell(h)
        return output, h, c


def arguments() -> tuple[Tensor, ...]:
    return torch.randn(4, 2, 3), torch.randn(2, 2, 5), torch.randn(2, 2, 5)


def test_the_graph_is_that_of_torch_nn() -> None:
    model = Model(lstm_triton)
    ours, stock = fx.symbolic_trace(model), fx.symbolic_trace(Model(nn))
    assert str(ours.graph) == str(stock.graph)
    ours.graph.lint()
    given = arguments()
    torch.testing.assert_close(ours(*given), model(*given))
    alone, input = fx.symbolic_trace(nn.Sequential(model.lstm)), torch.randn(2, 2, 4)
    torch.testing.assert_close(alone(input), model.lstm(input))


def test_what_torch_fx_does_with_a_graph() -> None:
    """Copies, pickles, interpreters, transformers and shapes."""
    model, given = Model(lstm_triton), arguments()
    graph = fx.symbolic_trace(model)
    fx.passes.shape_prop.ShapeProp(graph).propagate(*given)
    for changed in (
        copy.deepcopy(graph),
        pickle.loads(pickle.dumps(graph)),
        fx.Transformer(graph).transform(),
        fx.symbolic_trace(graph),
        fx.Interpreter(graph).run,
    ):
        torch.testing.assert_close(changed(*given), model(*given))


@pytest.mark.parametrize("given", ["lengths", "resets", "hx", "reset_state"])
def test_a_proxy_in_any_argument(given: str) -> None:
    """Also if the input is a parameter, whose values must not become a part of the graph."""

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.table = lstm_triton.LSTM(2, 3), nn.Parameter(torch.randn(4, 2, 2))
            self.register_buffer("resets", torch.rand(4, 2) < 0.5)

        def forward(self, value: Any) -> Tensor:
            options = {given: (value, value) if given in ("hx", "reset_state") else value}
            if given == "reset_state":
                options["resets"] = self.resets
            return self.lstm(self.table, **options)[0]

    values = {"lengths": torch.tensor([3, 1]), "resets": torch.rand(4, 2) < 0.5}
    value = values.get(given, torch.randn(1, 2, 3))
    module = Called()
    graph = fx.symbolic_trace(module)
    with torch.no_grad():
        module.table.mul_(2)
    torch.testing.assert_close(graph(value), module(value))


def test_hooks_and_subclasses_run_when_the_graph_runs() -> None:
    class Doubled(lstm_triton.LSTM):
        def forward(self, input: Tensor) -> Any:
            return super().forward(2 * input)

    normed = nn.utils.parametrizations.weight_norm(lstm_triton.LSTM(2, 2), "weight_hh_l0")
    for layer in (Doubled(2, 2), normed, lstm_triton.LSTMCell(2, 2)):
        calls: list[Any] = []
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        layer.register_forward_hook(lambda module, args, results, calls=calls: calls.append(results))
        model = nn.Sequential(layer)
        graph = fx.symbolic_trace(model)
        assert not calls
        input = torch.randn(3, 2)
        torch.testing.assert_close(graph(input), model(input))
        assert len(calls) == 2


def test_a_layer_alone_is_no_leaf() -> None:
    """As nn.LSTM: torch.fx wants to trace through its root."""
    for layer in (nn.LSTM(2, 3), lstm_triton.LSTM(2, 3), lstm_triton.LSTMCell(2, 3)):
        with pytest.raises(fx.proxy.TraceError):
            fx.symbolic_trace(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantization_in_graph_mode() -> None:
    """It quantizes what is around the layer, and leaves the layer."""
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.lstm, self.after = nn.Linear(3, 4), lstm_triton.LSTM(4, 5), nn.Linear(5, 1)

        def forward(self, input: Tensor) -> Tensor:
            output, _ = self.lstm(self.before(input))
            return self.after(output)

    model, input = Regressor().eval(), torch.randn(4, 2, 3)
    prepared = quantize.prepare_fx(model, get_default_qconfig_mapping(), (input,))
    prepared(input)
    quantized = quantize.convert_fx(prepared)
    assert type(quantized.lstm) is lstm_triton.LSTM
    torch.testing.assert_close(quantized(input), model(input), rtol=0.2, atol=0.2)

"""Whole models turned back into PyTorch's own layers, for tools that look for these."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lstm_triton
from tests.support.comparing import assert_same, run


class Speller(nn.Module):
    """Two LSTMs, one of them at two places, tied weights, a frozen one, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = lstm_triton.LSTM(3, 4, num_layers=2, dropout=0.5, memory="low")
        self.decoders = nn.ModuleList([lstm_triton.LSTM(4, 4), nn.Linear(4, 4)])
        self.decoders.append(self.decoders[0])
        self.step = lstm_triton.LSTMCell(4, 4)
        self.decoders[0].weight_hh_l0 = self.encoder.weight_hh_l0
        self.encoder.bias_ih_l0.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        hidden, _ = self.encoder(input)
        hidden, _ = self.decoders[0](hidden)
        return self.step(self.decoders[1](hidden)[-1])[0]


def speller() -> Speller:
    torch.manual_seed(0)
    return Speller()


def results_of(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    output = model(torch.ones(5, 2, 3))
    output.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"output": output.detach()} | gradients


def test_every_layer_is_restored_and_keeps_all_it_has() -> None:
    model, untouched = speller(), speller()
    record: list[Any] = []
    model.encoder.register_forward_hook(lambda module, *_: record.append(type(module)))
    model.step.eval()
    parameters, encoder = dict(model.named_parameters()), model.encoder
    restoration = lstm_triton.to_torch(model)
    assert [entry.names for entry in restoration.restored] == [("encoder",), ("decoders.0", "decoders.2"), ("step",)]
    assert not restoration.left
    assert type(model.encoder) is type(model.decoders[0]) is nn.LSTM
    assert type(model.step) is nn.LSTMCell
    assert model.encoder is encoder
    assert model.decoders[2] is model.decoders[0]
    assert model.decoders[0].weight_hh_l0 is model.encoder.weight_hh_l0
    assert not model.encoder.bias_ih_l0.requires_grad
    assert (model.encoder.training, model.step.training) == (True, False)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert_same(results_of(model), results_of(untouched))
    assert record == [nn.LSTM]
    assert lstm_triton.to_torch(model).restored == ()  # they are already


def test_weights_that_were_exchanged() -> None:
    """nn.LSTM reads its weights from a list of its own. What replaced them meanwhile is in it."""
    model = nn.ModuleList([lstm_triton.LSTM(3, 4)])
    model[0]._parameters["weight_hh_l0"] = nn.Parameter(torch.ones(16, 4))
    expected = run(model[0], torch.ones(5, 2, 3))
    lstm_triton.to_torch(model)
    assert_same(run(model[0], torch.ones(5, 2, 3)), expected)


def test_report_and_undo() -> None:
    class Residual(lstm_triton.LSTM):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            return super().forward(*arguments, **options)

    class OnlyDefaults(lstm_triton.LSTMCell):
        def __init__(self) -> None:
            super().__init__(3, 4)

    model = nn.ModuleDict({"a": lstm_triton.LSTM(3, 4), "b": OnlyDefaults(), "c": Residual(3, 4)})
    model["d"], model["e"], model["f"] = model["a"], lstm_triton.LSTM(3, 4), nn.LSTM(3, 4)
    model["e"].forward = model["e"].forward  # type: ignore[method-assign]
    restoration = lstm_triton.to_torch(model)
    assert str(restoration).splitlines() == [
        "now torch.nn.LSTM: 1",
        "  a, d: LSTM(3, 4)",
        "now torch.nn.LSTMCell: 1",
        "  b: LSTMCell(3, 4)",
        "left as they were: 2",
        "  c: Residual, its class defines forward",
        "  e: LSTM, its forward was set on the object",
    ]
    for _ in range(2):
        restoration.undo()
        assert (type(model["a"]), type(model["b"])) == (lstm_triton.LSTM, OnlyDefaults)
    assert type(model["f"]) is nn.LSTM
    lstm_triton.to_torch(model)
    model["a"].__class__ = nn.GRU
    with pytest.raises(RuntimeError, match=r"cannot undo: a, d has become a GRU"):
        restoration.undo()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        lstm_triton.to_torch([model])  # type: ignore[arg-type]
    assert str(lstm_triton.to_torch(nn.Linear(3, 4))) == "now torch.nn.LSTM: 0"


def test_the_option_memory_comes_back() -> None:
    model = speller()
    lstm_triton.to_torch(model).undo()
    assert model.encoder.memory == "low"


@pytest.mark.parametrize("make", [lstm_triton.LSTM, lstm_triton.LSTMCell])
def test_the_model_itself(make: Callable[..., nn.Module]) -> None:
    model = make(3, 4)
    expected = copy.deepcopy(model)(torch.ones(2, 3))
    assert "the model itself" in str(lstm_triton.to_torch(model))
    assert type(model).__module__ == "torch.nn.modules.rnn"
    torch.testing.assert_close(model(torch.ones(2, 3)), expected)


def test_replaced_layers_go_back_too() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    lstm_triton.replace_lstm(model)
    lstm_triton.to_torch(model)
    assert type(model[0]) is nn.LSTM


def test_parametrized_weights_stay_parametrized() -> None:
    model = nn.ModuleList([lstm_triton.LSTM(3, 4)])
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    input = torch.ones(5, 2, 3)
    expected = run(model[0], input)
    assert len(lstm_triton.to_torch(model).restored) == 1
    assert isinstance(model[0], nn.LSTM)
    assert parametrize.is_parametrized(model[0])
    assert_same(run(model[0], input), expected)
    parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert type(model[0]) is nn.LSTM


def test_a_saved_model_needs_no_lstm_triton() -> None:
    model = nn.Sequential(lstm_triton.LSTM(3, 4))
    assert b"lstm_triton." in pickle.dumps(model)  # the name of a module that loading imports
    lstm_triton.to_torch(model)
    assert b"lstm_triton." not in pickle.dumps(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_dynamic_quantization() -> None:
    """It looks for the exact classes: without `to_torch`, it passes the layers by."""
    layers = {nn.LSTM, nn.LSTMCell, nn.Linear}
    model = speller().eval()
    passed_by = torch.ao.quantization.quantize_dynamic(model, layers)
    assert type(passed_by.encoder) is lstm_triton.LSTM
    lstm_triton.to_torch(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, layers)
    for layer in (quantized.encoder, quantized.decoders[0], quantized.step):
        assert type(layer).__module__ == "torch.ao.nn.quantized.dynamic.modules.rnn"
    input = torch.ones(5, 2, 3)
    torch.testing.assert_close(quantized(input), model(input), atol=0.05, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_static_quantization() -> None:
    """The eager kind: observers are put in, calibrated, and exchanged."""
    layers = (torch.ao.quantization.QuantStub(), lstm_triton.LSTM(3, 4), nn.Identity())
    model = nn.Sequential(*layers).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig()
    lstm_triton.to_torch(model)
    prepared = torch.ao.quantization.prepare(model)
    prepared(torch.randn(5, 2, 3))
    assert type(torch.ao.quantization.convert(prepared)[1]).__module__ == "torch.ao.nn.quantized.modules.rnn"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_opacus_exchanges_the_layers() -> None:
    """Its validator finds no fault with this library's layers, and leaves them. It exchanges PyTorch's."""
    validators = pytest.importorskip("opacus.validators")
    model = nn.Sequential(lstm_triton.LSTM(3, 4))
    assert type(validators.ModuleValidator.fix(model)[0]) is lstm_triton.LSTM
    lstm_triton.to_torch(model)
    assert type(validators.ModuleValidator.fix(model)[0]).__name__ == "DPLSTM"


def test_initialisers_that_ask_for_the_class() -> None:
    model = speller()
    lstm_triton.to_torch(model)
    found: list[nn.Module] = []
    model.apply(lambda module: found.append(module) if isinstance(module, (nn.LSTM, nn.LSTMCell)) else None)
    assert found == [model.encoder, model.decoders[0], model.step]

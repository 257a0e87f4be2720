"""Models changed in one call, and single layers from nn.LSTM and to it: for ONNX, TorchScript and other machines."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_triton
from lstm_triton import standin
from lstm_triton.interpreter import interpret
from tests.support.comparing import CallCase, assert_results_as_accurate, assert_same, call_cases, run, twins

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
)


class Tagger(nn.Module):
    """A model as people write them: two LSTMs, one of them used at two places, and weights that are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.encoder = nn.LSTM(4, 4, num_layers=2, dropout=0.5)
        self.decoders = nn.ModuleList([nn.LSTM(4, 4), nn.Linear(4, 4)])
        self.decoders.append(self.decoders[0])
        self.decoders[0].weight_hh_l0 = self.encoder.weight_hh_l0
        self.unregistered = [self.encoder]

    def forward(self, words: Tensor) -> Tensor:
        hidden, states = self.encoder(self.embedding(words))
        hidden, _ = self.decoders[0](hidden, tuple(state[:1] for state in states))
        return self.decoders[2](self.decoders[1](hidden))[0]


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


WORDS = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 0], [1, 2]])


def results_of(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    output = model(WORDS)
    output.square().sum().backward()
    return {"output": output.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


# --- Whole models ---


def test_every_lstm_is_replaced() -> None:
    model, stock = tagger(), tagger()
    replacement = lstm_triton.replace_lstm(model)
    assert [entry.names for entry in replacement.replaced] == [("encoder",), ("decoders.0", "decoders.2")]
    assert not replacement.left
    assert type(model.encoder) is type(model.decoders[0]) is standin.LSTM
    assert model.decoders[0] is model.decoders[2]
    assert model.unregistered[0] is model.encoder  # references that no model knows of hold, too
    assert model.decoders[0].weight_hh_l0 is model.encoder.weight_hh_l0
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert repr(model) == repr(stock)
    assert_same(results_of(model), results_of(stock))
    model.eval()
    stock.eval()
    assert_same(results_of(model), results_of(stock))


def test_report() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.LSTM(3, 4, bidirectional=True), "c": nn.LSTMCell(3, 4)})
    model["d"] = model["a"]
    model["e"] = forward_set_on_the_object()
    replacement = lstm_triton.replace_lstm(model)
    assert str(replacement).splitlines() == [
        "now lstm_triton.LSTM: 2",
        "  a, d: LSTM(3, 4)",
        "  b: LSTM(3, 4, bidirectional=True)",
        "  each stays an nn.LSTM for isinstance. So torch.compile breaks its graph at each, as at every nn.LSTM. With "
        "torch._dynamo.config.allow_rnn = True it does not",
        "now lstm_triton.LSTMCell: 1",
        "  c: LSTMCell(3, 4)",
        "left as they were: 1",
        "  e: LSTM, its forward was set on the object",
    ]
    with pytest.raises(AttributeError):
        replacement.replaced = ()  # type: ignore[misc]
    assert str(lstm_triton.replace_lstm(nn.Linear(3, 4))) == "now lstm_triton.LSTM: 0"
    assert lstm_triton.replace_lstm(model).replaced == ()  # they are already


def test_the_model_may_be_an_lstm_itself() -> None:
    _, stock = twins(3, 4)
    model = copy.deepcopy(stock)
    replacement = lstm_triton.replace_lstm(model)
    assert type(model) is standin.LSTM
    assert "the model itself: LSTM(3, 4)" in str(replacement)
    input = torch.randn(5, 2, 3)
    assert_same(run(model, input), run(stock, input))


def test_model_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        lstm_triton.replace_lstm([nn.LSTM(3, 4)])  # type: ignore[arg-type]


def test_undo() -> None:
    model, stock = tagger(), tagger()
    replacement = lstm_triton.replace_lstm(model)
    for changed in (model, stock):
        optimizer = torch.optim.SGD(changed.parameters(), lr=0.1)
        results_of(changed)
        optimizer.step()
        changed.eval().double()
    for _ in range(2):  # a second time does no harm
        replacement.undo()
        assert type(model.encoder) is type(model.decoders[2]) is nn.LSTM
    assert not any(module.training for module in model.modules())
    assert_same(results_of(model), results_of(stock))
    lstm_triton.replace_lstm(model)
    assert type(model.encoder) is standin.LSTM


def test_undo_refuses_what_it_does_not_know() -> None:
    class Other(lstm_triton.LSTM):
        pass

    model = tagger()
    replacement = lstm_triton.replace_lstm(model)
    model.decoders[0].__class__ = Other
    with pytest.raises(RuntimeError, match=r"cannot undo: decoders.0, decoders.2 has become a Other"):
        replacement.undo()
    assert type(model.encoder) is standin.LSTM  # nothing was undone


def test_an_optimizer_made_before_goes_on() -> None:
    finals = []
    for change in (lstm_triton.replace_lstm, lambda model: None):
        model = tagger()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(4):
            results_of(model)
            optimizer.step()
            if step == 1:
                change(model)
        finals.append(model.state_dict())
    assert_same(*finals)


def test_hooks() -> None:
    """All kinds of them, and the handles that remove them."""

    def trained(change: Callable[[nn.Module], Any]) -> tuple[dict[str, Tensor], list[Any]]:
        record: list[Any] = []
        model = tagger()
        encoder = model.encoder
        before = encoder.register_forward_pre_hook(lambda module, args: record.append(args[0].shape))
        encoder.register_forward_hook(lambda module, args, output: (output[0] + 1, output[1]))
        encoder.register_full_backward_hook(lambda module, inputs, outputs: record.append(inputs[0].sum().item()))
        encoder.weight_hh_l1.register_hook(lambda gradient: 2 * gradient)
        encoder.register_state_dict_post_hook(lambda module, state, prefix, _: record.append(prefix))
        change(model)
        results = results_of(model)
        model.state_dict()
        before.remove()
        results_of(model)
        return results, record

    results, record = trained(lstm_triton.replace_lstm)
    expected, expected_record = trained(lambda model: None)
    assert_same(results, expected)
    assert record == expected_record
    assert len(record) == 4
    assert record[2] == "encoder."


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "two parametrizations": lambda m: [
        parametrizations.weight_norm(m, "weight_hh_l0"),
        parametrize.register_parametrization(m, "weight_ih_l0", Doubled()),
        parametrize.register_parametrization(m, "weight_ih_l0", Doubled()),
    ],
    "old weight_norm": lambda m: old_weight_norm(m, "weight_hh_l0"),
    "frozen": lambda m: m.weight_ih_l0.requires_grad_(False),
    "bfloat16": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("when", ["before", "after", "before the undoing"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights(change: Callable[[nn.Module], Any], when: str) -> None:
    """Whatever has been done to the weights, at whatever time, does the same as with nn.LSTM."""
    model, stock = nn.ModuleList([nn.LSTM(3, 4)]), nn.ModuleList([nn.LSTM(3, 4)])
    stock.load_state_dict(model.state_dict())
    change(stock[0])
    if when == "before":
        change(model[0])
    replacement = lstm_triton.replace_lstm(model)
    assert isinstance(model[0], lstm_triton.LSTM)
    if when != "before":
        change(model[0])
    if when == "before the undoing":
        replacement.undo()
        assert not isinstance(model[0], lstm_triton.LSTM)
    assert isinstance(model[0], nn.LSTM)
    assert type(model[0]).__name__ == type(stock[0]).__name__
    assert list(model.state_dict()) == list(stock.state_dict())
    input = torch.randn(5, 2, 3).to(model[0].weight_hh_l0.dtype)
    assert_same(run(model[0], input), run(stock[0], input))
    if parametrize.is_parametrized(model[0]):
        for module in (model[0], stock[0]):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
        assert type(model[0]) is (nn.LSTM if when == "before the undoing" else standin.LSTM)
        assert_same(run(model[0], input), run(stock[0], input))
    replacement.undo()
    assert type(model[0]) is nn.LSTM
    assert_same(run(model[0], input), run(stock[0], input))


def test_copies_of_a_parametrized_layer_are_replaced_one_by_one() -> None:
    """They have one class in common."""
    first = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    second = copy.deepcopy(first)
    replacement = lstm_triton.replace_lstm(first)
    assert isinstance(first, lstm_triton.LSTM)
    assert not isinstance(second, lstm_triton.LSTM)
    replacement.undo()
    input = torch.randn(5, 2, 3)
    assert_same(run(first, input), run(second, input))


def test_copies_and_pickles_of_a_changed_model() -> None:
    model = tagger()
    lstm_triton.replace_lstm(model)
    expected = results_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.encoder) is standin.LSTM
        assert twin.decoders[0] is twin.decoders[2]
        assert_same(results_of(twin), expected)


def test_models_are_not_kept_alive() -> None:
    model = tagger()
    lstm_triton.replace_lstm(model)
    remembered = weakref.ref(model.encoder)
    del model
    assert remembered() is None


class OnlyDefaults(nn.LSTM):
    """A subclass that says nothing but which options it wants."""

    def __init__(self) -> None:
        super().__init__(3, 4, batch_first=True)


class Residual(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return output + 1, states


class Scaled(nn.LSTM):
    scale = 2.0


class DoubledCell(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        h, c = super().forward(input, hx)
        return 2 * h, c


def test_subclass_that_only_has_a_constructor() -> None:
    model = nn.ModuleList([OnlyDefaults()])
    replacement = lstm_triton.replace_lstm(model)
    assert isinstance(model[0], lstm_triton.LSTM)
    assert isinstance(model[0], OnlyDefaults)
    replacement.undo()
    assert type(model[0]) is OnlyDefaults


def forward_set_on_the_object() -> nn.Module:
    module = nn.LSTM(3, 4)
    module.forward = module.forward  # type: ignore[method-assign]
    return module


def quantised() -> nn.Module:
    return torch.ao.nn.quantizable.LSTM(3, 4)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "kind", "reason"),
    [
        (lambda: Residual(3, 4), "Residual", "its class defines forward"),
        (lambda: Scaled(3, 4), "Scaled", "its class defines scale"),
        (lambda: parametrizations.weight_norm(Residual(3, 4), "weight_hh_l0"), "ParametrizedResidual", "forward"),
        (forward_set_on_the_object, "LSTM", "its forward was set on the object"),
        (lambda: torch.jit.script(nn.LSTM(3, 4)), "LSTM", "it is compiled by TorchScript"),
        (quantised, "LSTM", "it is quantised, or made for that"),
        (lambda: torch.jit.script(nn.LSTMCell(3, 4)), "LSTMCell", "it is compiled by TorchScript"),
        (lambda: DoubledCell(3, 4), "DoubledCell", "its class defines forward"),
    ],
)
def test_left_with_the_reason(make: Callable[[], nn.Module], kind: str, reason: str) -> None:
    model = nn.ModuleDict({"x": make()})
    classes = [type(module) for module in model.modules()]
    replacement = lstm_triton.replace_lstm(model)
    assert not replacement.replaced
    [left] = replacement.left
    assert (left.names, left.kind) == (("x",), kind)
    assert reason in left.reason
    assert f"  x: {kind}, {left.reason}" in str(replacement)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("other", [nn.GRU, nn.RNN, nn.Linear])
def test_other_layers_are_no_business_of_this(other: Callable[..., nn.Module]) -> None:
    model = nn.ModuleList([other(3, 4)])
    replacement = lstm_triton.replace_lstm(model)
    assert (replacement.replaced, replacement.left) == ((), ())
    assert type(model[0]) is other


@pytest.mark.interpreted
@pytest.mark.parametrize("seed", [0, 1])
def test_replaced_layers_run_in_the_kernels(seed: int) -> None:
    model = nn.ModuleList([nn.LSTM(5, 9, num_layers=2, bidirectional=True)])
    stock = copy.deepcopy(model)
    lstm_triton.replace_lstm(model)
    input = torch.randn(4, 3, 5)
    with interpret(seed), lstm_triton.backend("triton"):
        results = run(model[0], input)
    assert_results_as_accurate(results, stock[0], input)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:RNN module weights are not part of single contiguous chunk")
def test_moved_to_a_gpu_and_undone() -> None:
    model = nn.ModuleList([nn.LSTM(40, 96, num_layers=2)])
    stock = copy.deepcopy(model).half().cuda()
    replacement = lstm_triton.replace_lstm(model)
    model.half().cuda()
    input = torch.randn(25, 7, 40, device="cuda", dtype=torch.float16)
    with lstm_triton.backend("triton"):
        results = run(model[0], input)
    assert_results_as_accurate(results, stock[0], input)
    replacement.undo()
    assert_results_as_accurate(run(model[0], input), stock[0], input)


# --- One layer, from nn.LSTM and to it ---


@given(call_cases())
def test_to_torch_and_back(case: CallCase) -> None:
    ours, _ = case.twins()
    stock = ours.to_torch_lstm()
    assert type(stock) is nn.LSTM
    back = lstm_triton.LSTM.from_torch_lstm(stock)
    assert type(back) is lstm_triton.LSTM
    for other in (stock, back):
        assert repr(other) == repr(ours)
        assert other.training == ours.training
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in ours.named_parameters()]
        assert all(p is q for p, q in zip(other.parameters(), ours.parameters(), strict=True))
        assert_same(run(other, case.input, case.hx), run(ours, case.input, case.hx))


def test_options_are_kept_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    """Nor are random numbers drawn, for weights that are not used."""
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="dropout option adds"):
        ours = lstm_triton.LSTM(3, 4, dropout=0.5)
    torch.set_rng_state(state)
    recwarn.clear()
    stock = ours.to_torch_lstm()
    assert stock.dropout == lstm_triton.LSTM.from_torch_lstm(stock).dropout == 0.5
    assert not recwarn.list
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_shared() -> None:
    ours, _ = twins(3, 4)
    ours.weight_ih_l0.requires_grad_(False)
    ours.eval()
    stock = ours.to_torch_lstm()
    assert not stock.training
    assert not stock.weight_ih_l0.requires_grad
    input = torch.randn(5, 2, 3)
    with torch.no_grad():
        stock.weight_hh_l0.mul_(2)
    assert_same(run(ours, input), run(stock, input))
    ours.double()  # in place, for the one object that both have
    assert stock.weight_hh_l0.dtype == torch.float64
    assert_same(run(ours, input.double()), run(stock, input.double()))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, old_weight_norm])
def test_computed_weights(norm: Callable[..., nn.Module]) -> None:
    ours, stock = twins(3, 4)
    input = torch.randn(5, 2, 3)
    norm(ours, "weight_hh_l0")
    norm(stock, "weight_hh_l0")
    plain = ours.to_torch_lstm()
    assert type(plain) is nn.LSTM
    assert plain.weight_ih_l0 is ours.weight_ih_l0
    assert isinstance(plain.weight_hh_l0, nn.Parameter)
    assert_same(plain(input), ours(input))
    with pytest.raises(ValueError, match=r"module.weight_hh_l0 must be a parameter, but is computed from others"):
        lstm_triton.LSTM.from_torch_lstm(stock)


def test_what_cannot_be_taken_over() -> None:
    for wrong in (nn.GRU(3, 4), lstm_triton.LSTM(3, 4), nn.Linear(3, 4)):
        with pytest.raises(TypeError, match=r"module must be a torch.nn.LSTM, got (GRU|LSTM|Linear)"):
            lstm_triton.LSTM.from_torch_lstm(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a plain torch.nn.LSTM, but Residual defines forward"):
        lstm_triton.LSTM.from_torch_lstm(Residual(3, 4))
    assert lstm_triton.LSTM.from_torch_lstm(OnlyDefaults()).batch_first


def test_subclasses_make_their_own_kind() -> None:
    class Ours(lstm_triton.LSTM):
        pass

    assert type(Ours.from_torch_lstm(nn.LSTM(3, 4))) is Ours


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_torchscript() -> None:
    ours, _ = twins(3, 4, num_layers=2, bidirectional=True)
    # Inside another module: nn.LSTM has two forwards there, and none of that name.
    scripted = torch.jit.script(nn.Sequential(ours.to_torch_lstm()))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    input = torch.randn(5, 2, 3)
    packed = pack_padded_sequence(input, torch.tensor([5, 3]))
    assert_same(torch.jit.load(buffer)(input), ours(input))
    assert_same(ours.to_torch_lstm()(packed), ours(packed))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("way", ["the module itself", "nn.LSTM", "nn.LSTM, older exporter"])
def test_onnx(way: str) -> None:
    """Exported and run by onnxruntime, for other sizes than it was exported with.

    The module itself becomes a loop for each direction of each layer, and an nn.LSTM one node for each layer. In an
    nn.LSTM, the newer of PyTorch's exporters fixes the number of time steps: PyTorch's function unrolls them for it.
    """
    import onnx
    import onnxruntime

    layers = 1 if way == "the module itself" else 2  # exporting a loop takes seconds
    ours, _ = twins(3, 4, num_layers=layers, bidirectional=True, batch_first=True)
    ours.eval()
    dynamo, open_time = "older" not in way, way != "nn.LSTM"
    module, buffer = ours if way == "the module itself" else ours.to_torch_lstm(), io.BytesIO()

    def arguments(time_steps: int, batch_size: int) -> tuple[Any, ...]:
        h_0, c_0 = torch.randn(2, 2 * layers, batch_size, 4)
        return torch.randn(batch_size, time_steps, 3), (h_0, c_0)

    input_axes = {0: "batch"} | ({1: "time"} if open_time else {})
    names: dict[str, Any] = {"input_names": ["input", "h_0", "c_0"], "output_names": ["output", "h_n", "c_n"]}
    if dynamo:
        names["dynamic_shapes"] = (input_axes, ({1: "batch"}, {1: "batch"}))
    else:
        names["dynamic_axes"] = {"input": input_axes, "h_0": {1: "batch"}, "c_0": {1: "batch"}}
    torch.onnx.export(module, arguments(5, 2), buffer, dynamo=dynamo, **names)

    kinds = [node.op_type for node in onnx.load_from_string(buffer.getvalue()).graph.node]
    expected = {"Scan": 2} if way == "the module itself" else {"LSTM": 2}
    assert {kind: kinds.count(kind) for kind in ("Scan", "LSTM", "Loop") if kind in kinds} == expected
    session = onnxruntime.InferenceSession(buffer.getvalue())
    for sizes in ((5, 2), (7, 3), (1, 1)) if open_time else ((5, 2), (5, 3)):
        input, hx = arguments(*sizes)
        feed = {"input": input.numpy(), "h_0": hx[0].numpy(), "c_0": hx[1].numpy()}
        output, h_n, c_n = (torch.from_numpy(array) for array in session.run(None, feed))
        torch.testing.assert_close((output, (h_n, c_n)), ours(input, hx))

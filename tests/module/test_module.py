"""lstm_triton.LSTM against torch.nn.LSTM, which it stands in for: on the CPU, bit by bit."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import lstm_triton
from tests.support.comparing import CallCase, assert_same, call_cases, run, stock_in_autocast, twins

# PyTorch, of the weight_norm before parametrizations, and of oneDNN, which has no projections.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
)


@given(call_cases())
def test_results_and_gradients(case: CallCase) -> None:
    ours, stock = case.twins()
    assert_same(run(ours, case.input, case.hx), run(stock, case.input, case.hx))


@given(call_cases())
def test_structure_of_results(case: CallCase) -> None:
    ours, stock = case.twins()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        actual = ours(case.input, case.hx)
        torch.manual_seed(0)
        expected = stock(case.input, case.hx)
    assert type(actual) is type(expected) is tuple
    assert type(actual[0]) is type(expected[0])
    assert type(actual[1]) is type(expected[1]) is tuple
    assert_same(actual, expected)


@given(call_cases())
def test_initialisation_and_state_dict(case: CallCase) -> None:
    ours, stock = case.twins()
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert_same(dict(ours.state_dict()), dict(stock.state_dict()))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    stock.load_state_dict(ours.state_dict())
    for parameter in ours.parameters():
        parameter.data.zero_()
    ours.load_state_dict(stock.state_dict())
    assert_same(dict(ours.named_parameters()), dict(stock.named_parameters()))
    assert_same(run(ours, case.input, case.hx), run(stock, case.input, case.hx))


ATTRIBUTES = {
    "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size",
    "training", "_flat_weights_names", "_all_weights",
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.25, "bidirectional": True, "proj_size": 2},
        {"num_layers": 3, "dropout": 1},
        {"dtype": torch.float64, "device": "meta"},
    ],
)
def test_attributes(options: dict[str, Any]) -> None:
    ours, stock = twins(3, 4, **options)
    assert {name: getattr(ours, name) for name in ATTRIBUTES} == {name: getattr(stock, name) for name in ATTRIBUTES}
    assert {type(getattr(ours, name)) for name in ATTRIBUTES} == {type(getattr(stock, name)) for name in ATTRIBUTES}
    assert repr(ours) == repr(stock)
    assert ours.extra_repr() == stock.extra_repr()
    assert ours.__constants__ == stock.__constants__
    names_and_sizes = [[(name, p.shape, p.dtype, p.device) for name, p in m.named_parameters()] for m in (ours, stock)]
    assert names_and_sizes[0] == names_and_sizes[1]
    assert len(ours.all_weights) == len(stock.all_weights)
    for weights, names in zip(ours.all_weights, ours._all_weights, strict=True):
        assert all(weight is getattr(ours, name) for weight, name in zip(weights, names, strict=True))
    assert all(w is getattr(ours, n) for w, n in zip(ours._flat_weights, ours._flat_weights_names, strict=True))
    public = {name for name in dir(stock) if not name.startswith("_")}
    assert public <= set(dir(ours))


def test_is_an_rnn_base_but_no_nn_lstm() -> None:
    assert issubclass(lstm_triton.LSTM, nn.RNNBase)
    assert not issubclass(lstm_triton.LSTM, nn.LSTM)  # torch.compile refuses those


def test_helper_methods() -> None:
    ours, stock = twins(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    input, hx = torch.zeros(5, 2, 3), (torch.zeros(4, 2, 2), torch.zeros(4, 2, 4))
    assert ours.get_expected_hidden_size(input, None) == stock.get_expected_hidden_size(input, None) == (4, 2, 2)
    assert ours.get_expected_cell_size(input, None) == stock.get_expected_cell_size(input, None) == (4, 2, 4)
    ours.check_forward_args(input, hx, None)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(4, 2, 4\), got \[4, 2, 2\]"):
        ours.check_forward_args(input, (hx[0], hx[0]), None)
    order = torch.tensor([1, 0])
    assert_same(ours.permute_hidden(hx, order), stock.permute_hidden(hx, order))


def test_flatten_parameters_does_nothing() -> None:
    ours, _ = twins(3, 4)
    addresses = [weight.data_ptr() for weight in ours.parameters()]
    assert ours.flatten_parameters() is None
    assert addresses == [weight.data_ptr() for weight in ours.parameters()]


# --- Copies and conversions ---


def saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_copies(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    ours, stock = twins(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    input = torch.randn(5, 2, 3)
    twin = duplicate(ours)
    assert type(twin) is lstm_triton.LSTM
    assert_same(dict(twin.named_parameters()), dict(stock.named_parameters()))
    assert_same(run(twin, input), run(stock, input))


def test_state_dict_through_a_file() -> None:
    ours, stock = twins(3, 4)
    buffer = io.BytesIO()
    torch.save({key: value + 1 for key, value in stock.state_dict().items()}, buffer)
    buffer.seek(0)
    state_dict = torch.load(buffer)
    ours.load_state_dict(state_dict)
    stock.load_state_dict(state_dict)
    input = torch.randn(5, 2, 3)
    assert_same(run(ours, input), run(stock, input))


@pytest.mark.parametrize("bias", [True, False])
def test_state_of_an_old_pickle(bias: bool) -> None:
    """Pickles of before PyTorch 1.8 have no proj_size; the oldest have weights where the names of weights are now."""
    _, stock = twins(3, 4, num_layers=2, bidirectional=True, bias=bias)
    state = stock.__getstate__()
    del state["proj_size"]
    state["_all_weights"] = [[0]]
    state["_flat_weights_names"] = []
    loaded = lstm_triton.LSTM.__new__(lstm_triton.LSTM)
    loaded.__setstate__(state)
    assert loaded.proj_size == 0
    assert loaded._flat_weights_names == stock._flat_weights_names
    input = torch.randn(5, 2, 3)
    assert_same(run(loaded, input), run(stock, input))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "double": lambda m: m.double(),
    "half and back": lambda m: m.half().float(),
    "to": lambda m: m.to(torch.float64),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "setattr": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(torch.ones(16, 4))),
    "setattr of data": lambda m: setattr(m.weight_hh_l0, "data", torch.ones(16, 4)),
    "in place": lambda m: m.weight_hh_l0.data.mul_(2),
    "assign": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "to_empty": lambda m: [p.data.fill_(0.5) for p in m.to_empty(device="cpu").parameters()],
    "share_memory": lambda m: m.share_memory(),
    "reset": lambda m: (torch.manual_seed(3), m.reset_parameters()),
    "old weight_norm": lambda m: old_weight_norm(m, "weight_hh_l0").weight_hh_l0_g.data.mul_(2),
    "weight_norm": lambda m: parametrizations.weight_norm(
        m, "weight_hh_l0"
    ).parametrizations.weight_hh_l0.original0.data.mul_(2),
}


def drop_weights(module: Any) -> None:
    """As AWD-LSTM has it: what the layer reads under the name of a parameter is a tensor computed from another one."""
    raw = module._parameters.pop("weight_hh_l0")
    module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
    module.weight_hh_l0 = nn.functional.dropout(module.weight_hh_l0_raw, 0.5)


CHANGES["weight drop"] = drop_weights


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights(change: Callable[[Any], Any]) -> None:
    ours, stock = twins(3, 4)
    input = torch.randn(5, 2, 3)
    run(ours, input)  # whatever is remembered of the weights is remembered now
    for module in (ours, stock):
        torch.manual_seed(0)
        change(module)
    input = input.to(ours.weight_ih_l0.dtype)
    assert_same(run(ours, input), run(stock, input))


def test_functional_call() -> None:
    ours, stock = twins(3, 4, num_layers=2)
    input = torch.randn(5, 2, 3)
    output, _ = ours(input)
    other = {name: (parameter.detach() + 1).requires_grad_() for name, parameter in ours.named_parameters()}
    other_output, (_, c_n) = torch.func.functional_call(ours, other, (input,))
    assert_same(other_output, torch.func.functional_call(stock, other, (input,))[0])
    c_n.sum().backward()
    assert all(parameter.grad is not None for parameter in other.values())
    assert all(parameter.grad is None for parameter in ours.parameters())
    assert_same(ours(input)[0], output)


# --- Bad arguments ---


words_of_pytorch_2_13 = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 13), reason="earlier versions say some of it differently"
)


def complaint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[type[Exception], str]:
    """The class and the text of the exception that a call ends in."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the caller compares which)
        function(*args, **kwargs)
    return caught.type, str(caught.value)


@words_of_pytorch_2_13
@pytest.mark.parametrize(
    "options",
    [
        {"bias": 1},
        {"batch_first": 0},
        {"input_size": 3.0},
        {"hidden_size": 4.0},
        {"input_size": 0},
        {"hidden_size": 0},
        {"hidden_size": -1},
        {"num_layers": 0},
        {"dropout": -0.1},
        {"dropout": 1.5},
        {"dropout": True},
        {"dropout": "0.5"},
        {"dropout": "a"},
        {"proj_size": -1},
        {"proj_size": 4},
        {"proj_size": 5},
        {"num_layers": "2"},
        {"dtype": torch.int64},
        {"device": "nowhere"},
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any]) -> None:
    options = {"input_size": 3, "hidden_size": 4} | options
    assert complaint(lstm_triton.LSTM, **options) == complaint(nn.LSTM, **options)


def test_missing_or_unknown_options() -> None:
    for args, kwargs in (((3,), {}), ((), {}), ((3, 4), {"hidden": 5}), ((3, 4, *range(20)), {})):
        with pytest.raises(TypeError):
            nn.LSTM(*args, **kwargs)
        with pytest.raises(TypeError):
            lstm_triton.LSTM(*args, **kwargs)  # type: ignore[misc]


def test_dropout_without_a_layer_to_drop() -> None:
    messages = []
    for cls in (lstm_triton.LSTM, nn.LSTM):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as caught:
            module = cls(3, 4, dropout=0.5)
        messages.append([str(warning.message) for warning in caught])
        assert module.dropout == 0.5
    assert messages[0] == messages[1]


@dataclass
class BadCall:
    """What is wrong in a call that is right otherwise: LSTM(3, 4), 5 time steps, 2 sequences."""

    input: torch.Tensor = field(default_factory=lambda: torch.zeros(5, 2, 3))
    hx: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def states(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(size, dtype=dtype) for size in sizes)


BAD_CALLS = {
    "1-D input": BadCall(torch.zeros(3)),
    "4-D input": BadCall(torch.zeros(1, 5, 2, 3)),
    "1-D input and wrong states": BadCall(torch.zeros(3), states((1, 2), (1, 2))),
    "input dtype": BadCall(torch.zeros(5, 2, 3, dtype=torch.float64)),
    "input dtype float16": BadCall(torch.zeros(5, 2, 3, dtype=torch.float16)),
    "integers": BadCall(torch.zeros(5, 2, 3, dtype=torch.int64)),
    "input size": BadCall(torch.zeros(5, 2, 7)),
    "input size, no batch": BadCall(torch.zeros(5, 7)),
    "no time steps": BadCall(torch.zeros(0, 2, 3)),
    "no time steps, no batch": BadCall(torch.zeros(0, 3)),
    "no time steps, batch_first": BadCall(torch.zeros(2, 0, 3), options={"batch_first": True}),
    "nothing at all": BadCall(torch.zeros(0, 0, 3)),
    "h_0 size": BadCall(hx=states((1, 3, 4), (1, 2, 4))),
    "c_0 size": BadCall(hx=states((1, 2, 4), (1, 3, 4))),
    "both sizes": BadCall(hx=states((1, 3, 4), (1, 3, 4))),
    "broadcast states": BadCall(hx=states((1, 1, 4), (1, 1, 4))),
    "batch_first states": BadCall(torch.zeros(2, 5, 3), states((2, 1, 4), (2, 1, 4)), {"batch_first": True}),
    "too few layers": BadCall(hx=states((1, 2, 4), (1, 2, 4)), options={"num_layers": 2, "bidirectional": True}),
    "projected c_0": BadCall(hx=states((1, 2, 2), (1, 2, 2)), options={"proj_size": 2}),
    "h_0 not projected": BadCall(hx=states((1, 2, 4), (1, 2, 4)), options={"proj_size": 2}),
    "2-D states": BadCall(hx=states((1, 4), (1, 4))),
    "2-D c_0": BadCall(hx=states((1, 2, 4), (1, 4))),
    "3-D states, no batch": BadCall(torch.zeros(5, 3), states((1, 1, 4), (1, 1, 4))),
    "wrong sizes, no batch": BadCall(torch.zeros(5, 3), states((1, 5), (1, 4))),
    "dtype of states": BadCall(hx=states((1, 2, 4), (1, 2, 4), dtype=torch.float64)),
    "states on another device": BadCall(hx=tuple(state.to("meta") for state in states((1, 2, 4), (1, 2, 4)))),
    "input on another device": BadCall(torch.zeros(5, 2, 3, device="meta")),
    "three states": BadCall(hx=states((1, 2, 4), (1, 2, 4), (1, 2, 4))),
    "one state": BadCall(hx=states((1, 2, 4))),
    "no states": BadCall(hx=()),
    "states of None": BadCall(hx=(None, None)),
    "h_0 alone": BadCall(hx=(torch.zeros(1, 2, 4), None)),
    "a number for states": BadCall(hx=5),
    "one tensor of two 2-D states": BadCall(hx=torch.zeros(2, 2, 4)),
    "a number for input": BadCall(5),  # type: ignore[arg-type]
    "a list for input": BadCall([[1.0, 2.0, 3.0]]),  # type: ignore[arg-type]
}


@words_of_pytorch_2_13
@pytest.mark.parametrize("bad", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(bad: BadCall) -> None:
    ours, stock = twins(3, 4, **bad.options)
    assert complaint(ours, bad.input, bad.hx) == complaint(stock, bad.input, bad.hx)


def test_one_tensor_for_two_states() -> None:
    """nn.LSTM refuses them stacked, but for unbatched input, where it takes them by accident."""
    for cls in (lstm_triton.LSTM, nn.LSTM):
        with pytest.raises(TypeError, match=r"^lstm\(\) received an invalid combination of arguments"):
            cls(3, 4)(torch.zeros(5, 2, 3), torch.zeros(2, 1, 2, 4))
    with pytest.raises(TypeError, match=r"hx must be \(h_0, c_0\), got one Tensor"):
        lstm_triton.LSTM(3, 4)(torch.zeros(5, 3), torch.zeros(2, 1, 4))


@words_of_pytorch_2_13
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_bad_packed_calls(enforce_sorted: bool) -> None:
    """nn.LSTM checks nothing here, and takes states of too many sequences: the words are those for dense input."""
    ours, stock = twins(3, 4)
    dense = torch.zeros(5, 2, 3)
    packed = pack_padded_sequence(dense, torch.tensor([5, 5]), enforce_sorted=enforce_sorted)
    for sizes in (
        ((1, 3, 4), (1, 3, 4)),
        ((1, 2, 4), (1, 3, 4)),
        ((1, 1, 4), (1, 1, 4)),
        ((2, 2, 4), (2, 2, 4)),
        ((1, 2, 5), (1, 2, 4)),
    ):
        assert complaint(ours, packed, states(*sizes)) == complaint(stock, dense, states(*sizes))
    for data in (torch.zeros(10, 7), torch.zeros(10, 3, dtype=torch.float64)):
        expected = complaint(stock, data.view(5, 2, -1))
        assert complaint(ours, packed._replace(data=data)) == expected
    for hx, kind, message in (
        (states((2, 4), (2, 4)), RuntimeError, r"Expected hidden\[0\] size \(1, 2, 4\), got \[2, 4\]"),
        (states((1, 2, 4), (1, 2, 4), (1, 2, 4)), RuntimeError, "lstm expects two hidden states"),
        (torch.zeros(2, 1, 2, 4), TypeError, "got one Tensor"),
    ):
        with pytest.raises(kind, match=message):
            ours(packed, hx)
    with pytest.raises(RuntimeError, match="input must have 2 dimensions, got 1"):
        ours(packed._replace(data=torch.zeros(3)))


def test_errors_leave_the_random_state_alone() -> None:
    ours, _ = twins(3, 4, num_layers=2, dropout=0.5)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        ours(torch.zeros(5, 2, 7))
    assert torch.equal(before, torch.get_rng_state())


# --- Autograd ---


def test_frozen_weights_still_pass_gradients_on() -> None:
    ours, stock = twins(3, 4, num_layers=2)
    for module in (ours, stock):
        module.requires_grad_(False)
    input = torch.randn(5, 2, 3)
    results = run(ours, input)
    assert results["gradient of input"].abs().sum() > 0
    assert not any("weight" in name for name in results)
    assert_same(results, run(stock, input))


@pytest.mark.parametrize("which", ["output", "h_n", "c_n"])
def test_loss_on_one_result_alone(which: str) -> None:
    gradients = []
    for module in twins(3, 4, num_layers=2, bidirectional=True):
        torch.manual_seed(0)
        input, hx = torch.randn(5, 2, 3, requires_grad=True), tuple(torch.randn(4, 2, 4) for _ in range(2))
        leaves = [input, *(state.requires_grad_() for state in hx), *module.parameters()]
        output, (h_n, c_n) = module(input, hx)
        loss = {"output": output, "h_n": h_n, "c_n": c_n}[which].square().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    assert_same(*gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def test_retain_graph() -> None:
    ours, _ = twins(3, 4)
    output, _ = ours(torch.randn(5, 2, 3))
    output.sum().backward(retain_graph=True)
    once = ours.weight_hh_l0.grad.clone()
    output.sum().backward()
    torch.testing.assert_close(ours.weight_hh_l0.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


def test_output_changed_in_place() -> None:
    for module in twins(3, 4, bidirectional=True, num_layers=2):
        input = torch.randn(5, 2, 3)
        output, _ = module(input)
        loss = output.square().sum()
        with torch.no_grad():
            module.weight_hh_l0.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_states_carried_over() -> None:
    """Truncated backpropagation through time: the states of one call, cut off in place, begin the next."""
    gradients = []
    for module in twins(3, 4, num_layers=2):
        torch.manual_seed(0)
        hx = None
        for _ in range(3):
            output, hx = module(torch.randn(5, 2, 3), hx)
            output.sum().backward()
            for state in hx:
                state.detach_()
                state.mul_(0.5)
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert_same(*gradients)


def test_split_sequence_is_whole_sequence() -> None:
    ours, _ = twins(3, 4, num_layers=2, dtype=torch.float64)
    input = torch.randn(9, 2, 3, dtype=torch.float64)
    whole, last = ours(input)
    first_part, hx = ours(input[:4])
    second_part, hx = ours(input[4:], hx)
    torch.testing.assert_close((torch.cat((first_part, second_part)), hx), (whole, last))


def test_inference_mode() -> None:
    ours, stock = twins(3, 4)
    input = torch.randn(5, 2, 3)
    with torch.inference_mode():
        assert_same(ours(input), stock(input))


def test_second_derivatives() -> None:
    ours, _ = twins(2, 3, dtype=torch.float64)
    input = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], input)


# --- Layouts, empty batches, dropout, autocast ---


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat(2, 1, 1)[::2],
        lambda x: x[:1].expand(5, 2, 3),
        lambda x: x[:, :1].expand(5, 2, 3),
        lambda x: x.flip(2),
    ],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_strided_input_and_states(layout: Callable[[torch.Tensor], torch.Tensor], batch_first: bool) -> None:
    ours, stock = twins(3, 4, batch_first=batch_first)
    input = layout(torch.randn(5, 2, 3))
    batch_size = input.shape[0 if batch_first else 1]
    hx = (torch.randn(1, 1, 4).expand(1, batch_size, 4), torch.randn(1, 4, batch_size).transpose(1, 2))
    assert_same(ours(input, hx), stock(input, hx))
    assert_same(run(ours, input, hx), run(stock, input, hx))


@pytest.mark.parametrize("batch_first", [True, False])
def test_empty_batch(batch_first: bool) -> None:
    ours, stock = twins(3, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
    input = torch.zeros((0, 5, 3) if batch_first else (5, 0, 3))
    results = run(ours, input)
    assert results["output"].numel() == 0
    assert results["gradient of weight_hh_l0"].abs().sum() == 0
    assert_same(results, run(stock, input))


def test_packed_input_in_any_order() -> None:
    ours, stock = twins(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    sequences = [torch.randn(length, 3) for length in (2, 5, 1, 5)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    hx = torch.randn(4, 4, 4), torch.randn(4, 4, 4)
    actual, expected = ours(packed, hx), stock(packed, hx)
    assert_same(actual, expected)
    for index, sequence in enumerate(sequences):  # each as if it were alone
        _, (h_n, c_n) = ours(sequence, (hx[0][:, index], hx[1][:, index]))
        torch.testing.assert_close((actual[1][0][:, index], actual[1][1][:, index]), (h_n, c_n))


def test_dropout_is_between_layers_and_in_training_only() -> None:
    ours, stock = twins(3, 4, num_layers=3, dropout=0.5)
    input = torch.randn(20, 2, 3)
    assert_same(run(ours, input), run(stock, input))
    training = run(ours, input)["output"]
    assert (training != 0).all()  # none after the last layer
    ours.eval()
    stock.eval()
    assert_same(run(ours, input), run(stock, input))
    assert not torch.equal(run(ours, input)["output"], training)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast(packed: bool, input_dtype: torch.dtype) -> None:
    ours, stock = twins(3, 4, num_layers=2)
    input: Any = torch.randn(5, 2, 3, dtype=input_dtype)
    if packed:
        input = pack_padded_sequence(input, torch.tensor([5, 3]))
    hx = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    for states_or_none in (None, hx):
        with torch.autocast("cpu", torch.bfloat16):
            results = run(ours, input, states_or_none)
        assert_same(results, stock_in_autocast(stock, input, states_or_none))
        assert results["gradient of weight_hh_l0"].dtype == torch.float32
        if not packed and input_dtype == torch.float32:
            assert results["output"].dtype == results["c_n"].dtype == torch.bfloat16

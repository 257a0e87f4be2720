"""Models that stay as they are: calls of the function in which nn.LSTM ends, taken over by the kernels."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import lstm_triton
from lstm_triton.interpreter import interpret
from tests.support.comparing import CallCase, assert_results_as_accurate, assert_same, call_cases, run, twins

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
ON_THE_CPU = "the kernels run on NVIDIA GPUs, not on 'cpu' tensors"


class Insistent(nn.Module):
    """A model whose layer cannot be exchanged."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self.lstm, nn.LSTM)
        return self.lstm(input)[0]


def insistent(**options: Any) -> Insistent:
    return Insistent(twins(5, 9, **options)[1])


@given(call_cases())
def test_left_to_pytorch_where_there_is_no_gpu(case: CallCase) -> None:
    _, stock = case.twins()
    expected = run(stock, case.input, case.hx)
    with lstm_triton.accelerate() as acceleration:
        assert_same(run(stock, case.input, case.hx), expected)
    assert acceleration.taken_over == 0
    assert dict(acceleration.left) == {ON_THE_CPU: 1}


@pytest.mark.interpreted
@given(
    case=call_cases(
        dtypes=[torch.float32], layouts=["batched", "unbatched", "packed"], projections=False, dropouts=[0.0]
    )
)
def test_taken_over(case: CallCase) -> None:
    _, stock = case.twins()
    empty = not isinstance(case.input, nn.utils.rnn.PackedSequence) and case.input.numel() == 0
    with interpret(), lstm_triton.accelerate() as acceleration:
        results = run(stock, case.input, case.hx)
    assert (acceleration.taken_over, dict(acceleration.left)) == ((0, {"the batch is empty": 1}) if empty else (1, {}))
    if empty:
        assert_same(results, run(stock, case.input, case.hx))
    else:
        assert_results_as_accurate(results, stock, case.input, case.hx)


@pytest.mark.interpreted
def test_the_kernels_give_what_they_give_in_our_layer() -> None:
    """With dropout, and a packed batch in any order."""
    ours, stock = twins(5, 9, num_layers=2, bidirectional=True, dropout=0.5)
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 5) for n in (2, 4, 1)], enforce_sorted=False)
    for input in (torch.randn(4, 3, 5), packed):
        hx = (torch.randn(4, 3, 9), torch.randn(4, 3, 9))
        with interpret(), lstm_triton.accelerate() as acceleration:
            actual = run(stock, input, hx)
            assert acceleration.taken_over == 1
            expected = run(ours, input, hx)
        assert_same(actual, expected)
        assert acceleration.taken_over == 1  # our layer has no need of it
        assert not acceleration.left


@pytest.mark.interpreted
def test_report() -> None:
    model = insistent()
    with lstm_triton.accelerate() as acceleration:
        assert str(acceleration) == "calls of torch._VF.lstm taken over by the kernels: 0"
        with interpret(), torch.no_grad():
            for _ in range(2):
                model(torch.randn(2, 1, 5))
            model.double()(torch.randn(2, 1, 5).double())
    model(torch.randn(2, 1, 5).double())  # after the end
    assert str(acceleration).splitlines() == [
        "calls of torch._VF.lstm taken over by the kernels: 2",
        "left to PyTorch: 1 (the kernels take float32, float16 and bfloat16, not torch.float64)",
    ]


@pytest.mark.interpreted
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradients(context: Callable[[], Any]) -> None:
    model, input = insistent(), torch.randn(4, 3, 5)
    with context(), interpret(), lstm_triton.accelerate() as acceleration:
        output = model(input)
    assert acceleration.taken_over == 1
    assert output.requires_grad == (context is torch.enable_grad)
    torch.testing.assert_close(output, model(input))


@pytest.mark.interpreted
def test_subclasses_and_computed_weights() -> None:
    """What `replace_lstm` has to leave, and weights that are computed at every call."""

    class Residual(nn.LSTM):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            output, states = super().forward(input, hx)
            return output + input, states

    layer = parametrizations.weight_norm(Residual(6, 6), "weight_hh_l0")
    input = torch.randn(4, 3, 6)
    expected = run(layer, input)
    with interpret(), lstm_triton.accelerate() as acceleration:
        results = run(layer, input)
    assert acceleration.taken_over == 1
    torch.testing.assert_close(results, expected)
    other = {name: 2 * weight for name, weight in layer.named_parameters()}
    with interpret(), lstm_triton.accelerate():
        output, _ = torch.func.functional_call(layer, other, (input,))
    torch.testing.assert_close(output, torch.func.functional_call(layer, other, (input,))[0])


@pytest.mark.interpreted
def test_training() -> None:
    """The same losses as without it, to the precision of single numbers, and every call taken over."""
    torch.manual_seed(0)
    input, target = torch.randn(4, 3, 5), torch.rand(4, 3, 9)
    losses = []
    with interpret(), lstm_triton.accelerate() as acceleration:
        for path in ("auto", "aten"):
            model = insistent()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            with lstm_triton.backend(path):
                for _ in range(4):
                    loss = nn.functional.mse_loss(model(input), target)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-5)
    assert losses[3] < losses[0]
    assert acceleration.taken_over == 4
    assert dict(acceleration.left) == {'the backend "aten" was asked for': 4}


@pytest.mark.interpreted
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model, input = insistent(), torch.randn(4, 3, 5, requires_grad=True)
    model(input).sum().backward()
    expected, input.grad = input.grad, None
    with interpret(), lstm_triton.accelerate() as acceleration:
        checkpoint(model, input, use_reentrant=use_reentrant).sum().backward()
    assert acceleration.taken_over == 2
    torch.testing.assert_close(input.grad, expected)


@pytest.mark.interpreted
def test_nested() -> None:
    """The inner one counts, and the outer one goes on after it."""
    model, input = insistent(), torch.randn(4, 3, 5)
    with interpret(), lstm_triton.accelerate() as outer:
        with lstm_triton.accelerate() as inner:
            model(input)
        assert (inner.taken_over, outer.taken_over) == (1, 0)
        model(input)
    assert (inner.taken_over, outer.taken_over) == (1, 1)


# --- Cells ---


class Decoder(nn.Module):
    """Steps of cells, as Tacotron 2 has them: one cell is a subclass, and one has computed weights."""

    def __init__(self) -> None:
        super().__init__()

        class Zoned(nn.LSTMCell):
            def forward(self, input: Tensor, hx: Any = None) -> Any:
                h, c = super().forward(input, hx)
                return h + 1, c

        self.first, self.second = Zoned(5, 9), parametrizations.weight_norm(nn.LSTMCell(9, 4, bias=False), "weight_hh")

    def forward(self, input: Tensor) -> Tensor:
        outer, inner = None, None
        for step in input:
            outer = self.first(step, outer)
            inner = self.second(outer[0], inner)
        return inner[0]


@pytest.mark.interpreted
@pytest.mark.parametrize("batch", [(), (2,)], ids=["unbatched", "batched"])
def test_cells_are_taken_over(batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, input = Decoder(), torch.randn(3, *batch, 5)
    results = []
    for inside in (False, True):
        model.zero_grad()
        with interpret(), lstm_triton.accelerate() if inside else nullcontext() as acceleration:
            output = model(input)
        output.square().sum().backward()
        results.append((output, [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(*results)
    assert str(acceleration).splitlines() == [
        "calls of torch._VF.lstm taken over by the kernels: 0",
        "calls of torch._VF.lstm_cell taken over by the kernels: 6",
    ]
    assert acceleration.taken_over == 6


def test_cells_are_left_to_pytorch_where_there_is_no_gpu() -> None:
    """Bit by bit. A cell of ours is not counted: it chooses its path itself."""
    model, ours, input = Decoder(), lstm_triton.LSTMCell(5, 9), torch.randn(3, 2, 5)
    expected = model(input), ours(input[0])
    before = torch._VF.lstm_cell
    with lstm_triton.accelerate() as acceleration:
        assert_same((model(input), ours(input[0])), expected)
    assert dict(acceleration.left) == {ON_THE_CPU: 6}
    assert torch._VF.lstm_cell is before


@pytest.mark.interpreted
def test_cells_with_wrong_arguments_get_pytorchs_own_answer() -> None:
    cell, zeros = nn.LSTMCell(3, 4), torch.zeros
    wrong: list[tuple[Any, ...]] = [
        (zeros(2, 5),),
        (zeros(1, 2, 3),),
        (zeros(2, 3), (zeros(3, 4), zeros(2, 4))),
        (zeros(2, 3), (zeros(2, 4),)),
        (None,),
    ]

    def answer(arguments: tuple[Any, ...]) -> tuple[type[Exception], str] | str:
        try:
            return str(cell(*arguments))
        except Exception as error:
            return type(error), str(error)

    expected = [answer(arguments) for arguments in wrong]
    with interpret(), lstm_triton.accelerate() as acceleration:
        assert [answer(arguments) for arguments in wrong] == expected
        with lstm_triton.backend("aten"):
            cell(zeros(2, 3))
    assert acceleration.taken_over == 0
    assert acceleration.left['the backend "aten" was asked for'] == 1


@pytest.mark.interpreted
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_cell_is_left_as_it_is(fullgraph: bool) -> None:
    """torch.compile looks into it, and what it compiles would outlive the block."""
    cell, input = nn.LSTMCell(3, 4), torch.randn(2, 3)
    expected = cell(input)
    compiled = torch.compile(cell, backend="eager", fullgraph=fullgraph)
    for _ in range(2):
        with interpret(), lstm_triton.accelerate() as acceleration:
            torch.testing.assert_close(compiled(input), expected)
        assert acceleration.taken_over == 0
        torch.testing.assert_close(compiled(input), expected)


@pytest.mark.interpreted
def test_a_layer_that_is_compiled_as_a_part_of_a_graph_is_left_as_it_is() -> None:
    """torch.compile looks into nn.LSTM only if it is told to."""
    layer, input = nn.LSTM(3, 4), torch.randn(2, 2, 3)
    expected = layer(input)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(allow_rnn=True), interpret(), lstm_triton.accelerate() as acceleration:
        torch.testing.assert_close(compiled(input), expected)
    assert acceleration.taken_over == 0


def test_pytorch_is_as_it_was_afterwards() -> None:
    before = torch._VF.lstm
    first, second = lstm_triton.accelerate(), lstm_triton.accelerate()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # in an order that threads might find
    insistent()(torch.randn(4, 3, 5))
    second.__exit__(None, None, None)
    insistent()(torch.randn(4, 3, 5))
    assert torch._VF.lstm is before
    assert (sum(first.left.values()), sum(second.left.values())) == (0, 1)


def test_another_takeover_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def other(*arguments: Any) -> Any:
        calls.append(arguments)
        return torch.lstm(*arguments)

    monkeypatch.setattr(torch._VF, "lstm", other, raising=False)
    with lstm_triton.accelerate():
        insistent()(torch.randn(4, 3, 5))
    assert len(calls) == 1
    assert torch._VF.lstm is other


class Other:
    """Another library's function in the place of `torch._VF.lstm`, which calls what it replaces."""

    def __init__(self) -> None:
        self.calls, self.replaced = 0, torch._VF.lstm
        torch._VF.lstm = self

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.replaced(*arguments)

    def remove(self) -> None:
        torch._VF.lstm = self.replaced


@pytest.fixture
def plain() -> Iterator[Any]:
    found = torch._VF.lstm
    yield found
    torch._VF.lstm = found


@pytest.mark.interpreted
def test_what_others_replace_inside_is_kept(plain: Any) -> None:
    model, input = insistent(), torch.randn(4, 3, 5)
    with interpret(), lstm_triton.accelerate() as acceleration:
        other = Other()
        with lstm_triton.accelerate() as inner:
            model(input)
        assert (other.calls, inner.taken_over) == (1, 1)
    assert torch._VF.lstm is other
    model(input)
    assert (other.calls, acceleration.taken_over) == (2, 0)
    for _ in range(2):
        with lstm_triton.accelerate() as acceleration:
            model(input)
            with interpret():
                model(input)
        assert acceleration.taken_over == 1
        assert dict(acceleration.left) == {ON_THE_CPU: 1}  # counted once, though `other` calls what was ours
        assert torch._VF.lstm is other
    assert other.calls == 4
    other.remove()
    with lstm_triton.accelerate() as acceleration:
        model(input)
    assert dict(acceleration.left) == {ON_THE_CPU: 1}
    assert torch._VF.lstm is plain


@pytest.mark.interpreted
def test_others_take_their_own_away_inside(plain: Any) -> None:
    """It then puts the original back, and does not know of ours. The next block takes over again."""
    model, input, other = insistent(), torch.randn(4, 3, 5), Other()
    with interpret(), lstm_triton.accelerate():
        other.remove()
        assert torch._VF.lstm is plain
        with lstm_triton.accelerate() as inner:
            model(input)
        assert inner.taken_over == 1
    assert torch._VF.lstm is plain


@pytest.mark.interpreted
def test_threads() -> None:
    """One block for the thread that enters it, another for all."""
    model, input = insistent(), torch.randn(4, 3, 5)

    def call() -> None:
        thread = threading.Thread(target=model, args=(input,))
        thread.start()
        thread.join()

    everywhere = lstm_triton.accelerate(all_threads=True)
    with interpret(all_threads=True), everywhere as for_all, lstm_triton.accelerate() as acceleration:
        call()
        assert (acceleration.taken_over, for_all.taken_over) == (0, 1)
        model(input)
        assert (acceleration.taken_over, for_all.taken_over) == (1, 1)
    call()
    assert for_all.taken_over == 1


@pytest.mark.interpreted
def test_counts_of_many_threads() -> None:
    model, input = insistent(), torch.randn(1, 1, 5)

    def call() -> None:
        for _ in range(20):
            model(input)

    with lstm_triton.accelerate(all_threads=True) as acceleration:
        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert dict(acceleration.left) == {ON_THE_CPU: 80}


def test_left_when_an_exception_ends_it() -> None:
    model = insistent()
    with pytest.raises(ZeroDivisionError), lstm_triton.accelerate() as acceleration:
        raise ZeroDivisionError
    model(torch.randn(4, 3, 5))
    assert not acceleration.left


@pytest.mark.interpreted
def test_the_path_asked_for() -> None:
    model, ours = insistent(), lstm_triton.LSTM(5, 9)
    input = torch.randn(4, 3, 5)
    with lstm_triton.accelerate() as acceleration:
        with lstm_triton.backend("triton"), pytest.raises(RuntimeError, match=ON_THE_CPU):
            model(input)
        with interpret():
            expected = lstm_triton.functional.lstm(input, None, list(ours.parameters()), backend="aten")
        assert not acceleration.left  # a call of ours that asked for PyTorch's function was meant so
        assert acceleration.taken_over == 0
    assert_same(ours(input), expected)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "change",
    [
        lambda arguments: arguments[:5],
        lambda arguments: ["input", *arguments[1:]],
        lambda arguments: [arguments[0][0], *arguments[1:]],
        lambda arguments: [arguments[0][:0], *arguments[1:]],
        lambda arguments: [arguments[0], arguments[1][:1], *arguments[2:]],
        lambda arguments: [*arguments[:2], arguments[2][:3], *arguments[3:]],
        lambda arguments: [*arguments[:2], [], *arguments[3:]],
    ],
)
def test_wrong_arguments_get_pytorchs_own_answer(change: Callable[[list[Any]], list[Any]]) -> None:
    weights = [weight.detach() for weight in nn.LSTM(5, 9).parameters()]
    hx = (torch.zeros(1, 3, 9), torch.zeros(1, 3, 9))
    arguments = change([torch.randn(4, 3, 5), hx, weights, True, 1, 0.0, False, False, False])

    def answer() -> tuple[type[Exception], str] | str:
        try:
            return str(torch._VF.lstm(*arguments))
        except Exception as error:
            return type(error), str(error)

    expected = answer()
    with interpret(), lstm_triton.accelerate() as acceleration:
        assert answer() == expected
    assert acceleration.taken_over == 0


@pytest.mark.interpreted
def test_a_model_that_is_compiled() -> None:
    """torch.compile runs an nn.LSTM as it is, between the graphs of what surrounds it."""
    model = copy.deepcopy(insistent())
    compiled = torch.compile(model, backend="eager")
    input = torch.randn(4, 3, 5)
    with interpret(), lstm_triton.accelerate() as acceleration, torch.no_grad():
        output = compiled(input)
    assert acceleration.taken_over == 1
    torch.testing.assert_close(output, model(input).detach())


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    _, stock = twins(40, 96, num_layers=2, bidirectional=True, dtype=torch.float16, device="cuda")
    input = torch.randn(25, 7, 40, device="cuda", dtype=torch.float16)
    with lstm_triton.backend("triton"), lstm_triton.accelerate() as acceleration:
        results = run(stock, input)
    assert acceleration.taken_over == 1
    assert_results_as_accurate(results, stock, input)


@pytest.mark.gpu
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_on_a_gpu(use_reentrant: bool) -> None:
    """What is computed again, is so by another thread, the GPU's own in autograd."""
    model = Insistent(twins(40, 96, dtype=torch.float16, device="cuda")[1])
    input = torch.randn(25, 7, 40, device="cuda", dtype=torch.float16, requires_grad=True)
    with lstm_triton.accelerate() as acceleration:
        model(input).sum().backward()
        expected, input.grad = input.grad, None
        checkpoint(model, input, use_reentrant=use_reentrant).sum().backward()
    assert acceleration.taken_over == 3
    assert_same(input.grad, expected)

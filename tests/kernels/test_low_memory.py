"""memory="low": the same gradients from much less, window of time by window."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lstm_triton
from lstm_triton import interpreter
from lstm_triton.scan import backward, forward, low_memory, windows
from tests.support.comparing import LoopLSTM, assert_results_as_accurate, run, twins
from tests.support.launches import recorded_launches

interpreted = pytest.mark.interpreted
KINDS = ("dense", "lengths", "resets", "packed")


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows also of a few steps: of five a first one, one in between, and a shorter last one."""
    monkeypatch.setattr(windows, "LOW_MEMORY_STEPS", 2)


def given_as(kind: str, input: Tensor) -> tuple[Tensor | PackedSequence, dict[str, Any]]:
    """The input, and what else the module is called with."""
    steps, batch_size = input.shape[:2]
    generator = torch.Generator().manual_seed(steps)
    lengths = torch.randint(1, steps + 1, (batch_size,), generator=generator)
    if kind == "packed":
        return pack_padded_sequence(input, lengths, enforce_sorted=False), {}
    if kind == "lengths":
        lengths[0] = 0
        return input, {"lengths": lengths}
    if kind == "resets":
        return input, {"lengths": lengths, "resets": torch.rand(steps, batch_size, generator=generator) < 0.3}
    return input, {}


def check(kind: str, dtype: torch.dtype, time_steps: int, batch_size: int, seed: int = 0, **options: Any) -> None:
    """Values and every gradient against float64, with nn.LSTM's error as the yardstick."""
    torch.manual_seed(time_steps)
    options = {"hidden_size": 11, "dtype": dtype, **options}
    ours, stock = twins(5, **options)
    ours.memory = "low"
    input, others = given_as(kind, torch.randn(time_steps, batch_size, 5).to(dtype))
    lanes = ours.num_layers * (2 if ours.bidirectional else 1)
    sizes = (ours.proj_size or ours.hidden_size, ours.hidden_size)
    hx = [torch.randn(lanes, batch_size, size).to(dtype) for size in sizes]
    if "resets" in others:
        others["reset_state"] = [torch.randn(lanes, batch_size, size).to(dtype) for size in sizes]
    if others:
        loop = LoopLSTM(5, **options)
        loop.load_state_dict(stock.state_dict())
        stock = loop
    with interpreter.interpret(seed), lstm_triton.backend("triton"):
        actual = run(ours, input, hx, **others)
    assert_results_as_accurate(actual, stock, input, hx, **others)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_nn_lstm(kind: str, dtype: torch.dtype) -> None:
    check(kind, dtype, 5, 5, num_layers=2)


@interpreted
@given(
    kind=st.sampled_from(KINDS),
    time_steps=st.integers(1, 9),
    batch_size=st.integers(1, 9),
    num_layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    hidden_size=st.integers(4, 20),
    proj_size=st.sampled_from((0, 3)),
    seed=st.integers(0, 2**32),
)
def test_any_stack(kind: str, time_steps: int, batch_size: int, seed: int, **options: Any) -> None:
    check(kind, torch.float32, time_steps, batch_size, seed, **options)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_on_one_result_alone(kind: str) -> None:
    torch.manual_seed(0)
    module = lstm_triton.LSTM(5, 11, num_layers=2, bidirectional=True)
    input, others = given_as(kind, torch.randn(5, 4, 5))
    found = []
    for memory in ("full", "low"):
        module.memory = memory
        with interpreter.interpret(), lstm_triton.backend("triton"):
            output, (h_n, c_n) = module(input, **others)
            results = {"output": output.data if isinstance(output, PackedSequence) else output, "h_n": h_n, "c_n": c_n}
            found.append(
                {
                    name: torch.autograd.grad(result.square().sum(), list(module.parameters()), retain_graph=True)
                    for name, result in results.items()
                }
            )
    torch.testing.assert_close(found[1], found[0])


@interpreted
def test_dropout_is_that_of_the_full_memory() -> None:
    """The mask is found again, from the seed."""
    torch.manual_seed(0)
    module = lstm_triton.LSTM(5, 11, num_layers=3, bidirectional=True, dropout=0.4)
    input = torch.randn(5, 4, 5)
    found = []
    for memory in ("full", "low"):
        module.memory = memory
        with interpreter.interpret(), lstm_triton.backend("triton"):
            found.append(run(module, input))
    torch.testing.assert_close(found[1], found[0])


@interpreted
def test_every_schedule_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    module = lstm_triton.LSTM(5, 21, num_layers=2, memory="low")
    input, others = given_as("resets", torch.randn(5, 4, 5))
    found = []
    for seed in range(3):
        with interpreter.interpret(seed), lstm_triton.backend("triton"):
            found.append(run(module, input, **others))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@interpreted
def test_second_derivatives() -> None:
    torch.manual_seed(0)
    input = torch.randn(5, 2, 3, requires_grad=True)
    module = lstm_triton.LSTM(3, 6, memory="low")

    def penalty() -> Tensor:
        (grad,) = torch.autograd.grad(module(input)[0].square().sum(), input, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), input)[0]

    expected = penalty()  # by PyTorch's own function
    with interpreter.interpret(), lstm_triton.backend("triton"):
        torch.testing.assert_close(penalty(), expected)


@interpreted
def test_cells_that_are_asked_for_are_kept() -> None:
    module = lstm_triton.LSTM(3, 6, memory="low")
    input = torch.randn(5, 2, 3)
    expected = module.with_cells(input)
    expected[2].sum().backward()
    gradient = module.weight_ih_l0.grad
    module.zero_grad()
    with interpreter.interpret(), lstm_triton.backend("triton"):
        actual = module.with_cells(input)
    actual[2].sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(module.weight_ih_l0.grad, gradient)


def test_the_option() -> None:
    assert lstm_triton.LSTM(3, 4).memory == "full"
    module = lstm_triton.LSTM(3, 4, memory="low")
    assert str(module) == "LSTM(3, 4, memory='low')"
    assert pickle.loads(pickle.dumps(module)).memory == copy.deepcopy(module).memory == "low"
    with pytest.raises(ValueError, match="memory must be one of 'full', 'low', got 'lower'"):
        lstm_triton.LSTM(3, 4, memory="lower")  # type: ignore[arg-type]
    weights = list(module.parameters())
    with pytest.raises(ValueError, match="memory must be one of 'full', 'low', got None"):
        lstm_triton.functional.lstm(torch.zeros(5, 2, 3), None, weights, memory=None)  # type: ignore[call-overload]


@interpreted
def test_windows_of_few_preactivations_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window whose input projections would be too large is cut into several launches of the forward scan."""
    torch.manual_seed(0)
    module = lstm_triton.LSTM(5, 11, num_layers=2, bidirectional=True, memory="low")
    monkeypatch.setattr(windows, "LOW_MEMORY_STEPS", 3)
    for kind in KINDS:
        input, others = given_as(kind, torch.randn(5, 4, 5))
        found = []
        for limit in (2**30, 1):
            monkeypatch.setattr(windows, "PREACTIVATION_BYTES", limit)
            with interpreter.interpret(), lstm_triton.backend("triton"):
                found.append(run(module, input, **others))
        torch.testing.assert_close(found[1], found[0])


@interpreted
@pytest.mark.parametrize("memory", ["full", "low"])
@pytest.mark.parametrize("options", [{"num_layers": 3}, {"bidirectional": True}, {"proj_size": 3}], ids=str)
def test_explain_counts_the_launches(options: dict[str, Any], memory: str) -> None:
    def launched() -> int:
        """How many scans and cells, which are what is explained, since the last time."""
        number = len([kernel for kernel in launches.kernels if kernel != "recompute_gates"])
        launches.clear()
        return number

    module = lstm_triton.LSTM(5, 11, memory=memory, **options)  # type: ignore[arg-type]
    with interpreter.interpret(), lstm_triton.backend("triton"), recorded_launches() as launches:
        for time_steps in (1, 5):
            input = torch.randn(time_steps, 4, 5)
            explained = lstm_triton.explain(module, input).launches
            module(input)[0].sum().backward()
            assert launched() == explained
            with torch.no_grad():
                explained = lstm_triton.explain(module, input).launches
                module(input)
            assert launched() == explained


@interpreted
def test_per_sample_gradients() -> None:
    torch.manual_seed(0)
    module = lstm_triton.LSTM(3, 5, num_layers=2, memory="low")
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    input = torch.randn(4, 5, 1, 3)

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (sample,))[0].square().sum()

    gradient = torch.func.grad(loss)
    expected = [gradient(weights, sample) for sample in input]
    with interpreter.interpret(), lstm_triton.backend("triton"):
        actual = torch.func.vmap(gradient, in_dims=(None, 0))(weights, input)
    for name, each in actual.items():
        torch.testing.assert_close(each, torch.stack([one[name] for one in expected]))


# --- How much is kept, and how much is needed at once ---


IMPLEMENTATIONS = {
    "scan_forward": forward.scan_forward._init_fn,
    "scan_backward": backward.scan_backward._init_fn,
    "low_memory_gradients": low_memory.low_memory_gradients._init_fn,
}


class Peak(TorchDispatchMode):
    """The bytes of all memory allocated inside, at the time at which they are the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        implementation = IMPLEMENTATIONS.get(func.name().split("::")[-1])
        if implementation is None:
            results = func(*args, **(kwargs or {}))
        else:
            with self:  # what this library's operators allocate on the way counts, too
                results = implementation(*args, **(kwargs or {}))
        given = {
            each.untyped_storage()._cdata for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)
        }
        for result in pytree.tree_leaves(results):
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in given:
                storage = result.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: each for key, each in self.live.items() if not each[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return results


def kept_bytes(call: Callable[[], Tensor], but: list[Tensor]) -> int:
    """The bytes that a graph keeps for backward, without those of some tensors."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    known = {tensor.untyped_storage().data_ptr() for tensor in but}
    return sum(size for storage, size in storages.items() if storage not in known)


@pytest.fixture
def frequent_collections() -> Iterator[None]:
    """Interpreted programs hold their arguments in cycles. mypy makes collections rare in the process it runs in."""
    threshold = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*threshold)


@interpreted
def test_a_third_of_nn_lstms_memory(frequent_collections: None) -> None:
    """What is kept, and at its peak all that a training step allocates beside its results, against what nn.LSTM keeps.

    Where the steps are many and the weights, of which there are some copies, are small beside them. nn.LSTM's figure is
    that of the CPU.
    """
    torch.manual_seed(0)
    time_steps, batch_size, hidden_size = 96, 16, 16
    dtype = torch.float32
    ours, stock = twins(hidden_size, hidden_size)
    ours.memory = "low"
    input = torch.randn(time_steps, batch_size, hidden_size).to(dtype)
    weights = list(ours.parameters())
    theirs = kept_bytes(lambda: stock(input)[0], [input, *stock.parameters()])
    numbers = time_steps * batch_size * hidden_size * dtype.itemsize
    with interpreter.interpret(), lstm_triton.backend("triton"):
        kept = kept_bytes(lambda: ours(input)[0], [input, *weights])
        grad = torch.randn(time_steps, batch_size, hidden_size).to(dtype)
        gc.collect()
        with Peak() as peak:
            ours(input)[0].backward(grad)
    figures = {"kept": kept, "peak": peak.bytes, "nn.LSTM keeps": theirs}
    print("numbers a unit and step:", {name: f"{size / numbers:.2f}" for name, size in figures.items()})
    assert kept <= 1.5 * numbers
    assert peak.bytes <= theirs / 3

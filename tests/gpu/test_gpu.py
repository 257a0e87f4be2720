"""The kernels on a real GPU: against float64, with nn.LSTM's error there as the yardstick."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_triton
from lstm_triton import target
from lstm_triton.commands.check import tf32
from lstm_triton.reference import lstm_layer
from lstm_triton.scan import dropout, planner, windows
from lstm_triton.scan.plan import Kind, ScanShape
from lstm_triton.scan.products import MatmulPrecision
from tests.support.cells import assert_cell_as_accurate, run_cell
from tests.support.comparing import LoopLSTM, assert_as_accurate, assert_results_as_accurate, run, twins
from tests.support.lanes import DTYPES, LaneCase, scan_layer
from tests.support.traces import assert_trace_as_accurate

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture(autouse=True, params=["tf32", "ieee"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """What cuDNN, and so the kernels, may use for float32."""
    with tf32(request.param == "tf32"):
        yield request.param


def skip_repeated(precision: str, dtype: torch.dtype) -> None:
    if dtype != torch.float32 and precision == "ieee":
        pytest.skip("the precision of float32 makes no difference here")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("seq_len", "batch_size", "input_size", "hidden_size"),
    [
        (1, 1, 1, 1),
        (5, 3, 7, 5),
        (20, 16, 64, 64),
        (20, 17, 33, 131),
        (30, 16, 256, 256),
        (30, 64, 128, 512),
        (20, 16, 768, 768),
        (10, 100, 300, 1000),
        (10, 16, 64, 1536),
        (6, 33, 64, 2048),
        (4, 8, 64, 3000),
        (4, 16, 64, 4096),
    ],
)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward in time", "reversed"])
def test_layer(
    seq_len: int, batch_size: int, input_size: int, hidden_size: int, dtype: torch.dtype, reverse: bool, precision: str
) -> None:
    skip_repeated(precision, dtype)
    LaneCase(seq_len, batch_size, input_size, hidden_size, dtype, reverse, device=DEVICE).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_every_candidate_plan(kind: Kind, dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    sizes = {"batch_size": 40, "input_size": 48, "hidden_size": 200, "dtype": dtype, "allow_tf32": precision == "tf32"}
    device = target.Device.of(torch.device(DEVICE))
    for chosen in planner.candidates(ScanShape(kind, device=device, **sizes)):  # type: ignore[arg-type]
        print(chosen)
        LaneCase(6, 40, 48, 200, dtype, device=DEVICE, **{kind: chosen}).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module(dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    ours, stock = twins(40, 96, num_layers=3, bidirectional=True, batch_first=True, dtype=dtype, device=DEVICE)
    input = torch.randn(7, 25, 40, device=DEVICE).to(dtype)
    with lstm_triton.backend("triton"):
        actual = run(ours, input)
    assert_results_as_accurate(actual, stock, input)


def lengths_of(seq_len: int, batch_size: int, shortest: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(batch_size)
    drawn = torch.randint(shortest, seq_len + 1, (batch_size,), generator=generator)
    return (seq_len, *drawn[1:].tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["packed", "lengths", "resets", "lengths, resets and cells"])
@pytest.mark.parametrize(
    ("seq_len", "batch_size", "input_size", "hidden_size"),
    [(5, 3, 7, 5), (20, 17, 33, 131), (30, 64, 128, 512), (10, 100, 300, 1000), (6, 33, 64, 2048), (12, 3000, 16, 64)],
)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward in time", "reversed"])
def test_ragged_layer(
    seq_len: int,
    batch_size: int,
    input_size: int,
    hidden_size: int,
    kind: str,
    dtype: torch.dtype,
    reverse: bool,
    precision: str,
) -> None:
    skip_repeated(precision, dtype)
    options: dict[str, Any] = {"resets": "resets" in kind, "cells": "cells" in kind}
    if kind == "packed":
        options |= {"lengths": tuple(sorted(lengths_of(seq_len, batch_size, 1), reverse=True)), "packed": True}
    elif "lengths" in kind:
        options["lengths"] = lengths_of(seq_len, batch_size)
    LaneCase(seq_len, batch_size, input_size, hidden_size, dtype, reverse, device=DEVICE, **options).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_module(dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    ours, stock = twins(40, 96, num_layers=2, bidirectional=True, dtype=dtype, device=DEVICE)
    lengths = torch.tensor(lengths_of(25, 19, 1)).flip(0)
    packed = pack_padded_sequence(torch.randn(25, 19, 40, device=DEVICE).to(dtype), lengths, enforce_sorted=False)
    hx = tuple(torch.randn(4, 19, 96, device=DEVICE).to(dtype) for _ in range(2))
    with lstm_triton.backend("triton"):
        actual = run(ours, packed, hx)
    assert_results_as_accurate(actual, stock, packed, hx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_with_lengths_resets_and_cells(dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "dtype": dtype, "device": DEVICE}
    ours, loop = lstm_triton.LSTM(40, 96, **options), LoopLSTM(40, 96, **options)
    loop.load_state_dict(ours.state_dict())
    lengths = torch.tensor(lengths_of(25, 19)).to(DEVICE)
    input = torch.randn(25, 19, 40, device=DEVICE).to(dtype)
    input = torch.where((torch.arange(25, device=DEVICE).unsqueeze(1) < lengths).unsqueeze(2), input, torch.nan)
    hx, reset_state = (tuple(torch.randn(4, 19, 96, device=DEVICE).to(dtype) for _ in range(2)) for _ in range(2))
    resets = torch.rand(25, 19, device=DEVICE) < 0.2
    extra: dict[str, Any] = {"lengths": lengths, "resets": resets, "reset_state": reset_state, "cells": True}
    with lstm_triton.backend("triton"):
        actual = run(ours, input, hx, **extra)
    assert_results_as_accurate(actual, loop, input, hx, **extra)


def sequences(kind: str, layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """What to call a module of 40 inputs and 96 hidden units with: T = 25, B = 19; NaN where there is no step."""
    input = torch.randn(25, 19, 40, device=DEVICE).to(dtype)
    states = [tuple(torch.randn(layers, 19, 96, device=DEVICE).to(dtype) for _ in range(2)) for _ in range(2)]
    arguments: dict[str, Any] = {"input": input, "hx": states[0]}
    if kind == "packed":
        lengths = torch.tensor(lengths_of(25, 19, 1))
        arguments["input"] = pack_padded_sequence(input, lengths, enforce_sorted=False)
    if "lengths" in kind:
        arguments["lengths"] = lengths = torch.tensor(lengths_of(25, 19)).to(DEVICE)
        is_step = torch.arange(25, device=DEVICE).unsqueeze(1) < lengths
        arguments["input"] = torch.where(is_step.unsqueeze(2), input, torch.nan)
    if "resets" in kind:
        arguments |= {"resets": torch.rand(25, 19, device=DEVICE) < 0.2, "reset_state": states[1]}
    return arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "packed", "lengths and resets"])
def test_trace(kind: str, dtype: torch.dtype, precision: str) -> None:
    """The values are those of the call, and of the formula in float64; gates are open to some degree."""
    skip_repeated(precision, dtype)
    module = lstm_triton.LSTM(40, 96, num_layers=2, bidirectional=True, dtype=dtype, device=DEVICE)
    arguments = sequences(kind, 4, dtype)
    with torch.no_grad(), lstm_triton.backend("triton"):
        expected = module(**arguments)
        inside = lstm_triton.trace(module, **arguments)
    assert inside.path == "triton"
    for layer in inside.layers:
        for gate in (layer.forget_gate, layer.input_gate, layer.output_gate):
            percentages = gate[~gate.isnan()]
            assert percentages.numel() == inside.lengths.sum() * 96
            assert ((percentages >= 0) & (percentages <= 1)).all()
    with MatmulPrecision(precision):  # of the gates that are compared with
        assert_trace_as_accurate(inside, module, arguments)
    if dtype == torch.float32 and precision == "tf32":
        return  # what reaches the next layer may have been rounded elsewhere
    output, (h_n, c_n) = expected
    shown_output, output = (each.data for each in (inside.output, output))  # .data of packed sequences
    for shown, returned in ((shown_output, output), (inside.h_n, h_n), (inside.c_n, c_n)):
        assert_as_accurate(shown, returned.double(), returned)  # up to four units in the last place


class StreamedLSTM(lstm_triton.LSTM):
    """A layer that is given its sequences in chunks, each with the states after the one before."""

    def forward(self, input: torch.Tensor, hx: Any = None, **options: Any) -> Any:  # type: ignore[override]
        outputs = []
        for start, end in ((0, 1), (1, 12), (12, 25)):
            chunk = dict(options)
            if "lengths" in options:
                chunk["lengths"] = (options["lengths"] - start).clamp(0, end - start)
            if "resets" in options:
                chunk["resets"] = options["resets"][start:end]
            output, hx = super().forward(input[start:end], hx, **chunk)
            outputs.append(output)
        return torch.cat(outputs), hx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "lengths", "resets", "lengths and resets"])
def test_chunks_are_the_whole(kind: str, dtype: torch.dtype, precision: str) -> None:
    """In results and gradients, as accurate as the whole has to be."""
    skip_repeated(precision, dtype)
    streamed, loop = (cls(40, 96, num_layers=2, dtype=dtype, device=DEVICE) for cls in (StreamedLSTM, LoopLSTM))
    loop.load_state_dict(streamed.state_dict())
    arguments = sequences(kind, 2, dtype)
    with lstm_triton.backend("triton"):
        actual = run(streamed, **arguments)
    assert_results_as_accurate(actual, loop, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((30, 32, 512, 512), {"num_layers": 4}),
        ((20, 33, 100, 200), {"num_layers": 3, "bias": False}),
        ((20, 32, 512, 512), {"num_layers": 2, "bidirectional": True}),
        ((20, 17, 64, 256), {"num_layers": 2, "proj_size": 64}),
        ((20, 32, 64, 131), {"num_layers": 2, "proj_size": 50, "bidirectional": True}),
    ],
    ids=["chained", "odd sizes", "both directions", "projected", "projected, both directions"],
)
def test_stack(sizes: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    seq_len, batch_size, input_size, hidden_size = sizes
    ours, stock = twins(input_size, hidden_size, **options, dtype=dtype, device=DEVICE)
    input = torch.randn(seq_len, batch_size, input_size, device=DEVICE).to(dtype)
    lanes = options["num_layers"] * (2 if options.get("bidirectional") else 1)
    states = (options.get("proj_size") or hidden_size, hidden_size)
    hx = tuple(torch.randn(lanes, batch_size, size, device=DEVICE).to(dtype) for size in states)
    with lstm_triton.backend("triton"):
        print(lstm_triton.explain(ours, input, hx))
        actual = run(ours, input, hx)
    assert_results_as_accurate(actual, stock, input, hx)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "both directions"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_every_candidate_plan_of_two_lanes(kind: Kind, bidirectional: bool, precision: str) -> None:
    sizes = {"batch_size": 40, "input_size": 200, "hidden_size": 100, "dtype": torch.float32}
    ours, stock = twins(200, 100, num_layers=2, bidirectional=bidirectional, device=DEVICE)
    input = torch.randn(6, 40, 200, device=DEVICE)
    device = target.Device.of(torch.device(DEVICE))
    shape = ScanShape(kind, device=device, allow_tf32=precision == "tf32", lanes=2, chained=not bidirectional, **sizes)
    for chosen in planner.candidates(shape):
        print(chosen)
        with lstm_triton.backend("triton"), planner.forced(chosen, kind):
            actual = run(ours, input)
        assert_results_as_accurate(actual, stock, input)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_and_resets_in_a_chain(dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    ours, loop = (cls(64, 512, num_layers=4, dtype=dtype, device=DEVICE) for cls in (lstm_triton.LSTM, LoopLSTM))
    loop.load_state_dict(ours.state_dict())
    input = torch.randn(25, 19, 64, device=DEVICE).to(dtype)
    extra: dict[str, Any] = {
        "lengths": torch.tensor(lengths_of(25, 19)).to(DEVICE),
        "resets": torch.rand(25, 19, device=DEVICE) < 0.1,
        "cells": True,
    }
    with lstm_triton.backend("triton"):
        actual = run(ours, input, **extra)
    assert_results_as_accurate(actual, loop, input, **extra)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["layers", "both directions"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype: torch.dtype, bidirectional: bool, precision: str) -> None:
    """The masks of dropout.dropout_scale, forward and backward, whatever shares a launch; and their statistics."""
    skip_repeated(precision, dtype)
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": bidirectional, "dtype": dtype, "device": DEVICE}
    ours, loop = lstm_triton.LSTM(64, 256, dropout=0.3, **options), LoopLSTM(64, 256, **options)
    loop.load_state_dict(ours.state_dict())
    input = torch.randn(20, 32, 64, device=DEVICE).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seed = torch.randint(2**63 - 1, (1,), device=DEVICE)  # as `run` makes the scan draw it
    for lane in range(2 if bidirectional else 1):
        kept = dropout.dropout_scale(seed, lane, 0.3, torch.empty(20, 32, 256, device=DEVICE)) > 0
        assert abs(kept.double().mean().item() - 0.7) < 4 * (0.3 * 0.7 / kept.numel()) ** 0.5
        loop.masks = [*loop.masks, kept / (1 - 0.3)]
    with lstm_triton.backend("triton"):
        actual = run(ours, input)
    assert_results_as_accurate(actual, loop, input)


@pytest.mark.parametrize("kind", ["packed", "lengths and resets"])
def test_the_host_never_waits(kind: str, precision: str) -> None:
    """Forward and backward, once what is asked of a new layer once has been asked."""
    module = lstm_triton.LSTM(40, 96, num_layers=2, bidirectional=True, device=DEVICE)
    data = torch.randn(25, 19, 40, device=DEVICE, requires_grad=True)
    input: Any = data
    extra: dict[str, Any] = {}
    if kind == "packed":
        input = pack_padded_sequence(data, torch.tensor(lengths_of(25, 19, 1)), enforce_sorted=False)
    else:
        extra = {
            "lengths": torch.tensor(lengths_of(25, 19)).to(DEVICE),
            "resets": torch.rand(25, 19, device=DEVICE) < 0.2,
            "reset_state": tuple(torch.randn(4, 19, 96, device=DEVICE, requires_grad=True) for _ in range(2)),
        }

    def step() -> None:
        with lstm_triton.backend("triton"):
            output, (h_n, c_n), cells = module.with_cells(input, **extra)
        rows = output.data if kind == "packed" else output
        loss = rows.square().sum() + h_n.sum() + c_n.sum() + cells.sum()
        torch.autograd.grad(loss, list(module.parameters()))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_from_run_to_run(dtype: torch.dtype, precision: str) -> None:
    layer = LaneCase(50, 64, 96, 512, dtype, device=DEVICE)
    first = layer.run(scan_layer)
    for _ in range(5):
        for name, tensor in layer.run(scan_layer).items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers(value: float, precision: str) -> None:
    ours, stock = twins(8, 64, device=DEVICE)
    input = torch.randn(20, 16, 8, device=DEVICE)
    input[10, 3, 2] = value
    with torch.no_grad(), lstm_triton.backend("triton"):
        actual, expected = ours(input)[0], stock(input)[0]
    assert torch.equal(actual.isnan(), expected.isnan())


def test_sequences_and_batches_share_kernels(precision: str) -> None:
    """No compilation when the number of steps changes, nor for batches of the same kind."""
    from lstm_triton.kernels.backward import backward_scan
    from lstm_triton.kernels.forward import forward_scan

    module = lstm_triton.LSTM(64, 128, dtype=torch.float16, device=DEVICE)

    def compiled() -> int:
        return sum(
            len(caches[0]) for kernel in (forward_scan, backward_scan) for caches in kernel.device_caches.values()
        )

    def step(seq_len: int, batch_size: int) -> None:
        with lstm_triton.backend("triton"):
            module(torch.randn(seq_len, batch_size, 64, device=DEVICE, dtype=torch.float16))[0].sum().backward()

    step(16, 16)
    before = compiled()
    assert before > 0
    for seq_len in (1, 2, 17, 64, 1000):
        step(seq_len, 16)
    for batch_size in (13, 14, 15):
        step(16, batch_size)
    assert compiled() == before


@pytest.mark.parametrize(
    ("seq_len", "batch_size"),
    [(100_000, 4), (40, 100_000), (340, 100_000)],
    ids=["long", "wide", "more than 2^31 gates"],
)
def test_long_and_wide(seq_len: int, batch_size: int, precision: str) -> None:
    """Values and gradients, seen on the last rows of the batch: rows do not know of each other."""
    if precision == "tf32":
        pytest.skip("float16: the precision of float32 makes no difference here")
    hidden_size, seen = 16, slice(batch_size - 4, None)
    if torch.cuda.mem_get_info()[0] < 40 * seq_len * batch_size * hidden_size:
        pytest.skip("needs more free memory on the GPU")
    ours, stock = twins(4, hidden_size, dtype=torch.float16, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    input = torch.randn(seq_len, batch_size, 4, device=DEVICE, dtype=torch.float16, generator=generator)
    input.requires_grad_()
    with lstm_triton.backend("triton"):
        output, (h_n, _) = ours(input)
    assert torch.equal(output[-1], h_n[0])
    (gradient,) = torch.autograd.grad(output[:, seen].sum(), input)
    if batch_size > 4:
        assert not gradient[:, :-4].any()

    few = input.detach()[:, seen].contiguous().requires_grad_()
    expected, hx, chunk = [], None, 10_000  # steps at a time: cuDNN takes no more than 65,535
    for start in range(0, seq_len, chunk):
        part, hx = stock(few[start : start + chunk], hx)
        expected.append(part)
    whole = torch.cat(expected)
    torch.testing.assert_close(output[:, seen], whole, rtol=2e-2, atol=2e-2)
    (expected_gradient,) = torch.autograd.grad(whole.sum(), few)
    torch.testing.assert_close(gradient[:, seen], expected_gradient, rtol=5e-2, atol=5e-2)


def test_long_inference_in_windows(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 steps, whose input projections never exist all at once; the same as in one window."""
    if precision == "tf32":
        pytest.skip("float16: the precision of float32 makes no difference here")
    module = lstm_triton.LSTM(64, 128, num_layers=2, dtype=torch.float16, device=DEVICE)
    input = torch.randn(100_000, 4, 64, device=DEVICE, dtype=torch.float16)
    results, peaks = [], []
    for window_bytes in (2**40, 2**24):
        monkeypatch.setattr(windows, "PREACTIVATION_BYTES", window_bytes)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode(), lstm_triton.backend("triton"):
            output, _ = module(input)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append(output)
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)
    print(f"peak: {peaks[0] / 2**20:.0f} MiB in one window, {peaks[1] / 2**20:.0f} MiB in windows")
    assert peaks[1] <= peaks[0]


def test_second_derivatives(precision: str) -> None:
    if precision == "tf32":
        pytest.skip("the formula's own precision follows another setting")
    layer = LaneCase(4, 3, 5, 20, device=DEVICE)

    def penalty(function: object, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        arguments = [t.to(dtype).requires_grad_() for t in layer.tensors() if t is not None]
        output, _, _ = function(*arguments, reverse=False)  # type: ignore[operator]
        grads = torch.autograd.grad(output.square().sum(), arguments, create_graph=True)
        return torch.autograd.grad(torch.stack([grad.square().sum() for grad in grads]).sum(), arguments)

    actual, expected = penalty(scan_layer, torch.float32), penalty(lstm_layer, torch.float64)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


def test_first_call_is_reported(precision: str) -> None:
    """How long the first call of a new layer takes: printed, not judged."""
    module = lstm_triton.LSTM(24, 72, dtype=torch.bfloat16, device=DEVICE)
    started = time.perf_counter()
    with lstm_triton.backend("triton"):
        output, _ = module(torch.randn(4, 2, 24, device=DEVICE, dtype=torch.bfloat16))
    output.sum().backward()
    torch.cuda.synchronize()
    print(f"first forward and backward of a new layer: {time.perf_counter() - started:.2f} s")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 33, 37), (16, 768, 768), (100, 300, 1000), (4, 64, 4096)], ids=str)
def test_cell(sizes: tuple[int, int, int], dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    batch_size, input_size, hidden_size = sizes
    torch.manual_seed(0)
    ours = lstm_triton.LSTMCell(input_size, hidden_size, dtype=dtype, device=DEVICE)
    stock = torch.nn.LSTMCell(input_size, hidden_size, dtype=dtype, device=DEVICE)
    stock.load_state_dict(ours.state_dict())
    tensors = [
        torch.randn(batch_size, size, device=DEVICE).to(dtype) for size in (input_size, hidden_size, hidden_size)
    ]
    with MatmulPrecision(precision), lstm_triton.backend("triton"):
        actual = run_cell(ours, *tensors)
        with torch.no_grad():
            h, c = ours(tensors[0], (tensors[1], tensors[2]))
    with MatmulPrecision(precision):
        assert_cell_as_accurate(actual, stock, *tensors)
    torch.testing.assert_close((h, c), (actual["h_1"], actual["c_1"]))


@pytest.mark.parametrize("hidden_size", [1, 4, 8, 16])
def test_many_steps_of_small_layers(hidden_size: int, precision: str) -> None:
    """Tiles of few elements: a sentinel that slips through is a NaN."""
    module = lstm_triton.LSTM(3, hidden_size, device=DEVICE)
    input = torch.randn(5000, 8, 3, device=DEVICE, requires_grad=True)
    with lstm_triton.backend("triton"):
        output, _ = module(input)
    output.sum().backward()
    assert output.isfinite().all()
    assert input.grad is not None
    assert input.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_steps_without_gradients(dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    ours, stock = twins(40, 96, num_layers=2, bidirectional=True, dtype=dtype, device=DEVICE)
    input, hx = torch.randn(1, 25, 40, device=DEVICE).to(dtype), torch.randn(2, 4, 25, 96, device=DEVICE).to(dtype)
    with torch.no_grad(), lstm_triton.backend("triton"):
        actual = ours(input, tuple(hx))
        expected = stock(input, tuple(hx))
        exact = stock.double()(input.double(), tuple(hx.double()))
    for one, right, other in zip(
        (actual[0], *actual[1]), (exact[0], *exact[1]), (expected[0], *expected[1]), strict=True
    ):
        assert_as_accurate(one, right, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 32}], ids=str)
def test_low_memory(options: dict[str, Any], dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    ours, stock = twins(40, 96, num_layers=2, dtype=dtype, device=DEVICE, **options)
    ours.memory = "low"
    input = torch.randn(100, 17, 40, device=DEVICE).to(dtype)  # windows of 32 steps, and one of 4
    with lstm_triton.backend("triton"):
        actual = run(ours, input)
    assert_results_as_accurate(actual, stock, input)


def test_low_memory_needs_a_third(precision: str) -> None:
    """The peak of a training step, beside the input, against what nn.LSTM keeps for backward."""
    if precision == "tf32":
        pytest.skip("float16: the precision of float32 makes no difference here")
    input = torch.randn(2048, 64, 1024, device=DEVICE, dtype=torch.float16)
    if torch.cuda.mem_get_info()[0] < 16 * input.nbytes:
        pytest.skip("needs more free memory on the GPU")
    ours, stock = twins(1024, 1024, dtype=torch.float16, device=DEVICE)
    ours.memory = "low"
    weights = sum(weight.nbytes for weight in ours.parameters())
    with lstm_triton.backend("triton"):
        ours(input[:64])[0].sum().backward()  # compiles
    ours.zero_grad()
    before = torch.cuda.memory_allocated()
    output, _ = stock(input)
    theirs = torch.cuda.memory_allocated() - before
    del output
    torch.cuda.reset_peak_memory_stats()
    with lstm_triton.backend("triton"):
        output, _ = ours(input)
    kept = torch.cuda.memory_allocated() - before
    output.backward(input)
    peak = torch.cuda.max_memory_allocated() - before - 4 * weights  # gradients, and their sums in float32
    figures = {"kept": kept, "peak": peak, "nn.LSTM keeps": theirs}
    print("units of the output:", {name: f"{size / output.nbytes:.2f}" for name, size in figures.items()})
    assert peak <= theirs / 3

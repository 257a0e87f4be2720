"""The kernels on a real GPU: against float64, with nn.LSTM's error there as the yardstick."""

import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import lstm_triton
from lstm_triton import planner
from lstm_triton.autograd import scan_layer

from .comparing import assert_results_as_accurate, run, twins
from .kernel_cases import DTYPES, Layer

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=["tf32", "ieee"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """What cuDNN, and so the kernels, may use for float32."""
    settings = torch.backends.cudnn.rnn
    previous = settings.fp32_precision
    settings.fp32_precision = request.param
    yield request.param
    settings.fp32_precision = previous


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
    ],
)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward in time", "reversed"])
def test_layer(
    seq_len: int, batch_size: int, input_size: int, hidden_size: int, dtype: torch.dtype, reverse: bool, precision: str
) -> None:
    skip_repeated(precision, dtype)
    Layer(seq_len, batch_size, input_size, hidden_size, dtype, reverse, device="cuda").check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_every_candidate_plan(kind: planner.Kind, dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    sizes = {"batch_size": 40, "input_size": 48, "hidden_size": 200, "dtype": dtype, "allow_tf32": precision == "tf32"}
    device = planner.Device.of(torch.device("cuda"))
    for chosen in planner.candidates(kind, device=device, **sizes):  # type: ignore[arg-type]
        print(chosen)
        Layer(6, 40, 48, 200, dtype, device="cuda", **{kind: chosen}).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module(dtype: torch.dtype, precision: str) -> None:
    skip_repeated(precision, dtype)
    ours, stock = twins(40, 96, num_layers=3, bidirectional=True, batch_first=True, dtype=dtype, device="cuda")
    input = torch.randn(7, 25, 40, device="cuda").to(dtype)
    with lstm_triton.backend("triton"):
        actual = run(ours, input)
    assert_results_as_accurate(actual, stock, input)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_from_run_to_run(dtype: torch.dtype, precision: str) -> None:
    layer = Layer(50, 64, 96, 512, dtype, device="cuda")
    first = layer.run(scan_layer)
    for _ in range(5):
        for name, tensor in layer.run(scan_layer).items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers(value: float, precision: str) -> None:
    ours, stock = twins(8, 64, device="cuda")
    input = torch.randn(20, 16, 8, device="cuda")
    input[10, 3, 2] = value
    with torch.no_grad(), lstm_triton.backend("triton"):
        actual, expected = ours(input)[0], stock(input)[0]
    assert torch.equal(actual.isnan(), expected.isnan())


def test_sequences_and_batches_share_kernels(precision: str) -> None:
    """No compilation when the number of steps changes, nor for batches of the same kind."""
    from lstm_triton.kernels.backward import backward_scan
    from lstm_triton.kernels.forward import forward_scan

    module = lstm_triton.LSTM(64, 128, dtype=torch.float16, device="cuda")

    def compiled() -> int:
        return sum(
            len(caches[0]) for kernel in (forward_scan, backward_scan) for caches in kernel.device_caches.values()
        )

    def step(seq_len: int, batch_size: int) -> None:
        module(torch.randn(seq_len, batch_size, 64, device="cuda", dtype=torch.float16))[0].sum().backward()

    step(16, 16)
    before = compiled()
    for seq_len in (1, 2, 17, 64, 1000):
        step(seq_len, 16)
    for batch_size in (13, 14, 15):
        step(16, batch_size)
    assert compiled() == before


def test_long_and_wide(precision: str) -> None:
    """T = 100,000, B = 100,000, and more than 2^31 gate elements in all."""
    module = lstm_triton.LSTM(4, 16, dtype=torch.float16, device="cuda")
    stock = nn.LSTM(4, 16, dtype=torch.float16, device="cuda")
    stock.load_state_dict(module.state_dict())
    for seq_len, batch_size, chunk in ((100_000, 4, 10_000), (40, 100_000, 40), (340, 100_000, 340)):
        if torch.cuda.mem_get_info()[0] < 24 * seq_len * batch_size * 16:
            pytest.skip("needs more free memory on the GPU")
        generator = torch.Generator("cuda").manual_seed(0)
        input = torch.randn(seq_len, batch_size, 4, device="cuda", dtype=torch.float16, generator=generator)
        with torch.no_grad():
            output, (h_n, _) = module(input)
            assert torch.equal(output[-1], h_n[0])
            rows = slice(batch_size - 4, None)
            hx = None
            for start in range(0, seq_len, chunk):
                expected, hx = stock(input[start : start + chunk, rows].contiguous(), hx)
                torch.testing.assert_close(output[start : start + chunk, rows], expected, rtol=2e-2, atol=2e-2)


def test_second_derivatives(precision: str) -> None:
    if precision == "tf32":
        pytest.skip("the formula's own precision follows another setting")
    layer = Layer(4, 3, 5, 20, device="cuda")
    arguments = [tensor.requires_grad_() for tensor in layer.tensors() if tensor is not None]
    output, _, _ = scan_layer(*arguments, reverse=False)
    grads = torch.autograd.grad(output.square().sum(), arguments, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), arguments)
    assert all(tensor.isfinite().all() for tensor in second)


def test_first_call_is_reported(precision: str) -> None:
    """How long the first call of a new layer takes: printed, not judged."""
    module = lstm_triton.LSTM(24, 72, dtype=torch.bfloat16, device="cuda")
    started = time.perf_counter()
    module(torch.randn(4, 2, 24, device="cuda", dtype=torch.bfloat16))[0].sum().backward()
    torch.cuda.synchronize()
    print(f"first forward and backward of a new layer: {time.perf_counter() - started:.2f} s")

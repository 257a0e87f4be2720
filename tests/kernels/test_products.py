"""Matrix products outside the scans."""

import random
import time
from threading import Thread

import pytest
import torch

from lstm_triton.onednn import without_onednn
from lstm_triton.scan import products

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("input_size", [1, 4, 7])
def test_nan_stays_in_its_row(dtype: torch.dtype, input_size: int) -> None:
    """Rows without a step may hold NaN, and each row belongs to another sequence."""
    rows, weight = torch.randn(34, input_size, dtype=dtype), torch.randn(32, input_size, dtype=dtype)
    rows[5] = torch.nan
    projected = torch.empty(34, 32, dtype=dtype)  # NaN, too: see conftest.py
    products.project(rows, weight, projected)
    assert projected.isnan().any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("fails", ["_precision", "_set_precision"])
def test_a_setting_that_cannot_be_changed_blocks_nobody(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def fail(*_: str) -> None:
        raise RuntimeError("no such setting")

    before = torch.backends.cuda.matmul.fp32_precision
    with monkeypatch.context() as patch:
        patch.setattr(products, fails, fail)
        with pytest.raises(RuntimeError, match="no such setting"), products.MatmulPrecision("tf32"):
            pass
    with products.MatmulPrecision("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("enabled", [True, False])
def test_onednn_comes_back_after_several_threads(enabled: bool) -> None:
    seen = list[bool]()

    def turn_off() -> None:
        for _ in range(20):
            with without_onednn():
                time.sleep(random.random() / 1e4)
                seen.append(torch._C._get_mkldnn_enabled())

    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        threads = [Thread(target=turn_off) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch._C._get_mkldnn_enabled() == enabled
        assert not any(seen)
    finally:
        torch._C._set_mkldnn_enabled(before)

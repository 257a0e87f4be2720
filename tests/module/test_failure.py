"""An error of the GPU, raised where this library next asks it for something, says what to do."""

from collections.abc import Iterator

import pytest
import torch

import lstm_triton
from lstm_triton import interpreter, target
from lstm_triton.failure import KernelFailed, explained
from lstm_triton.scan import buffers


@pytest.fixture(params=["buffer", "kernel"])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The GPU fails when it is asked to fill a buffer, or for a kernel. Yields the message."""
    message = "CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"

    def fail(*arguments: object, **keywords: object) -> None:
        raise RuntimeError(message)

    pytest.importorskip("triton")
    with interpreter.interpret(), lstm_triton.backend("triton"):
        if request.param == "buffer":
            monkeypatch.setattr(buffers, "sentinels", fail)
        else:
            monkeypatch.setattr(target.current(), "run", fail)
        yield message


@pytest.mark.interpreted
def test_forward(failing: str) -> None:
    with pytest.raises(KernelFailed, match=r"unspecified launch failure.*start it again") as raised:
        lstm_triton.LSTM(3, 4)(torch.randn(5, 2, 3))
    assert str(raised.value.__cause__) == failing


@pytest.mark.interpreted
def test_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with interpreter.interpret(), lstm_triton.backend("triton"):
        output, _ = lstm_triton.LSTM(3, 4)(torch.randn(5, 2, 3))
        monkeypatch.setattr(buffers, "sentinels", fail)
        with pytest.raises(KernelFailed, match="illegal memory access"):
            output.sum().backward()


@pytest.mark.interpreted
def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(RuntimeError):
        pass

    def fail(*arguments: object) -> None:
        raise Own("out of memory")

    monkeypatch.setattr(buffers, "sentinels", fail)
    with interpreter.interpret(), lstm_triton.backend("triton"), pytest.raises(Own):
        lstm_triton.LSTM(3, 4)(torch.randn(5, 2, 3))
    assert explained(ValueError("out of memory")) is None

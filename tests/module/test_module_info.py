"""lstm_triton.LSTM under the inputs by which PyTorch tests nn.LSTM itself.

They are read in a process of their own: PyTorch's test helpers freeze the global flags of torch.backends, among others.
"""

import subprocess
import sys

import torch
from torch import nn

import lstm_triton
from tests.support.comparing import assert_same, run
from tests.support.processes import ROOT


def compare_samples() -> int:
    """Compare results and gradients of every sample, and return how many there are."""
    from torch.testing._internal.common_modules import module_db

    (info,) = (info for info in module_db if info.module_cls is nn.LSTM)
    samples = [
        (sample, training, dtype)
        for training in (True, False)
        for dtype in (torch.float32, torch.float64)
        for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
    ]
    for sample, training, dtype in samples:
        constructor, args = sample.constructor_input, sample.forward_input.args
        stock = nn.LSTM(*constructor.args, **constructor.kwargs, dtype=dtype).train(training)
        ours = lstm_triton.LSTM(*constructor.args, **constructor.kwargs, dtype=dtype).train(training)
        ours.load_state_dict(stock.state_dict())
        assert_same(run(ours, *args), run(stock, *args))
        torch.testing.assert_close(ours(*args), sample.reference_fn(stock, *args))
    return len(samples)


def test_module_info_of_pytorch() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "tests.module.test_module_info"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) == 128  # with and without biases, batch_first, reverse direction, projections, states


if __name__ == "__main__":
    print(compare_samples())

"""An LSTM layer for PyTorch that runs in Triton kernels: `lstm_triton.LSTM` in place of `torch.nn.LSTM`.

    >>> import torch, lstm_triton
    >>> lstm = lstm_triton.LSTM(input_size=10, hidden_size=20, num_layers=2)
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))

From the outside in: `module` (the layer with its parameters) -> `functional` (checks, the choice of a path, the stack
of layers) -> `scan` (the path through the kernels) or `aten` (PyTorch's own function). `tracing` looks inside. Triton
and the kernels are imported when a call first needs them.
"""

import signal

from .ending import leave_at_once, starts

if starts("lstm_triton"):  # the imports below take seconds, in which Ctrl-C would show a traceback
    signal.signal(signal.SIGINT, leave_at_once)

from . import functional, reference
from .acceleration import Acceleration, accelerate
from .cell import LSTMCell
from .convert import Replacement, replace_lstm
from .explanation import Explanation, explain
from .module import LSTM
from .preference import backend
from .restoration import Restoration, to_torch
from .tracing import Trace, trace

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "Acceleration",
    "Explanation",
    "LSTMCell",
    "Replacement",
    "Restoration",
    "Trace",
    "__version__",
    "accelerate",
    "backend",
    "explain",
    "functional",
    "reference",
    "replace_lstm",
    "to_torch",
    "trace",
]

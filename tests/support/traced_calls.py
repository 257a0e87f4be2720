"""`python -m tests.support.traced_calls`: traces calls through the kernels in one graph each, and prints their names.

The GPU is a pretended one: kernels do nothing. So every version of Triton will do, and no interpreter is needed.
"""

import torch

import lstm_triton
from bench.overhead import pretended_gpu

STATE = torch.zeros(1, 2, 16)
CALLS = (
    ("a layer", {}, {}),
    ("layers in both directions, with dropout", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}, {}),
    ("projections", {"proj_size": 8}, {}),
    ("lengths", {}, {"lengths": torch.tensor([3, 1])}),
    ("resets", {}, {"resets": torch.zeros(4, 2, dtype=torch.bool)}),
    ("memory", {"memory": "low"}, {}),
    ("one tensor as both states", {}, {"hx": (STATE, STATE)}),
)


def main() -> None:
    for name, options, arguments in CALLS:
        for trains in (True, False):
            torch._dynamo.reset()
            lstm = lstm_triton.LSTM(16, 16, **options)  # type: ignore[arg-type]
            lstm.compile(fullgraph=True, backend="aot_eager")
            with pretended_gpu(), lstm_triton.backend("triton"), torch.set_grad_enabled(trains):
                output, _ = lstm(torch.randn(4, 2, 16), **arguments)
                if trains:
                    output.sum().backward()
            print(f"{name}, {'training' if trains else 'inference'}")
    cell = lstm_triton.LSTMCell(16, 16)
    cell.compile(fullgraph=True, backend="aot_eager")
    with pretended_gpu(), lstm_triton.backend("triton"):
        h, _ = cell(torch.randn(2, 16))
        h.sum().backward()
    print("a cell, training")


if __name__ == "__main__":
    main()

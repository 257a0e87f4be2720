"""One layer in one direction, through the kernels and through nn.LSTM: what kernel tests compare, over which cases."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lstm_triton import interpreter, planner
from lstm_triton.autograd import scan_layer
from lstm_triton.planner import Device, Kind, Plan
from lstm_triton.reference import lstm_layer

from .comparing import assert_as_accurate, floor_of, nudged

NAMES = ("output", "h_n", "c_n")
ARGUMENTS = ("input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Layer:
    """A layer's sizes and options, and the plans its scans are to run with (None: the planner's own)."""

    seq_len: int
    batch_size: int
    input_size: int
    hidden_size: int
    dtype: torch.dtype = torch.float32
    reverse: bool = False
    states: bool = True
    bias: bool = True
    device: str = "cpu"
    forward: Plan | None = None
    backward: Plan | None = None

    def tensors(self) -> list[Tensor | None]:
        """Arguments of scan_layer, in its order."""
        generator = torch.Generator().manual_seed(self.hidden_size)

        def uniform(*sizes: int) -> Tensor:
            return (2 * torch.rand(sizes, generator=generator) - 1).to(self.dtype).to(self.device)

        gates, scale = 4 * self.hidden_size, self.hidden_size**-0.5
        return [
            2 * uniform(self.seq_len, self.batch_size, self.input_size),
            uniform(self.batch_size, self.hidden_size) if self.states else None,
            uniform(self.batch_size, self.hidden_size) if self.states else None,
            uniform(gates, self.input_size) * self.input_size**-0.5,
            uniform(gates, self.hidden_size) * scale,
            uniform(gates) * scale if self.bias else None,
            uniform(gates) * scale if self.bias else None,
        ]

    def run(
        self, function: object, change: Callable[[Tensor], Tensor] = lambda tensor: tensor, seed: int = 0
    ) -> dict[str, Tensor]:
        """Results and gradients by name; `function` has scan_layer's parameters, `change` makes its arguments."""
        arguments = [tensor if tensor is None else change(tensor).requires_grad_() for tensor in self.tensors()]
        with ExitStack() as stack:
            if function is scan_layer and self.device == "cpu":
                stack.enter_context(interpreter.interpret(seed))
            kinds: tuple[tuple[Kind, Plan | None], ...] = (("forward", self.forward), ("backward", self.backward))
            for kind, plan in kinds:
                if plan is not None:
                    stack.enter_context(planner.forced(plan, kind))
            results = function(*arguments, reverse=self.reverse)  # type: ignore[operator]
            generator = torch.Generator().manual_seed(1)
            grads = [torch.randn(r.shape, generator=generator).bfloat16().to(r.device, r.dtype) for r in results]
            torch.autograd.backward(results, grads)
        found = dict(zip(NAMES, results, strict=True))
        found |= {f"gradient of {n}": t.grad for n, t in zip(ARGUMENTS, arguments, strict=True) if t is not None}
        return {name: tensor.detach() for name, tensor in found.items()}

    def stock(self, *arguments: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """nn.LSTM as a function with scan_layer's parameters."""
        input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh = arguments
        assert input is not None
        module = nn.LSTM(self.input_size, self.hidden_size, bias=self.bias, dtype=input.dtype, device=self.device)
        weights = {"weight_ih_l0": weight_ih, "weight_hh_l0": weight_hh, "bias_ih_l0": bias_ih, "bias_hh_l0": bias_hh}
        hx = None if h_0 is None or c_0 is None else (h_0.unsqueeze(0), c_0.unsqueeze(0))
        output, (h_n, c_n) = torch.func.functional_call(
            module,
            {name: weight for name, weight in weights.items() if weight is not None},
            (input.flip(0) if reverse else input, hx),
        )
        return output.flip(0) if reverse else output, h_n[0], c_n[0]

    def check(self, seed: int = 0) -> None:
        """The kernels are as accurate as nn.LSTM, in every result and gradient."""
        print(self)
        actual = self.run(scan_layer, seed=seed)
        reference, stock = self.run(lstm_layer, torch.Tensor.double), self.run(self.stock)
        sensitive = self.run(lstm_layer, lambda tensor: nudged(tensor.double(), self.dtype))
        for name, tensor in actual.items():
            floor = floor_of(sensitive[name], reference[name], self.dtype)
            assert_as_accurate(tensor, reference[name], stock[name], floor=floor, name=name)


@st.composite
def layers(draw: st.DrawFn, largest_hidden: int = 50) -> Layer:
    """Any layer with any plan that fits a small device: one program or many, one tile or several, streamed or not."""
    sizes = {
        "batch_size": draw(st.integers(1, 20)),
        "input_size": draw(st.integers(1, 40)),
        "hidden_size": draw(st.integers(1, largest_hidden)),
        "dtype": draw(st.sampled_from(DTYPES)),
    }
    plans = {}
    for kind in ("forward", "backward"):
        device = Device(
            "small",
            arch=draw(st.sampled_from(("interpreter", "sm_90"))),
            multiprocessors=draw(st.integers(1, 12)),
            shared_bytes=draw(st.sampled_from((16, 32, 64, 200))) * 1024,
        )
        found = planner.candidates(kind, **sizes, device=device, allow_tf32=False)  # type: ignore[arg-type]
        if found:
            plan = draw(st.sampled_from(found))
            plans[kind] = interpretable(plan)
    return Layer(
        seq_len=draw(st.integers(1, 4)),
        **sizes,
        reverse=draw(st.booleans()),
        states=draw(st.booleans()),
        bias=draw(st.booleans()),
        **plans,
    )


def interpretable(plan: Plan) -> Plan:
    """The plan without what only a GPU can do: the interpreter has no inline assembly."""
    return replace(plan, packed=False, dot_precision="ieee")

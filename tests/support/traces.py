"""What a trace shows, by name, and how it is compared."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_triton
from lstm_triton.interpreter import interpret
from lstm_triton.tracing import Trace, trace
from tests.support.comparing import assert_as_accurate, floor_of, nudged

GATES = ("input_gate", "forget_gate", "candidate", "output_gate")
VALUES = (*GATES, "cell_state", "hidden_state")


def values_of(inside: Trace[Any]) -> dict[str, Tensor]:
    """Every tensor of a trace that can be compared, by name."""
    named = {f"{name} of {layer}": getattr(layer, name) for layer in inside.layers for name in VALUES}
    output = inside.output.data if isinstance(inside.output, PackedSequence) else inside.output
    return named | {"output": output, "h_n": inside.h_n, "c_n": inside.c_n}


def traced(module: nn.RNNBase, path: str, seed: int = 0, **arguments: Any) -> Trace[Any]:
    with interpret(seed) if path == "triton" else nullcontext(), lstm_triton.backend(path):
        return trace(module, **arguments)


def assert_trace_as_accurate(actual: Trace[Any], module: nn.RNNBase, arguments: dict[str, Any]) -> None:
    """Each value is as close to float64 as what PyTorch's own function gives in the module's dtype."""
    dtype = actual.h_n.dtype

    def in_float64(change: Any) -> dict[str, Tensor]:
        wide = copy.deepcopy(module).double()
        with torch.no_grad():
            for parameter in wide.parameters():
                parameter.copy_(change(parameter))
        given = {}
        for name, value in arguments.items():
            if isinstance(value, PackedSequence):
                value = value._replace(data=change(value.data.double()))
            elif isinstance(value, tuple):
                value = tuple(change(state.double()) for state in value)
            elif value.is_floating_point():
                value = change(value.double())
            given[name] = value
        return values_of(traced(wide, "aten", **given))

    stock = values_of(traced(module, "aten", **arguments))
    reference, sensitive = in_float64(lambda tensor: tensor), in_float64(lambda tensor: nudged(tensor, dtype))
    for name, tensor in values_of(actual).items():
        floor = floor_of(sensitive[name], reference[name], dtype)
        assert_as_accurate(tensor, reference[name], stock[name], floor=floor, name=name)

"""One step of lstm_triton.LSTMCell and of nn.LSTMCell: what the tests of the cell compare."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lstm_triton
from lstm_triton import interpreter
from tests.support.comparing import assert_as_accurate, floor_of, nudged


def cell_twins(*args: Any, **kwargs: Any) -> tuple[lstm_triton.LSTMCell, nn.LSTMCell]:
    """Ours and PyTorch's, made from the same seed."""
    cells = []
    for cls in (lstm_triton.LSTMCell, nn.LSTMCell):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            cells.append(cls(*args, **kwargs))
    return cells[0], cells[1]


def run_cell(cell: nn.Module, *tensors: Tensor) -> dict[str, Tensor]:
    """Results and gradients of one step by name, given (input,) or (input, h, c); what flows back is random."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    cell.zero_grad()
    results = cell(leaves[0], tuple(leaves[1:]) or None)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=generator).bfloat16().to(r.device, r.dtype) for r in results]
    torch.autograd.backward(results, grads)
    found = dict(zip(("h_1", "c_1"), results, strict=True))
    named = {**dict(zip(("input", "h_0", "c_0"), leaves, strict=False)), **dict(cell.named_parameters())}
    found |= {f"gradient of {name}": leaf.grad for name, leaf in named.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def cell_arguments(
    batch_size: int, input_size: int, hidden_size: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """(input, h, c)"""
    generator = torch.Generator().manual_seed(hidden_size)
    sizes = (input_size, hidden_size, hidden_size)
    return [torch.randn(batch_size, size, generator=generator).to(dtype) for size in sizes]


def check_cell(tensors: list[Tensor], hidden_size: int, bias: bool = True, seed: int = 0) -> None:
    """The kernels are as accurate as nn.LSTMCell, in results and gradients."""
    ours, stock = cell_twins(tensors[0].shape[-1], hidden_size, bias=bias, dtype=tensors[0].dtype)
    with interpreter.interpret(seed), lstm_triton.backend("triton"):
        actual = run_cell(ours, *tensors)
    assert_cell_as_accurate(actual, stock, *tensors)


def assert_cell_as_accurate(actual: dict[str, Tensor], stock: nn.LSTMCell, *tensors: Tensor) -> None:
    """`assert_as_accurate` for every entry of `run_cell(cell, *tensors)`, given the nn.LSTMCell of the same weights."""

    def in_float64(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        cell = copy.deepcopy(stock).double()
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.copy_(change(parameter))
        return run_cell(cell, *(change(tensor.double()) for tensor in tensors))

    expected, reference = run_cell(stock, *tensors), in_float64(lambda tensor: tensor)
    dtype = tensors[0].dtype
    sensitive = in_float64(lambda tensor: nudged(tensor, dtype))
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        floor = floor_of(sensitive[name], reference[name], dtype)
        assert_as_accurate(tensor, reference[name], expected[name], floor=floor, name=name)

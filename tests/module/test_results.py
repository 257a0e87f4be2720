"""Results belong to the caller: their memory is their own, and they may be changed in place, whatever H is."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_triton
from lstm_triton import interpreter

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

TIME_STEPS, BATCH_SIZE, INPUT_SIZE = 4, 2, 3
KINDS: dict[str, dict[str, Any]] = {
    "a layer": {},
    "layers": {"num_layers": 3},
    "directions": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "projections": {"proj_size": 4},
    "packed": {},
    "lengths": {},
    "cells": {"num_layers": 2},
    "cells in 16 bits": {"dtype": torch.bfloat16},
    "cells and lengths": {},
}


class Case:
    """A module and what it is called with."""

    def __init__(self, kind: str, hidden_size: int, **options: Any) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.module = lstm_triton.LSTM(INPUT_SIZE, hidden_size, **{**KINDS[kind], **options})
        shape = (BATCH_SIZE, TIME_STEPS) if self.module.batch_first else (TIME_STEPS, BATCH_SIZE)
        self.input = torch.randn(*shape, INPUT_SIZE).to(self.module.weight_hh_l0.dtype)

    def results(self) -> list[Tensor]:
        """Output, h_n, c_n, and cells if asked for."""
        lengths = torch.tensor([TIME_STEPS, 2])
        call: Any = self.module.with_cells if "cells" in self.kind else self.module
        with interpreter.interpret(), lstm_triton.backend("triton"):
            if self.kind == "packed":
                output, states = call(pack_padded_sequence(self.input, lengths))
                assert isinstance(output, PackedSequence)
                return [output.data, *states]
            output, states, *cells = call(self.input, **({"lengths": lengths} if "lengths" in self.kind else {}))
        return [output, *states, *cells]

    def gradients(self, results: list[Tensor]) -> tuple[Tensor, ...]:
        loss = torch.stack([result.float().sin().sum() for result in results]).sum()
        with interpreter.interpret(), lstm_triton.backend("triton"):
            return torch.autograd.grad(loss, list(self.module.parameters()))


@pytest.mark.parametrize("hidden_size", [16, 5], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_in_place(kind: str, hidden_size: int) -> None:
    """Every result at once: the gradients are those of the same change of a copy."""
    case = Case(kind, hidden_size)
    expected = case.gradients([2 * result for result in case.results()])
    results = case.results()
    for result in results:
        assert result.untyped_storage().nbytes() == result.numel() * result.itemsize
        result.mul_(2)
    torch.testing.assert_close(case.gradients(results), expected)


@pytest.mark.parametrize("hidden_size", [16, 5], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize("time_steps", [TIME_STEPS, 1])
@pytest.mark.parametrize("kind", ["a layer", "cells"])
def test_without_gradients(kind: str, time_steps: int, hidden_size: int) -> None:
    """No result changes with another one."""
    case = Case(kind, hidden_size)
    case.input = case.input[:time_steps]
    with torch.no_grad():
        results = case.results()
        expected = [result.clone() * 2 for result in results]
        for result in results:
            result.mul_(2)
        torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_saved_output_is_no_larger_than_its_numbers() -> None:
    output = Case("layers", 16).results()[0].detach()
    file, expected = io.BytesIO(), io.BytesIO()
    torch.save(output, file)
    torch.save(output.clone(), expected)
    assert len(file.getvalue()) == len(expected.getvalue())


@pytest.mark.parametrize("hidden_size", [16, 5], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_with_low_memory(num_layers: int, hidden_size: int) -> None:
    """One layer keeps the output itself, where no row is padded. Then backward notices the change, as in nn.LSTM."""
    case = Case("a layer", hidden_size, num_layers=num_layers, memory="low")
    expected = case.gradients([2 * result for result in case.results()])
    results = case.results()
    for result in results:
        result.mul_(2)
    if num_layers == 1 and hidden_size == 16:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            case.gradients(results)
    else:
        torch.testing.assert_close(case.gradients(results), expected)


def test_compiled_with_low_memory() -> None:
    case = Case("a layer", 16, memory="low")
    case.module.compile(fullgraph=True, backend="aot_eager")
    results = case.results()
    results[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case.gradients(results)

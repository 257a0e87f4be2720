"""Look inside an LSTM: the gates and both memories of every step, computed by the path that the call takes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .call import Call, Sequences
from .checks import call_of_module
from .functional import run
from .ragged import Ragged, padded
from .refusal import LaunchRefused
from .routing import choose, fall_back
from .stack import LaneResults, LaneWeights, Start, States

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """What one layer did in one direction. T time steps, B sequences (1 without a batch), H hidden units, P outputs.

    All tensors are (T, B, H), whatever the layout of the input. Only `hidden_state` is (T, B, P), where P is H unless
    projected. Steps are in the order of time, in both directions. Sequences are in the order in which they were given.
    The dtype is the dtype that the layer computes in. Values are NaN where a sequence has no step.

    Attributes:
        layer: counted from 0.
        direction: of reading; "reverse" starts from the end of the sequence.
        forget_gate: what part of the long-term memory is kept, 0 to 1.
        input_gate: what part of the potential memory is added to the long-term memory, 0 to 1.
        output_gate: what part of the long-term memory becomes the new short-term memory, 0 to 1.
        candidate: the potential memory, -1 to 1.
        cell_state: the long-term memory, c_t = forget_gate * c_{t-1} + input_gate * candidate.
        hidden_state: the short-term memory, h_t = output_gate * tanh(c_t), multiplied by W_hr if projected.
    """

    layer: int
    direction: Literal["forward", "reverse"]
    forget_gate: Tensor = field(repr=False)
    input_gate: Tensor = field(repr=False)
    output_gate: Tensor = field(repr=False)
    candidate: Tensor = field(repr=False)
    cell_state: Tensor = field(repr=False)
    hidden_state: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class Trace(Generic[Sequences]):
    """What `trace` saw.

    Attributes:
        path: what computed the call: "triton", the kernels, or "aten", PyTorch's own function.
        layers: one entry per layer and direction, the directions of a layer side by side.
        lengths: (B,) the number of steps of each sequence.
        output, h_n, c_n: what the module returns, in the module's layout.
    """

    path: Literal["triton", "aten"]
    layers: tuple[LayerTrace, ...]
    lengths: Tensor = field(repr=False)
    output: Sequences = field(repr=False)
    h_n: Tensor = field(repr=False)
    c_n: Tensor = field(repr=False)

    def layer(self, layer: int = 0, direction: str = "forward") -> LayerTrace:
        """One entry of `layers`.

        Args:
            layer: counted from 0.
            direction: "forward" or "reverse".

        Raises:
            ValueError: there is no such layer or direction.
        """
        for found in self.layers:
            if (found.layer, found.direction) == (layer, direction):
                return found
        known = ", ".join(f"({found.layer}, {found.direction!r})" for found in self.layers)
        raise ValueError(f"layer and direction must be one of {known}, got ({layer}, {direction!r})")

    def plot(
        self,
        layer: int = 0,
        direction: str = "forward",
        sequence: int = 0,
        *,
        units: "Sequence[int] | None" = None,
        title: str | None = None,
    ) -> "Figure":
        """Draw one sequence over time: up to four hidden units as lines, more as heat maps.

        Args:
            layer, direction: which of `layers`.
            sequence: which sequence of the batch.
            units: the hidden units to draw; None: all.
            title: of the figure; None: what is drawn.

        Returns:
            A matplotlib Figure. It opens no window. `figure.savefig("trace.png")` writes it to a file, and notebooks
            show it with `display(figure)`.

        Raises:
            ValueError: there is no such layer, direction, sequence or unit, or the sequence has no steps.
            ModuleNotFoundError: matplotlib is not installed; it comes with `lstm-triton[demo]`.
        """
        shown = self.layer(layer, direction)
        _, batch_size, hidden_size = shown.cell_state.shape
        if not 0 <= sequence < batch_size:
            raise ValueError(f"sequence must be from 0 to {batch_size - 1}, got {sequence}")
        units = range(hidden_size) if units is None else units
        if len(units) == 0 or not all(0 <= unit < hidden_size for unit in units):
            raise ValueError(f"units must be some of 0 to {hidden_size - 1}, got {list(units)}")
        steps = int(self.lengths[sequence])
        if steps == 0:
            raise ValueError(f"sequence {sequence} has no steps to draw")
        try:
            from . import pictures
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] not in ("matplotlib", "numpy"):
                raise
            message = f"plot needs {error.name}, which comes with: pip install 'lstm-triton[demo]'"
            raise ModuleNotFoundError(message, name=error.name) from None
        if title is None:
            title = f"Layer {layer}, {direction}, sequence {sequence}: the gates and memories of "
            title += f"{len(units)} hidden units" if len(units) > 1 else f"hidden unit {units[0]}"
        values = {name: value[:steps, sequence] for name, value in vars(shown).items() if isinstance(value, Tensor)}
        return pictures.draw(values, list(units), title)


def trace(
    module: nn.RNNBase,
    input: Sequences,
    hx: States | list[Tensor] | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: States | list[Tensor] | None = None,
) -> Trace[Sequences]:
    """Run a module, and keep what is inside: the gates' percentages, the long-term and the short-term memory.

    On the Triton path, gates and cells are what the kernels themselves keep. PyTorch's own function returns only h_t.
    There the formula computes the gates from each step's input and h_{t-1}, and c_t from the gates. `trace` calls
    PyTorch's own function layer by layer, so it may round packed sequences differently than one call of all layers
    does. Packed sequences on the CPU are traced without autocast.

    Args:
        module: an `lstm_triton.LSTM`, or an `nn.LSTM`, which is run as an `lstm_triton.LSTM`. Dropout is off, as in
            evaluation, even if the module is in training.
        input, hx, lengths, resets, reset_state: as `lstm_triton.LSTM` takes them.

    Returns:
        Tensors without gradients; see `Trace` and `LayerTrace` for their shapes.

    Raises:
        TypeError: the module is no LSTM.
        TypeError, ValueError, RuntimeError: what the call itself would raise.

    >>> import lstm_triton
    >>> inside = trace(lstm_triton.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3))
    >>> inside.layers
    (LayerTrace(layer=0, direction='forward'), LayerTrace(layer=1, direction='forward'))
    >>> inside.layers[1].forget_gate.shape, torch.equal(inside.layers[1].hidden_state, inside.output)
    (torch.Size([5, 2, 4]), True)
    """
    sequences = {"lengths": lengths, "resets": resets, "reset_state": reset_state}
    call = call_of_module(module, input, hx, caller="trace", **sequences)._replace(training=False)
    path = choose(None, call).path
    try:
        seen, tables, results = _inside(call, input, path)
    except LaunchRefused as error:
        fall_back(error, call, None)
        path = "aten"
        seen, tables, results = _inside(call, input, path)
    output, (h_n, c_n) = results

    directions: list[Literal["forward", "reverse"]] = ["forward", "reverse"]
    order = input.unsorted_indices if isinstance(input, PackedSequence) else None
    lengths = torch.full((call.batch_size,), call.time_steps, dtype=torch.int32, device=h_n.device)
    if tables is not None:
        lengths = tables.lengths
        seen = [tuple(padded(values, tables) for values in inside) for inside in seen]
    if order is not None:
        lengths = lengths.index_select(0, order)
        seen = [tuple(values.index_select(1, order) for values in inside) for inside in seen]
    layers = (
        LayerTrace(index // call.directions, directions[index % call.directions], *inside)
        for index, inside in enumerate(seen)
    )
    return Trace(path, tuple(layers), lengths, output, h_n, c_n)


def _inside(
    call: Call, input: Sequences, path: str
) -> tuple[list[tuple[Tensor, ...]], Ragged | None, tuple[Sequences, States]]:
    """What is inside each lane in the order of `LayerTrace`, the tables of a ragged call, and the call's results."""
    if path == "triton":
        from .scan.inside import scan_lane_inside as look_inside
    else:
        from .aten.inside import native_lane_inside as look_inside
    seen: list[tuple[Tensor, ...]] = []
    tables: Ragged | None = None

    def lane(
        input: Tensor, start: Start, weights: LaneWeights, *, reverse: bool, ragged: Ragged | None, return_cells: bool
    ) -> LaneResults:
        nonlocal tables
        tables = ragged
        results, gates, cells = look_inside(input, start, weights, reverse=reverse, ragged=ragged)
        seen.append((gates.forget, gates.input, gates.output, gates.candidate, cells, results[0]))
        return results

    with torch.no_grad(), _autocast_of(call, path):
        output, states, _ = run(call, input, path, lane)
    return seen, tables, (output, states)


def _autocast_of(call: Call, path: str) -> AbstractContextManager[object]:
    """Autocast as it is; off for packed sequences on the CPU, whose dtype PyTorch's own function keeps."""
    data = call.data
    left_alone = path == "aten" and call.batch_sizes is not None and data.device.type == "cpu"
    if left_alone and data.dtype == call.weights[0].dtype:
        return torch.autocast("cpu", enabled=False)
    return nullcontext()

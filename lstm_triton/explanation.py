"""`explain`: what a call would do, without computing it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .call import Call, CellCall, has_several_dtypes
from .cell_checks import checked_call_of_cell
from .checks import call_of_module, check_memory
from .functional import compute
from .routing import choose
from .target import Device

if TYPE_CHECKING:
    from .scan.plan import CellPlan, Kind, Plan


@dataclass(frozen=True)
class LayerExplanation:
    """Which path one layer takes in one direction, and why."""

    layer: int
    direction: Literal["forward", "reverse"]
    path: Literal["triton", "aten"]
    reason: str


@dataclass(frozen=True)
class ScanLaunch:
    """One launch of a kernel of this library.

    Attributes:
        kind: "forward" or "backward"; for single steps "cell" or "cell backward".
        lanes: the lanes that the launch computes, as positions in `Explanation.layers`.
        plan: the sizes that the planner chose; None if it chose none.
        times: how often the kernel is launched, over all windows of time.
    """

    kind: Literal["forward", "backward", "cell", "cell backward"]
    lanes: tuple[int, ...]
    plan: "Plan | CellPlan | None"
    times: int = 1


@dataclass(frozen=True)
class Explanation:
    """What `explain` found out; `print` it.

    Attributes:
        layers: every direction of every layer.
        scans: the launches of this library's kernels: forward, and if gradients are enabled backward. With gradients
            enabled, `explain` assumes that some are needed. PyTorch's own launches are not counted.
    """

    module: str
    device: str
    dtype: torch.dtype
    time_steps: int
    batch_size: int
    layers: tuple[LayerExplanation, ...]
    scans: tuple[ScanLaunch, ...]

    @property
    def launches(self) -> int:
        return sum(scan.times for scan in self.scans)

    def __str__(self) -> str:
        lines = [
            f"{self.module} on {self.device}, {self.dtype}, T={self.time_steps}, B={self.batch_size}",
            "layer  direction  path    why",
        ]
        lines += [f"{each.layer:>5}  {each.direction:<9}  {each.path:<6}  {each.reason}" for each in self.layers]
        for number, scan in enumerate(self.scans, 1):
            what = scan.kind if "cell" in scan.kind else f"{scan.kind} scan of {self._named(scan.lanes)}"
            what += "" if scan.times == 1 else f", {scan.times} times"
            lines.append(f"launch {number}: {what}" + ("" if scan.plan is None else f": {scan.plan}"))
        if self.scans:
            lines.append(f"launches in all: {self.launches}")
        return "\n".join(lines)

    __repr__ = __str__

    def _named(self, lanes: tuple[int, ...]) -> str:
        first, last = (self.layers[lane] for lane in (lanes[0], lanes[-1]))
        layers = f"layer {first.layer}" if first.layer == last.layer else f"layers {first.layer} to {last.layer}"
        if len({each.direction for each in self.layers}) == 1:
            return layers
        return layers + (" in both directions" if first.direction != last.direction else f", {first.direction}")


def explain(
    module: nn.RNNBase | nn.LSTMCell,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | list[Tensor] | None = None,
) -> Explanation:
    """What `module(input, hx)` would do here and now, without computing it.

    Args:
        module: an `LSTM` or `LSTMCell` of lstm_triton, or of `torch.nn`. A module of `torch.nn` is explained as if it
            were the module of lstm_triton.
        input, hx: as the module takes them. An input on the "meta" device, which has sizes but no memory, stands for
            an input on the device of the module's weights.

    Raises:
        TypeError: the module is no LSTM.
        ValueError, RuntimeError: what the call itself would raise.

    >>> import lstm_triton
    >>> print(explain(lstm_triton.LSTM(3, 4), torch.empty(100, 16, 3, device="meta")))
    LSTM(3, 4) on cpu, torch.float32, T=100, B=16
    layer  direction  path    why
        0  forward    aten    the kernels run on NVIDIA GPUs, not on 'cpu' tensors
    """
    if isinstance(module, nn.LSTMCell):
        return _explained_cell(module, input, hx)
    if isinstance(module, nn.RNNBase):
        input, hx = _with_memory(module, input, hx)
    call = call_of_module(module, input, hx)
    check_memory(call.data, call.states or (), call.weights)
    choice = choose(None, call)
    if has_several_dtypes(call):
        with torch.no_grad():
            compute(_piece(call), choice.path)
    names: list[Literal["forward", "reverse"]] = ["forward", "reverse"] if call.directions == 2 else ["forward"]
    layers = [LayerExplanation(layer, direction, *choice) for layer in range(call.num_layers) for direction in names]
    dtype = call.autocast_dtype() or call.data.dtype
    launches = _launches_of_lstm(call, dtype) if choice.path == "triton" else []
    sizes = (call.time_steps, call.batch_size)
    return Explanation(str(module), str(call.data.device), dtype, *sizes, tuple(layers), tuple(launches))


def _explained_cell(module: nn.LSTMCell, input: object, hx: object) -> Explanation:
    input, hx = _with_memory(module, input, hx)
    call = checked_call_of_cell(module, input, hx)
    choice = choose(None, call)
    if call.states is not None and has_several_dtypes(call):
        with torch.no_grad():  # PyTorch's own function alone knows which mixtures of dtypes it takes
            nn.LSTMCell.forward(module, call.data[:1], (call.states[0][:1], call.states[1][:1]))
    dtype = call.autocast_dtype() or call.data.dtype
    launches = _launches_of_cell(call, dtype) if choice.path == "triton" else []
    layers = (LayerExplanation(0, "forward", *choice),)
    return Explanation(str(module), str(call.data.device), dtype, 1, call.batch_size, layers, tuple(launches))


def _with_memory(module: nn.Module, input: Any, hx: Any) -> tuple[Any, Any]:
    """The arguments of a call. For those on the "meta" device, tensors where the weights are, of the same sizes.

    They have one element of memory.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    like = next(module.parameters(), None)
    if not isinstance(data, Tensor) or not data.is_meta or like is None:
        return input, hx

    def stand_in(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta:
            return like.new_empty((), dtype=value.dtype).expand(value.shape)
        return value

    input = input._replace(data=stand_in(data)) if isinstance(input, PackedSequence) else stand_in(data)
    return input, type(hx)(stand_in(state) for state in hx) if type(hx) in (tuple, list) else hx


def _piece(call: Call) -> Call:
    """One sequence of at most two steps. PyTorch's own function alone knows which mixtures of dtypes it takes."""
    states = None if call.states is None else (call.states[0][:, :1], call.states[1][:, :1])
    steps = min(call.time_steps, 2)
    piece = call._replace(states=states, time_steps=steps, batch_size=1, sorted_indices=None, training=False)
    if call.batch_sizes is None:
        return piece._replace(data=call.data[:1, :steps] if call.batch_first else call.data[:steps, :1])
    return piece._replace(data=call.data[:steps], batch_sizes=call.batch_sizes.new_ones(steps))


def _launches_of_lstm(call: Call, dtype: torch.dtype) -> list[ScanLaunch]:
    from .scan.schedule import is_single_step

    trains = torch.is_grad_enabled()
    # The given h of projected layers is added to input projections in memory (`Start.preact`).
    fuse_input = not (call.projected() and (call.states is not None or call.reset_state is not None))
    has_dropout = call.training and call.dropout > 0 and call.num_layers > 1 and not call.projected()
    if not trains and is_single_step(call.time_steps, not call.dense(), has_dropout, fuse_input):
        launches = []
        for lane in range(call.num_layers * call.directions):
            input_size = call.weights[0].shape[1] if lane < call.directions else call.directions * call.output_size
            launches.append(ScanLaunch("cell", (lane,), _cell_plan(call, dtype, input_size, "rnn")))
        return launches
    kinds: tuple[Kind, ...] = ("forward", "backward") if trains else ("forward",)
    return [scan for kind in kinds for scan in _scans(kind, call, dtype, fuse_input)]


def _scans(kind: "Kind", call: Call, dtype: torch.dtype, fuse_input: bool) -> list[ScanLaunch]:
    from .scan.launch import allows_tf32
    from .scan.plan import ScanShape
    from .scan.schedule import backward_schedules, forward_schedules

    trains, device = torch.is_grad_enabled(), Device.of(call.data.device)
    low_memory = trains and call.low_memory
    # Projected layers are scanned one by one: between two of them, a matrix product projects the output.
    layers_together = 1 if call.projected() else call.num_layers
    found: list[ScanLaunch] = []
    for layer in range(0, call.num_layers, layers_together):
        input_size = call.weights[0].shape[1] if layer == 0 else call.directions * call.output_size
        first = ScanShape(kind, call.batch_size, input_size, call.hidden_size, dtype, device, allows_tf32())
        sizes = (first, layers_together, call.directions, call.time_steps)
        if kind == "forward":
            keep_gates = trains and not low_memory
            schedules = forward_schedules(*sizes, keep_gates=keep_gates, low_memory=low_memory, fuse_input=fuse_input)
        else:
            schedules = backward_schedules(*sizes, low_memory=low_memory)
        for schedule in schedules:
            lanes = tuple(layer * call.directions + lane for lane in schedule.planned.lanes)
            found.append(ScanLaunch(kind, lanes, schedule.planned.plan, schedule.times))
    return found


def _launches_of_cell(call: CellCall, dtype: torch.dtype) -> list[ScanLaunch]:
    forward = ScanLaunch("cell", (0,), _cell_plan(call, dtype, call.data.shape[1], "matmul"))
    return [forward, ScanLaunch("cell backward", (0,), None)] if torch.is_grad_enabled() else [forward]


def _cell_plan(call: Call | CellCall, dtype: torch.dtype, input_size: int, precision_of: str) -> "CellPlan":
    from .scan.cell import plan_of_cell

    stand_in = call.data.new_empty(1, dtype=dtype).expand(call.batch_size, input_size)
    return plan_of_cell(stand_in, call.hidden_size, precision_of)

"""Which path a call takes, the Triton kernels or PyTorch's own function, and why."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import transforms

if TYPE_CHECKING:
    from .functional import Call
    from .planner import CellPlan, Kind, Plan

Function = TypeVar("Function", bound=Callable[..., Any])

BACKENDS = ("auto", "triton", "aten")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_current = "auto"  # a plain global: torch.compile guards on it, as it could not on a context variable
_triton_installed = importlib.util.find_spec("triton") is not None  # without importing it


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the path of every call inside the `with` block, unless the call itself names one. Holds for all threads.

    Args:
        name: "auto": the Triton kernels where they can run, PyTorch's own function elsewhere, and where it was
            measured to be faster on this GPU. "triton": the kernels, and where they cannot run a RuntimeError that
            says why. "aten": PyTorch's own function.

    Raises:
        ValueError: for any other name.

    >>> import lstm_triton
    >>> with lstm_triton.backend("aten"):
    ...     output, (h_n, c_n) = lstm_triton.LSTM(3, 4)(torch.zeros(5, 2, 3))
    """
    global _current
    previous = _current
    _current = _checked(name)
    try:
        yield
    finally:
        _current = previous


class Choice(NamedTuple):
    path: Literal["triton", "aten"]
    reason: str


def choose(requested: str | None, call: "Call") -> Choice:
    """The path of a call, which is one for all of its layers, and why.

    Raises:
        ValueError: `requested` is not the name of a backend.
        RuntimeError: "triton" is asked for where the kernels cannot run.
    """
    name = _current if requested is None else _checked(requested)
    if name == "aten":
        return Choice("aten", 'the backend "aten" was asked for')
    obstacle = _obstacle(call)
    if obstacle is None:
        faster = None if name == "triton" else _why_stock(call)
        return Choice("triton", "the kernels take it") if faster is None else Choice("aten", faster)
    if name == "triton":
        raise RuntimeError(f'the backend "triton" was asked for, but cannot take this call: {obstacle}')
    return Choice("aten", obstacle)


def autocast_dtype(call: "Call") -> torch.dtype | None:
    """The dtype autocast gives to all tensors of a call; None: it is off, or leaves them alone as it does float64."""
    return transforms.autocast_dtype(_tensors(call))


def _tensors(call: "Call") -> list[Tensor]:
    return [call.data, *(call.states or ()), *(call.reset_state or ()), *call.weights]


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


def _obstacle(call: "Call") -> str | None:
    """Why the kernels cannot take a call; None if they can."""
    from .interpreter import active

    device = call.data.device
    if device.type != "cuda" and not (device.type == "cpu" and active()):
        return f"the kernels run on NVIDIA GPUs, not on {device.type!r} tensors"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit.trace does not record the kernels"
    for tensor in _tensors(call):
        if tensor.device != device:
            return f"tensors are on several devices, {device} and {tensor.device}"
    dtype = autocast_dtype(call)
    if dtype is None:
        dtype = call.data.dtype
        for tensor in _tensors(call):
            if tensor.dtype != dtype:
                return f"tensors have several dtypes, {dtype} and {tensor.dtype}"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if call.batch_size == 0:
        return "the batch is empty"
    if not _triton_installed:
        return "Triton is not installed (it is released for Linux only)"
    input_sizes = [] if call.cell else [call.weights[0].shape[1]]  # for a cell there is always a plan
    if call.num_layers > 1:
        input_sizes.append(call.directions * call.output_size)
    return _obstacle_of_device(device, dtype, tuple(input_sizes), call.hidden_size)


def _why_stock(call: "Call") -> str | None:
    """Why the kernels had better not take a call that they can: nn.LSTM was measured to be faster there."""
    # Compiled or traced, a batch size may be any; inside torch.func, or without cuDNN, nn.LSTM's path is another one.
    if torch.compiler.is_compiling() or not isinstance(call.batch_size, int) or not _is_gpu(call.data):
        return None
    if transforms.active() or not torch.backends.cudnn.enabled:
        return None
    one_layer = call.num_layers == 1 and call.directions == 1 and call.output_size == call.hidden_size
    dense = call.batch_sizes is None and call.lengths is None and call.resets is None
    if not (one_layer and dense) or call.cell or call.return_cells or call.low_memory or call.time_steps == 1:
        return None  # not what was measured

    from .ops import allows_tf32
    from .planner import Device
    from .routes import why_stock

    # Not whether gradients are enabled: what checkpointing computes again has to take the same path both times.
    mode = "training" if call.training else "inference"
    dtype = autocast_dtype(call) or call.data.dtype
    return why_stock(mode, dtype, allows_tf32(), call.hidden_size, call.batch_size, Device.of(call.data.device))


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _constant(function: Function) -> Function:
    """Let torch.compile call a function, when it compiles, instead of looking into it.

    As torch.compiler.assume_constant_result does, which would import the compiler, and that takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _obstacle_of_device(
    device: torch.device, dtype: torch.dtype, input_sizes: tuple[int, ...], hidden_size: int
) -> str | None:
    """What is in the way of sizes on a device, whatever the batch and the number of time steps."""
    return _found_obstacle_of_device(device, dtype, input_sizes, hidden_size)


@cache  # inside the other function, as torch.compile warns of caches that it sees
def _found_obstacle_of_device(
    device: torch.device, dtype: torch.dtype, input_sizes: tuple[int, ...], hidden_size: int
) -> str | None:
    from .planner import Device, plan

    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "there is no GPU: torch.cuda.is_available() is False"
        gpu = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            # Triton 3.6 makes the loads that wait for other programs cached ones there: they may never see a value.
            return "the kernels do not run on AMD GPUs yet"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "TRITON_INTERPRET=1 is set: programs that wait for each other would run one after another"
        if gpu.major < 8:
            return f"the kernels need compute capability 8.0 or later, {gpu.name} has {gpu.major}.{gpu.minor}"
    kinds: tuple[Kind, Kind] = ("forward", "backward")
    try:
        for kind in kinds:
            for input_size in input_sizes:
                # More sequences and TF32 only add to the plans to choose from.
                plan(
                    kind,
                    batch_size=1,
                    input_size=input_size,
                    hidden_size=hidden_size,
                    dtype=dtype,
                    device=Device.of(device),
                    allow_tf32=False,
                )
    except ValueError as no_plan:
        return str(no_plan)
    return None


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
        kind: "forward" or "backward"; of an LSTMCell "cell" or "cell backward".
        lanes: the positions in `Explanation.layers` that it computes.
        plan: its sizes, if they were chosen.
        times: how often it is launched, for window after window of time.
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
        scans: the launches of this library's kernels: forward, and where gradients are enabled backward, both as if
            some were needed. What PyTorch launches is not counted.
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
    """What `module(input, hx)` would do here and now, without computing any of it.

    Args:
        module: an `lstm_triton.LSTM` or `LSTMCell`, or one of `nn`, of which is told what it would do as the former.
        input, hx: as the module takes them. An input on the "meta" device, which has sizes but no memory, stands for
            one on the device of the module's weights.

    Raises:
        TypeError: the module is no LSTM.
        ValueError, RuntimeError: what the call itself would raise.

    >>> import lstm_triton
    >>> print(explain(lstm_triton.LSTM(3, 4), torch.empty(100, 16, 3, device="meta")))
    LSTM(3, 4) on cpu, torch.float32, T=100, B=16
    layer  direction  path    why
        0  forward    aten    the kernels run on NVIDIA GPUs, not on 'cpu' tensors
    """
    call = call_of(module, input, hx)
    if call.data.device.type == "meta":
        call = call._replace(data=call.weights[0].new_empty(0, dtype=call.data.dtype), states=None)
    choice = choose(None, call)
    dtype = autocast_dtype(call) or call.data.dtype

    names: list[Literal["forward", "reverse"]] = ["forward", "reverse"] if call.directions == 2 else ["forward"]
    layers = [LayerExplanation(layer, direction, *choice) for layer in range(call.num_layers) for direction in names]
    launches: list[ScanLaunch] = []
    if choice.path == "triton":
        launches = _cell_launches(call, dtype) if call.cell else _launches(call, dtype)
    return Explanation(
        str(module), str(call.data.device), dtype, call.time_steps, call.batch_size, tuple(layers), tuple(launches)
    )


def call_of(
    module: nn.RNNBase | nn.LSTMCell,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | list[Tensor] | None,
    caller: str = "explain",
    **sequences: Any,
) -> "Call":
    """The call that a module would make, its arguments checked; `sequences` are lengths, resets and reset_state."""
    from .functional import check_arguments

    if isinstance(module, nn.LSTMCell):
        from . import cell

        return cell.checked_call_of(module, input, hx)
    if not isinstance(module, nn.RNNBase) or module.mode != "LSTM":
        takes = "an lstm_triton.LSTM or a torch.nn.LSTM"
        if caller == "explain":
            takes = "an LSTM or an LSTMCell, of lstm_triton or of torch.nn"
        raise TypeError(f"{caller} takes {takes}, got {type(module).__name__}")
    return check_arguments(
        input,
        hx,
        [getattr(module, name) for name in module._flat_weights_names],
        num_layers=module.num_layers,
        bias=module.bias,
        batch_first=module.batch_first,
        dropout=module.dropout,
        training=module.training,
        bidirectional=module.bidirectional,
        proj_size=module.proj_size,
        memory=getattr(module, "memory", "full"),
        **sequences,
    )


def _launches(call: "Call", dtype: torch.dtype) -> list[ScanLaunch]:
    from . import ops

    trains = torch.is_grad_enabled()
    projected = call.output_size < call.hidden_size
    initial = call.states is not None or call.reset_state is not None
    dense = call.batch_sizes is None and call.lengths is None and call.resets is None
    if not trains and call.time_steps == 1 and dense and not projected and not (call.training and call.dropout > 0):
        lanes = range(call.num_layers * call.directions)
        return [ScanLaunch("cell", (lane,), _cell_plan(call, dtype, lane, "rnn")) for lane in lanes]

    low_memory = trains and call.low_memory
    kept_steps = ops.low_memory_steps(call.time_steps) if low_memory else call.time_steps
    kinds: tuple[Kind, ...] = ("forward", "backward") if trains else ("forward",)
    # Projected layers are scanned one by one: what lies between two of them is a product of its own.
    stacks = [1] * call.num_layers if projected else [call.num_layers]
    found: list[ScanLaunch] = []
    for kind in kinds:
        first = 0
        for layers in stacks:
            # With low_memory, backward takes lane after lane.
            by_lane = low_memory and kind == "backward"
            launches = ops.launches_of(
                kind,
                num_layers=1 if by_lane else layers,
                directions=1 if by_lane else call.directions,
                batch_size=call.batch_size,
                input_size=call.weights[0].shape[1] if first == 0 else call.directions * call.output_size,
                hidden_size=call.hidden_size,
                dtype=dtype,
                device=call.data.device,
                fuse_input=not (projected and initial),
            )
            if by_lane:
                launches = tuple(replace(launches[0], first=lane) for lane in range(layers * call.directions))
            for launch in launches:
                at_once = call.time_steps
                if kind == "forward" and (low_memory or not trains):
                    at_once = ops.steps_at_once(launch.plan, call.hidden_size, call.batch_size, dtype.itemsize)
                windows = len(ops.window_bounds(call.time_steps, kept_steps, at_once)) - 1
                apart = windows > 1 and not launch.plan.chained  # directions meet different windows
                lanes_of_launch = tuple(first + lane for lane in launch.lanes)
                times = windows * (launch.plan.lanes if apart else 1)
                found.append(ScanLaunch(kind, lanes_of_launch, launch.plan, times))
            first += layers * call.directions
    return found


def _cell_plan(call: "Call", dtype: torch.dtype, lane: int, precision_of: str) -> "CellPlan":
    from .cell_ops import plan_of

    layer_input = call.weights[0].shape[1] if lane < call.directions else call.directions * call.output_size
    stand_in = call.data.new_empty(1, dtype=dtype).expand(call.batch_size, layer_input)
    return plan_of(stand_in, call.hidden_size, precision_of)


def _cell_launches(call: "Call", dtype: torch.dtype) -> list[ScanLaunch]:
    forward = ScanLaunch("cell", (0,), _cell_plan(call, dtype, 0, "matmul"))
    return [forward, ScanLaunch("cell backward", (0,), None)] if torch.is_grad_enabled() else [forward]

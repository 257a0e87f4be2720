"""Which path a call takes, the Triton kernels or PyTorch's own function, and why."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

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
        name: "auto": the Triton kernels where they can run, PyTorch's own function elsewhere. "triton": the kernels,
            and where they cannot run a RuntimeError that says why. "aten": PyTorch's own function.

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
        return Choice("triton", "the kernels take it")
    if name == "triton":
        raise RuntimeError(f'the backend "triton" was asked for, but cannot take this call: {obstacle}')
    return Choice("aten", obstacle)


def autocast_dtype(call: "Call") -> torch.dtype | None:
    """The dtype autocast gives to all tensors of a call; None: it is off, or leaves them alone as it does float64."""
    device_type = call.data.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    for tensor in _tensors(call):
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return None
    return torch.get_autocast_dtype(device_type)


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
    if call.output_size < call.hidden_size:
        return "the kernels do not take projections (proj_size) yet"
    if call.batch_size == 0:
        return "the batch is empty"
    if not _triton_installed:
        return "Triton is not installed (it is released for Linux only)"
    input_sizes = [] if call.cell else [call.weights[0].shape[1]]  # for a cell there is always a plan
    if call.num_layers > 1:
        input_sizes.append(call.directions * call.output_size)
    return _obstacle_of_device(device, dtype, tuple(input_sizes), call.hidden_size)


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
    """What one layer does in one direction.

    Attributes:
        forward, backward: the plans of its two scans; None off the Triton path. A cell has one plan, `forward`.
        launches: of this library's kernels, forward and backward together. What PyTorch launches is not counted.
    """

    layer: int
    direction: Literal["forward", "reverse"]
    path: Literal["triton", "aten"]
    reason: str
    forward: "Plan | CellPlan | None"
    backward: "Plan | None"
    launches: int


@dataclass(frozen=True)
class Explanation:
    """What `explain` found out; `print` it."""

    module: str
    device: str
    dtype: torch.dtype
    time_steps: int
    batch_size: int
    layers: tuple[LayerExplanation, ...]
    is_cell: bool = False

    @property
    def launches(self) -> int:
        return sum(layer.launches for layer in self.layers)

    def __str__(self) -> str:
        lines = [
            f"{self.module} on {self.device}, {self.dtype}, T={self.time_steps}, B={self.batch_size}",
            "layer  direction  path    launches  why",
        ]
        for layer in self.layers:
            lines.append(
                f"{layer.layer:>5}  {layer.direction:<9}  {layer.path:<6}  {layer.launches:>8}  {layer.reason}",
            )
            for name, plan in (("forward", layer.forward), ("backward", layer.backward)):
                if plan is not None:
                    lines.append(f"{'':7}{'cell' if self.is_cell else f'{name} scan'}: {plan}")
        return "\n".join(lines)


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
    layer  direction  path    launches  why
        0  forward    aten           0  the kernels run on NVIDIA GPUs, not on 'cpu' tensors
    """
    call = call_of(module, input, hx)
    if call.data.device.type == "meta":
        call = call._replace(data=call.weights[0].new_empty(0, dtype=call.data.dtype), states=None)
    choice = choose(None, call)
    dtype = autocast_dtype(call) or call.data.dtype

    directions: list[Literal["forward", "reverse"]] = ["forward", "reverse"] if call.directions == 2 else ["forward"]
    layers = []
    for layer in range(call.num_layers):
        for direction in directions:
            forward: Plan | CellPlan | None = None
            backward: Plan | None = None
            launches = 0
            if choice.path == "triton" and call.cell:
                forward, launches = _cell_plan(call, dtype), 2
            elif choice.path == "triton":
                input_size = getattr(module, f"weight_ih_l{layer}").shape[1]
                forward = _plan("forward", call, dtype, input_size)
                backward = _plan("backward", call, dtype, input_size)
                launches = 2
            layers.append(LayerExplanation(layer, direction, *choice, forward, backward, launches))
    sizes = (dtype, call.time_steps, call.batch_size)
    return Explanation(str(module), str(call.data.device), *sizes, tuple(layers), call.cell)


def call_of(
    module: nn.RNNBase | nn.LSTMCell, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | list[Tensor] | None
) -> "Call":
    """The call that a module would make, its arguments checked."""
    from .functional import check_arguments

    if isinstance(module, nn.LSTMCell):
        from . import cell

        return cell.checked_call_of(module, input, hx)
    if not isinstance(module, nn.RNNBase) or module.mode != "LSTM":
        raise TypeError(
            f"explain takes an LSTM or an LSTMCell, of lstm_triton or of torch.nn, got {type(module).__name__}"
        )
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
    )


def _plan(kind: "Kind", call: "Call", dtype: torch.dtype, input_size: int) -> "Plan":
    from .ops import plan_of

    stand_in = call.data.new_empty(1, dtype=dtype).expand(call.time_steps, call.batch_size, input_size)
    return plan_of(kind, stand_in, call.hidden_size)


def _cell_plan(call: "Call", dtype: torch.dtype) -> "CellPlan":
    from .cell_ops import plan_of

    stand_in = call.data.new_empty(1, dtype=dtype).expand(call.batch_size, call.weights[0].shape[1])
    return plan_of(stand_in, call.hidden_size, "matmul")

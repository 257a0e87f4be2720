"""Which path a call takes, the Triton kernels or PyTorch's own function, and why."""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import refusal, target, transforms, triton_package
from .call import Call, CellCall
from .preference import checked_name, current_backend
from .target import Device

Function = TypeVar("Function", bound=Callable[..., Any])
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    path: Literal["triton", "aten"]
    reason: str


def choose(requested: str | None, call: Call | CellCall) -> Choice:
    """The path of a call, and why. All layers of a call take one path.

    Raises:
        ValueError: `requested` is not the name of a backend.
        RuntimeError: "triton" is asked for where the kernels cannot run.
    """
    name = current_backend() if requested is None else checked_name(requested)
    if name == "aten":
        return Choice("aten", 'the backend "aten" was asked for')
    obstacle = _obstacle(call)
    if obstacle is None and name == "auto" and (refusal.state or torch.compiler.is_dynamo_compiling()):
        obstacle = _refusal(call)
    if obstacle is None:
        faster = None if name == "triton" or isinstance(call, CellCall) else _why_stock(call)
        return Choice("triton", "the kernels take it") if faster is None else Choice("aten", faster)
    if name == "triton":
        raise RuntimeError(f'the backend "triton" was asked for, but cannot take this call: {obstacle}')
    return Choice("aten", obstacle)


def _obstacle(call: Call | CellCall) -> str | None:
    """Why the kernels cannot take a call; None if they can."""
    device = call.data.device
    if not target.current().takes(device):
        return f"the kernels run on NVIDIA GPUs, not on {device.type!r} tensors"
    if transforms.tracing():
        return "torch.jit.trace does not record the kernels"
    tensors = call.tensors()
    for tensor in tensors:
        if tensor.device != device:
            return f"tensors are on several devices, {device} and {tensor.device}"
        if tensor.layout != torch.strided:
            return f"the kernels take dense tensors, not tensors of the layout {tensor.layout}"
    dtype = call.autocast_dtype()
    if dtype is None:
        dtype = call.data.dtype
        for tensor in tensors:
            if tensor.dtype != dtype:
                return f"tensors have several dtypes, {dtype} and {tensor.dtype}"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if call.batch_size == 0:
        return "the batch is empty"
    scanned: tuple[int, ...] = ()  # input sizes of scans; a cell has none, and always has a plan
    if isinstance(call, Call):
        scanned = (call.weights[0].shape[1],)
        if call.num_layers > 1:
            scanned += (call.directions * call.output_size,)
    return _obstacle_of_device(device, dtype, scanned, call.hidden_size)


def _refusal(call: Call | CellCall) -> str | None:
    """Why kernels for such layers were refused on this machine (refusal.py); None: they were not."""
    device, dtype = call.data.device, call.autocast_dtype() or call.data.dtype
    # A compiled program cannot fall back while it runs. So the kernels are tried before they are compiled into it.
    if torch.compiler.is_dynamo_compiling() and target.current().may_refuse(device):
        try_kernels(device, dtype, call.hidden_size, isinstance(call, CellCall))
    return _known_refusal(refusal.state, device, dtype, call.hidden_size)


def fall_back(error: refusal.LaunchRefused, call: Call | CellCall, requested: str | None) -> None:
    """Let PyTorch's own function compute a call whose kernels were refused, and warn of it the first time.

    Raises:
        LaunchRefused: "triton" is asked for.
    """
    if (current_backend() if requested is None else requested) == "triton":
        raise error
    refusal.give_way(error, _layers_of(call))


def take_up(call: Call | CellCall) -> None:
    """Let "auto" take the kernels for such calls again, now that they have run."""
    refusal.forget(_layers_of(call))


def _layers_of(call: Call | CellCall) -> refusal.Layers:
    return target.layers(call.data.device, call.autocast_dtype() or call.data.dtype, call.hidden_size)


def _why_stock(call: Call) -> str | None:
    """Why PyTorch's own function replaces the kernels in a call: it was measured to be faster; None: it was not."""
    # In a compiled program the batch size may vary. Inside torch.func, or without cuDNN, nn.LSTM takes another path.
    if torch.compiler.is_compiling() or not isinstance(call.batch_size, int) or not _is_gpu(call.data):
        return None
    if transforms.active() or not torch.backends.cudnn.enabled:
        return None
    one_layer = call.num_layers == 1 and call.directions == 1 and call.output_size == call.hidden_size
    if not (one_layer and call.dense()) or call.return_cells or call.low_memory or call.time_steps == 1:
        return None  # not what was measured

    from .routes import why_stock
    from .scan.launch import allows_tf32

    # The mode must not depend on whether gradients are enabled: with checkpointing, a call runs once without gradients
    # and once with them, and both runs must take one path.
    mode = "training" if call.training else "inference"
    dtype = call.autocast_dtype() or call.data.dtype
    return why_stock(mode, dtype, allows_tf32(), call.hidden_size, call.batch_size, Device.of(call.data.device))


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _constant(function: Function) -> Function:
    """Mark a function that torch.compile calls while it compiles, instead of tracing the function.

    torch.compiler.assume_constant_result sets the mark, too. But it imports the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _known_refusal(state: str, device: torch.device, dtype: torch.dtype, hidden_size: int) -> str | None:
    """`refusal.known`. `state`: an argument, so that torch.compile guards on it."""
    return refusal.known(target.layers(device, dtype, hidden_size))


@_constant
def try_kernels(device: torch.device, dtype: torch.dtype, hidden_size: int, of_cell: bool = False) -> None:
    """Run small kernels of such layers, and remember if they are refused."""
    from .scan import trial

    where: Any = target.current()
    try:
        trial.try_kernels(where, device, dtype, hidden_size, of_cell)
    except refusal.LaunchRefused as error:
        refusal.remember(error, target.layers(device, dtype, hidden_size))


@_constant
def _obstacle_of_device(
    device: torch.device, dtype: torch.dtype, input_sizes: tuple[int, ...], hidden_size: int
) -> str | None:
    """Why the kernels cannot run layers of these sizes on a device, for any B and T; None if they can."""
    obstacle = _found_obstacle_of_device(device, dtype, input_sizes, hidden_size)
    return triton_package.obstacle() if obstacle is None and device.type == "cuda" else obstacle


@lru_cache(maxsize=1024)  # in a function of its own: torch.compile warns of a cache that it sees
def _found_obstacle_of_device(
    device: torch.device, dtype: torch.dtype, input_sizes: tuple[int, ...], hidden_size: int
) -> str | None:
    from .scan.plan import Kind, ScanShape
    from .scan.planner import plan

    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "there is no GPU: torch.cuda.is_available() is False"
        gpu = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            # There Triton 3.6 caches the loads that wait for other programs, so that they may never see a new value.
            return "the kernels do not run on AMD GPUs yet"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "TRITON_INTERPRET=1 is set: programs that wait for each other would run one after another"
        if gpu.major < 8:
            return f"the kernels need compute capability 8.0 or later, {gpu.name} has {gpu.major}.{gpu.minor}"
    kinds: tuple[Kind, Kind] = ("forward", "backward")
    try:
        for kind in kinds:
            for input_size in input_sizes:
                # B = 1 without TF32 is the hardest case: a larger B, and TF32, only add plans.
                plan(ScanShape(kind, 1, input_size, hidden_size, dtype, Device.of(device), allow_tf32=False))
    except ValueError as no_plan:
        return str(no_plan)
    return None

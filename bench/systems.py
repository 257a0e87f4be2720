"""Who takes part: for each system an adapter, which makes runners from a problem.

Every adapter takes weights in nn.LSTM's layout (gate order i, f, g, o) and gives gradients for these weights. So all
systems are compared with one reference. Work that a user of the system does once, such as a cast, is not timed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .cases import BASELINE, FLOOR, OURS, BenchCase, UnknownName
from .devices import Cpu
from .floor import exchange_runner
from .problem import Outputs, Problem, Runner, module_runner


@dataclass(frozen=True)
class System:
    """A system that takes part in cases.

    Attributes:
        runners: make the ways in which the system computes a problem.
        refuses: says why the system cannot run a case on a device; None where it can.
        package: what has to be installed for the system.
        patience: how many times longer than others the system may be silent. Some compile for minutes.
    """

    name: str
    runners: Callable[[Problem], list[Runner]]
    refuses: Callable[[BenchCase, Cpu], str | None] = lambda case, device: None
    package: str | None = None
    patience: float = 1.0

    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def why_missing(self, case: BenchCase, device: Cpu) -> str | None:
        if case.dtype == "tf32" and device.name != "cuda":
            return "a CPU has no TF32"
        if reason := self.refuses(case, device):
            return reason
        return None if self.installed() else f"the package {self.package} is not installed"


def as_users_write_it(problem: Problem, module: nn.LSTM) -> Runner:
    """A runner of nn.LSTM. Where nn.LSTM lacks something, its users' own code is around it."""
    parameters = list(module.parameters())
    if problem.lengths is not None:
        lengths = problem.lengths

        def padded(input: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)  # the copy waits for the device
            output, states = module(packed)
            return pad_packed_sequence(output, total_length=len(input))[0], states

        return replace(module_runner(problem, padded, parameters, "packed and padded again"), modules=[module])
    if problem.resets is not None:
        keeps = (~problem.resets).to(next(module.parameters()).dtype).unsqueeze(2).unbind()

        def step_by_step(input: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            h = input.new_zeros(module.num_layers, input.shape[1], module.proj_size or module.hidden_size)
            c = input.new_zeros(module.num_layers, input.shape[1], module.hidden_size)
            outputs = []
            for step, keep in zip(input.split(1), keeps, strict=True):
                output, (h, c) = module(step, (h * keep, c * keep))
                outputs.append(output)
            return torch.cat(outputs), (h, c)

        return replace(module_runner(problem, step_by_step, parameters, "step by step"), modules=[module])
    return module_runner(problem, module, parameters)


def baseline(problem: Problem) -> list[Runner]:
    return [as_users_write_it(problem, problem.module)]


def ours(problem: Problem) -> list[Runner]:
    import lstm_triton

    module = lstm_triton.LSTM(
        **problem.constructor_arguments(),
        device=problem.device.torch_device,
        dtype=problem.dtype,
        memory=problem.case.memory,
    )
    module.load_state_dict(problem.module.state_dict())
    input = problem.shape_input(problem.new_leaf())
    with problem.device.active():
        # The kernels are measured even where "auto" takes nn.LSTM, since nn.LSTM was faster in an earlier measurement.
        path = "triton"
        try:
            with lstm_triton.backend(path):
                layers = lstm_triton.explain(module, input).layers
        except RuntimeError:
            path = "auto"
            layers = lstm_triton.explain(module, input).layers
    # A time of the fallback must not be taken for a time of the kernels.
    label = "; ".join(dict.fromkeys(f"not the kernels: {layer.reason}" for layer in layers if layer.path != "triton"))

    def call(input: Tensor | PackedSequence, lengths: Tensor | None = None, resets: Tensor | None = None) -> Any:
        with lstm_triton.backend(path):
            return module(input, lengths=lengths, resets=resets)

    as_given = functools.partial(call, lengths=problem.lengths, resets=problem.resets)
    runner = replace(module_runner(problem, as_given, list(module.parameters()), label), modules=[module])
    if problem.resets is None:
        return [runner]
    # The layer without resets has another result. Only its time is of interest.
    plain = module_runner(problem, call, list(module.parameters()), "without resets")
    return [runner, replace(plain, compared=False)]


def step_loop(problem: Problem) -> Callable[[Tensor], tuple[Tensor, tuple[Tensor, Tensor]]]:
    """One compiled step that is called T times, as a user of torch.compile writes it."""
    module = problem.module

    def step(preact: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (preact + h @ weight_hh.T).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    step = torch.compile(step)

    def run(input: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        finals: list[tuple[Tensor, Tensor]] = []
        for _ in range(module.num_layers):
            directions = []
            for direction in range(2 if module.bidirectional else 1):
                names = module._flat_weights_names[4 * len(finals) : 4 * len(finals) + 4]
                weight_ih, weight_hh, bias_ih, bias_hh = (getattr(module, name) for name in names)
                preacts = F.linear(input, weight_ih, bias_ih + bias_hh).unbind()
                h = c = input.new_zeros(input.shape[1], module.hidden_size)
                steps = []
                for preact in reversed(preacts) if direction else preacts:
                    h, c = step(preact, h, c, weight_hh)
                    steps.append(h)
                directions.append(torch.stack(steps[::-1] if direction else steps))
                finals.append((h, c))
            input = torch.cat(directions, dim=-1) if len(directions) > 1 else directions[0]
        h_n, c_n = (torch.stack(states) for states in zip(*finals, strict=True))
        return input, (h_n, c_n)

    return run


def torch_compiled(problem: Problem) -> list[Runner]:
    torch.compiler.reset()  # else the compilations of all cases count towards the limit for a function
    parameters = list(problem.module.parameters())
    runners = [module_runner(problem, torch.compile(problem.module), parameters, "torch.compile(nn.LSTM)")]
    if problem.case.layout == "dense" and not problem.case.proj_size:
        runners.append(module_runner(problem, step_loop(problem), parameters, "compiled step loop"))
    return runners


def torch_compiled_refuses(case: BenchCase, device: Cpu) -> str | None:
    return "has neither lengths nor resets" if case.layout in ("lengths", "resets") else None


def one_dense_layer(case: BenchCase, device: Cpu) -> str | None:
    """Why not, for systems whose kernels take one dense layer in one direction on an NVIDIA GPU."""
    if device.name != "cuda" or torch.version.hip is not None:
        return "runs on NVIDIA GPUs only"
    if case.layers > 1 or case.bidirectional or case.layout != "dense" or case.proj_size:
        return "offers one dense layer in one direction without projection"
    return None


def flashrnn(backend: str) -> Callable[[Problem], list[Runner]]:
    """FlashRNN 1.0 (Poeppel, Beck, Hochreiter), with one head as wide as the layer.

    flashrnn(Wx (B, T, 4, heads, D), R (4, heads, D, D_prev), b (4, heads, D)) returns all states (2, B, T, heads, D),
    h first, and the last states. The order of gates i, f, z, o is nn.LSTM's.
    """

    def runners(problem: Problem) -> list[Runner]:
        from flashrnn import flashrnn as run

        hidden_size = problem.case.H
        parameters = [parameter.detach().clone().requires_grad_() for parameter in problem.module.parameters()]
        weight_ih, weight_hh, bias_ih, bias_hh = parameters
        dtype = str(problem.dtype).removeprefix("torch.")

        def call(input: Tensor) -> Outputs:
            states, _ = run(
                F.linear(input, weight_ih).unflatten(-1, (4, 1, hidden_size)),
                weight_hh.view(4, 1, hidden_size, hidden_size),
                (bias_ih + bias_hh).view(4, 1, hidden_size),
                function="lstm",
                backend=backend,
                dtype=dtype,
            )
            hidden = states[0, :, :, 0]
            return hidden.transpose(0, 1), hidden[None, :, -1], states[1, None, :, -1, 0]

        return [Runner(call, parameters, adapt=lambda leaf: leaf.transpose(0, 1).contiguous())]

    return runners


def torchrl(problem: Problem) -> list[Runner]:
    """The kernels of TorchRL 0.14's LSTMModule(recurrent_backend="triton").

    lstm_triton(x (B, T, I), hidden (B, T, H), cell (B, T, H), four weights, is_init (B, T)) returns all h, all c, h_n
    and c_n. A reset at (b, t) starts from hidden and cell there. Tensors are float32; products are in compute_dtype.
    """
    from torchrl.modules.tensordict_module._rnn_triton import lstm_triton as run

    case = problem.case
    parameters = [parameter.detach().float().clone().requires_grad_() for parameter in problem.module.parameters()]
    zeros = torch.zeros(case.B, case.T, case.H, device=problem.device.torch_device)
    never_reset = torch.zeros(case.B, case.T, dtype=torch.bool, device=problem.device.torch_device)

    def call(input: Tensor) -> Outputs:
        output, _, h_n, c_n = run(
            input,
            zeros,
            zeros,
            *parameters,
            never_reset,
            compute_dtype=problem.dtype,
            input_precision="tf32" if case.dtype == "tf32" else "ieee",
        )
        return output.transpose(0, 1), h_n[None], c_n[None]

    label = "float32 tensors, bfloat16 products" if case.dtype == "bfloat16" else ""
    return [Runner(call, parameters, adapt=lambda leaf: leaf.float().transpose(0, 1).contiguous(), label=label)]


def torchrl_refuses(case: BenchCase, device: Cpu) -> str | None:
    return "multiplies in float32 or bfloat16 only" if case.dtype == "float16" else one_dense_layer(case, device)


def exchange_floor(problem: Problem) -> list[Runner]:
    return [exchange_runner(problem)]


def floor_refuses(case: BenchCase, device: Cpu) -> str | None:
    if device.name == "cpu":
        return "nothing is exchanged on a CPU"
    if case.proj_size:
        return "exchanges h as it is, without projections"
    if case.memory != "full":
        return "takes all steps at once"
    return "exchanges the steps of whole batches only" if case.layout in ("packed", "lengths") else None


REGISTRY = {
    system.name: system
    for system in (
        System(OURS, ours),
        System(BASELINE, baseline),
        System("nn.LSTM+compile", torch_compiled, torch_compiled_refuses, patience=3),
        System("flashrnn-triton", flashrnn("triton_fused"), one_dense_layer, "flashrnn"),
        System("flashrnn-cuda", flashrnn("cuda_fused"), one_dense_layer, "flashrnn", patience=4),
        System("torchrl-triton", torchrl, torchrl_refuses, "torchrl", patience=2),
        System(FLOOR, exchange_floor, floor_refuses),
    )
}


def require_plugin(name: str | None) -> None:
    """Raise UnknownName unless there is such a module. It is not imported."""
    try:
        there = name is None or importlib.util.find_spec(name) is not None
    except Exception as error:  # of the folder that the module is said to be in, which is imported
        raise UnknownName(f"cannot find the plugin {name!r}: {type(error).__name__}: {error}") from error
    if not there:
        raise UnknownName(f"cannot find the plugin {name!r}: no such module")


def load_plugin(name: str | None) -> None:
    """Import a module that may add to REGISTRY."""
    require_plugin(name)
    try:
        if name is not None:
            importlib.import_module(name)
    except Exception as error:
        raise UnknownName(f"cannot import the plugin {name!r}: {type(error).__name__}: {error}") from error

"""PyTorch's own LSTM function: `native`, that with derivatives of any order; `layer`, one layer by it; and
`scan_layer`, the same as one operator.

That is for torch.compile: left to itself, it unrolls that function over the time steps, compiles it again for every
length, and on the CPU fails where the weights need a gradient and the input does not.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import transforms
from .ragged import Ragged
from .reference import lstm_layer

_NO_TABLES = (None,) * len(Ragged._fields)
Results = tuple[Tensor, ...]  # output, h_n, c_n, and the cells if asked for


def layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    reverse: bool,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    return_cells: bool = False,
) -> Results:
    """What `lstm_triton.autograd.scan_layer` computes, by PyTorch's own function; also in float64, and projected.

    A ragged batch is cut: where all sequences have all steps, at every step at which some of them start anew; otherwise
    into the stretches that nothing interrupts, which become the sequences of a packed batch. For that, the host waits
    for the device. With `return_cells`, which that function has not, the layer is computed step
    by step.
    """
    if h_0 is None or c_0 is None:
        batch_size = input.shape[1] if ragged is None else ragged.batch_size
        h_0 = input.new_zeros(batch_size, weight_hh.shape[1])
        c_0 = input.new_zeros(batch_size, weight_ih.shape[0] // 4)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    if return_cells or (ragged is not None and not ragged.is_step().any()):  # PyTorch's function takes no empty batch
        return lstm_layer(
            input, h_0, c_0, *weights, reverse=reverse, h_reset=h_reset, c_reset=c_reset, ragged=ragged,
            return_cells=return_cells,
        )  # fmt: skip
    given = [weight for weight in weights if weight is not None]
    has_bias = bias_ih is not None
    if ragged is not None and bool((ragged.lengths == ragged.offsets.shape[0] - 1).all()):
        return _segments(input, (h_0, c_0), (h_reset, c_reset), given, has_bias, ragged, reverse)
    if ragged is not None:
        return _stretches(input, (h_0, c_0), (h_reset, c_reset), given, has_bias, ragged, reverse)
    input = input.flip(0) if reverse else input
    states = (h_0.unsqueeze(0), c_0.unsqueeze(0))
    output, h_n, c_n = native(input, None, states, given, bias=has_bias)
    return output.flip(0) if reverse else output.contiguous(), h_n.squeeze(0), c_n.squeeze(0)


def native(
    data: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    bias: bool,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> Results:
    """`torch._VF.lstm`, with gradients that can be differentiated again, and taken in evaluation mode, on GPUs as well.

    There that function is cuDNN's, which refuses both. cuDNN goes on to compute results and first derivatives; for
    second ones PyTorch's function without cuDNN computes the layers again. Autocast is taken on every CPU.

    Raises:
        RuntimeError: when a second derivative is taken through cuDNN's dropout, whose mask is not known.
    """

    def lstm(*tensors: Tensor, training: bool = training, dropout: float = dropout) -> Results:
        data, h_0, c_0, *weights = tensors
        options = (bias, num_layers, dropout, training, bidirectional)
        results: Results
        if batch_sizes is None and (dtype := _dtype_to_convert_to(tensors)) is not None:
            with transforms.without_autocast(data.device):
                return lstm(*(tensor.to(dtype) for tensor in tensors), training=training, dropout=dropout)
        # By the name that `lstm_triton.accelerate` does not take over.
        if batch_sizes is None:
            results = torch.lstm(data, (h_0, c_0), weights, *options, batch_first)
        else:
            results = torch.lstm(data, batch_sizes, (h_0, c_0), weights, *options)
        return results

    tensors = (data, *states, *weights)
    if not _is_cudnns(data):
        return lstm(*tensors)
    if transforms.active():
        with torch.backends.cudnn.flags(enabled=False):
            return lstm(*tensors)
    needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if not needs_gradients or traced:  # what is traced contains the function itself
        return lstm(*tensors)
    dropout = dropout if training else 0.0
    # cuDNN keeps what backward needs in training mode only.
    differentiable = partial(lstm, training=True, dropout=dropout)
    results: Results = _Native.apply(differentiable, dropout > 0, *tensors)  # type: ignore[no-untyped-call]
    return results


def _without_onednns_layers() -> set[torch.dtype]:
    """The dtypes in which oneDNN has no LSTM for this processor."""
    if not torch.backends.mkldnn.is_available():
        return set()
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return {dtype for dtype, is_supported in supported.items() if not is_supported()}


_WITHOUT_ONEDNNS_LAYERS = _without_onednns_layers()


def _dtype_to_convert_to(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """What autocast makes of a batch on a CPU where oneDNN has no layers in that dtype; otherwise None.

    PyTorch chooses oneDNN's layers before it casts, and fails there: "could not create a primitive descriptor". It does
    not choose them, nor fail, for projected layers, for empty inputs, and for inputs in a dtype they do not have.
    """
    data, h_0, c_0, *_ = tensors
    if not data.is_cpu or not torch.backends.mkldnn.enabled or h_0.shape[-1] < c_0.shape[-1] or data.numel() == 0:
        return None
    dtype = transforms.autocast_dtype(tensors)
    return dtype if dtype in _WITHOUT_ONEDNNS_LAYERS and data.dtype not in _WITHOUT_ONEDNNS_LAYERS else None


def _is_cudnns(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.backends.cudnn.enabled


class _Native(torch.autograd.Function):
    """cuDNN's layers with their own graph for first derivatives, and another one without cuDNN for second ones."""

    @staticmethod
    def forward(ctx: Any, lstm: Callable[..., Results], masked: bool, *tensors: Tensor) -> Results:
        ctx.lstm, ctx.masked = lstm, masked
        device = tensors[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            ctx.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
            ctx.results = lstm(*ctx.leaves)
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors, results, again = ctx.leaves, ctx.results, torch.is_grad_enabled()
        if again:
            if ctx.masked:
                raise RuntimeError(
                    "second derivatives cannot be taken through the dropout of cuDNN's LSTM: make an LSTM of each "
                    "layer with nn.Dropout between them, or turn cuDNN off by torch.backends.cudnn.flags(enabled=False)"
                )
            # Under new names: where one argument depends on another, that path is the engine's business.
            tensors = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            with torch.backends.cudnn.flags(enabled=False), torch.autocast(*ctx.autocast):
                results = ctx.lstm(*tensors)
        wanted = [tensor for tensor, need in zip(tensors, ctx.needs_input_grad[2:], strict=True) if need]
        used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in used],
                wanted,
                [grad for _, grad in used],
                retain_graph=again or torch._C._autograd._get_current_graph_task_keep_graph(),
                create_graph=again,
                allow_unused=True,
            )
        )
        return None, None, *(next(found) if need else None for need in ctx.needs_input_grad[2:])


def scan_layers(
    one_layer: Callable[..., Results],
    projected: bool,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    directions: int,
    bias: bool,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    dropout: float = 0.0,
    low_memory: bool = False,
    return_cells: bool = False,
) -> Results:
    """What `lstm_triton.autograd.scan_layers` computes, lane after lane, by `layer` or `scan_layer`.

    With `projected`, the weights of a lane end with its weight_hr. `low_memory` changes nothing: what PyTorch's own
    function keeps for backward is its own choice.
    """
    size = (4 if bias else 2) + projected
    lanes = len(weights) // size
    outputs, ends = [], []
    for lane in range(lanes):
        weight_ih, weight_hh, *others = weights[size * lane : size * (lane + 1)]
        weight_hr = others[-1] if projected else None
        states = [None if each is None else each[lane] for each in (h_0, c_0, h_reset, c_reset)]
        output, *end = one_layer(
            input, *states[:2], weight_ih, weight_hh, *(others[:2] if bias else (None, None)), weight_hr,
            reverse=lane % directions == 1, h_reset=states[2], c_reset=states[3], ragged=ragged,
            return_cells=return_cells,
        )  # fmt: skip
        outputs.append(output)
        ends.append(end)
        if len(outputs) == directions:
            input, outputs = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1), []
            if dropout > 0 and lane < lanes - 1:
                input = F.dropout(input, dropout)
    return input, *(torch.stack(each) for each in zip(*ends, strict=True))


def _segments(
    input: Tensor,
    states: tuple[Tensor, Tensor],
    reset: tuple[Tensor | None, Tensor | None],
    weights: list[Tensor],
    bias: bool,
    ragged: Ragged,
    reverse: bool,
) -> Results:
    """A layer whose sequences all have all steps, call after call from each step at which some of them start anew."""
    shape = (ragged.offsets.shape[0] - 1, ragged.batch_size)
    steps, anew = input.unflatten(0, shape), ragged.starts_anew(reverse).unflatten(0, shape)
    if reverse:
        steps, anew = steps.flip(0), anew.flip(0)
    starts = anew[1:].any(1).nonzero().flatten() + 1
    sizes = starts.diff(prepend=starts.new_zeros(1), append=starts.new_tensor([len(steps)])).tolist()
    h, c = states
    h_reset, c_reset = (0 if other is None else other for other in reset)
    outputs = []
    for first, segment in zip([0, *starts.tolist()], steps.split(sizes), strict=True):
        begins = anew[first].unsqueeze(1)
        h, c = torch.where(begins, h_reset, h), torch.where(begins, c_reset, c)
        hx = (h.unsqueeze(0), c.unsqueeze(0))
        output, h, c = native(segment, None, hx, weights, bias=bias)
        h, c = h.squeeze(0), c.squeeze(0)
        outputs.append(output)
    result = torch.cat(outputs)
    return (result.flip(0) if reverse else result).flatten(0, 1), h, c


def _stretches(
    input: Tensor,
    states: tuple[Tensor, Tensor],
    reset: tuple[Tensor | None, Tensor | None],
    weights: list[Tensor],
    bias: bool,
    ragged: Ragged,
    reverse: bool,
) -> Results:
    """A ragged layer as one packed batch, whose sequences are the stretches between one start and the next."""
    batch_size = ragged.batch_size
    # Sequence by sequence, in the order of the scan: each step's row, and the state row it starts from.
    sources = ragged.sources(reverse).view(-1, batch_size)
    rows = torch.arange(ragged.rows, device=sources.device).view(-1, batch_size)
    sources, rows = ((t.flip(0) if reverse else t).t().flatten() for t in (sources, rows))
    steps = sources >= 0
    sources, rows = sources[steps], rows[steps]
    output = input.new_zeros(ragged.rows, states[0].shape[1])
    starts = ((sources < batch_size) | (sources >= batch_size + ragged.rows)).nonzero().squeeze(1)
    lengths = torch.cat([starts[1:], starts.new_tensor([rows.numel()])]) - starts
    sequences = rows[starts] % batch_size
    anew = (sources[starts] >= 2 * batch_size + ragged.rows).unsqueeze(1)

    longest = lengths.argsort(descending=True, stable=True)
    rank = longest.argsort()
    stretch = torch.arange(len(starts), device=rows.device).repeat_interleave(lengths)
    offset = torch.arange(rows.numel(), device=rows.device) - starts[stretch]
    order = rows[(offset * len(starts) + rank[stretch]).argsort()]
    initial = []
    for state, other in zip(states, reset, strict=True):
        begun = state[sequences]
        begun = torch.where(anew, torch.zeros_like(begun) if other is None else other[sequences], begun)
        initial.append(begun[longest].unsqueeze(0))
    found, *final = native(input[order], offset.bincount().cpu(), initial, weights, bias=bias)

    output = output.index_copy(0, order, found)
    # A sequence ends with its last stretch; without one, as it began.
    last = torch.cat([sequences[1:] != sequences[:-1], sequences.new_ones(1).bool()])
    ends = [
        state.index_copy(0, sequences[last], end.squeeze(0)[rank[last]])
        for state, end in zip(states, final, strict=True)
    ]
    return output, *ends


def scan_layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    reverse: bool,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    return_cells: bool = False,
) -> Results:
    """`layer`, as one operator."""
    tables = _NO_TABLES if ragged is None else ragged
    arguments = (h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h_reset, c_reset, *tables)
    results: Results = torch.ops.lstm_triton.aten_layer(input, *arguments, reverse, return_cells)
    return results if return_cells else results[:3]


def _layer(input: Tensor, *arguments: Any) -> Results:
    *tensors, h_reset, c_reset = arguments[:9]
    *_, reverse, return_cells = arguments
    results = layer(
        input,
        *tensors,
        reverse=reverse,
        h_reset=h_reset,
        c_reset=c_reset,
        ragged=_tables_among(arguments),
        return_cells=return_cells,
    )
    return (*results, input.new_empty(0))[:4]


def _tables_among(arguments: tuple[Any, ...]) -> Ragged | None:
    tables = arguments[-6:-2]
    return None if tables[0] is None else Ragged(*tables)


def _has_gradient(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _layer_backward(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    """The gradients of all tensors among the arguments. The layer is computed again, for PyTorch's own derivative."""
    with torch.enable_grad():
        arguments = tuple(a.detach().requires_grad_() if _has_gradient(a) else a for a in arguments)
        results = _layer(*arguments)
    leaves = [argument for argument in arguments if _has_gradient(argument)]
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
    found = torch.autograd.grad(
        [result for result, _ in used],
        leaves,
        [grad for _, grad in used],
        allow_unused=True,
        materialize_grads=True,
    )
    return [grad.contiguous() for grad in found]


def _layer_sizes(input: Tensor, h_0: Tensor | None, c_0: Tensor | None, *others: Any) -> Results:
    weight_ih, weight_hh, *_, return_cells = others
    ragged = _tables_among(others)
    batch_size = input.shape[1] if ragged is None else ragged.batch_size
    sizes = weight_hh.shape[1], weight_ih.shape[0] // 4
    return (
        input.new_empty(*input.shape[:-1], sizes[0]),
        input.new_empty(batch_size, sizes[0]),
        input.new_empty(batch_size, sizes[1]),
        input.new_empty((*input.shape[:-1], sizes[1]) if return_cells else 0),
    )


def _layer_backward_sizes(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [argument.new_empty(argument.shape) for argument in arguments if _has_gradient(argument)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    *tensors, ctx.reverse, ctx.return_cells = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable
def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = iter(torch.ops.lstm_triton.aten_layer_backward(grads, *tensors, ctx.reverse, ctx.return_cells))
    return *(next(found) if _has_gradient(tensor) else None for tensor in tensors), None, None


_ARGUMENTS = (
    "Tensor input, Tensor? h_0, Tensor? c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "Tensor? weight_hr, Tensor? h_reset, Tensor? c_reset, Tensor? before, Tensor? after, Tensor? offsets, "
    "Tensor? lengths, bool reverse, bool return_cells"
)
_FORWARD, _BACKWARD = "lstm_triton::aten_layer", "lstm_triton::aten_layer_backward"

torch.library.define(_FORWARD, f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(_FORWARD, "default", _layer)
torch.library.register_fake(_FORWARD, _layer_sizes)
torch.library.register_autograd(_FORWARD, _backward, setup_context=_save_for_backward)

# No autograd rule: with one, derivatives would be switched off inside. Nobody differentiates it, see `_backward`.
torch.library.define(_BACKWARD, f"(Tensor[] grads, {_ARGUMENTS}) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(_BACKWARD, "default", _layer_backward)
torch.library.register_fake(_BACKWARD, _layer_backward_sizes)

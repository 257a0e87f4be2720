"""The LSTM as a function of its weights: checks the arguments, chooses the path, runs the stack of layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, get_args, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ragged, transforms
from .backend import autocast_dtype, choose
from .reference import lstm_layer

Sequences = TypeVar("Sequences", Tensor, PackedSequence)
States = tuple[Tensor, Tensor]  # h and c, of all layers and directions
Results = tuple[Tensor, Tensor, Tensor, Tensor | None]  # output, h_n, c_n, and the cells if asked for
Memory = Literal["full", "low"]
MEMORY: tuple[str, ...] = get_args(Memory)
ScanLayers = Callable[..., tuple[Tensor, ...]]  # with the parameters of autograd.scan_layers


@overload
def lstm(
    input: Sequences,
    hx: States | list[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = ...,
    bias: bool = ...,
    batch_first: bool = ...,
    dropout: float = ...,
    training: bool = ...,
    bidirectional: bool = ...,
    proj_size: int = ...,
    lengths: Tensor | None = ...,
    resets: Tensor | None = ...,
    reset_state: States | list[Tensor] | None = ...,
    return_cells: Literal[False] = ...,
    memory: Memory = ...,
    backend: str | None = ...,
) -> tuple[Sequences, States]: ...


@overload
def lstm(
    input: Sequences,
    hx: States | list[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = ...,
    bias: bool = ...,
    batch_first: bool = ...,
    dropout: float = ...,
    training: bool = ...,
    bidirectional: bool = ...,
    proj_size: int = ...,
    lengths: Tensor | None = ...,
    resets: Tensor | None = ...,
    reset_state: States | list[Tensor] | None = ...,
    return_cells: Literal[True],
    memory: Memory = ...,
    backend: str | None = ...,
) -> tuple[Sequences, States, Tensor]: ...


def lstm(
    input: Sequences,
    hx: States | list[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    proj_size: int = 0,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: States | list[Tensor] | None = None,
    return_cells: bool = False,
    memory: Memory = "full",
    backend: str | None = None,
) -> tuple[Any, ...]:
    """What `lstm_triton.LSTM` computes, with the weights as an argument.

    T time steps, B sequences, I inputs, H hidden units, P outputs (`proj_size`, or H without projections), D directions
    (1 or 2). The formula is that of `torch.nn.LSTM`: Hochreiter & Schmidhuber (1997) with the forget gate of Gers,
    Schmidhuber & Cummins (2000).

    Args:
        input: (T, B, I), (B, T, I) with `batch_first`, (T, I) for one sequence without a batch, or a `PackedSequence`.
        hx: (h_0, c_0) of shapes (num_layers * D, B, P) and (num_layers * D, B, H), without the B for an input without
            a batch; None: zeros.
        weights: for each layer, for each direction (forward, reverse): weight_ih (4H, I; from the second layer on
            4H, D * P), weight_hh (4H, P), with `bias` also bias_ih and bias_hh (4H,), with `proj_size` also
            weight_hr (P, H). The gates are in the order i, f, g, o.
        dropout: the probability of dropout on the output of every layer but the last, when `training`.
        lengths: (B,) integers on the input's device, in any order, 0 <= length <= T (on a GPU a wrong one is a
            device-side assertion). The steps from there on count as absent: their output is 0, the final state is the
            one before them, and the reverse direction begins before them. A sequence of length 0 ends as it began.
        resets: (T, B) bool, (B, T) with `batch_first`, (T,) without a batch: where True, the sequence starts anew at
            that step, from `reset_state`. No state passes from one side to the other in either direction: backwards,
            the step before starts from `reset_state`.
        reset_state: (h, c), shaped like `hx`; None: zeros.
        return_cells: whether to return every c_t.
        memory: "low" keeps little between forward and backward: every h_t (the output is one of them), and the c_t of a
            few steps. Backward computes the gates again, window of time by window, which takes longer: two large
            products more. On the Triton path only; with `return_cells` all is kept.
        backend: "auto", "triton" or "aten"; None: what `lstm_triton.backend` says, "auto" unless told otherwise.

    All tensors are of one floating-point dtype and on one device; under autocast, they are converted to its dtype.

    Returns:
        output, laid out like the input, with D * P features; (h_n, c_n), shaped like `hx`; and with `return_cells` the
        cells (num_layers * D, ...): for each layer, for each direction, c_t of all steps laid out like the input, with
        H features, 0 for absent steps.

    Raises:
        TypeError, ValueError, RuntimeError: what `torch.nn.LSTM` raises for the same input and states.
        TypeError, ValueError: `lengths`, `resets` or `reset_state` of another dtype, device or shape than said above,
            lengths outside 0 to T, or `lengths` or `resets` with a `PackedSequence`, which has lengths of its own.
        RuntimeError: a weight of a wrong size; backend="triton" for what the kernels do not take, with the reason.

    >>> weights = [torch.randn(16, 3), torch.randn(16, 4), torch.zeros(16), torch.zeros(16)]
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 2, 3), None, weights)
    >>> output.shape, h_n.shape, torch.equal(output[-1:], h_n)
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]), True)
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 2, 3), None, weights, lengths=torch.tensor([5, 2]))
    >>> torch.equal(output[1, 1], h_n[0, 1]), output[2:, 1].count_nonzero().item()
    (True, 0)
    """
    call = check_arguments(
        input,
        hx,
        weights,
        num_layers=num_layers,
        bias=bias,
        batch_first=batch_first,
        dropout=dropout,
        training=training,
        bidirectional=bidirectional,
        proj_size=proj_size,
        lengths=lengths,
        resets=resets,
        reset_state=reset_state,
        return_cells=return_cells,
        memory=memory,
    )
    results = run(call, input, _layers_function(choose(backend, call).path, call))
    return results if return_cells else results[:2]


def run(call: "Call", input: Tensor | PackedSequence, scan_layers: ScanLayers | None) -> tuple[Any, ...]:
    """What `lstm` returns for a checked call of this input, and the cells or None; see `_layers_function`."""
    if isinstance(input, PackedSequence) and call.states is not None:
        call = call._replace(states=_permuted(call.states, input.sorted_indices))
    output, h_n, c_n, cells = _call_aten(call) if scan_layers is None else _stack(scan_layers, call)
    results: tuple[Any, ...]
    if isinstance(input, PackedSequence):
        states = _permuted((h_n, c_n), input.unsorted_indices)
        packed = PackedSequence(output, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        results = packed, states, cells
    elif input.dim() == 2:
        batch_axis = 0 if call.batch_first else 1
        cells = None if cells is None else cells.squeeze(batch_axis + 1)
        results = output.squeeze(batch_axis), (h_n.squeeze(1), c_n.squeeze(1)), cells
    else:
        results = output, (h_n, c_n), cells
    return results


class Call(NamedTuple):
    """The arguments of one call, checked, and with a batch dimension even if the input has none."""

    data: Tensor  # (T, B, I), with batch_first (B, T, I), or the rows of a packed sequence (sum of lengths, I)
    batch_sizes: Tensor | None  # (T,), of a packed sequence
    states: States | None
    weights: list[Tensor]
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    training: bool
    directions: int  # D, 1 or 2
    time_steps: int  # T
    batch_size: int  # B
    hidden_size: int  # H, of c
    output_size: int  # P, of h: less than H with projections
    lengths: Tensor | None = None  # (B,)
    resets: Tensor | None = None  # (T, B)
    reset_state: States | None = None
    return_cells: bool = False
    low_memory: bool = False
    cell: bool = False  # a single step, of `LSTMCell`: data is (B, I), states are (B, H)


def check_arguments(
    input: Tensor | PackedSequence,
    hx: States | list[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
    proj_size: int,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: States | list[Tensor] | None = None,
    return_cells: bool = False,
    memory: str = "full",
) -> Call:
    """Refuse what `torch.nn.LSTM` refuses, in its words and order, and wrong states of packed sequences as well."""
    directions = 2 if bidirectional else 1
    input_size, hidden_size = _check_weights(weights, num_layers, bias, directions, proj_size)
    output_size = proj_size or hidden_size

    states = None if hx is None else (hx[0], hx[1])
    if isinstance(input, PackedSequence):
        data, batch_sizes = input.data, input.batch_sizes
        batch_first = False  # there is no batch axis
        time_steps, batch_size = batch_sizes.shape[0], int(batch_sizes[0])
    else:
        data, batch_sizes = input, None
        dimensions = input.dim()
        if dimensions not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {dimensions}D instead")
        if states is not None and (states[0].dim() != dimensions or states[1].dim() != dimensions):
            raise RuntimeError(
                f"For {'batched' if dimensions == 3 else 'unbatched'} {dimensions}-D input, hx and cx should "
                f"also be {dimensions}-D but got ({states[0].dim()}-D, {states[1].dim()}-D) tensors"
            )
        if dimensions == 2:
            data = input.unsqueeze(0 if batch_first else 1)
            states = None if states is None else (states[0].unsqueeze(1), states[1].unsqueeze(1))
        batch_size, time_steps = data.shape[:2] if batch_first else (data.shape[1], data.shape[0])

    dtype = weights[0].dtype
    if data.dtype != dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({dtype}). "
            f"Convert input: input.to({dtype}), or convert model: model.to({data.dtype})"
        )
    if batch_sizes is not None and data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    if data.shape[-1] != input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {input_size}, got {data.shape[-1]}")
    if states is not None:
        for index, size in enumerate((output_size, hidden_size)):
            expected, got = (num_layers * directions, batch_size, size), list(states[index].shape)
            if got != list(expected):
                raise RuntimeError(f"Expected hidden[{index}] size {expected}, got {got}")
    if isinstance(hx, Tensor):
        raise TypeError("lstm() received an invalid combination of arguments - hx must be (h_0, c_0), got one Tensor")
    if hx is not None and len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    if time_steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    given = {"lengths": lengths, "resets": resets, "reset_state": reset_state}
    if isinstance(input, PackedSequence):
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name} cannot be given with a PackedSequence: pass the padded input, and its lengths"
                )
    without_batch = isinstance(input, Tensor) and input.dim() == 2
    if lengths is not None:
        lengths = _checked_lengths(lengths, time_steps, () if without_batch else (batch_size,), data.device)
    if resets is not None:
        shape = (batch_size, time_steps) if batch_first else (time_steps, batch_size)
        resets = _checked_resets(resets, (time_steps,) if without_batch else shape, data.device).reshape(shape)
    if reset_state is not None:
        batch = () if without_batch else (batch_size,)
        sizes = [(num_layers * directions, *batch, size) for size in (output_size, hidden_size)]
        reset_state = _checked_reset_state(reset_state, resets, sizes, data)
        if not batch:
            reset_state = (reset_state[0].unsqueeze(1), reset_state[1].unsqueeze(1))
    return Call(
        data,
        batch_sizes,
        states,
        list(weights),
        num_layers,
        bias,
        batch_first,
        dropout,
        training,
        directions,
        time_steps,
        batch_size,
        hidden_size,
        output_size,
        lengths,
        resets.t() if resets is not None and batch_first else resets,
        reset_state,
        return_cells,
        low_memory=checked_memory(memory) == "low",
    )


def checked_memory(memory: str) -> str:
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY))}, got {memory!r}")
    return memory


def _checked_lengths(lengths: Tensor, time_steps: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
    if not isinstance(lengths, Tensor) or lengths.dtype not in (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    ):
        raise TypeError(f"lengths must be a tensor of integers, got {kind}")
    if lengths.shape != shape:
        raise ValueError(f"lengths must have one number for each sequence, shape {shape}, got {tuple(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"lengths must be on the input's device, {device}, got {lengths.device}")
    fits = ((lengths >= 0) & (lengths <= time_steps)).all()
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        # Raising an exception would wait for the device; a number in the message would be one graph for each number.
        torch._assert_async(fits, "lengths must be from 0 to T, the number of time steps")
    elif not transforms.plain(fits).all():
        given = transforms.plain(lengths).tolist()
        raise ValueError(f"lengths must be from 0 to {time_steps}, the number of time steps, got {given}")
    return lengths.reshape(-1)


def _checked_resets(resets: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        kind = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"resets must be a tensor of torch.bool, got {kind}")
    if resets.shape != shape:
        raise ValueError(f"resets must be shaped as the input without its features, {shape}, got {tuple(resets.shape)}")
    if resets.device != device:
        raise ValueError(f"resets must be on the input's device, {device}, got {resets.device}")
    return resets


def _checked_reset_state(
    state: States | list[Tensor], resets: Tensor | None, sizes: list[tuple[int, ...]], data: Tensor
) -> States:
    if resets is None:
        raise ValueError("reset_state is given without resets: expected resets, which say where to start anew from it")
    pair = "reset_state must be a pair (h, c) of tensors"
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"{pair}, got {type(state).__name__}")
    if len(state) != 2:
        raise TypeError(f"{pair}, got {len(state)} of them")
    for tensor in state:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{pair}, got {type(tensor).__name__} in it")
    for index, (tensor, size) in enumerate(zip(state, sizes, strict=True)):
        if tensor.shape != size:
            raise ValueError(f"reset_state[{index}] must have the shape {size}, as in hx, got {tuple(tensor.shape)}")
        if tensor.device != data.device:
            raise ValueError(f"reset_state[{index}] must be on the input's device, {data.device}, got {tensor.device}")
        if tensor.dtype != data.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(f"reset_state[{index}] must have the input's dtype, {data.dtype}, got {tensor.dtype}")
    return state[0], state[1]


def _check_weights(
    weights: Sequence[Tensor], num_layers: int, bias: bool, directions: int, proj_size: int
) -> tuple[int, int]:
    """The input size and the hidden size, which the first weight tells, if all weights have the sizes they imply.

    PyTorch's own function does not look at all of them, and reads past the end of a weight that is too small.
    """
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    count = num_layers * directions * (2 + (2 if bias else 0) + (1 if proj_size else 0))
    if len(weights) != count:
        raise RuntimeError(f"Expected {count} weights, got {len(weights)}")
    if weights[0].dim() != 2:
        raise RuntimeError(f"Expected weights[0] to be 2-D, got {weights[0].dim()}-D")
    input_size, hidden_size = weights[0].shape[1], weights[0].shape[0] // 4
    if proj_size and proj_size >= hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")

    output_size = proj_size or hidden_size
    index = 0
    for layer in range(num_layers):
        expected: list[tuple[int, ...]] = [
            (4 * hidden_size, directions * output_size if layer else input_size),
            (4 * hidden_size, output_size),
        ]
        if bias:
            expected += [(4 * hidden_size,), (4 * hidden_size,)]
        if proj_size:
            expected += [(proj_size, hidden_size)]
        for size in expected * directions:
            if weights[index].shape != size:
                raise RuntimeError(f"Expected weights[{index}] size {size}, got {list(weights[index].shape)}")
            index += 1
    return input_size, hidden_size


def _permuted(states: States, order: Tensor | None) -> States:
    """The states with their sequences in another order."""
    return states if order is None else (states[0].index_select(1, order), states[1].index_select(1, order))


def _layers_function(path: str, call: Call) -> ScanLayers | None:
    """What computes a stack of layers; None: PyTorch's own function does, with all that is around it."""
    projected = call.output_size < call.hidden_size
    if path == "triton":
        from . import autograd

        return autograd.scan_projected_layers if projected else autograd.scan_layers
    from . import aten

    one_layer = _layer_function(call)
    return None if one_layer is None else partial(aten.scan_layers, one_layer, projected)


def _layer_function(call: Call) -> Callable[..., tuple[Tensor, ...]] | None:
    """What computes one layer in one direction, off the Triton path."""
    dense = call.batch_sizes is None
    interrupted = call.lengths is not None or call.resets is not None
    if transforms.need_formula() or (transforms.active() and (interrupted or not dense)):
        return lstm_layer
    if transforms.exporting() and dense:
        fixed = not torch.compiler.is_dynamo_compiling() and isinstance(call.time_steps, int)
        if fixed and not interrupted and not call.return_cells:
            return None  # one call of PyTorch's own function, for this number of time steps
        from . import exported

        return exported.layer
    from . import aten

    if torch.compiler.is_dynamo_compiling() and dense:
        return aten.scan_layer
    return aten.layer if interrupted or call.return_cells else None


def compute(path: str, call: Call) -> Results:
    """All layers of a call, by the path chosen for it; the states are in the order of the data's sequences."""
    scan_layers = _layers_function(path, call)
    return _call_aten(call) if scan_layers is None else _stack(scan_layers, call)


def _call_aten(call: Call) -> Results:
    """The call that `torch.nn.LSTM` makes."""
    from .aten import native

    states = call.states
    if states is None:
        layers = call.num_layers * call.directions
        h_0 = call.data.new_zeros(layers, call.batch_size, call.output_size)
        c_0 = call.data.new_zeros(layers, call.batch_size, call.hidden_size)
        states = (h_0, c_0)
    results = native(
        call.data,
        call.batch_sizes,
        states,
        call.weights,
        bias=call.bias,
        num_layers=call.num_layers,
        dropout=call.dropout,
        training=call.training,
        bidirectional=call.directions == 2,
        batch_first=call.batch_first,
    )
    return results[0], results[1], results[2], None


def _stack(scan_layers: ScanLayers, call: Call) -> Results:
    """The whole stack, laid out as the call wants it."""
    input, weights = call.data, call.weights
    states: list[Tensor | None] = [*(call.states or (None, None)), *(call.reset_state or (None, None))]
    dtype = autocast_dtype(call)
    if dtype is not None:
        input, weights = input.to(dtype), [weight.to(dtype) for weight in weights]
        states = [None if state is None else state.to(dtype) for state in states]
    if call.batch_first:
        input = input.transpose(0, 1)
    tables = _tables(call)
    if tables is not None and call.batch_sizes is None:
        input = input.reshape(-1, input.shape[2])
    h_0, c_0, h_reset, c_reset = states
    output, h_n, c_n, *cells = scan_layers(
        input,
        h_0,
        c_0,
        weights,
        directions=call.directions,
        bias=call.bias,
        h_reset=h_reset,
        c_reset=c_reset,
        ragged=tables,
        dropout=call.dropout if call.training else 0.0,
        low_memory=call.low_memory,
        return_cells=call.return_cells,
    )
    if call.batch_sizes is None:
        if tables is not None:
            shape = (call.time_steps, call.batch_size)
            output, cells = output.unflatten(0, shape), [each.unflatten(1, shape) for each in cells]
        if call.batch_first:
            output, cells = output.transpose(0, 1), [each.transpose(1, 2) for each in cells]
    return output, h_n, c_n, cells[0] if cells else None


def _tables(call: Call) -> ragged.Ragged | None:
    """Which step follows on which, unless they simply do."""
    device = call.data.device
    if call.batch_sizes is not None:
        return ragged.packed(call.batch_sizes, device)
    if call.lengths is not None or call.resets is not None:
        return ragged.dense(call.lengths, call.resets, call.time_steps, call.batch_size, device)
    return None

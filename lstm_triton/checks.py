"""The checks of arguments, with their error messages. Every caller makes its `Call` here."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import transforms
from .attributes import options_of, weights_of
from .call import MEMORY, Call
from .option_checks import check_bools, checked_dropout, checked_int, checked_weights
from .packed_checks import check_packed
from .ragged import batch_size_of
from .stack import States

INTEGERS = {
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


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
    """Check the arguments of an LSTM. What `torch.nn.LSTM` refuses is refused in its words and in its order.

    So is what `torch.nn.LSTM` takes and computes wrong results for, such as packed sequences that are not well-formed,
    and weights or states of packed sequences that have wrong sizes.
    """
    packed = isinstance(input, PackedSequence)
    batch_first = batch_first if not packed else False  # there is no batch axis
    are_bools = type(bias) is type(batch_first) is type(training) is type(bidirectional) is bool
    if not are_bools:  # a slower check says which
        check_bools(bias=bias, batch_first=batch_first, training=training, bidirectional=bidirectional)
    if not type(num_layers) is type(proj_size) is int:
        num_layers = checked_int("num_layers", num_layers)
        proj_size = checked_int("proj_size", int(proj_size) if isinstance(proj_size, bool) else proj_size)
    if type(dropout) is not float or not 0 <= dropout <= 1:
        dropout = checked_dropout(dropout, is_applied=training and num_layers > 1)
    if type(weights) is not list:
        weights = checked_weights(weights)
    directions = 2 if bidirectional else 1
    # Like `nn.LSTM`, which reads the dtype of the first weight, but not beside a packed sequence.
    no_first = TypeError if packed else AttributeError
    input_size, hidden_size = _check_weights(weights, num_layers, bias, directions, proj_size, no_first)
    output_size = proj_size or hidden_size

    if isinstance(input, PackedSequence):
        check_packed(input, with_states=hx is not None)
        _check_pair(hx, is_permuted=input.sorted_indices is not None)
    looks_right = packed or hx is None or (type(hx) is tuple and len(hx) == 2)
    if hx is not None and not looks_right:
        hx[0].dim()  # like `nn.LSTM`, which looks at h_0 before it looks for c_0
    states = None if hx is None else (hx[0], hx[1])
    if isinstance(input, PackedSequence):
        data, batch_sizes = input.data, input.batch_sizes
        time_steps, batch_size = batch_sizes.shape[0], batch_size_of(batch_sizes)
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
    if data.shape[-1] != input_size:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {input_size}, got {data.shape[-1]}")
    if states is not None:
        for index, size in enumerate((output_size, hidden_size)):
            expected, got = (num_layers * directions, batch_size, size), list(states[index].shape)
            if got != list(expected):
                raise RuntimeError(f"Expected hidden[{index}] size {expected}, got {got}")
    if not looks_right:
        _check_pair(hx, is_permuted=False)
    if time_steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if isinstance(input, PackedSequence):
        for name, value in {"lengths": lengths, "resets": resets, "reset_state": reset_state}.items():
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
    if packed or lengths is not None or resets is not None or return_cells:  # PyTorch checks the memory of the others
        check_memory(data, states or (), weights)
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
        sorted_indices=input.sorted_indices if isinstance(input, PackedSequence) else None,
    )


def _check_pair(hx: Any, is_permuted: bool) -> None:
    """Check that the states are two tensors. `nn.LSTM` fails in another way if it brings them into another order."""
    if hx is None:
        return
    for index in range(2 if is_permuted else 0):
        if not isinstance(hx[index], Tensor):
            raise AttributeError(f"hx must be (h_0, c_0), a pair of Tensors, got {type(hx[index]).__name__} in it")
    if not isinstance(hx, (tuple, list)):
        got = "one Tensor" if isinstance(hx, Tensor) else type(hx).__name__
        raise TypeError(f"lstm() received an invalid combination of arguments - hx must be (h_0, c_0), got {got}")
    for state in hx:
        if not isinstance(state, Tensor):
            raise TypeError(f"hx must be (h_0, c_0), a pair of Tensors, got {type(state).__name__} in it")
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")


def check_memory(data: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Refuse tensors on the "meta" device beside tensors that have memory.

    PyTorch's own function refuses most of these calls, but computes garbage for packed sequences. Other devices and
    dtypes that do not fit are refused by the operations of that function.
    """
    is_meta = data.is_meta
    for name, tensors in (("hidden", states), ("parameter", weights)):
        for tensor in tensors:
            if tensor.is_meta != is_meta:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at {data.device} and "
                    f"{name} tensor at {tensor.device}"
                )


def checked_memory(memory: str) -> str:
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY))}, got {memory!r}")
    return memory


def _checked_lengths(lengths: Tensor, time_steps: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
    if not isinstance(lengths, Tensor) or lengths.dtype not in INTEGERS:
        raise TypeError(f"lengths must be a tensor of integers, got {kind}")
    if lengths.shape != shape:
        raise ValueError(f"lengths must have one number for each sequence, shape {shape}, got {tuple(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"lengths must be on the input's device, {device}, got {lengths.device}")
    if lengths.dtype not in (torch.int32, torch.int64):  # a comparison would convert T to the dtype of the lengths
        lengths = lengths.to(torch.int64)
    if transforms.tracing():  # a traced program takes other lengths, and does not check them
        with transforms.unrecorded():
            _check_range(lengths, int(time_steps))
    else:
        _check_range(lengths, time_steps)
    return lengths.reshape(-1)


def _check_range(lengths: Tensor, time_steps: int) -> None:
    fits = ((lengths >= 0) & (lengths <= time_steps)).all()
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        # To raise an exception, the host would wait for the device. With a number in the message, torch.compile would
        # compile one graph for each number.
        torch._assert_async(fits, "lengths must be from 0 to T, the number of time steps")
    elif not transforms.plain(fits).all():
        given = transforms.plain(lengths).tolist()
        raise ValueError(f"lengths must be from 0 to {time_steps}, the number of time steps, got {given}")


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
    weights: Sequence[Tensor], num_layers: int, bias: bool, directions: int, proj_size: int, no_first: type[Exception]
) -> tuple[int, int]:
    """Check the sizes of all weights. Returns the input size and the hidden size, which the first weight tells.

    The exception `no_first` says that the first weight is None.

    PyTorch's own function does not check every weight. It reads past the end of a weight that is too small.
    """
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    count = num_layers * directions * (2 + (2 if bias else 0) + (1 if proj_size else 0))
    if len(weights) != count:
        raise RuntimeError(f"Expected {count} weights, got {len(weights)}")
    first: Any = weights[0]
    if not isinstance(first, Tensor):
        _refuse_weight(0, first, no_first)
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
            weight: Any = weights[index]
            if not isinstance(weight, Tensor):
                _refuse_weight(index, weight, TypeError)
            if weight.shape != size:
                raise RuntimeError(f"Expected weights[{index}] size {size}, got {list(weight.shape)}")
            index += 1
    return input_size, hidden_size


def _refuse_weight(index: int, weight: Any, of_none: type[Exception]) -> None:
    error = of_none if weight is None else TypeError
    raise error(f"Expected weights[{index}] to be a Tensor, got {type(weight).__name__}")


def weights_in_use(module: nn.RNNBase, weights: list[Tensor]) -> list[Tensor]:
    """The weights of the layers that a module has now: its attribute `num_layers` may have been lowered.

    Raises:
        RuntimeError: the first weight has not the sizes in the module's attributes. `nn.LSTM` compares the input and
            the states with these.
    """
    size = (4 * module.hidden_size, module.input_size)
    if weights and isinstance(weights[0], Tensor) and weights[0].shape != size:
        checked_int("hidden_size", module.hidden_size)
        raise RuntimeError(
            f"Expected {module._flat_weights_names[0]} size (4 * hidden_size, input_size) = {size}, "
            f"got {list(weights[0].shape)}"
        )
    lane = 2 + (2 if module.bias else 0) + (1 if module.proj_size else 0)
    count = module.num_layers * (2 if module.bidirectional else 1) * lane
    if count == len(weights):
        return weights
    if checked_int("num_layers", module.num_layers) <= 0:
        raise RuntimeError(f"num_layers must be greater than zero, got {module.num_layers}")
    return weights[:count] if count < len(weights) else weights


def call_of_module(
    module: nn.RNNBase,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | list[Tensor] | None,
    caller: str = "explain",
    **sequences: Any,
) -> "Call":
    """The checked call that a module would make. `sequences` are lengths, resets and reset_state."""
    if not isinstance(module, nn.RNNBase) or module.mode != "LSTM":
        takes = "an lstm_triton.LSTM or a torch.nn.LSTM"
        if caller == "explain":
            takes = "an LSTM or an LSTMCell, of lstm_triton or of torch.nn"
        raise TypeError(f"{caller} takes {takes}, got {type(module).__name__}")
    return check_arguments(input, hx, weights_in_use(module, weights_of(module)), **options_of(module), **sequences)


VF_LSTM_ARGUMENTS = 9  # nn.LSTM calls torch._VF.lstm with so many, all positional


def call_of_vf_lstm(arguments: tuple[Any, ...]) -> Call | None:
    """The checked call of `torch._VF.lstm`; None: the arguments are wrong, and PyTorch's function says best how."""
    if len(arguments) != VF_LSTM_ARGUMENTS:
        return None
    input, *others = arguments
    packed = isinstance(others[0], Tensor)
    hx, weights, *shared, batch_first = (*others[1:], False) if packed else others
    options = dict(zip(("bias", "num_layers", "dropout", "training", "bidirectional"), shared, strict=True))
    try:
        if input.dim() == 2 and not packed:  # no call of nn.LSTM, which adds a batch dimension first
            return None
        output_size = weights[1].shape[1]
        proj_size = output_size if output_size != weights[0].shape[0] // 4 else 0
        data = PackedSequence(input, others[0]) if packed else input
        return check_arguments(data, hx, weights, batch_first=batch_first, proj_size=proj_size, **options)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None

"""The LSTM as a function of its weights. It checks the arguments, chooses the path and runs the stack of layers."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import prepared_call, refusal
from .call import Call, Memory, Sequences, in_order
from .checks import check_arguments
from .refusal import LaunchRefused
from .routing import choose, fall_back, take_up
from .stack import Lane, Options, Results, ScanLayers, States, layers_of


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
        lengths: (B,) integers on the input's device, in any order, 0 <= length <= T (on a GPU a wrong length is a
            device-side assertion). Steps past the length are absent: their output is 0, the final state is that of the
            last step before them, and the reverse direction begins at this last step. The final state of a sequence of
            length 0 is its initial state.
        resets: (T, B) bool, (B, T) with `batch_first`, (T,) without a batch: where True, the sequence is reset at that
            step, which then starts from `reset_state`. No state passes between this step and the step before, in either
            direction: in the reverse direction, the step before starts from `reset_state`.
        reset_state: (h, c), shaped like `hx`, the state after a reset; None: zeros.
        return_cells: whether to return every c_t.
        memory: "low" keeps little between forward and backward: every h_t, and the c_t of a few steps. Backward
            computes the gates again, one window of time after the other. This takes longer, by two large products.
            Only on the Triton path; with `return_cells` everything is kept.
        backend: "auto", "triton" or "aten"; None: what `lstm_triton.backend` says, which is "auto" unless set.

    All tensors are of one floating-point dtype and on one device; under autocast, they are converted to its dtype.

    Returns:
        output, laid out like the input, with D * P features; (h_n, c_n), shaped like `hx`; and with `return_cells` the
        cells (num_layers * D, ...): for each layer, for each direction, c_t of all steps laid out like the input, with
        H features, 0 for absent steps.

    Raises:
        TypeError, ValueError, RuntimeError: what `torch.nn.LSTM` raises for the same input and states.
        TypeError, ValueError: `lengths`, `resets` or `reset_state` of another dtype, device or shape than said above,
            lengths outside 0 to T, or `lengths` or `resets` with a `PackedSequence`, which has lengths of its own.
        TypeError, IndexError, RuntimeError: a `PackedSequence` that is not well-formed, before anything is launched.
        RuntimeError: a weight of a wrong size; dropout outside 0 to 1 where it is applied; backend="triton" for what
            the kernels do not take, with the reason.

    >>> import torch
    >>> weights = [torch.randn(16, 3), torch.randn(16, 4), torch.zeros(16), torch.zeros(16)]
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 2, 3), None, weights)
    >>> output.shape, h_n.shape, torch.equal(output[-1:], h_n)
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]), True)
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 2, 3), None, weights, lengths=torch.tensor([5, 2]))
    >>> torch.equal(output[1, 1], h_n[0, 1]), output[2:, 1].count_nonzero().item()
    (True, 0)
    """
    key = prepared = None
    if lengths is None and resets is None and reset_state is None and not torch.compiler.is_dynamo_compiling():
        options: Any = (num_layers, bias, batch_first, dropout, training, bidirectional, proj_size)
        key = prepared_call.key_of(input, hx, weights, (*options, return_cells, memory, backend))
        prepared = prepared_call.known.get(key)
    is_new = prepared is None
    if prepared is None:
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
        choice = choose(backend, call)
        if key is None:
            output, states, cells = run(call, input, choice.path, requested=backend)
            return (output, states, cells) if return_cells else (output, states)
        prepared = prepared_call.prepare(call, choice, input)  # type: ignore[arg-type]
    path: str = prepared.choice.path
    results = None
    if prepared.run is not None:
        try:
            results = prepared.run(input, hx, weights)  # type: ignore[arg-type]
        except LaunchRefused as error:
            fall_back(error, prepared.call(input, hx, weights), backend)  # type: ignore[arg-type]
            path = "aten"
    if results is None:
        call = prepared.call(input, hx, weights)  # type: ignore[arg-type]
        output, states, cells = run(call, input, path, requested=backend)
        results = (output, states, cells) if return_cells else (output, states)
    if is_new:
        prepared_call.remember(key, prepared)
    return results


def run(
    call: Call, input: Sequences, path: str, lane: Lane | None = None, requested: str | None = None
) -> tuple[Sequences, States, Tensor | None]:
    """Run a checked call. Output, (h_n, c_n) and cells are laid out as the caller's input is; see `compute`."""
    output, h_n, c_n, cells = compute(call, path, lane, requested)
    if isinstance(input, PackedSequence):
        packed = PackedSequence(output, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        return packed, in_order((h_n, c_n), input.unsorted_indices), cells
    if input.dim() == 2:
        batch_axis = 0 if call.batch_first else 1
        output, h_n, c_n = output.squeeze(batch_axis), h_n.squeeze(1), c_n.squeeze(1)
        cells = None if cells is None else cells.squeeze(batch_axis + 1)
    return output, (h_n, c_n), cells


def compute(call: Call, path: str, lane: Lane | None = None, requested: str | None = None) -> Results:
    """Compute all layers of a call on its path. The states are in the order of the data's sequences.

    With a `lane`, this `lane` computes all layers, lane after lane. Cells are None unless they are asked for. If the
    kernels are refused on this machine, PyTorch's own function computes the call.

    Args:
        requested: the backend that the call itself names; None: it names none.
    """
    if path == "aten" or lane is not None or torch.compiler.is_dynamo_compiling():
        return _computed(call, path, lane)
    try:
        results = _computed(call, path, lane)
    except LaunchRefused as error:
        fall_back(error, call, requested)
        return _computed(call, "aten", lane)
    if refusal.state:
        take_up(call)
    return results


def _computed(call: Call, path: str, lane: Lane | None) -> Results:
    if path == "triton" and lane is None:
        from . import scan

        layers: ScanLayers = scan.scan_projected_layers if call.projected() else scan.scan_layers
    else:
        from .aten.layers import lane_of, whole_stack

        lane = lane_of(call) if lane is None else lane
        if lane is None:
            return whole_stack(call)
        layers = layers_of(lane)
    input, start, stack, ragged = call.prepared()
    options = Options(ragged, call.dropout if call.training else 0.0, call.low_memory, call.return_cells)
    output, h_n, c_n, *cells = layers(input, start, stack, options)
    if call.batch_sizes is None:
        if ragged is not None:
            shape = (call.time_steps, call.batch_size)
            output, cells = output.unflatten(0, shape), [each.unflatten(1, shape) for each in cells]
        if call.batch_first:
            output, cells = output.transpose(0, 1), [each.transpose(1, 2) for each in cells]
    return output, h_n, c_n, cells[0] if cells else None

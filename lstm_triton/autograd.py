"""A stack of layers, differentiable: the two scans, and the matrix products around the backward one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cell_ops, ops, transforms, vmap  # noqa: F401 (vmap: its rules)
from . import low_memory as low
from .ops import Layout, Stack, gate_major, gate_minor
from .ragged import Ragged
from .reference import lstm_layer

STATES = 7  # of _Scan's arguments, those before the tables and weights that gradients reach


def scan_layers(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    directions: int = 1,
    bias: bool = True,
    reverse: bool = False,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    preact_0: Tensor | None = None,
    preact_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    dropout: float = 0.0,
    low_memory: bool = False,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """All steps of a stack of layers, through the Triton kernels.

    Args:
        input: (T, B, I), of any strides; of a ragged batch (rows, I).
        h_0, c_0: (lanes, B, H), or both None for zeros. A lane is one direction of one layer, layer after layer.
        weights: of each lane weight_ih (4H, I; from the second layer on 4H, directions * H) and weight_hh (4H, H),
            gates in the order i, f, g, o; with `bias` also bias_ih and bias_hh (4H,).
        directions: 1 or 2: forward and reverse.
        reverse: of one direction: walk from the last step to the first.
        h_reset, c_reset: (lanes, B, H), where sequences start anew from, or both None for zeros.
        preact_0, preact_reset: (lanes, B, 4H), or None: the share that initial states and those to start anew from
            have in the pre-activations, where they are no h of this layer. For a single layer.
        ragged: which step follows on which; None: all steps of all sequences in turn.
        dropout: the probability of dropout on the output of every layer but the last.
        low_memory: keep little for backward, which then takes longer (low_memory.py); not with `return_cells`, which
            asks for what would not be kept.
        return_cells: whether every c_t is asked for.

    Returns:
        output (T, B, directions * H), h_n and c_n (lanes, B, H), and with `return_cells` cells (lanes, T, B, H); of a
        ragged batch, output (rows, ...) and cells (lanes, rows, H), zeros where there is no step. The output may be a
        view of a buffer.

    All tensors have one dtype (float32, float16 or bfloat16) and one device: a GPU, or the CPU while
    lstm_triton.interpreter.interpret() is on. The caller has checked the arguments. Every tensor gets gradients, of any
    order: those above the first, and forward-mode ones, come from the step-by-step formula (reference.py), in the same
    dtype.
    """
    stack = Stack(weights, directions, bias, reverse)
    states = (input, h_0, c_0, h_reset, c_reset, preact_0, preact_reset)
    tables = () if ragged is None else tuple(ragged)
    dropout = float(dropout) if stack.num_layers > 1 else 0.0  # an integer would be another type to a kernel
    seed = torch.randint(2**63 - 1, (1,), device=input.device) if dropout > 0 else None
    options = _Options(directions, bias, reverse, dropout, low_memory and not return_cells, return_cells, len(tables))
    if transforms.in_forward_mode():
        unkept = (input,) * 4  # of no use to the formula
        results = _formula(_Saved(options, states, seed, *unkept, tables, weights))
        return results if return_cells else results[:3]
    if torch.is_grad_enabled() and (transforms.active() or _any_requires_grad(*states, *weights)):
        results = _Scan.apply(*states, seed, *options, *tables, *weights)  # type: ignore[no-untyped-call]
        return tuple(results[: 4 if return_cells else 3])
    if ragged is None and input.shape[0] == 1 and preact_0 is None and dropout == 0:
        # As in streaming: there is nobody to exchange states with.
        output, h_n, c_n = transforms.call(cell_ops.single_step, input[0], h_0, c_0, weights, directions, bias)
        results = (output.unsqueeze(0), h_n, c_n)
        return (*results, c_n.unsqueeze(1)) if return_cells else results
    hidden, _, cell, _, h_n, c_n = transforms.call(
        ops.scan_forward, input, h_0, c_0, weights, directions, bias, reverse, return_cells, False, tables, h_reset,
        c_reset, dropout, seed, preact_0, preact_reset,
    )  # fmt: skip
    output = _output(hidden, stack, input, ragged)
    return (output, h_n, c_n, _cells(cell, stack, input, ragged)) if return_cells else (output, h_n, c_n)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def scan_projected_layers(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    directions: int = 1,
    bias: bool = True,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    dropout: float = 0.0,
    low_memory: bool = False,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """`scan_layers` with projections: the last weight of a lane is its weight_hr (P, H), and h has P elements.

    In h_t = W_hr y_t, y_t = o_t * tanh(c_t), the scan works with y: W_hh h_{t-1} = (W_hh W_hr) y_{t-1}, one product
    beforehand, and a step has one exchange instead of two. Only the states that are given have to be multiplied with
    W_hh themselves. All outputs are projected at once.
    """
    size = 5 if bias else 3
    lanes = len(weights) // size
    ends: list[tuple[Tensor, ...]] = []
    for first in range(0, lanes, directions):
        of_lanes, folded, preacts = range(first, first + directions), [], []
        for lane in of_lanes:
            weight_ih, weight_hh, *biases, weight_hr = weights[size * lane : size * (lane + 1)]
            folded += [weight_ih, weight_hh @ weight_hr, *biases]
            preacts.append([None if each is None else each[lane] @ weight_hh.t() for each in (h_0, h_reset)])
        preact_0, preact_reset = (None if each[0] is None else torch.stack(each) for each in zip(*preacts, strict=True))
        lane_slice = slice(first, first + directions)
        output, y_n, *others = scan_layers(
            input,
            None,
            None if c_0 is None else c_0[lane_slice],
            folded,
            directions=directions,
            bias=bias,
            c_reset=None if c_reset is None else c_reset[lane_slice],
            preact_0=preact_0,
            preact_reset=preact_reset,
            ragged=ragged,
            low_memory=low_memory,
            return_cells=return_cells,
        )
        projections = [weights[size * lane + size - 1].t() for lane in of_lanes]
        parts = output.unflatten(-1, (directions, -1)).unbind(-2)
        input = torch.cat([part @ weight for part, weight in zip(parts, projections, strict=True)], dim=-1)
        h_n = torch.stack([y @ weight for y, weight in zip(y_n, projections, strict=True)])
        if ragged is not None and h_0 is not None:  # sequences without steps end where they begin
            h_n = torch.where(ragged.lengths.unsqueeze(1) > 0, h_n, h_0[lane_slice])
        ends.append((h_n, *others))
        if dropout > 0 and first + directions < lanes:
            input = torch.nn.functional.dropout(input, dropout)
    return input, *(torch.cat(each) for each in zip(*ends, strict=True))


def scan_layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reverse: bool,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    ragged: Ragged | None = None,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """`scan_layers` of one layer in one direction: states (B, H), and cells without an axis for lanes."""
    states = {"h_0": h_0, "c_0": c_0, "h_reset": h_reset, "c_reset": c_reset}
    output, *others = scan_layers(
        input,
        weights=[weight for weight in (weight_ih, weight_hh, bias_ih, bias_hh) if weight is not None],
        bias=bias_ih is not None,
        reverse=reverse,
        ragged=ragged,
        return_cells=return_cells,
        **{name: None if state is None else state.unsqueeze(0) for name, state in states.items()},  # type: ignore[arg-type]
    )
    return output, *(other.squeeze(0) for other in others)


def _output(hidden: Tensor, stack: Stack, input: Tensor, ragged: Ragged | None) -> Tensor:
    """The last layer's outputs, laid out like the input, out of the state rows of h."""
    layout = Layout.of(input, stack.hidden_size, () if ragged is None else tuple(ragged))
    lanes = hidden[-stack.directions :, layout.steps, : stack.hidden_size]
    lanes = lanes.view(stack.directions, *input.shape[:-1], stack.hidden_size)
    return lanes[0].contiguous() if stack.directions == 1 else torch.cat(lanes.unbind(), dim=-1)


def _cells(cell: Tensor, stack: Stack, input: Tensor, ragged: Ragged | None) -> Tensor:
    layout = Layout.of(input, stack.hidden_size, () if ragged is None else tuple(ragged))
    cells = cell[:, layout.steps, : stack.hidden_size].to(input.dtype)
    if ragged is not None:
        return torch.where(ragged.is_step().unsqueeze(1), cells, 0)
    return cells.view(-1, *input.shape[:-1], stack.hidden_size)


class _Options(NamedTuple):
    """The arguments of _Scan that are no tensors."""

    directions: int
    bias: bool
    reverse: bool
    dropout: float
    low_memory: bool
    return_cells: bool
    table_count: int


class _Saved(NamedTuple):
    """What backward has of forward."""

    options: _Options
    states: Sequence[Tensor | None]  # the first arguments of _Scan
    seed: Tensor | None
    hidden: Tensor
    passed: Tensor
    cell: Tensor
    gates: Tensor
    tables: Sequence[Tensor]
    weights: Sequence[Tensor]

    @staticmethod
    def of(options: _Options, tensors: Sequence[Any]) -> "_Saved":
        states, buffers = tensors[:STATES], tensors[STATES : STATES + 5]
        tables_and_weights, count = tensors[STATES + 5 :], options.table_count
        return _Saved(options, states, *buffers, tables_and_weights[:count], tables_and_weights[count:])  # type: ignore[call-arg]

    def tensors(self) -> list[Tensor | None]:
        buffers = (self.seed, self.hidden, self.passed, self.cell, self.gates)
        return [*self.states, *buffers, *self.tables, *self.weights]

    @property
    def stack(self) -> Stack:
        return Stack(self.weights, self.options.directions, self.options.bias, self.options.reverse)

    @property
    def ragged(self) -> Ragged | None:
        return Ragged(*self.tables) if self.tables else None

    @property
    def input(self) -> Tensor:
        input = self.states[0]
        assert input is not None
        return input


class _Scan(torch.autograd.Function):
    """The states first, then the seed, the options, the tables of a ragged batch, and the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        (input, h_0, c_0, h_reset, c_reset, preact_0, preact_reset), seed, options, tables, weights = _sorted(arguments)
        keep = not options.low_memory
        stack = Stack(weights, options.directions, options.bias, options.reverse)
        hidden, passed, cell, gates, h_n, c_n = transforms.call(
            ops.scan_forward, input, h_0, c_0, *stack, keep, keep, tables, h_reset, c_reset, options.dropout, seed,
            preact_0, preact_reset, options.low_memory,
        )  # fmt: skip
        ragged = Ragged(*tables) if tables else None
        cells = _cells(cell, stack, input, ragged) if options.return_cells else hidden.new_empty(0)
        return _output(hidden, stack, input, ragged), h_n, c_n, cells, hidden, passed, cell, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        states, seed, options, tables, weights = _sorted(inputs)
        buffers = output[4:]
        ctx.options = tuple(options)
        ctx.mark_non_differentiable(*(buffers if options.return_cells else output[3:]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*states, seed, *buffers, *tables, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = _Saved.of(_Options(*ctx.options), ctx.saved_tensors)
        if not saved.options.return_cells:
            grads = (*grads[:3], None)
        others = len(_Options._fields) + 1 + len(saved.tables)
        needed = (*ctx.needs_input_grad[:STATES], *ctx.needs_input_grad[STATES + others :])
        # Autocast that is on where backward is called was not asked for by the layer.
        with transforms.without_autocast(saved.input.device):
            if torch.is_grad_enabled():
                found = _Gradients.apply(  # type: ignore[no-untyped-call]
                    needed, ctx.options, *grads[:4], *saved.tensors()
                )
            else:
                found = _gradients(saved, needed, grads[:4])
        return *found[:STATES], *(None for _ in range(others)), *found[STATES:]


def _sorted(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """_Scan's arguments: states, seed, options, tables and weights."""
    last_option = STATES + 1 + len(_Options._fields)
    options = _Options(*arguments[STATES + 1 : last_option])
    others = arguments[last_option:]
    return arguments[:STATES], arguments[STATES], options, others[: options.table_count], others[options.table_count :]


class _Gradients(torch.autograd.Function):
    """`_gradients`, to be differentiated again: through the step-by-step formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        needed: tuple[bool, ...], options: tuple[Any, ...], *grads_and_saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = _Saved.of(_Options(*options), grads_and_saved[4:])
        return tuple(_gradients(saved, needed, grads_and_saved[:4]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.needed, ctx.options, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        every = ctx.saved_tensors
        saved = _Saved.of(_Options(*ctx.options), every[4:])
        first_weight = len(every) - len(saved.weights)
        # The gradients of the results, the states and the weights, as far as there are any.
        places = [*range(4 + STATES), *range(first_weight, len(every))]
        places = [place for place in places if every[place] is not None]

        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            renewed = list(every)
            for place, tensor in zip(places, tensors, strict=True):
                renewed[place] = tensor
            return _gradients_by_formula(_Saved.of(saved.options, renewed[4:]), ctx.needed, renewed[:4])

        with transforms.without_autocast(saved.input.device):
            results, pull_back = torch.func.vjp(gradients, *(every[place] for place in places))[:2]
            present = [grad for grad, need in zip(grads, ctx.needed, strict=True) if need]
            cotangents = (
                torch.zeros_like(result) if grad is None else grad
                for result, grad in zip(results, present, strict=True)
            )
            found = dict(zip(places, pull_back(tuple(cotangents)), strict=True))
        return None, None, *(found.get(place) for place in range(len(every)))


def _gradients(saved: _Saved, needed: Sequence[bool], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients of states and weights, as far as needed: the backward scan, and products over what it leaves."""
    input, stack, ragged, dropout, tables = saved.input, saved.stack, saved.ragged, saved.options.dropout, saved.tables
    if saved.options.low_memory:
        _, _, _, _, c_reset, preact_0, preact_reset = saved.states
        every = low.gradients(
            *grads[:3], input, c_reset, preact_0, preact_reset, *stack, saved.hidden, saved.cell, tables, dropout,
            saved.seed, needed[0],
        )  # fmt: skip
        return [grad if need else None for grad, need in zip(every, needed, strict=True)]
    layout = Layout.of(input, stack.hidden_size, tables)
    hidden_size, batch_size = stack.hidden_size, layout.batch_size
    grad_output, grad_h_n, grad_c_n, grad_cells = grads
    grad_gates, grad_cell = transforms.call(
        ops.scan_backward, grad_output, grad_h_n, grad_c_n, *stack, saved.cell, saved.gates, tables, batch_size,
        grad_cells, dropout, saved.seed,
    )  # fmt: skip
    grad_cell = grad_cell[..., :hidden_size].to(input.dtype)

    found: list[Tensor | None] = [None] * len(needed)
    if needed[0]:
        first = stack.layer(0)
        found[0] = ops.input_gradient(grad_gates[first], stack.named("weight_ih")[first], layout).view(input.shape)
    begun, anew = [], []  # of every lane, the gradients of the states' shares in the pre-activations, gate-minor
    of_weights: list[Tensor | None] = []
    weight_needed = iter(needed[STATES:])
    for lane in range(stack.lanes):
        reverse = stack.is_reverse(lane)
        rows = grad_gates[lane, layout.steps, : 4 * hidden_size]
        if needed[1] or needed[5]:
            begun.append(ops.begun_gates(grad_gates[lane], layout, ragged, reverse))
        if ragged is not None and (needed[3] or needed[6]):
            # Sequences start anew in padded batches only: their rows are those of T steps.
            is_anew = ragged.starts_anew(reverse).unsqueeze(1)
            anew.append(torch.where(is_anew, rows, 0).unflatten(0, (-1, batch_size)).sum(0))
        of_weight_ih = of_weight_hh = None
        if next(weight_needed):
            inputs = _inputs(saved, lane // stack.directions, layout)
            of_inputs = [ops.matmul(rows.t(), each) for each in inputs]
            of_weight_ih = gate_major(of_inputs[0] if len(of_inputs) == 1 else torch.cat(of_inputs, dim=1))
        if next(weight_needed):
            hidden_prev = ops.hidden_before(saved.hidden[lane], layout, ragged, reverse)
            of_weight_hh = gate_major(ops.matmul(rows.t(), hidden_prev))
        of_weights += [of_weight_ih, of_weight_hh]
        if stack.bias:
            of_ih, of_hh = next(weight_needed), next(weight_needed)
            grad_bias = gate_major(rows.sum(0).unsqueeze(1)).squeeze(1) if of_ih or of_hh else None
            own_bias = grad_bias.clone() if grad_bias is not None and of_ih and of_hh else grad_bias
            of_weights += [grad_bias if of_ih else None, own_bias if of_hh else None]
    found[STATES:] = of_weights

    def through_recurrent_weights(of_preacts: list[Tensor]) -> Tensor:
        weights = stack.named("weight_hh")
        return torch.stack(
            [ops.matmul(each, gate_minor(weight), exact=True) for each, weight in zip(of_preacts, weights, strict=True)]
        )

    if needed[1]:
        grad_h_0 = through_recurrent_weights(begun)
        if ragged is not None and grad_h_n is not None:  # sequences without steps end where they begin
            grad_h_0 = grad_h_0 + torch.where(ragged.lengths.unsqueeze(1) > 0, 0, grad_h_n)
        found[1] = grad_h_0
    if needed[2]:
        found[2] = grad_cell[:, :batch_size]
    if needed[3] and anew:
        found[3] = through_recurrent_weights(anew)
    if needed[4]:
        found[4] = grad_cell[:, batch_size:]
    for place, of_preacts in ((5, begun), (6, anew)):
        if needed[place] and of_preacts:
            found[place] = torch.stack([gate_major(each.t()).t() for each in of_preacts])
    return found


def _inputs(saved: _Saved, layer: int, layout: Layout) -> list[Tensor]:
    """What a layer has read: (rows, K) tensors, side by side."""
    if layer > 0:
        buffer = saved.passed if saved.options.dropout > 0 else saved.hidden
        below = buffer[saved.stack.layer(layer - 1), layout.steps, : layout.hidden_size]
        return list(below.unbind())
    rows = saved.input.reshape(layout.rows, -1)
    # There may be anything where no step is.
    return [rows if saved.ragged is None else torch.where(saved.ragged.is_step().unsqueeze(1), rows, 0)]


def _gradients_by_formula(
    saved: _Saved, needed: tuple[bool, ...], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The needed ones of the gradients, in operations that can be differentiated again."""
    arguments = [*saved.states, *saved.weights]
    wanted = [place for place, need in enumerate(needed) if need]

    def results(*tensors: Tensor) -> list[Tensor]:
        renewed = list(arguments)
        for place, tensor in zip(wanted, tensors, strict=True):
            renewed[place] = tensor
        results = _formula(saved._replace(states=renewed[:STATES], weights=renewed[STATES:]))  # type: ignore[arg-type]
        return [result for result, grad in zip(results, grads, strict=True) if grad is not None]

    pull_back = torch.func.vjp(results, *(arguments[place] for place in wanted))[1]
    found: tuple[Tensor, ...] = pull_back([grad for grad in grads if grad is not None])
    return found


def _formula(saved: _Saved) -> tuple[Tensor, ...]:
    """What `scan_layers` returns, step by step."""
    stack, dropout = saved.stack, saved.options.dropout
    below, size, others = saved.input, stack.weights_per_lane, saved.states[1:]
    h_n, c_n, cells, outputs = [], [], [], []
    for lane in range(stack.lanes):
        h_0, c_0, h_reset, c_reset, *preacts = (None if each is None else each[lane] for each in others)
        weight_ih, weight_hh, *biases = stack.weights[size * lane : size * (lane + 1)]
        reverse, below_and_more = stack.is_reverse(lane), below
        if preacts[0] is not None or preacts[1] is not None:
            # As if they were inputs of their own.
            more = _shares_of_states(preacts, below, reverse, saved.ragged)
            below_and_more = torch.cat([below, more], dim=-1)
            weight_ih = torch.cat([weight_ih, torch.eye(4 * stack.hidden_size).to(weight_ih)], dim=1)
        output, h, c, every_c = lstm_layer(
            below_and_more, h_0, c_0, weight_ih, weight_hh, *(biases or (None, None)), reverse=reverse,
            h_reset=h_reset, c_reset=c_reset, ragged=saved.ragged, return_cells=True,
        )  # fmt: skip
        h_n.append(h)
        c_n.append(c)
        cells.append(every_c)
        if dropout > 0 and lane < stack.lanes - stack.directions:
            assert saved.seed is not None
            output = (output * ops.dropout_scale(saved.seed, lane, dropout, output.detach())).to(output.dtype)
        outputs.append(output)
        if len(outputs) == stack.directions:
            below, outputs = torch.cat(outputs, dim=-1), []
    return below, torch.stack(h_n), torch.stack(c_n), torch.stack(cells)


def _shares_of_states(preacts: Sequence[Tensor | None], input: Tensor, reverse: bool, ragged: Ragged | None) -> Tensor:
    """(T, B, 4H), or (rows, 4H): what the states that steps start from add to their pre-activations."""
    preact_0, preact_reset = preacts
    if ragged is None:
        assert preact_0 is not None
        others = preact_0.new_zeros(input.shape[0] - 1, *preact_0.shape)
        return torch.cat([others, preact_0.unsqueeze(0)] if reverse else [preact_0.unsqueeze(0), others])
    some = preact_0 if preact_0 is not None else preact_reset
    assert some is not None
    shares = some.new_zeros(ragged.rows, some.shape[1])
    if preact_0 is not None:
        rows = (ragged.firsts(reverse) - ragged.batch_size).clamp(0, ragged.rows - 1)
        shares = shares.index_add(0, rows, torch.where(ragged.starts_from_initial(reverse).unsqueeze(1), preact_0, 0))
    if preact_reset is not None:
        anew = ragged.starts_anew(reverse).view(-1, ragged.batch_size, 1)
        shares = shares + torch.where(anew, preact_reset, 0).flatten(0, 1)
    return shares

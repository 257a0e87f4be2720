"""How an LSTM is compared with nn.LSTM: over which cases, and whether bit by bit or by the distance from float64."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton.scan import launch

# What PyTorch's function ends in where oneDNN has no layers for the processor in the dtype that autocast casts to.
REFUSAL = "could not create a primitive descriptor"
LAYOUTS = ("batched", "unbatched", "packed", "packed unsorted")


def twins(*args: Any, **kwargs: Any) -> tuple[lstm_triton.LSTM, nn.LSTM]:
    """Ours and PyTorch's, made from the same seed."""
    modules = []
    for cls in (lstm_triton.LSTM, nn.LSTM):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            modules.append(cls(*args, **kwargs))
    return modules[0], modules[1]


@dataclass
class CallCase:
    """A module's options, and an input for it."""

    options: dict[str, Any]
    input: Any
    hx: Any
    training: bool

    def twins(self) -> tuple[lstm_triton.LSTM, nn.LSTM]:
        ours, stock = twins(**self.options)
        return ours.train(self.training), stock.train(self.training)


@st.composite
def call_cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16),
    layouts: Sequence[str] = LAYOUTS,
    projections: bool = True,
    dropouts: Sequence[float] = (0.0, 0.5, 1.0),
    empty_batches: bool = True,
    smallest_hidden: int = 1,
) -> CallCase:
    """Every combination of a module's options, small sizes, and ways to pass an input."""
    num_layers = draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "input_size": draw(st.integers(1, 5)),
        "hidden_size": draw(st.integers(smallest_hidden, smallest_hidden + 5)),
        "num_layers": num_layers,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dropout": draw(st.sampled_from(dropouts)) if num_layers > 1 else 0.0,
        "bidirectional": draw(st.booleans()),
        "dtype": draw(st.sampled_from(dtypes)),
    }
    input_size, hidden_size = options["input_size"], options["hidden_size"]
    options["proj_size"] = draw(st.integers(0, hidden_size - 1)) if projections else 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(options["dtype"])

    layout = draw(st.sampled_from(layouts))
    time_steps = draw(st.integers(1, 6))
    batch_size = draw(st.integers(0 if layout == "batched" and empty_batches else 1, 4))
    input: Any
    if layout == "unbatched":
        input = random(time_steps, input_size)
    elif layout == "batched":
        input = random(time_steps, batch_size, input_size)
        input = input.transpose(0, 1) if options["batch_first"] else input
    else:
        lengths = draw(st.lists(st.integers(1, time_steps), min_size=batch_size, max_size=batch_size))
        enforce_sorted = layout == "packed"
        lengths = sorted(lengths, reverse=True) if enforce_sorted else lengths
        padded = random(max(lengths), batch_size, input_size)
        input = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=enforce_sorted)

    hx = None
    if draw(st.booleans()):
        layers = num_layers * (2 if options["bidirectional"] else 1)
        batch = () if layout == "unbatched" else (batch_size,)
        sizes = (options["proj_size"] or hidden_size, hidden_size)
        hx = draw(st.sampled_from((tuple, list)))(random(layers, *batch, size) for size in sizes)
    return CallCase(options, input, hx, training=draw(st.booleans()))


def loop_layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    *weights: Tensor | None,
    reverse: bool,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """output, h_n, c_n and every c of a layer (T, B, I) in one direction, as users write it: a step of nn.LSTM a time.

    It knows of no tables: sequences end and start anew by what `lengths` (B,) and `resets` (T, B) themselves say.
    """
    time_steps, batch_size, _ = input.shape
    given = [weight for weight in weights if weight is not None]
    no_h = input.new_zeros(batch_size, given[1].shape[1])  # projected, h is shorter than c
    no_c = input.new_zeros(batch_size, given[1].shape[0] // 4)
    h, h_reset = (no_h if state is None else state for state in (h_0, h_reset))
    c, c_reset = (no_c if state is None else state for state in (c_0, c_reset))
    times = torch.arange(time_steps, device=input.device).unsqueeze(1)
    if lengths is None:
        lengths = torch.full((batch_size,), time_steps, device=input.device)
    is_step = times < lengths
    anew = torch.zeros_like(is_step) if resets is None else resets & is_step
    if reverse:  # the cut is before the step at which a sequence starts anew
        anew = torch.cat([anew[1:], torch.zeros_like(anew[:1])])
    is_step, anew = is_step.unsqueeze(2), anew.unsqueeze(2)
    input = torch.where(is_step, input, 0)
    output, cells = [no_h] * time_steps, [no_c] * time_steps
    for t in reversed(range(time_steps)) if reverse else range(time_steps):
        states = [torch.where(anew[t], *pair).unsqueeze(0) for pair in ((h_reset, h), (c_reset, c))]
        options = (len(given) > 3, 1, 0.0, torch.is_grad_enabled(), False, False)  # bias, layers, dropout, training
        _, h_next, c_next = torch._VF.lstm(input[t : t + 1], states, given, *options)
        h, c = torch.where(is_step[t], h_next[0], h), torch.where(is_step[t], c_next[0], c)
        output[t], cells[t] = torch.where(is_step[t], h, 0), torch.where(is_step[t], c, 0)
    return torch.stack(output), h, c, torch.stack(cells)


class LoopLSTM(nn.LSTM):
    """nn.LSTM called step by step, which gives it what it has not: lengths, resets, every c, and given dropout."""

    masks: Sequence[Tensor] = ()  # (T, B, H), of each lane that has dropout: 0 or 1 / (1 - probability)

    def with_cells(
        self,
        input: Tensor,
        hx: Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        output = input.transpose(0, 1) if self.batch_first else input
        resets = resets.t() if resets is not None and self.batch_first else resets
        h_n, c_n, cells = [], [], []
        for weights in self.all_weights:  # layer after layer, direction after direction
            index = len(h_n)
            h_0, c_0 = (None, None) if hx is None else (hx[0][index], hx[1][index])
            h_reset, c_reset = (None, None) if reset_state is None else (reset_state[0][index], reset_state[1][index])
            reverse = self.bidirectional and index % 2 == 1
            if not reverse:
                below, above = output, []
            scanned, h, c, every_c = loop_layer(
                below, h_0, c_0, *weights, reverse=reverse, lengths=lengths, resets=resets, h_reset=h_reset,
                c_reset=c_reset,
            )  # fmt: skip
            above.append(scanned * self.masks[index].to(scanned.dtype) if index < len(self.masks) else scanned)
            output = torch.cat(above, dim=-1)
            h_n.append(h)
            c_n.append(c)
            cells.append(every_c.transpose(0, 1) if self.batch_first else every_c)
        output = output.transpose(0, 1) if self.batch_first else output
        return output, (torch.stack(h_n), torch.stack(c_n)), torch.stack(cells)

    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        if not isinstance(input, PackedSequence):
            return self.with_cells(input, hx, **options)[:2]
        padded, lengths = pad_packed_sequence(input, self.batch_first)
        output, states, _ = self.with_cells(padded, hx, lengths=lengths)
        return pack_padded_sequence(output, lengths, self.batch_first, enforce_sorted=False), states


def run(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Sequence[Tensor] | None = None,
    cells: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Results and gradients of one forward and backward pass, by name; `cells`: those of `with_cells`.

    What flows back into the results is random, but the same for every module. The random state is the same before
    every call, too, for the sake of dropout.
    """
    hx = None if hx is None else type(hx)(state.detach().requires_grad_() for state in hx)
    anew = options.get("reset_state")
    if anew is not None:
        options["reset_state"] = anew = tuple(state.detach().requires_grad_() for state in anew)
    data = (input.data if isinstance(input, PackedSequence) else input).detach().requires_grad_()
    module.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        call: Any = module.with_cells if cells else module
        output, (h_n, c_n), *every_c = call(
            input._replace(data=data) if isinstance(input, PackedSequence) else data, hx, **options
        )
    results = {"output": output.data if isinstance(output, PackedSequence) else output, "h_n": h_n, "c_n": c_n}
    results |= dict(zip(("cells",), every_c, strict=False))

    generator = torch.Generator().manual_seed(1)
    # Rounded to 8 bits, the gradients are the same numbers in every dtype.
    grads = [torch.randn(r.shape, generator=generator).bfloat16().to(r.device, r.dtype) for r in results.values()]
    torch.autograd.backward(list(results.values()), grads)
    leaves = {"input": data, **dict(zip(("h_0", "c_0"), hx or (), strict=False)), **dict(module.named_parameters())}
    leaves |= dict(zip(("h_reset", "c_reset"), anew or (), strict=False))
    results |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in results.items()}


@cache
def can_autocast(dtype: torch.dtype) -> bool:
    """Whether nn.LSTM can be computed under autocast to that dtype on the CPU, which depends on the processor."""
    try:
        with torch.autocast("cpu", dtype):
            nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
    except RuntimeError as error:
        if REFUSAL in str(error):
            return False
        raise
    return True


def run_converted(stock: nn.LSTM, input: Tensor, hx: Sequence[Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """`run` of the module, input and states in another dtype, and gradients in their own again: what autocast does."""
    results = run(
        copy.deepcopy(stock).to(dtype), input.to(dtype), None if hx is None else type(hx)(h.to(dtype) for h in hx)
    )
    dtypes = {name: stock.weight_hh_l0.dtype for name in results if name.startswith("gradient")}
    dtypes["gradient of input"] = input.dtype
    return {name: tensor.to(dtypes.get(name, dtype)) for name, tensor in results.items()}


def stock_in_autocast(
    stock: nn.LSTM,
    input: Tensor | PackedSequence,
    hx: Sequence[Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """`run` of an nn.LSTM under autocast on the CPU; where it fails for this processor, of the converted module."""
    try:
        with torch.autocast("cpu", dtype):
            return run(stock, input, hx)
    except RuntimeError as error:
        if REFUSAL not in str(error):
            raise
    assert isinstance(input, Tensor)
    return run_converted(stock, input, hx, dtype)


def assert_same(actual: Any, expected: Any) -> None:
    """The same shapes, dtypes and bits, in any nesting of tuples, lists and dictionaries."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)


def error(actual: Tensor, reference: Tensor) -> float:
    """How far a tensor is from its float64 reference, as a part of the reference's length."""
    assert reference.dtype == torch.float64
    actual = actual.double().to(reference.device)
    # What is infinite or not a number has no distance: it has to be the same.
    finite = reference.isfinite()
    torch.testing.assert_close(actual[~finite], reference[~finite], rtol=0, atol=0, equal_nan=True)
    difference, length = (actual - reference)[finite].norm().item(), reference[finite].norm().item()
    return difference / length if length > 0 else difference


def assert_as_accurate(
    actual: Tensor,
    reference: Tensor,
    stock: Tensor,
    factor: float = 2.0,
    floor: float | None = None,
    name: str = "",
) -> None:
    """No farther from the float64 reference than `factor` times what nn.LSTM is, computing in the same dtype.

    Args:
        actual: what is tested.
        reference: the same in float64.
        stock: the same by nn.LSTM in the dtype of `actual`.
        floor: the error that is always allowed, as nn.LSTM may be exact by luck. Default: four units in the last place.
    """
    assert actual.shape == reference.shape == stock.shape, (name, actual.shape, reference.shape, stock.shape)
    assert actual.dtype == stock.dtype, (name, actual.dtype, stock.dtype)
    if floor is None:
        floor = 4 * torch.finfo(actual.dtype).eps
    ours, theirs = error(actual, reference), error(stock, reference)
    print(f"{name or 'error':<30} ours {ours:.2e}  nn.LSTM {theirs:.2e}  allowed {max(factor * theirs, floor):.2e}")
    assert ours <= max(factor * theirs, floor), f"{name}: error {ours:.2e}, nn.LSTM's {theirs:.2e}"


def to_nearest_tf32(tensor: Tensor) -> Tensor:
    """A float32 tensor of finite values, each rounded to 10 bits behind the first one."""
    bits = tensor.view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def nudged(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 tensor, each element off by up to four units of `dtype`: about what rounding on the way does.

    Where a GPU may take TF32 for float32, each element is off by twice what rounding it to TF32 does: nn.LSTM's error
    is no yardstick for TF32 where cuDNN chooses to compute in float32 all the same.
    """
    if dtype == torch.float32 and tensor.is_cuda and launch.allows_tf32():
        return torch.where(tensor.isfinite(), 2 * to_nearest_tf32(tensor.float()).double() - tensor, tensor)
    generator = torch.Generator().manual_seed(2)
    offsets = 2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1
    return tensor * (1 + 4 * torch.finfo(dtype).eps * offsets.to(tensor.device))


def floor_of(sensitive: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    """The error that is always allowed: four units, or, where sums cancel, what nudging the arguments makes of them.

    Without it a gradient of a few terms that cancel would be judged by how lucky nn.LSTM was with its last digits.
    """
    return max(4 * torch.finfo(dtype).eps, error(sensitive, reference))


def assert_results_as_accurate(
    actual: Mapping[str, Tensor],
    stock: nn.LSTM,
    input: Tensor | PackedSequence,
    hx: Sequence[Tensor] | None = None,
    **options: Any,
) -> None:
    """`assert_as_accurate` for every entry of `run(module, input, hx, ...)`, given the nn.LSTM of the same weights."""

    def in_float64(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        module = copy.deepcopy(stock).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(change(parameter))
        packed = isinstance(input, PackedSequence)
        data = change(input.data.double())
        states = None if hx is None else type(hx)(change(state.double()) for state in hx)
        anew = options.get("reset_state")
        changed = {} if anew is None else {"reset_state": tuple(change(state.double()) for state in anew)}
        return run(module, input._replace(data=data) if packed else data, states, **{**options, **changed})

    expected, reference = run(stock, input, hx, **options), in_float64(lambda tensor: tensor)
    assert actual.keys() == expected.keys()
    dtype = expected["output"].dtype
    sensitive = in_float64(lambda tensor: nudged(tensor, dtype))
    for name, tensor in actual.items():
        floor = floor_of(sensitive[name], reference[name], dtype)
        assert_as_accurate(tensor, reference[name], expected[name], floor=floor, name=name)

"""Arguments of a call, made the same each time, and ways to make the call. Each way gives tensors by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

Tensors = dict[str, Tensor]

# --- Arguments ---


class Subclass(Tensor):
    """A user's own kind of tensor."""


def misaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "misaligned": misaligned,
    "negative": lambda tensor: torch.complex(tensor.float(), -tensor.float()).conj().imag.to(tensor.dtype),
    "negative view": lambda tensor: torch._neg_view(-tensor),
    "every second": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "subclass": lambda tensor: tensor.as_subclass(Subclass),
}


class Made(NamedTuple):
    """The arguments of a call."""

    input: Any
    hx: Any
    keywords: dict[str, Any]

    def leaves(self) -> Tensors:
        """What may have a gradient."""
        data = self.input.data if isinstance(self.input, PackedSequence) else self.input
        pairs = {"0": self.hx or (), "reset": self.keywords.get("reset_state", ())}
        named = {f"{name}_{when}": state for when, pair in pairs.items() for name, state in zip("hc", pair)}  # noqa: B905
        return {"input": data, **named}

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Made":
        """The same with a function of each leaf."""
        packed = isinstance(self.input, PackedSequence)
        input = self.input._replace(data=function(self.input.data)) if packed else function(self.input)
        pair = self.keywords.get("reset_state")
        anew = {} if pair is None else {"reset_state": [function(state) for state in pair]}
        hx = None if self.hx is None else type(self.hx)(function(state) for state in self.hx)
        return Made(input, hx, {**self.keywords, **anew})


MISTAKES: dict[str, Callable[[Made], Made]] = {
    "input of another dtype": lambda made: made._replace(input=made.input.to(torch.complex64)),
    "input of another size": lambda made: made._replace(input=torch.cat([made.input, made.input], -1)),
    "input of four dimensions": lambda made: made._replace(input=made.input[None, None]),
    "no steps": lambda made: made._replace(input=made.input[:0]),
    "meta": lambda made: made._replace(input=made.input.to("meta")),
    "one state": lambda made: made._replace(hx=made.hx[:1]),
    "a tensor as states": lambda made: made._replace(hx=made.hx[0]),
    "states of another size": lambda made: made._replace(hx=[state[..., :-1] for state in made.hx]),
    "states of another dtype": lambda made: made._replace(hx=[state.to(torch.complex64) for state in made.hx]),
    "too long": lambda made: made._replace(keywords={"lengths": torch.tensor([99])}),
    "resets of another dtype": lambda made: made._replace(keywords={"resets": torch.zeros(1)}),
    "reset_state alone": lambda made: made._replace(keywords={"reset_state": made.hx}),
}


@dataclass(frozen=True)
class Arguments:
    """How the arguments of a call are made: the same ones each time."""

    sizes: tuple[int, int] = (3, 2)  # T, B
    kind: str = "batched"  # "unbatched", "packed", "packed unsorted"
    layout: str = "contiguous"
    states: type | None = None
    sequences: tuple[str, ...] = ()  # of "lengths", "resets", "reset_state"
    requires_grad: bool = True
    mistake: str = ""
    seed: int = 0

    def make(self, options: dict[str, Any], dtype: torch.dtype) -> Made:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*sizes: int) -> Tensor:
            return LAYOUTS[self.layout](torch.randn(sizes, generator=generator).to(dtype))

        def pair(kind: Any) -> Any:
            lanes = options["num_layers"] * (2 if options["bidirectional"] else 1)
            sizes = (options["proj_size"] or options["hidden_size"], options["hidden_size"])
            return kind(random(lanes, *([] if self.kind == "unbatched" else [batch_size]), size) for size in sizes)

        time_steps, batch_size = self.sizes
        packed = self.kind.startswith("packed")
        order = (batch_size, time_steps) if options["batch_first"] and not packed else (time_steps, batch_size)
        order = (time_steps,) if self.kind == "unbatched" else order
        input: Any = random(*order, options["input_size"])
        lengths = torch.randint(1, time_steps + 1, (batch_size,), generator=generator)
        resets = torch.rand(order, generator=generator) < 0.5
        if packed:
            lengths = lengths if "unsorted" in self.kind else lengths.sort(descending=True).values
            input = pack_padded_sequence(input, lengths, enforce_sorted="unsorted" not in self.kind)
        every = {"lengths": lengths[0] if self.kind == "unbatched" else lengths, "resets": resets}
        every |= {"reset_state": pair(tuple)}
        keywords = {} if packed else {name: every[name] for name in self.sequences}
        made = Made(input, None if self.states is None and not self.mistake else pair(self.states or tuple), keywords)
        made = MISTAKES[self.mistake](made) if self.mistake and not packed else made
        return made if self.mistake else made.mapped(lambda leaf: leaf.detach().requires_grad_(self.requires_grad))


# --- Ways to call ---


def results_of(module: Any, made: Made) -> Tensors:
    output, (h_n, c_n) = module(made.input, made.hx, **made.keywords)
    return {"output": output.data if isinstance(output, PackedSequence) else output, "h_n": h_n, "c_n": c_n}


def random_like(tensors: Tensors) -> list[Tensor]:
    """Rounded to 8 bits: the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(each.shape, generator=generator).bfloat16().to(each.dtype) for each in tensors.values()]


def product(tensors: Tensors, others: list[Tensor]) -> Tensor:
    products = [(one * other).double().sum() for one, other in zip(tensors.values(), others, strict=True)]
    return torch.stack(products).sum()


def plain(module: Any, made: Made, weights: Tensors) -> dict[str, Any]:
    return with_gradients(results_of(module, made), made, weights)


def with_gradients(results: Tensors, made: Made, weights: Tensors) -> dict[str, Any]:
    leaves = {name: leaf for name, leaf in {**made.leaves(), **weights}.items() if leaf.requires_grad}
    if not leaves or not results["output"].requires_grad:
        return dict(results)
    ends = [result for result in results.values() if result.requires_grad]
    flow = [each for each, result in zip(random_like(results), results.values(), strict=True) if result.requires_grad]
    found = torch.autograd.grad(ends, list(leaves.values()), flow, allow_unused=True)
    return {**results, **{f"gradient of {name}": grad for name, grad in zip(leaves, found, strict=True)}}


def with_cells(module: Any, made: Made, weights: Tensors) -> dict[str, Any]:
    output, (h_n, c_n), _ = module.with_cells(made.input, made.hx, **made.keywords)
    output = output.data if isinstance(output, PackedSequence) else output
    return with_gradients({"output": output, "h_n": h_n, "c_n": c_n}, made, weights)


def profiled(module: Any, made: Made, weights: Tensors) -> dict[str, Any]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return plain(module, made, weights)


def with_other_weights(module: Any, made: Made, weights: Tensors) -> dict[str, Any]:
    output, (h_n, c_n) = functional_call(module, weights, (made.input, made.hx), made.keywords)
    output = output.data if isinstance(output, PackedSequence) else output
    return with_gradients({"output": output, "h_n": h_n, "c_n": c_n}, made, weights)


def with_a_list_of_weights(module: Any, made: Made, weights: Tensors) -> dict[str, Any]:
    """As a subclass of nn.LSTM does: the list counts if the attributes are those of the last call."""
    state = torch.get_rng_state()
    results_of(module, made)
    torch.set_rng_state(state)
    kept, module._flat_weights = module._flat_weights, [weights[name] for name in module._flat_weights_names]
    try:
        return plain(module, made, weights)
    finally:
        module._flat_weights = kept


def of_input(module: Any, made: Made) -> Callable[[Tensor], Tensors]:
    return lambda input: results_of(module, made._replace(input=input))


def func_grad(module: Any, made: Made, weights: Tensors) -> dict[str, Any]:
    def loss(input: Tensor) -> Tensor:
        results = of_input(module, made)(input)
        return product(results, random_like(results))

    return {"gradient of input": torch.func.grad(loss)(made.input.detach())}


def func_grad_of_weights(module: Any, made: Made, weights: Tensors) -> dict[str, Any]:
    def loss(weights: Tensors) -> Tensor:
        output, (h_n, c_n) = functional_call(module, weights, (made.input, made.hx), made.keywords)
        results = {"output": output, "h_n": h_n, "c_n": c_n}
        return product(results, random_like(results))

    found = torch.func.grad(loss)({name: weight.detach() for name, weight in weights.items()})
    return {f"gradient of {name}": grad for name, grad in found.items()}


def vmap(module: Any, made: Made, weights: Tensors) -> dict[str, Any]:
    both = torch.stack([made.input.detach(), -made.input.detach()])
    found = torch.func.vmap(of_input(module, made), randomness="same")(both)
    return {name: each[0] for name, each in found.items()}


def jvp(module: Any, made: Made, weights: Tensors) -> dict[str, Any]:
    input = made.input.detach()
    results, tangents = torch.func.jvp(of_input(module, made), (input,), (direction(input),))
    return {**results, "derivative": product(tangents, random_like(results))}


def dual_numbers(module: Any, made: Made, weights: Tensors) -> dict[str, Any]:
    input = made.input.detach()
    with forward_ad.dual_level():
        pairs = of_input(module, made)(forward_ad.make_dual(input, direction(input)))
        unpacked = {name: forward_ad.unpack_dual(pair) for name, pair in pairs.items()}
        results = {name: pair.primal for name, pair in unpacked.items()}
        tangents = {name: pair.tangent for name, pair in unpacked.items()}
        return {**results, "derivative": product(tangents, random_like(results))}


def direction(input: Tensor) -> Tensor:
    return random_like({"input": input})[0]


GIVING_WEIGHTS = (with_other_weights, with_a_list_of_weights)
TRANSFORMS = (func_grad, func_grad_of_weights, vmap, jvp, dual_numbers)
WAYS = (plain, with_cells, profiled, *GIVING_WEIGHTS, *TRANSFORMS)

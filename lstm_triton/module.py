"""The layer with its parameters: `LSTM` takes the place of `torch.nn.LSTM` in a model."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .attributes import MEMORY_ATTRIBUTE, computed_weights, memory_of, options_of, weights_of
from .call import MEMORY, Memory, Sequences
from .checks import checked_memory, weights_in_use
from .functional import lstm
from .leaf import Leaf
from .reclassing import own_names
from .stack import States
from .torchscript import scriptable

Layer = TypeVar("Layer", bound=nn.RNNBase)


class LSTM(Leaf, nn.RNNBase):
    r"""`torch.nn.LSTM`, computed by Triton kernels where they can run, and by PyTorch's own function elsewhere.

    For each time step :math:`t`, each layer computes

    .. math::
        \begin{array}{ll}
            i_t = \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
            f_t = \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
            g_t = \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
            o_t = \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
            c_t = f_t \odot c_{t-1} + i_t \odot g_t \\
            h_t = o_t \odot \tanh(c_t)
        \end{array}

    (Hochreiter & Schmidhuber, 1997; forget gate: Gers, Schmidhuber & Cummins, 2000; notation and gate order: the
    documentation of `torch.nn.LSTM`). With ``proj_size > 0``, :math:`h_t` is multiplied by :math:`W_{hr}` besides
    (Sak et al., 2014).

    Arguments, defaults, attributes, initialisation, `state_dict` and errors are those of `torch.nn.LSTM`. Checkpoints
    of `torch.nn.LSTM` load. It is no subclass of `nn.LSTM`, since `torch.compile` refuses such subclasses.
    `torch.compile`, `torch.export` and `torch.jit.trace` take it. `torch.jit.script` compiles an `nn.LSTM` with the
    same parameters in its place.

    Args:
        input_size (int): the number of features of the input, I.
        hidden_size (int): the number of features of the hidden state, H.
        num_layers (int): the number of layers, each reading the output of the one before. Default: 1
        bias (bool): whether the gates have biases. Default: True
        batch_first (bool): input and output are (B, T, ...) instead of (T, B, ...); the states are not. Default: False
        dropout (float): the probability of dropout on the output of every layer but the last, in training. Default: 0.0
        bidirectional (bool): a second set of weights reads the sequence from its end; the outputs of both
            directions are concatenated (D = 2, otherwise 1). Default: False
        proj_size (int): the size P of projected hidden states, 0 for none (P = H). Default: 0
        device, dtype: of the parameters.
        memory (str): by name only: "full" or "low". "low" keeps little between forward and backward: every :math:`h_t`
            and a few :math:`c_t`, instead of all gates. Backward computes the gates again, so it takes longer. "low"
            has an effect in the Triton kernels only. Assigning "low" or "full" to the attribute `memory` changes it. A
            subclass may keep anything else under this name.

    Inputs:
        * **input**: (T, B, I), (B, T, I) with `batch_first`, (T, I) for one sequence without a batch, or a
          `PackedSequence`; in the dtype of the parameters unless autocast is on.
        * **hx**: (h_0, c_0) of shapes (D * num_layers, B, P) and (D * num_layers, B, H), without the B for an
          input without a batch. Default: zeros
        * **lengths** (by name only): (B,) integers on the input's device, in any order, zero included: how many
          steps each sequence has. Later steps are ignored. Default: all have T steps
        * **resets** (by name only): (T, B) bool, (B, T) with `batch_first`: where True, the sequence is reset at that
          step. No state passes between this step and the step before, in either direction. Default: nowhere
        * **reset_state** (by name only): the state after a reset, shaped like `hx`. Default: zeros

    Outputs:
        * **output**: (T, B, D * P), laid out like the input; zeros past a sequence's length.
        * **(h_n, c_n)**: the final states, shaped like `hx`.

    Raises:
        TypeError, ValueError: by the constructor, as `nn.LSTM` does.
        ValueError, RuntimeError: for an input or a state of a wrong dtype, number of dimensions or size, as `nn.LSTM`
            does, and for packed sequences as well, whose states `nn.LSTM` does not check.
        TypeError, IndexError, RuntimeError: for a `PackedSequence` that is not well-formed, and for attributes that the
            weights contradict. A lowered `num_layers` runs the first layers, as in `nn.LSTM`.
        TypeError, ValueError: for `lengths`, `resets` or a `reset_state` of a wrong dtype, device or shape.

    >>> import torch
    >>> lstm = LSTM(10, 20, num_layers=2)
    >>> lstm.load_state_dict(torch.nn.LSTM(10, 20, num_layers=2).state_dict())
    <All keys matched successfully>
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10), (torch.zeros(2, 3, 20), torch.zeros(2, 3, 20)))
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        memory: Memory = "full",
    ) -> None:
        checked_memory(memory)
        nn.RNNBase.__init__(  # not super(): in standin.py, nn.LSTM comes next
            self,
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        if memory != "full" or type(self) is LSTM:  # a subclass may have a method `memory`
            self.memory = memory

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "memory" and (type(self) is LSTM or (isinstance(value, str) and value in MEMORY)):
            super().__setattr__(MEMORY_ATTRIBUTE, checked_memory(value))
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_flat_weights_names" not in state and "_all_weights" in state:  # of an early PyTorch
            state["_flat_weights_names"] = [name for names in state["_all_weights"] for name in names]
        if "_flat_weights" not in state:
            parameters = {**state, **state["_parameters"]}
            state["_flat_weights"] = [parameters.get(name) for name in state.get("_flat_weights_names", [])]
        if state.get("memory") in MEMORY:  # where this library kept it at first
            state.setdefault(MEMORY_ATTRIBUTE, state["memory"])
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        memory = memory_of(self)
        return super().extra_repr() + (f", memory={memory!r}" if memory != "full" else "")

    def forward(
        self,
        input: Sequences,
        hx: States | list[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: States | list[Tensor] | None = None,
    ) -> tuple[Sequences, States]:
        return lstm(
            input,
            hx,
            weights_in_use(self, weights_of(self)),
            lengths=lengths,
            resets=resets,
            reset_state=reset_state,
            **options_of(self),
        )

    def with_cells(
        self,
        input: Sequences,
        hx: States | list[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: States | list[Tensor] | None = None,
    ) -> tuple[Sequences, States, Tensor]:
        """`forward`, and also the long-term memory c_t of every step. Gradients flow through the c_t, too.

        Returns:
            output and (h_n, c_n) as `forward` returns them, and cells (D * num_layers, ...): for each layer, for each
            direction, c_t of all steps laid out like the input, with H features.

        >>> import torch
        >>> output, (h_n, c_n), cells = LSTM(10, 20, num_layers=2).with_cells(torch.randn(5, 3, 10))
        >>> cells.shape, torch.equal(cells[:, -1], c_n)
        (torch.Size([2, 5, 3, 20]), True)
        """
        return lstm(
            input,
            hx,
            weights_in_use(self, weights_of(self)),
            lengths=lengths,
            resets=resets,
            reset_state=reset_state,
            return_cells=True,
            **options_of(self),
        )

    def to_torch_lstm(self) -> nn.LSTM:
        """A `torch.nn.LSTM` that computes the same: for ONNX, TorchScript, and machines without this package.

        It has the same `Parameter` objects, so training one module trains the other. It has the same training flag. A
        weight that is computed from other tensors (weight_norm, parametrizations) becomes a new parameter with the
        present value. Hooks are not copied: they belong to this module.

        >>> import torch
        >>> stock = LSTM(10, 20).to_torch_lstm()
        >>> stock
        LSTM(10, 20)
        >>> isinstance(stock, torch.nn.LSTM)
        True
        """
        twin = _without_weights(nn.LSTM, self)
        for name, weight in zip(self._flat_weights_names, weights_of(self), strict=True):
            computed = not isinstance(weight, nn.Parameter)
            setattr(twin, name, nn.Parameter(weight.detach().clone()) if computed else weight)
        return twin

    @classmethod
    def from_torch_lstm(cls, module: nn.LSTM) -> "LSTM":
        """An LSTM of this library with the same `Parameter` objects and the same training flag as an `nn.LSTM`.

        Training one module trains the other. An optimizer made for one serves both. Hooks are not copied.
        `lstm_triton.replace_lstm` changes a module in place instead, and keeps hooks and parametrizations as well.

        Raises:
            TypeError: the module is no `nn.LSTM`, or of a subclass with methods or attributes of its own, which would
                be lost.
            ValueError: one of its weights is no parameter, but computed from others (weight_norm, parametrizations).

        >>> import torch
        >>> stock = torch.nn.LSTM(10, 20)
        >>> LSTM.from_torch_lstm(stock).weight_hh_l0 is stock.weight_hh_l0
        True
        """
        if not isinstance(module, nn.LSTM) or isinstance(module, LSTM):
            raise TypeError(f"module must be a torch.nn.LSTM, got {type(module).__name__}")
        for name in computed_weights(module):
            raise ValueError(
                f"module.{name} must be a parameter, but is computed from others: "
                "lstm_triton.replace_lstm(module) keeps that"
            )
        lost = own_names(type(module), nn.LSTM.__mro__)
        if lost:
            raise TypeError(f"module must be a plain torch.nn.LSTM, but {type(module).__name__} defines {lost}")
        twin = _without_weights(cls, module)
        for name in module._flat_weights_names:
            setattr(twin, name, module._parameters[name])
        return twin

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read every parameter where it is."""

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles: an `nn.LSTM` with the same parameters."""
        return scriptable(self, LSTM, computed_weights(self), LSTM.to_torch_lstm)

    # For callers that use nn.LSTM's helpers. `forward` does not use them.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]


def _without_weights(cls: Callable[..., Layer], module: nn.RNNBase) -> Layer:
    """A `cls` with the options of `module`. Its weights have sizes but no memory, until they are set."""
    twin = cls(
        module.input_size,
        module.hidden_size,
        num_layers=module.num_layers,
        bias=module.bias,
        batch_first=module.batch_first,
        bidirectional=module.bidirectional,
        proj_size=module.proj_size,
        device="meta",
    )
    twin.dropout = module.dropout  # not in the constructor, which would repeat its warning about dropout
    return twin.train(module.training)

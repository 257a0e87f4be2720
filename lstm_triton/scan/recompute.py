"""The gates and cell states of a lane once more, from what is known after the forward scan."""

from collections.abc import Sequence

from torch import Tensor

from ..ragged import Ragged
from ..stack import Stack
from .launch import launch
from .plan import AGAIN_BLOCK, AGAIN_WARPS


def recompute_gates(gates: Tensor, cell: Tensor, stack: Stack, tables: Sequence[Tensor], batch_size: int) -> None:
    """Complete what `scan_backward` needs of a single lane, in place.

    Args:
        gates: (1, rows, 4H), pre-activations without biases on entry, activated gates on return.
        cell: (1, state rows, state_stride(H)), c of the states that sequences start from on entry, of all on return.
    """
    from ..kernels.again import gates_again as kernel

    ragged = Ragged(*tables) if tables else None
    block_batch, block_hidden = AGAIN_BLOCK
    grid = (-(-batch_size // block_batch), -(-stack.hidden_size // block_hidden))
    bias_ih, bias_hh = [*stack.named("bias_ih"), *stack.named("bias_hh")] if stack.bias else [gates, gates]
    arguments = {
        "gates_ptr": gates,
        "bias_ih_ptr": bias_ih.contiguous(),
        "bias_hh_ptr": bias_hh.contiguous(),
        "cell_ptr": cell,
        "before_ptr": gates if ragged is None else ragged.before,
        "after_ptr": gates if ragged is None else ragged.after,
        "offsets_ptr": gates if ragged is None else ragged.offsets,
        "seq_len": gates.shape[1] // batch_size if ragged is None else ragged.offsets.shape[0] - 1,
        "batch_size": batch_size,
        "reverse": int(stack.reverse),
    }
    constants = {
        "HIDDEN": stack.hidden_size,
        "STATE_STRIDE": cell.shape[2],
        "HAS_BIAS": stack.bias,
        "RAGGED": ragged is not None,
        "BLOCK_BATCH": block_batch,
        "BLOCK_HIDDEN": block_hidden,
    }
    launch(kernel, grid, gates.device, arguments, constants, {"num_warps": AGAIN_WARPS})

"""Compute a lane's gates and cell states again, from what forward kept."""

from torch import Tensor

from ..stack import Stack
from .launch import prepared, run
from .layout import Layout
from .plan import RECOMPUTE_BLOCK, RECOMPUTE_WARPS, divide_up

RECOMPUTE_OPTIONS: dict[str, object] = {"num_warps": RECOMPUTE_WARPS}


def recompute_gates(gates: Tensor, cell: Tensor, stack: Stack, layout: Layout) -> None:
    """Complete, in place, the gates and cell states of a single lane for `scan_backward`.

    Args:
        gates: (1, rows, 4H), pre-activations without biases on entry, activated gates on return.
        cell: (1, state rows, state_stride(H)). On entry it has the c that sequences start from, on return every c.
    """
    from ..kernels.recompute import recompute_gates as kernel

    ragged, batch_size = layout.ragged, layout.batch_size
    block_batch, block_hidden = RECOMPUTE_BLOCK
    grid = (divide_up(batch_size, block_batch), divide_up(stack.hidden_size(), block_hidden))
    biases_ih, biases_hh = stack.biases()
    arguments = {
        "gates_ptr": gates,
        "bias_ih_ptr": biases_ih[0] if biases_ih else gates,
        "bias_hh_ptr": biases_hh[0] if biases_hh else gates,
        "cell_ptr": cell,
        "before_ptr": gates if ragged is None else ragged.before,
        "after_ptr": gates if ragged is None else ragged.after,
        "offsets_ptr": gates if ragged is None else ragged.offsets,
        "seq_len": layout.time_steps,
        "batch_size": batch_size,
        "reverse": int(stack.reverse),
    }
    constants = {
        "HIDDEN": stack.hidden_size(),
        "STATE_STRIDE": layout.stride,
        "HAS_BIAS": stack.bias(),
        "RAGGED": ragged is not None,
        "BLOCK_BATCH": block_batch,
        "BLOCK_HIDDEN": block_hidden,
    }
    run(prepared(kernel, grid, constants, RECOMPUTE_OPTIONS), gates.device, arguments)

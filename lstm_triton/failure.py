"""A kernel that failed on the GPU: an error that says what happened and what to do.

A GPU runs asynchronously, so the error of a kernel shows in a later call. One such error ends a scan whose programs
wait in vain for each other (kernels/spin.py). After a kernel has failed, no call on this GPU works any more.
"""

SIGNS = (  # in the messages of CUDA and HIP
    "unspecified launch failure",  # of `trap`
    "illegal memory access",
    "illegal instruction",
    "hardware exception",
)


class KernelFailed(RuntimeError):
    """A kernel failed on the GPU, in this call or before it. The cause is the GPU's own error."""


def explained(error: BaseException) -> KernelFailed | None:
    """The exception to raise instead of an error of the GPU; None for any other error, and for this exception."""
    message = str(error)
    if isinstance(error, KernelFailed) or not any(sign in message for sign in SIGNS):
        return None
    return KernelFailed(
        f"a kernel failed on the GPU, in this call or before it ({message.strip().splitlines()[0]}). A scan of "
        "lstm_triton fails so after some seconds if its programs wait in vain for each other. This process cannot use "
        "the GPU any more: start it again. With CUDA_LAUNCH_BLOCKING=1 in the environment the call that fails is the "
        'one that raises. lstm_triton.backend("aten") computes without these kernels. Please report what '
        "`python -m lstm_triton info` and `python -m lstm_triton check` print"
    )

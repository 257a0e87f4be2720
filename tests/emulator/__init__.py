"""An emulator of PTX: compiled kernels on the CPU, instruction by instruction, with all of their threads.

`emulated` puts a GPU that does not exist under Triton. Kernels are compiled for it as for a real one, down to PTX, and
a launch with CPU tensors runs that PTX here. A warp's 32 threads are one NumPy array per register; they may diverge, in
which case those that are furthest behind go first. Warps of all programs (PTX: CTAs) take turns in a seeded random
order, at any instruction.

Whatever a GPU leaves open is made to vary: stores to global memory become visible late, word by word and out of order;
threads of one warp poll at different times; asynchronous instructions read and write at once, or when they are waited
for. Beyond that, four kinds of mistakes raise an error wherever they happen, whether or not a value comes out wrong:

    Fault     an access outside of all buffers, or not aligned
    Race      two warps touch the same shared memory, or write the same global memory, without a barrier in between, and
              a value changes; or a load that may be served from a stale cache reads what another program has written
    Deadlock  programs wait for each other, or for values, and nothing is written any more
    Diverged  threads of a warp are at different places at an instruction that all have to execute together

NaNs (0x7fba) are in registers and shared memory that nobody has written, and come out of global memory that another
warp of the program has written without a barrier since: not an error, as threads may load what they have no use for,
where there are more threads than elements. Not modelled: acquire and release, atomics, thread block clusters, and time.

Instructions, layouts of fragments and descriptors: NVIDIA, PTX ISA. Only what the kernels need is here; anything else
raises NotImplementedError.
"""

from tests.emulator.driver import emulated, launch
from tests.emulator.machine import Deadlock, Diverged, Fault, Race

__all__ = ["Deadlock", "Diverged", "Fault", "Race", "emulated", "launch"]

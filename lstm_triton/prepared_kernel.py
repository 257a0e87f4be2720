"""A kernel with all that is the same in many launches, and the short way to launch it on a GPU.

Triton finds the compiled kernel by looking at every argument in Python. Here the compiled kernel of an earlier launch
is taken, if these are equal: the dtypes of tensors, whether addresses are multiples of 16, and whether integers fit
into 32 bits. (The kernels are not compiled for values of integers: `do_not_specialize`.) Triton's knobs must be equal,
too. Environment variables that Triton reads count as they were at the first launch.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from . import triton_package

KNOWN_LAUNCHERS = ((3, 5), (3, 9))  # the oldest and the newest Triton whose compiled kernels take these arguments
REMEMBERED = 64  # compiled kernels of a prepared kernel: for devices, and for unusual addresses
modulo_16 = (15).__and__  # methods of numbers: `map` calls them without a function in Python
_is_wide = (2**31).__le__  # 2**31 <= number
_dtype, _address = attrgetter("dtype"), Tensor.data_ptr


class _Compiled(NamedTuple):
    """A compiled kernel, ready to be launched."""

    caches: Any  # Triton's own for the device. Another object: somebody has emptied Triton's caches
    knobs: tuple[dict[str, Any], dict[str, Any]]  # Triton's, that somebody has set
    run: Any
    function: Any
    packed_metadata: Any
    kernel: Any  # Triton's object, kept alive: it owns the function


class PreparedKernel:
    """A kernel with its grid, the values of its compile-time arguments and its compiler's options.

    Args:
        kernel: a function under `triton.jit`. Its compile-time arguments are its last ones. Names of tensors end with
            "_ptr", names of tuples of tensors with "_ptrs". All other arguments are numbers, in `do_not_specialize`.
        grid: the numbers of programs.
        constants: the compile-time arguments, by name. The kernel may lack some.
        options: of Triton's compiler and launcher.
        plan: what the constants were chosen by.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        constants: Mapping[str, object],
        options: Mapping[str, object],
        plan: Any = None,
    ) -> None:
        from triton import knobs
        from triton.runtime import driver

        self.kernel, self.grid, self.options, self.plan = kernel, grid, options, plan
        self._names: list[str] = [name for name in kernel.arg_names if name not in constants]
        self._constants = [constants[name] for name in kernel.arg_names[len(self._names) :]]
        self._pointers = _getter([at for at, name in enumerate(self._names) if name.endswith("_ptr")])
        self._tuples = [at for at, name in enumerate(self._names) if name.endswith("_ptrs")]
        self._numbers = _getter([at for at, name in enumerate(self._names) if not name.endswith(("_ptr", "_ptrs"))])
        self._compiled: dict[Any, _Compiled] = {}
        self._hooks, self._compilation, self._driver = knobs.runtime, knobs.compilation, driver

    def values(self, arguments: Mapping[str, object]) -> list[Any]:
        """All arguments in the order of the kernel's parameters, from those that are not compile-time arguments."""
        return [*map(arguments.__getitem__, self._names), *self._constants]

    def run_interpreted(self, values: Sequence[Any]) -> None:
        self.kernel[self.grid](*values)

    def run_on_gpu(self, device: int, values: Sequence[Any]) -> None:
        """Launch on a GPU, which is PyTorch's current one."""
        # What Triton compiles for, of the arguments that are not compile-time arguments.
        tensors = self._pointers(values)
        for at in self._tuples:
            tensors += values[at]
        addresses, dtypes = map(_address, tensors), map(_dtype, tensors)
        key = (device, *map(_is_wide, self._numbers(values)), *map(modulo_16, addresses), *dtypes)
        found = self._compiled.get(key)
        try:
            hooks = self._hooks.launch_enter_hook, self._hooks.launch_exit_hook
            is_watched = hooks[0].calls or hooks[1].calls or self.kernel.pre_run_hooks
        except AttributeError:  # a hook was replaced by an object without `calls`
            is_watched = True
        caches = self.kernel.device_caches[device]
        knobs = self._hooks.__dict__, self._compilation.__dict__
        if found is None or found.caches is not caches or found.knobs != knobs or is_watched:
            self._remember(key, device, self.kernel[self.grid](*values, **self.options))
            return
        stream = self._driver.active.get_current_stream(device)
        found.run(*(*self.grid, 1, 1)[:3], stream, found.function, found.packed_metadata, None, *hooks, *values)

    def _remember(self, key: tuple[object, ...], device: int, kernel: Any) -> None:
        if kernel is None or not _launcher_is_known():  # None: a hook has kept Triton from launching
            return
        if len(self._compiled) >= REMEMBERED:
            self._compiled.clear()
        caches = self.kernel.device_caches[device]
        knobs = dict(self._hooks.__dict__), dict(self._compilation.__dict__)
        self._compiled[key] = _Compiled(caches, knobs, kernel.run, kernel.function, kernel.packed_metadata, kernel)


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the elements at these places, as a tuple."""
    return itemgetter(*places) if len(places) > 1 else lambda values: tuple([values[at] for at in places])


@cache
def _launcher_is_known() -> bool:
    oldest, newest = KNOWN_LAUNCHERS
    return not triton_package.older_than(oldest) and triton_package.older_than((newest[0], newest[1] + 1))

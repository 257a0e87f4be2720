"""What `with` blocks set: the backend, where kernels run, and who takes over calls of `nn.LSTM`.

One rule for all of them: what a block sets holds in the thread or asyncio task that entered the block, until the block
ends. Of several open blocks the one entered last decides. Blocks may end in any order.

- Another thread or task sees nothing of a block, unless it took the context along: `asyncio.create_task` and
  `asyncio.to_thread` inside the block do so, and `contextvars.copy_context().run`. `all_threads=True` asks for every
  thread that has no open block of its own; `nn.DataParallel` needs that, since its threads start without context.
- The threads in which autograd computes backward see the blocks of the thread that called backward.
- A generator that is suspended inside a block leaves the block open.
- A block may be entered several times, also nested, and in several threads at once. To end an ended block does nothing.
"""

import ctypes
import os
import sys
from contextlib import ContextDecorator
from contextvars import ContextVar
from threading import Lock, local
from types import ModuleType
from typing import Any, Generic, TypeVar

# By name: torch.compile looks into functions that name the module torch, also if they are called between its programs.
from torch._C import _current_graph_task_id, _get_obj_in_tls, _is_key_in_tls, _stash_obj_in_tls

Value = TypeVar("Value")
Own = TypeVar("Own", bound="Block")


class ForkLock:
    """A lock that is free in the child of a fork, whoever held it in the parent: that thread is not in the child."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if self._lock.locked():  # not in a child that was forked by the thread that held the lock
            self._lock.release()


class _Entered:
    """One entering of a block. It stays in the contexts that took it along, so it says itself whether it ended."""

    __slots__ = ("ended", "name", "value")

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value
        self.ended = False


class _Told:
    """What autograd's threads are told by the thread that calls backward.

    PyTorch knows no tasks of asyncio. So `blocks` is that of the task that asked for a setting last.
    """

    blocks: "Open" = ()


class _Thread(local):
    """What each thread has of its own: what it told autograd."""

    told: _Told | None = None


Open = tuple[_Entered, ...]  # in the order of entering
_lock = ForkLock()
_own: ContextVar[Open] = ContextVar("lstm_triton_blocks", default=())
_of_all_threads: Open = ()
_open_blocks = 0  # in the whole process: without any, no thread looks for its own
_FOR_BACKWARD = "lstm_triton_blocks"
_thread = _Thread()


class Block(ContextDecorator):
    """A `with` block that gives a setting a value."""

    def __init__(self, name: str, value: object, *, all_threads: bool) -> None:
        self._name, self._value, self._all_threads = name, value, all_threads
        self._open: Open = ()

    def __enter__(self: Own) -> Own:
        global _of_all_threads, _open_blocks
        entered = _Entered(self._name, self._value)
        with _lock:
            self._open += (entered,)
            if self._all_threads:
                _of_all_threads += (entered,)
            _open_blocks += 1
        _own.set((*_still_open(_own.get()), entered))
        _blocks()  # tells autograd
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> bool:
        """End what was entered last: in this thread or task, otherwise anywhere. False: nothing was open."""
        global _of_all_threads, _open_blocks
        with _lock:
            here = [each for each in _own.get() if each in self._open]
            entered = (here or self._open or (None,))[-1]
            if entered is None:
                return False
            entered.ended = True
            _open_blocks -= 1
            self._open, _of_all_threads = _still_open(self._open), _still_open(_of_all_threads)
        _own.set(_still_open(_own.get()))
        _blocks()
        return True


def _still_open(blocks: Open) -> Open:
    return tuple([each for each in blocks if not each.ended])


def _blocks() -> Open:
    """The blocks of this thread or task, ended ones among them."""
    own, told = _own.get(), _thread.told
    if told is not None:
        told.blocks = own
        return own
    if _is_key_in_tls(_FOR_BACKWARD):  # a thread of autograd, which was told by another thread
        return (*_get_obj_in_tls(_FOR_BACKWARD).blocks, *own)
    if own and _current_graph_task_id() == -1:  # not a thread of autograd
        _thread.told = told = _Told()
        told.blocks = own
        _hand_to_autograd(told)
    return own


def _hand_to_autograd(told: _Told) -> None:
    """Let PyTorch hand this object to the threads of autograd, as it hands them the grad mode."""
    references = sys.getrefcount(told)
    _stash_obj_in_tls(_FOR_BACKWARD, told)
    if sys.getrefcount(told) == references:  # PyTorch 2.11 and older take over a reference without counting it
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(told))


class Setting(ModuleType, Generic[Value]):
    """Something that blocks set.

    It is a module whose attribute `now` is computed. torch.compile reads an attribute of a module by `getattr`, and
    guards on its value in each call, but torch.compile cannot guard on a context variable. `torch.backends.cudnn` is
    such a module, too.
    """

    def __init__(self, name: str, default: Value) -> None:
        super().__init__(f"lstm_triton setting {name}")
        self._name, self._default = name, default

    @property
    def now(self) -> Value:
        """What the innermost open block of this thread or task says."""
        if _open_blocks > 0:
            name, told = self._name, _thread.told
            if told is None:
                own = _blocks()
            else:  # the usual case of `_blocks`, quickly
                told.blocks = own = _own.get()
            for blocks in (own, _of_all_threads):
                for entered in reversed(blocks):
                    if entered.name == name and not entered.ended:
                        return entered.value  # type: ignore[no-any-return]
        return self._default

    def block(self, value: Value, *, all_threads: bool) -> Block:
        return Block(self._name, value, all_threads=all_threads)

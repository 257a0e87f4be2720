"""Counts kernels that Triton finds in its cache, and kernels that it compiles. So a filled cache shows its worth.

    with hits.counting() as kernels:
        ...
    print(kernels)  # kernel cache: 7 found, 0 compiled

Triton tells of its look-ups since version 3.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock


@dataclass
class Hits:
    """The names of kernels that this process loaded, in the order of their first launches."""

    found: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"kernel cache: {len(self.found)} found, {len(self.compiled)} compiled"


@contextmanager
def counting() -> Iterator[Hits]:
    """Count all kernels that Triton loads until the block ends.

    A kernel counts once: the process keeps it, and Triton does not look for it again.
    """
    from triton import knobs

    hits = Hits()
    others = knobs.compilation.listener

    def listen(*, src: Any, cache_hit: bool, **more: Any) -> None:
        (hits.found if cache_hit else hits.compiled).append(src.name)
        if others is not None:
            others(src=src, cache_hit=cache_hit, **more)

    with mock.patch.object(knobs.compilation, "listener", listen):
        yield hits

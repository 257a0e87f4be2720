"""Fixtures of the module's tests."""

from collections.abc import Iterator

import pytest

from tests.support.fake_gpu import FakeGPU, fake_gpu


@pytest.fixture
def gpu() -> Iterator[FakeGPU]:
    with fake_gpu() as found:
        yield found

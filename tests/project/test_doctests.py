"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import lstm_triton

MODULES = sorted(path.stem for path in Path(lstm_triton.__file__).parent.glob("[!_]*.py"))


@pytest.mark.parametrize("name", ["lstm_triton", *(f"lstm_triton.{name}" for name in MODULES)])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    assert doctest.testmod(lstm_triton.module).attempted > 0

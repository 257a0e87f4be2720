"""The short way to a launch, against Triton's own way, on a pretended GPU (tests/support/short_launches.py)."""

import json

import pytest

from tests.support.processes import output_of_python

pytest.importorskip("triton")

Ways = dict[str, int]  # how many launches went the short way and Triton's own, and how many took another kernel


@pytest.fixture(scope="module")
def found() -> dict[str, Ways]:
    return json.loads(output_of_python("-m", "tests.support.short_launches"))  # type: ignore[no-any-return]


def test_it_takes_the_kernel_that_triton_would_take(found: dict[str, Ways]) -> None:
    """For all dtypes, sizes and addresses."""
    assert found["random"]["short"] > 100
    assert found["random"]["different"] == 0


@pytest.mark.parametrize(
    ("case", "short"),
    [
        ("nothing", 4),
        ("knob", 3),
        ("hook", 2),
        ("hook that launches nothing", 2),
        ("hook of another kind", 2),
        ("caches", 3),
        ("another Triton", 0),
    ],
)
def test_when_it_is_taken(found: dict[str, Ways], case: str, short: int) -> None:
    """From the second of five calls on, unless something changes before the last two, or Triton is not known."""
    assert found[case] == {"short": short, "own": 5 - short, "different": 0}

"""What is measured: cases, and grids of cases, as data.

T steps, B batch rows, I input_size and H hidden_size, as in the rows of a results file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from lstm_triton.ending import Mistake

Row = dict[str, Any]  # of a results file: see results.ROW_KEYS

MODES = ("forward", "forward+backward", "inference")
DTYPES = ("float32", "tf32", "float16", "bfloat16")  # tf32: tensors in float32, products in TF32
# lengths: padded sequences, with the length of every row. resets: every row is reset now and then.
LAYOUTS = ("dense", "packed", "lengths", "resets")

OURS = "lstm_triton"
BASELINE = "nn.LSTM"
FLOOR = "exchange-floor"
SYSTEMS = (OURS, BASELINE, "nn.LSTM+compile", "flashrnn-triton", "flashrnn-cuda", "torchrl-triton", FLOOR)
MAIN = (OURS, BASELINE, FLOOR)


@dataclass(frozen=True)
class BenchCase:
    """A layer or a stack of layers, and what is done with it. str() is its name in everything that is printed."""

    mode: str
    dtype: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    bidirectional: bool = False
    layout: str = "dense"
    proj_size: int = 0
    memory: Literal["full", "low"] = "full"  # of lstm_triton.LSTM

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.dtype not in DTYPES or self.layout not in LAYOUTS:
            raise ValueError(f"no such case: {self}")
        if self.layout == "resets" and self.bidirectional:
            raise ValueError(f"no such case, as nn.LSTM's step loop has one direction: {self}")

    def __str__(self) -> str:
        return "-".join([self.shape, self.dtype, self.mode])

    @property
    def shape(self) -> str:
        parts = [f"T{self.T}", f"B{self.B}", f"H{self.H}"]
        parts += [f"I{self.I}"] if self.I != self.H else []
        parts += [f"{self.layers}layers"] if self.layers > 1 else []
        parts += ["bidirectional"] if self.bidirectional else []
        parts += [self.layout] if self.layout != "dense" else []
        parts += [f"proj{self.proj_size}"] if self.proj_size else []
        parts += [f"{self.memory}-memory"] if self.memory != "full" else []
        return "-".join(parts)

    @property
    def backward(self) -> bool:
        return self.mode == "forward+backward"

    @property
    def output_size(self) -> int:
        return self.proj_size or self.H

    @property
    def lengths(self) -> list[int]:
        """The steps of every batch row: T, or, if packed or padded, between a quarter of T and T, unsorted."""
        if self.layout in ("dense", "resets"):
            return [self.T] * self.B
        shortest = max(1, self.T // 4)
        spread = [self.T - (self.T - shortest) * row // max(1, self.B - 1) for row in range(self.B)]
        return spread[1::2] + spread[::2]


CASE_FIELDS = tuple(BenchCase.__dataclass_fields__)


def as_dict(case: BenchCase) -> Row:
    """The case as keys of a row. proj_size and memory are left out where they have their defaults."""
    defaults = {"proj_size": 0, "memory": "full"}
    return {name: value for name, value in asdict(case).items() if name not in defaults or value != defaults[name]}


def from_dict(fields: Row) -> BenchCase:
    return BenchCase(**{name: fields[name] for name in CASE_FIELDS if name in fields})


@dataclass(frozen=True)
class Block:
    """Cases, and the systems that take part in all of them."""

    cases: tuple[BenchCase, ...]
    systems: tuple[str, ...] = MAIN


@dataclass(frozen=True)
class Grid:
    about: str
    blocks: tuple[Block, ...]
    timed: bool = True  # False: values are checked, and nothing is timed
    first_call: bool = False  # start with an empty kernel cache, and report how long the first call takes

    def __iter__(self) -> Iterator[tuple[BenchCase, tuple[str, ...]]]:
        """(case, systems), the most important first. A case comes again only for systems that are new to it."""
        seen: set[tuple[BenchCase, str]] = set()
        for block in self.blocks:
            for case in block.cases:
                if names := tuple(name for name in block.systems if (case, name) not in seen):
                    seen.update((case, name) for name in names)
                    yield case, names


def product_of(**axes: Iterable[Any]) -> tuple[BenchCase, ...]:
    """All combinations of the axes. The last axis changes fastest. I is H where it is not given."""
    combinations = (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))
    return tuple(BenchCase(**{"I": fields["H"], **fields}) for fields in combinations)


def variations(base: BenchCase, modes: Iterable[str], dtypes: Iterable[str], *changes: Row) -> tuple[BenchCase, ...]:
    return tuple(
        replace(base, mode=mode, dtype=dtype, **change) for change in changes for mode, dtype in product(modes, dtypes)
    )


TRAINING = ("forward+backward", "forward")
FAST_DTYPES = ("bfloat16", "float16", "tf32")
TINY = BenchCase("forward+backward", "float32", T=6, B=3, I=8, H=8)
FLASHRNN_CASE = BenchCase("forward+backward", "bfloat16", T=1024, B=16, I=768, H=768)
FLASHRNN_SWEEPS = variations(
    FLASHRNN_CASE,
    TRAINING,
    FAST_DTYPES,
    *({"T": length} for length in (256, 512, 2048)),
    *({"B": batch} for batch in (64, 256, 2, 128, 32, 8)),
)
HIDDEN_SIZES = (512, 1024, 256, 768, 128, 2048, 64, 1536, 160)
STACK = BenchCase("forward+backward", "bfloat16", T=512, B=32, I=512, H=512)

GRIDS = {
    "smoke": Grid(
        "everything once, in seconds, on any machine",
        (
            Block(
                variations(TINY, MODES, ("float32",), {}),
                tuple(system for system in SYSTEMS if system != "nn.LSTM+compile"),
            ),
            Block(variations(TINY, MODES[1:2], ("bfloat16", "float32"), {}, {"T": 12}, {"B": 1}, {"H": 16, "I": 16})),
            Block(
                variations(
                    TINY,
                    MODES[1:2],
                    ("float32",),
                    {"I": 5, "layers": 2, "bidirectional": True},
                    {"layout": "packed"},
                    {"layout": "lengths"},
                    {"layout": "resets"},
                    {"proj_size": 3},
                )
            ),
        ),
    ),
    "accuracy": Grid(
        "errors against float64 over sizes that fit a tile and sizes that fit none",
        (
            Block(
                product_of(
                    mode=TRAINING[:1],
                    T=(64,),
                    H=(768, 128, 256, 512, 1024, 100, 2048, 1536, 7, 331),
                    B=(16, 5),
                    dtype=DTYPES,
                ),
                (OURS, BASELINE),
            ),
        ),
        timed=False,
    ),
    "headline": Grid(
        "FlashRNN's published case (T=1024, B=16, H=768), then its sweeps over B and over T",
        (
            Block(variations(FLASHRNN_CASE, MODES[1::-1] + MODES[2:], (*FAST_DTYPES, "float32"), {}), SYSTEMS),
            Block(FLASHRNN_SWEEPS),
            Block(FLASHRNN_SWEEPS, SYSTEMS[3:6]),  # last, since some peers compile for minutes
        ),
    ),
    "latency": Grid(
        "one step of one row: the overhead of a call, and how long the first call takes",
        (
            Block(
                product_of(T=(1,), B=(1,), H=(512, 128), mode=("inference", "forward+backward"), dtype=FAST_DTYPES),
                SYSTEMS[:2],
            ),
        ),
        first_call=True,
    ),
    "stacks": Grid(
        "several layers, both directions, odd batches, sequences of different lengths or that start anew, projections",
        (
            Block(
                variations(
                    STACK,
                    ("forward+backward", "inference"),
                    ("bfloat16", "tf32"),
                    {"layers": 2},
                    {},
                    {"bidirectional": True},
                    {"layout": "packed"},
                    {"layout": "lengths"},
                    {"layout": "resets"},
                    {"layers": 4},
                    {"B": 33},
                    {"layers": 2, "bidirectional": True, "layout": "packed"},
                    {"proj_size": 128},
                    {"layers": 3, "bidirectional": True, "B": 33},
                    {"layers": 6},
                    {"layers": 2, "proj_size": 128, "layout": "packed"},
                    {"layers": 2, "proj_size": 128, "bidirectional": True},
                    {"memory": "low"},
                    {"layers": 4, "memory": "low"},
                ),
            ),
        ),
    ),
    "full": Grid(
        "the map: hidden size by batch size by dtype, two lengths",
        (
            Block(product_of(mode=TRAINING[:1], T=(1024,), B=(16, 64, 1), H=HIDDEN_SIZES, dtype=FAST_DTYPES)),
            Block(
                product_of(
                    mode=("forward+backward", "inference"),
                    T=(1024, 256),
                    B=(16, 64, 256, 1),
                    H=HIDDEN_SIZES,
                    dtype=FAST_DTYPES,
                ),
            ),
        ),
    ),
}


def shrunk(case: BenchCase) -> BenchCase:
    """The case with sizes so small that the interpreter needs about a second."""
    return replace(
        case,
        T=min(case.T, 3),
        B=min(case.B, 3),
        I=min(case.I, 5),
        H=min(case.H, 8),
        layers=min(case.layers, 2),
        proj_size=min(case.proj_size, 3),
    )


def rehearsal(grid: Grid) -> Grid:
    """The grid with a few cases of each block, all of them shrunk."""
    blocks = []
    for block in grid.blocks:
        small = tuple(dict.fromkeys(shrunk(case) for case in block.cases))
        blocks.append(replace(block, cases=small[:: max(1, len(small) // 3)][:3]))
    return replace(grid, blocks=tuple(blocks))


class UnknownName(Mistake):
    """There is no such grid or system. The message is one line."""


def systems_named(names: str | None) -> tuple[str, ...] | None:
    """The systems in a list with commas. None where no list was given."""
    if names is None:
        return None
    chosen = tuple(names.split(","))
    if unknown := [name for name in chosen if name not in SYSTEMS]:
        raise UnknownName(f"unknown system {unknown[0]!r}: choose from {', '.join(SYSTEMS)}")
    if len(set(chosen)) < len(chosen):
        raise UnknownName(f"a system is named twice in {names!r}")
    return chosen


def work_list(
    grid_name: str, systems: str | None = None, rehearse: bool = False, blocks: int | None = None
) -> list[tuple[BenchCase, tuple[str, ...]]]:
    """(case, systems) of a grid in order.

    Args:
        blocks: only the first ones are taken; None: all.
        rehearse: take small sizes, for the interpreter.
    """
    if grid_name not in GRIDS:
        raise UnknownName(f"unknown grid {grid_name!r}: choose from {', '.join(GRIDS)}")
    chosen = systems_named(systems)
    grid = rehearsal(GRIDS[grid_name]) if rehearse else GRIDS[grid_name]
    grid = replace(grid, blocks=grid.blocks[:blocks])
    return [(case, chosen or names) for case, names in grid]

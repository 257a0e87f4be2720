"""The planner is a pure function; every plan it makes fits the device."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.resources import DEVICES
from lstm_triton.scan import planner
from lstm_triton.scan.planner import candidates, forced, launches, plan, state_stride
from lstm_triton.target import Device

SIZES = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 300) | st.integers(1, 200_000),
        "input_size": st.integers(1, 3000),
        "hidden_size": st.integers(1, 2200) | st.integers(1, 8000),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "allow_tf32": st.booleans(),
    }
)
H200 = DEVICES["sm_90"]


@given(st.sampled_from(["forward", "backward"]), SIZES, st.sampled_from(sorted(DEVICES)))
def test_every_candidate_covers_the_layer_and_fits_the_device(
    kind: planner.Kind, sizes: dict[str, object], arch: str
) -> None:
    device = DEVICES[arch]
    for each in candidates(kind, device=device, **sizes):  # type: ignore[arg-type]
        assert each.programs <= device.multiprocessors
        assert each.slices * each.block_hidden >= sizes["hidden_size"] > (each.slices - 1) * each.block_hidden
        assert each.batch_tiles * each.block_batch >= sizes["batch_size"] > (each.batch_tiles - 1) * each.block_batch
        assert 1 <= each.groups <= each.batch_tiles
        depth = sizes["hidden_size"] * (1 if kind == "forward" else 4)
        assert each.chunks * each.block_k >= depth > (each.chunks - 1) * each.block_k
        assert 1 <= each.group_chunks <= each.resident_chunks <= each.chunks
        assert each.block_k // each.split_k >= 16
        size = sizes["dtype"].itemsize  # type: ignore[attr-defined]
        # Every element of a state tile is polled by one thread, and each thread polls 32 bits or more.
        threads = each.num_warps * device.threads_per_warp
        assert each.block_batch * each.block_k * size >= 4 * threads
        assert each.thread_elements in (0, each.block_batch * each.block_k // threads)
        assert (each.thread_elements > 0) == (device.capability > 0)
        rows = each.block_hidden * (4 if kind == "forward" else 1)
        assert 0 <= each.register_chunks <= each.resident_chunks
        assert each.register_chunks == 0 or each.split_k > 1
        in_shared = each.resident_chunks - each.register_chunks
        weights = rows * each.block_k * size * (2 if each.dot_precision == "tf32x3" else 1)
        partial_sums = 4 * each.split_k * rows * each.block_batch if each.split_k > 1 else 0
        assert in_shared * weights + partial_sums <= device.shared_bytes
        # Programs hold back only where the values they look for are on their way, and where they can look.
        waits = device.capability > 0 and each.slices > 1 and each.batch_tiles <= each.groups
        assert each.hold == 0 or (waits and planner.LEAST_HOLD <= each.hold <= planner.MOST_HOLD)
        if each.fuse_input:
            chunks = -(-sizes["input_size"] // each.block_input)  # type: ignore[operator]
            assert weights // each.block_k * each.block_input * chunks + in_shared * weights < device.shared_bytes
        for block in (
            each.block_batch,
            each.block_hidden,
            each.block_k,
            each.block_input,
            each.split_k,
            each.num_warps,
        ):
            assert block & (block - 1) == 0


@given(st.sampled_from(["forward", "backward"]), SIZES)
def test_the_first_candidate_is_the_plan(kind: planner.Kind, sizes: dict[str, object]) -> None:
    found = candidates(kind, device=H200, **sizes)  # type: ignore[arg-type]
    assert plan(kind, device=H200, **sizes) == found[0]  # type: ignore[arg-type]
    assert [each.predicted_cycles for each in found] == sorted(each.predicted_cycles for each in found)


@pytest.mark.parametrize("hidden_size", [64, 128, 256, 384, 512, 768, 1024])
@pytest.mark.parametrize("batch_size", [1, 16, 64, 256])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_all_weights_stay_on_a_large_gpu(kind: planner.Kind, batch_size: int, hidden_size: int) -> None:
    sizes = {"batch_size": batch_size, "input_size": hidden_size, "hidden_size": hidden_size, "allow_tf32": False}
    for dtype in (torch.float16, torch.bfloat16):
        assert plan(kind, dtype=dtype, device=H200, **sizes).resident_fraction == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("batch_size", "hidden_size"), [(16, 4096), (100_000, 512), (100_000, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_large_sizes_have_plans(
    kind: planner.Kind, dtype: torch.dtype, batch_size: int, hidden_size: int, arch: str
) -> None:
    """Of float32 with and without TF32: weights that do not fit on the chip are streamed, batch tiles take turns."""
    device = DEVICES[arch]
    sizes: dict[str, Any] = {"batch_size": batch_size, "input_size": hidden_size, "hidden_size": hidden_size}
    for allow_tf32 in {False, dtype == torch.float32}:
        found = plan(kind, dtype=dtype, allow_tf32=allow_tf32, device=device, **sizes)
        assert found.programs <= device.multiprocessors
        assert found.slices * found.block_hidden >= hidden_size
        assert found.batch_tiles * found.block_batch >= batch_size
        assert hidden_size < 4096 or found.resident_fraction < 1


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("hidden_size", [100, 768, 1024])
def test_batches_share_a_few_kernels(kind: planner.Kind, hidden_size: int) -> None:
    """What is compiled in does not follow the batch size: only a few tile shapes do."""
    kernels = set()
    for batch_size in range(1, 520):
        chosen = plan(
            kind, batch_size=batch_size, input_size=64, hidden_size=hidden_size, dtype=torch.float16, device=H200,
            allow_tf32=False,
        )  # fmt: skip
        several = chosen.batch_tiles > chosen.groups
        kernels.add((several, chosen.hold > 0, replace(chosen, batch_tiles=0, groups=0, predicted_cycles=0, hold=0)))
    print(f"{kind}, H={hidden_size}: {len(kernels)} kernels for 519 batch sizes")
    assert len(kernels) <= 8


def test_precision_follows_what_cudnn_may_use() -> None:
    sizes = {"batch_size": 16, "input_size": 64, "hidden_size": 64, "dtype": torch.float32}
    assert plan("forward", device=H200, allow_tf32=True, **sizes).dot_precision == "tf32"
    assert plan("forward", device=H200, allow_tf32=False, **sizes).dot_precision == "tf32x3"
    assert plan("forward", device=DEVICES["gfx942"], allow_tf32=True, **sizes).dot_precision == "ieee"


def test_a_device_that_is_too_small_is_refused() -> None:
    sizes = {"batch_size": 1, "input_size": 8, "hidden_size": 4096, "dtype": torch.float32, "allow_tf32": False}
    with pytest.raises(ValueError, match="no plan for hidden_size 4096"):
        plan("forward", device=Device("toy", "sm_90", 2, 16 * 1024), **sizes)


def test_a_measured_table_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"batch_size": 16, "input_size": 64, "hidden_size": 256, "dtype": torch.float16, "allow_tf32": False}
    device = Device("NVIDIA Measured", "sm_90", 132, 232448)
    second = candidates("forward", device=device, **sizes)[1]
    path = tmp_path / planner.table_path(device).name
    path.write_text(json.dumps({planner.key("forward", **sizes): asdict(second)}))
    monkeypatch.setattr(planner, "table_path", lambda device: path)
    planner._table.cache_clear()
    planner._plan.cache_clear()
    assert plan("forward", device=device, **sizes) == second
    other = {**sizes, "batch_size": 17}
    assert plan("forward", device=device, **other) == candidates("forward", device=device, **other)[0]
    planner._table.cache_clear()
    planner._plan.cache_clear()


def test_the_backward_scan_does_not_depend_on_the_input() -> None:
    """Who tunes it and who runs it find the same plan and the same table entry, whatever input_size they name."""
    sizes = {"batch_size": 16, "hidden_size": 256, "dtype": torch.float16, "allow_tf32": False}
    plans = [plan("backward", device=H200, input_size=input_size, **sizes) for input_size in (1, 256, 1024)]
    keys = {planner.key("backward", input_size=input_size, **sizes) for input_size in (1, 256, 1024)}
    assert plans[0] == plans[1] == plans[2]
    assert len(keys) == 1
    assert planner.key("forward", input_size=1, **sizes) != planner.key("forward", input_size=2, **sizes)


def test_a_forced_plan_holds_for_its_kind_only() -> None:
    sizes = {"batch_size": 16, "input_size": 64, "hidden_size": 256, "dtype": torch.float16, "allow_tf32": False}
    usual = plan("forward", device=H200, **sizes)
    other = candidates("forward", device=H200, **sizes)[-1]
    with forced(other, "forward"):
        assert plan("forward", device=H200, **sizes) == other
        assert plan("backward", device=H200, **sizes) != other
    assert plan("forward", device=H200, **sizes) == usual


def test_state_rows_are_aligned() -> None:
    for hidden_size in range(1, 200):
        assert state_stride(hidden_size) % 16 == 0
        assert 0 <= state_stride(hidden_size) - hidden_size < 16


# --- The launches of a stack ---

STACK = {"batch_size": 32, "input_size": 512, "hidden_size": 512, "dtype": torch.bfloat16, "allow_tf32": False}


def lanes_of(kind: planner.Kind, num_layers: int, directions: int = 1, **changes: Any) -> list[list[int]]:
    sizes: dict[str, Any] = {**STACK, **changes}
    found = launches(kind, num_layers=num_layers, directions=directions, device=H200, **sizes)
    assert all(each.plan.chained == (directions == 1 and each.plan.lanes > 1) for each in found)
    assert all(each.plan.programs <= H200.multiprocessors for each in found)
    return [list(each.lanes) for each in found]


def test_layers_go_together_where_they_fit() -> None:
    assert lanes_of("forward", 4) == [[0, 1, 2, 3]]
    assert lanes_of("forward", 8) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert lanes_of("forward", 6) == [[0, 1], [2, 3], [4, 5]]
    # As the weights of one layer alone fill the device.
    for kind in ("forward", "backward"):
        assert lanes_of(kind, 3, input_size=2048, hidden_size=2048) == [[0], [1], [2]]


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_both_directions_go_together(kind: planner.Kind) -> None:
    assert lanes_of(kind, 2, directions=2) == [[0, 1], [2, 3]]


@given(st.sampled_from(["forward", "backward"]), SIZES, st.integers(1, 9), st.integers(1, 2))
@settings(max_examples=20)
def test_launches_take_every_lane_once_and_fit(
    kind: planner.Kind, sizes: dict[str, Any], num_layers: int, directions: int
) -> None:
    sizes = {**sizes, "batch_size": min(sizes["batch_size"], 300)}
    arguments = {"num_layers": num_layers, "directions": directions, "device": H200, **sizes}
    try:
        found = launches(kind, **arguments)
    except ValueError:  # no plan for one lane alone either
        with pytest.raises(ValueError, match="no plan"):
            plan(kind, device=H200, **{**sizes, "input_size": max(sizes["input_size"], 2 * sizes["hidden_size"])})
        return
    assert [lane for each in found for lane in each.lanes] == list(range(num_layers * directions))
    for each in found:
        assert each.plan.programs <= H200.multiprocessors
        assert each.plan.chained == (directions == 1 and each.plan.lanes > 1)
        if each.plan.chained:
            assert each.plan.resident_fraction == 1
    planner._plan.cache_clear()
    planner._lane_counts.cache_clear()
    assert launches(kind, **arguments) == found


def test_a_forced_plan_decides_how_many_layers_go_together() -> None:
    for lanes, expected in ((1, [1, 1, 1, 1]), (2, [2, 2]), (4, [4])):
        chosen = candidates("forward", device=H200, lanes=lanes, chained=lanes > 1, **STACK)[-1]
        with forced(chosen):
            found = launches("forward", num_layers=4, directions=1, device=H200, **STACK)
        assert [each.plan for each in found] == [chosen] * len(expected)
        assert [each.plan.lanes for each in found] == expected

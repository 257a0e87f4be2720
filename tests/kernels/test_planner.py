"""The planner is a pure function; every plan it makes fits the device."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.resources import DEVICES
from lstm_triton.scan import planner
from lstm_triton.scan.cost import DATA_CENTRE
from lstm_triton.scan.plan import Kind, ScanShape, state_stride
from lstm_triton.scan.planner import candidates, forced, launches, plan
from lstm_triton.target import Device

H200 = DEVICES["sm_90"]
KINDS: tuple[Kind, ...] = ("forward", "backward")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def shapes(*devices: Device) -> st.SearchStrategy[ScanShape]:
    """Any layer on one of the devices."""
    return st.builds(
        ScanShape,
        kind=st.sampled_from(KINDS),
        batch_size=st.integers(1, 300) | st.integers(1, 200_000),
        input_size=st.integers(1, 3000),
        hidden_size=st.integers(1, 2200) | st.integers(1, 8000),
        dtype=st.sampled_from(DTYPES),
        device=st.sampled_from(devices),
        allow_tf32=st.booleans(),
        lanes=st.just(1),
        chained=st.just(False),
    )


@given(shapes(*DEVICES.values()))
def test_every_candidate_covers_the_layer_and_fits_the_device(shape: ScanShape) -> None:
    device = shape.device
    for each in candidates(shape):
        assert each.programs <= device.multiprocessors
        assert each.slices * each.block_hidden >= shape.hidden_size > (each.slices - 1) * each.block_hidden
        assert each.batch_tiles * each.block_batch >= shape.batch_size > (each.batch_tiles - 1) * each.block_batch
        assert 1 <= each.groups <= each.batch_tiles
        depth = shape.hidden_size * (1 if shape.kind == "forward" else 4)
        assert each.chunks * each.block_k >= depth > (each.chunks - 1) * each.block_k
        assert 1 <= each.group_chunks <= each.resident_chunks <= each.chunks
        assert each.block_k // each.split_k >= 16
        size = shape.dtype.itemsize
        # Every element of a state tile is polled by one thread, and each thread polls 32 bits or more.
        threads = each.num_warps * device.threads_per_warp
        assert each.block_batch * each.block_k * size >= 4 * threads
        assert each.thread_elements in (0, each.block_batch * each.block_k // threads)
        assert (each.thread_elements > 0) == (device.capability > 0)
        rows = each.block_hidden * (4 if shape.kind == "forward" else 1)
        assert 0 <= each.register_chunks <= each.resident_chunks
        assert each.register_chunks == 0 or each.split_k > 1
        in_shared = each.resident_chunks - each.register_chunks
        weights = rows * each.block_k * size * (2 if each.dot_precision == "tf32x3" else 1)
        partial_sums = 4 * each.split_k * rows * each.block_batch if each.split_k > 1 else 0
        assert in_shared * weights + partial_sums <= device.shared_bytes
        # Programs hold back only where the values they look for are on their way, and where they can look.
        waits = device.capability > 0 and each.slices > 1 and each.batch_tiles <= each.groups
        assert each.hold == 0 or (waits and DATA_CENTRE.least_hold <= each.hold <= DATA_CENTRE.most_hold)
        if each.fuse_input:
            chunks = -(-shape.input_size // each.block_input)
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


@given(shapes(H200))
def test_the_first_candidate_is_the_plan(shape: ScanShape) -> None:
    found = candidates(shape)
    assert plan(shape) == found[0]
    assert [each.predicted_cycles for each in found] == sorted(each.predicted_cycles for each in found)


@pytest.mark.parametrize("hidden_size", [64, 128, 256, 384, 512, 768, 1024])
@pytest.mark.parametrize("batch_size", [1, 16, 64, 256])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_all_weights_stay_on_a_large_gpu(kind: Kind, batch_size: int, hidden_size: int) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        shape = ScanShape(kind, batch_size, hidden_size, hidden_size, dtype, H200, allow_tf32=False)
        assert plan(shape).resident_fraction == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("batch_size", "hidden_size"), [(16, 4096), (100_000, 512), (100_000, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_large_sizes_have_plans(kind: Kind, dtype: torch.dtype, batch_size: int, hidden_size: int, arch: str) -> None:
    """Of float32 with and without TF32: weights that do not fit on the chip are streamed, batch tiles take turns."""
    device = DEVICES[arch]
    for allow_tf32 in {False, dtype == torch.float32}:
        found = plan(ScanShape(kind, batch_size, hidden_size, hidden_size, dtype, device, allow_tf32))
        assert found.programs <= device.multiprocessors
        assert found.slices * found.block_hidden >= hidden_size
        assert found.batch_tiles * found.block_batch >= batch_size
        assert hidden_size < 4096 or found.resident_fraction < 1


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("hidden_size", [100, 768, 1024])
def test_batches_share_a_few_kernels(kind: Kind, hidden_size: int) -> None:
    """What is compiled in does not follow the batch size: only a few tile shapes do."""
    kernels = set()
    for batch_size in range(1, 520):
        chosen = plan(ScanShape(kind, batch_size, 64, hidden_size, torch.float16, H200, allow_tf32=False))
        several = chosen.batch_tiles > chosen.groups
        kernels.add((several, chosen.hold > 0, replace(chosen, batch_tiles=0, groups=0, predicted_cycles=0, hold=0)))
    print(f"{kind}, H={hidden_size}: {len(kernels)} kernels for 519 batch sizes")
    assert len(kernels) <= 8


SHAPE = ScanShape("forward", 16, 64, 256, torch.float16, H200, allow_tf32=False)


def test_precision_follows_what_cudnn_may_use() -> None:
    shape = replace(SHAPE, dtype=torch.float32)
    assert plan(replace(shape, allow_tf32=True)).dot_precision == "tf32"
    assert plan(shape).dot_precision == "tf32x3"
    assert plan(replace(shape, allow_tf32=True, device=DEVICES["gfx942"])).dot_precision == "ieee"


def test_a_device_that_is_too_small_is_refused() -> None:
    toy = Device("toy", "sm_90", 2, 16 * 1024)
    refused = replace(SHAPE, hidden_size=4096, dtype=torch.float32, device=toy)
    with pytest.raises(ValueError, match=r"no plan for hidden_size 4096 in torch\.float32 fits Device\(name='toy'"):
        plan(refused)
    with pytest.raises(ValueError, match=r"no plan for hidden_size 4096 in torch\.float32, 2 side by side, fits "):
        plan(replace(refused, lanes=2))


def test_a_measured_table_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(SHAPE, device=Device("NVIDIA Measured", "sm_90", 132, 232448))
    second = candidates(shape)[1]
    path = tmp_path / planner.table_path(shape.device).name
    path.write_text(json.dumps({shape.key: asdict(second)}))
    monkeypatch.setattr(planner, "table_path", lambda device: path)
    planner._table.cache_clear()
    planner._best.cache_clear()
    assert plan(shape) == second
    other = replace(shape, batch_size=17)
    assert plan(other) == candidates(other)[0]
    planner._table.cache_clear()
    planner._best.cache_clear()


# --- What the planner remembers ---


@pytest.mark.parametrize("hidden_size", [16, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_batch_sizes_share_what_was_computed_once(hidden_size: int, dtype: torch.dtype) -> None:
    """And get the plan that the estimate of each batch size chooses."""
    first = replace(SHAPE, hidden_size=hidden_size, dtype=dtype)
    fused = set()
    for batch_size in [*range(1, 90), 127, 128, 129, 1000, 4097]:
        for kind in KINDS:
            shape = replace(first, batch_size=batch_size, kind=kind)
            found = plan(shape)
            assert found == candidates(shape)[0]
            fused.add(found.fuse_input)
    assert hidden_size == 1000 or len(fused) == 2  # a separate projection costs more the larger the batch is


def test_memory_is_bounded_and_a_new_batch_size_cheap() -> None:
    for cached in (planner._launches, planner._best, planner._finalists, planner._placements):
        cached.cache_clear()
    for batch_size in range(1, 2 * planner.PLANNED_CALLS):
        launches(replace(SHAPE, batch_size=batch_size), num_layers=1, directions=1)
    info = {name: getattr(planner, name).cache_info() for name in ("_launches", "_best", "_finalists", "_placements")}
    assert all(each.currsize <= planner.PLANNED_CALLS for each in info.values())
    assert all(each.maxsize == planner.PLANNED_CALLS for each in (planner.plan_cell.cache_info(), info["_best"]))
    assert info["_placements"].maxsize == planner.PLANNED_LAYERS
    assert info["_placements"].misses <= 2  # of the layer, and of the widest layer of the stack
    assert info["_finalists"].misses <= 2 * (2 * planner.PLANNED_CALLS // 8 + 1)  # 8 batch sizes share them


def test_keys_of_a_table() -> None:
    assert SHAPE.key == "forward float16 B=16 I=64 H=256"
    assert (
        replace(SHAPE, dtype=torch.float32, allow_tf32=True, lanes=2).key == "forward tf32 B=16 I=64 H=256 2 directions"
    )
    assert replace(SHAPE, kind="backward", lanes=3, chained=True).key == "backward float16 B=16 H=256 3 layers"


def test_the_backward_scan_does_not_depend_on_the_input() -> None:
    """Who tunes it and who runs it find the same plan and the same table entry, whatever input_size they name."""
    backward = [replace(SHAPE, kind="backward", input_size=input_size) for input_size in (1, 256, 1024)]
    assert len({plan(shape) for shape in backward}) == 1
    assert len({shape.key for shape in backward}) == 1
    assert SHAPE.key != replace(SHAPE, input_size=2).key


def test_a_forced_plan_holds_for_its_kind_only() -> None:
    usual, other = plan(SHAPE), candidates(SHAPE)[-1]
    with forced(other, "forward"):
        assert plan(SHAPE) == other
        assert plan(replace(SHAPE, kind="backward")) != other
    assert plan(SHAPE) == usual


def test_state_rows_are_aligned() -> None:
    for hidden_size in range(1, 200):
        assert state_stride(hidden_size) % 16 == 0
        assert 0 <= state_stride(hidden_size) - hidden_size < 16


# --- The launches of a stack ---

FIRST = ScanShape("forward", 32, 512, 512, torch.bfloat16, H200, allow_tf32=False)  # one lane of the first layer


def lanes_of(first: ScanShape, num_layers: int, directions: int = 1) -> list[list[int]]:
    found = launches(first, num_layers, directions)
    assert all(each.plan.chained == (directions == 1 and each.plan.lanes > 1) for each in found)
    assert all(each.plan.programs <= H200.multiprocessors for each in found)
    return [list(each.lanes) for each in found]


def test_layers_go_together_where_they_fit() -> None:
    assert lanes_of(FIRST, 4) == [[0, 1, 2, 3]]
    assert lanes_of(FIRST, 8) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert lanes_of(FIRST, 6) == [[0, 1], [2, 3], [4, 5]]
    # As the weights of one layer alone fill the device.
    for kind in KINDS:
        assert lanes_of(replace(FIRST, kind=kind, input_size=2048, hidden_size=2048), 3) == [[0], [1], [2]]


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_both_directions_go_together(kind: Kind) -> None:
    assert lanes_of(replace(FIRST, kind=kind), 2, directions=2) == [[0, 1], [2, 3]]


@given(shapes(H200), st.integers(1, 9), st.integers(1, 2))
@settings(max_examples=20)
def test_launches_take_every_lane_once_and_fit(first: ScanShape, num_layers: int, directions: int) -> None:
    first = replace(first, batch_size=min(first.batch_size, 300))
    try:
        found = launches(first, num_layers, directions)
    except ValueError:  # no plan for one lane alone either
        with pytest.raises(ValueError, match="no plan"):
            plan(replace(first, input_size=max(first.input_size, 2 * first.hidden_size)))
        return
    assert [lane for each in found for lane in each.lanes] == list(range(num_layers * directions))
    for each in found:
        assert each.plan.programs <= H200.multiprocessors
        assert each.plan.chained == (directions == 1 and each.plan.lanes > 1)
        if each.plan.chained:
            assert each.plan.resident_fraction == 1
    planner._best.cache_clear()
    planner._launches.cache_clear()
    assert launches(first, num_layers, directions) == found


def test_a_forced_plan_decides_how_many_layers_go_together() -> None:
    for lanes, expected in ((1, [1, 1, 1, 1]), (2, [2, 2]), (4, [4])):
        chosen = candidates(replace(FIRST, lanes=lanes, chained=lanes > 1))[-1]
        with forced(chosen):
            found = launches(FIRST, num_layers=4, directions=1)
        assert [each.plan for each in found] == [chosen] * len(expected)
        assert [each.plan.lanes for each in found] == expected

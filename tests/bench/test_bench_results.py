"""bench.cases and bench.results: the grids are what they say, and a results file is written whole or refused."""

import json
from dataclasses import replace

import pytest

from bench import cases, measure, results
from bench.cases import BenchCase

ORIGIN = dict.fromkeys(results.PROVENANCE_KEYS, "x")
CASE = BenchCase("forward+backward", "float32", T=4, B=2, I=3, H=5)


def row(system: str = "nn.LSTM", case: BenchCase = CASE, **changes: object) -> cases.Row:
    return measure.new_row("smoke", case, system, "ok", "") | changes


def cases_of(name: str) -> list[BenchCase]:
    return [case for case, _ in cases.GRIDS[name]]


def test_a_row_has_the_keys_of_the_schema_and_gives_its_case_back() -> None:
    assert set(row()) == set(results.ROW_KEYS)
    projected = replace(CASE, proj_size=2, layers=3, bidirectional=True, layout="packed")
    assert set(row(case=projected)) == {*results.ROW_KEYS, "proj_size"}
    for case in (CASE, projected):
        assert results.case_of(json.loads(json.dumps(row(case=case)))) == case


def test_headline_starts_with_flashrnns_case_and_sweeps_batch_and_length() -> None:
    found = cases_of("headline")
    assert found[0] == BenchCase("forward+backward", "bfloat16", T=1024, B=16, I=768, H=768)
    assert {case.H for case in found} == {768}
    assert {case.B for case in found if case.T == 1024} == {2, 8, 16, 32, 64, 128, 256}
    assert {case.T for case in found if case.B == 16} == {256, 512, 1024, 2048}
    assert {case.dtype for case in found} == {"float32", "tf32", "float16", "bfloat16"}
    assert {case.mode for case in found} == set(cases.MODES)


def test_full_is_the_whole_map_once() -> None:
    found = cases_of("full")
    assert len(found) == len(set(found)) == 2 * 4 * 9 * 2 * 3
    assert {case.H for case in found} == {64, 128, 160, 256, 512, 768, 1024, 1536, 2048}
    assert {case.B for case in found} == {1, 16, 64, 256}
    assert {case.T for case in found} == {256, 1024}
    # Most important first: training at T=1024 before anything else.
    assert {(case.mode, case.T) for case in found[: 4 * 9 * 3]} == {("forward+backward", 1024)}


def test_stacks_and_latency_have_their_kinds_of_cases() -> None:
    stacks = cases_of("stacks")
    assert {case.layers for case in stacks} >= {2, 3, 4, 6}
    assert any(case.bidirectional for case in stacks)
    assert {case.layout for case in stacks} == {case.layout for case in cases_of("smoke")} == set(cases.LAYOUTS)
    assert any(case.proj_size for case in stacks)
    assert any(case.B % 2 for case in stacks)
    assert {(case.T, case.B) for case in cases_of("latency")} == {(1, 1)}
    assert cases.GRIDS["latency"].first_call


@pytest.mark.parametrize("name", cases.GRIDS)
def test_every_grid_has_us_and_the_baseline_side_by_side_and_a_rehearsal(name: str) -> None:
    seen: set[tuple[BenchCase, str]] = set()
    for case, systems in cases.GRIDS[name]:
        pairs = {(case, system) for system in systems}
        assert not pairs & seen
        seen |= pairs
        assert ("lstm_triton" in systems) == ("nn.LSTM" in systems)
        assert (case, "lstm_triton") in seen  # the others come with us or later
        assert set(systems) <= set(cases.SYSTEMS)
    rehearsed = cases.work_list(name, rehearse=True)
    assert rehearsed
    assert all(case.T <= 3 and case.B <= 3 and case.H <= 8 and case.layers <= 2 for case, _ in rehearsed)


def test_a_case_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no such case"):
        BenchCase("backward", "float32", T=1, B=1, I=1, H=1)
    with pytest.raises(ValueError, match="no such case"):
        replace(CASE, layout="resets", bidirectional=True)


@pytest.mark.parametrize("layout", ["packed", "lengths"])
def test_lengths_of_a_case_are_unsorted_and_reach_t(layout: str) -> None:
    lengths = replace(CASE, T=40, B=5, layout=layout).lengths
    assert len(lengths) == 5
    assert (max(lengths), min(lengths)) == (40, 10)
    assert lengths != sorted(lengths, reverse=True)


def test_results_survive_writing_and_reading(tmp_path) -> None:
    path = tmp_path / "results.json"
    written = results.Results(ORIGIN, [row(), row("lstm_triton", median_us=1.5)])
    written.write(path)
    content = json.loads(path.read_text())
    assert (content["schema"], content["provenance"], len(content["rows"])) == (1, ORIGIN, 2)
    assert results.Results.read(path) == written
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_new_row_replaces_the_old_one_of_its_case_in_its_place() -> None:
    found = results.Results(ORIGIN, [row(median_us=1.0), row("lstm_triton")])
    found.add([row(median_us=2.0), row(case=replace(CASE, T=5))])
    assert [one["median_us"] for one in found.rows] == [2.0, None, None]
    assert [one["T"] for one in found.rows] == [4, 4, 5]


def damaged(change) -> str:
    content = {"schema": 1, "provenance": dict(ORIGIN), "rows": [row()]}
    change(content)
    return json.dumps(content)


WHOLE = damaged(lambda content: None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "damaged"),
        (WHOLE[: len(WHOLE) // 2], "damaged"),
        ("[]", "not a JSON object"),
        (damaged(lambda content: content.update(schema=2)), "schema 2, this version reads schema 1"),
        (damaged(lambda content: content.pop("schema")), "schema None"),
        (damaged(lambda content: content.pop("rows")), "no provenance or no rows"),
        (damaged(lambda content: content["provenance"].pop("gpu")), "no provenance 'gpu'"),
        (damaged(lambda content: content["rows"].append(3)), "row 2 is not an object"),
        (damaged(lambda content: content["rows"][0].pop("error")), "row 1 has no 'error'"),
        (damaged(lambda content: content["rows"][0].update(status="fine")), "unknown status 'fine'"),
        (damaged(lambda content: content["rows"][0].update(mode="sideways")), "row 1: no such case"),
    ],
)
def test_a_file_that_is_no_results_file_is_refused_in_one_line(tmp_path, text: str, why: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(results.ResultsError, match=why) as refusal:
        results.Results.read(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert path.read_text() == text


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, step: str) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, step, full_disk)
    with pytest.raises(results.ResultsError, match="No space left"):
        results.Results(ORIGIN, [row()]).write(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_rows_of_other_kernels_do_not_go_into_the_same_file(tmp_path) -> None:
    path = tmp_path / "results.json"
    results.Results(ORIGIN, [row()]).write(path)
    assert results.open_for(path, ORIGIN | {"date": "later"}).rows == [row()]
    for key in ("kernel_hash", "gpu", "torch", "triton"):
        with pytest.raises(results.ResultsError, match="other kernels"):
            results.open_for(path, ORIGIN | {key: "y"})


def test_the_kernel_hash_follows_kernels_launches_and_the_gpus_own_table(tmp_path, monkeypatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "lstm_triton" / "scan").mkdir(parents=True)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "table_path", lambda device: tmp_path / f"{device.name}.json")
    seen = set()
    scan = ("planner", "plan", "fit", "cost", "schedule", "launch", "buffers", "windows", "forward", "products")
    (tmp_path / "lstm_triton" / "prepared_kernel.py").write_text("")
    names = ("target.py", "prepared_kernel.py", *(f"scan/{name}.py" for name in scan))
    deciding = (*(f"lstm_triton/{name}" for name in names), "kernels/forward.py", "kernels/other.py", "this gpu.json")
    for name in deciding:
        (tmp_path / name).write_text("x")
        seen.add(results.kernel_hash("this gpu"))
    assert len(seen) == len(deciding)
    (tmp_path / "lstm_triton" / "module.py").write_text("x")
    (tmp_path / "another gpu.json").write_text("x")
    assert results.kernel_hash("this gpu") in seen


def test_provenance_says_where_a_result_comes_from() -> None:
    origin = results.provenance("some GPU", "1.2")
    assert set(origin) == set(results.PROVENANCE_KEYS)
    assert origin["gpu"] == "some GPU"
    assert origin["kernel_hash"] == results.kernel_hash("some GPU")

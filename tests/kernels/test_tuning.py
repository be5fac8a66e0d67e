"""The timing cache: what it answers for, and that several writers lose nothing."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import FileError
from quantkit.kernels import tuning
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.families import FAMILIES
from quantkit.kernels.gpus import GPUS
from quantkit.kernels.heuristics import Problem, candidates, choose
from quantkit.kernels.timing import Timing
from quantkit.kernels.timing_table import Entry, TimingTable, bucket, key_of
from quantkit.kernels.work import Work

PROBLEM = Problem(m=64, n=8192, k=8192, format="int8", output="bfloat16")
KIND = EpilogueKind(row_scale="one", column_scale="each")


def timing(us: float) -> Timing:
    return Timing(median_us=us, q1_us=us - 1, q3_us=us + 1, runs=9)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    tuning.forget()
    return tmp_path / "timings"


def found(cache: Path, problem: Problem = PROBLEM, kind: EpilogueKind = KIND) -> Entry | None:
    table = tuning.table("test gpu", local="driver-1", cache=cache)
    return table.find(key_of("gemm_sm90", problem, kind))


def remember(cache: Path, problem: Problem = PROBLEM, kind: EpilogueKind = KIND) -> Path:
    tiles = list(candidates(problem))
    timed = {tiles[0]: timing(30.0), tiles[3]: timing(20.0), tiles[5]: timing(25.0)}
    return tuning.remember("test gpu", "gemm_sm90", problem, kind, timed, local="driver-1", cache=cache)


def test_the_fastest_tile_is_remembered(cache: Path) -> None:
    assert found(cache) is None
    remember(cache)
    entry = found(cache)
    assert entry is not None
    assert entry.time_us == 20.0
    assert tuning.tile_of(entry, PROBLEM) == list(candidates(PROBLEM))[3]


def test_an_entry_answers_for_its_bucket_of_rows_and_no_other(cache: Path) -> None:
    remember(cache)
    assert found(cache, replace(PROBLEM, m=33)) is not None
    assert found(cache, replace(PROBLEM, m=32)) is None
    assert found(cache, replace(PROBLEM, m=65)) is None
    for other in ({"n": 8191}, {"k": 8191}, {"format": "bfloat16"}, {"output": "float32"}):
        assert found(cache, replace(PROBLEM, **other)) is None


def test_another_epilogue_takes_what_was_timed_unless_it_was_timed_itself(cache: Path) -> None:
    remember(cache)
    biased = replace(KIND, bias=True)
    entry = found(cache, kind=biased)
    assert entry is not None
    tile = list(candidates(PROBLEM))[7]
    tuning.remember(
        "test gpu", "gemm_sm90", PROBLEM, biased, {tile: timing(1.0)}, local="driver-1", cache=cache
    )
    own, plain = found(cache, kind=biased), found(cache)
    assert own is not None and plain is not None
    assert (own.time_us, plain.time_us) == (1.0, 20.0)


def test_timings_of_another_driver_or_gpu_are_none_of_this(cache: Path) -> None:
    remember(cache)
    key = key_of("gemm_sm90", PROBLEM, KIND)
    assert tuning.table("test gpu", local="driver-2", cache=cache).find(key) is None
    assert tuning.table("other gpu", local="driver-1", cache=cache).find(key) is None


def test_timings_of_a_kernel_that_has_changed_since_count_no_more(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(cache)
    tuning.forget()
    monkeypatch.setattr(tuning, "source_hash", lambda kernel: "another")
    assert found(cache) is None


def test_a_tile_that_the_kernel_no_longer_has_is_not_used(cache: Path) -> None:
    remember(cache)
    entry = found(cache)
    assert entry is not None
    assert (
        tuning.tile_of(replace(entry, configuration={**entry.configuration, "tile_n": 72}), PROBLEM) is None
    )
    assert tuning.tile_of(replace(entry, configuration={"unknown": 1}), PROBLEM) is None


def test_an_order_of_tiles_beyond_the_enumerated_ones_is_used() -> None:
    tile = replace(choose(PROBLEM), group=3)
    entry = Entry(configuration=asdict(tile), time_us=1, q1_us=1, q3_us=1, m=64, source="")
    assert tuning.tile_of(entry, PROBLEM) == tile


@pytest.mark.parametrize(
    "damage",
    [
        {"configuration": {"tile_n": [64]}},
        {"configuration": {"tile_n": "64"}},
        {"configuration": {"group": -1}},
        {"configuration": [1]},
        {"time_us": "fast"},
        {"time_us": float("nan")},
        {"time_us": 0},
        {"m": -64},
    ],
)
def test_an_entry_that_no_kernel_could_be_launched_with_warns(cache: Path, damage: dict[str, object]) -> None:
    path = remember(cache)
    held = json.loads(path.read_text())
    (row,) = held["entries"]
    for name, value in damage.items():
        row[name] = row[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(held))
    tuning.forget()
    with pytest.warns(UserWarning, match=r"no timing table can be read there.*tune again"):
        assert found(cache) is None


def test_a_file_of_nothing_but_brackets_warns(cache: Path) -> None:
    path = remember(cache)
    path.write_text("[" * 100_000)
    tuning.forget()
    with pytest.warns(UserWarning, match="no timing table can be read there"):
        assert found(cache) is None


def test_no_order_of_tiles_is_none() -> None:
    tile = replace(choose(PROBLEM), group=0)
    entry = Entry(configuration=asdict(tile), time_us=1, q1_us=1, q3_us=1, m=64, source="")
    assert tuning.tile_of(entry, PROBLEM) is None


def test_a_damaged_file_warns_and_stops_no_product(cache: Path) -> None:
    path = remember(cache)
    tuning.forget()
    path.write_text(path.read_text()[:-20])
    with pytest.warns(UserWarning, match=r"no timing table can be read there.*tune again"):
        assert found(cache) is None


def test_a_file_of_a_newer_version_is_left_alone(cache: Path) -> None:
    path = remember(cache)
    tuning.forget()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.warns(UserWarning, match="version 2"):
        assert found(cache) is None


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "timings").write_text("a file")
    with pytest.raises(FileError, match=r"timings: cannot be made"):
        remember(tmp_path / "timings")


def test_writers_at_the_same_time_lose_nothing(cache: Path) -> None:
    program = """
import sys
from pathlib import Path
from quantkit.kernels import tuning
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.heuristics import Problem, choose
from quantkit.kernels.timing import Timing
first = int(sys.argv[2])
for n in range(first, first + 12):
    problem = Problem(m=64, n=n, k=64, format="int8", output="bfloat16")
    timed = {choose(problem): Timing(median_us=n, q1_us=n, q3_us=n, runs=1)}
    tuning.remember(
        "test gpu", "gemm_sm90", problem, EpilogueKind(), timed, local="driver-1", cache=Path(sys.argv[1])
    )
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(cache), str(first)]) for first in (100, 200, 300)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    table = tuning.table("test gpu", local="driver-1", cache=cache)
    assert sorted(key.n for key in table.entries) == [*range(100, 112), *range(200, 212), *range(300, 312)]


@given(st.integers(1, 100_000))
def test_a_bucket_holds_its_rows_and_little_more(m: int) -> None:
    size = bucket(m)
    assert m <= size <= max(2 * m - 1, 1)
    assert bucket(size) == size
    if m > 128:
        assert size <= 1.25 * m


def test_the_shipped_tables_are_of_known_gpus_and_kernels() -> None:
    for path in tuning.SHIPPED.glob("*.json"):
        assert path.stem in GPUS
        table = TimingTable.from_json(path.read_text())
        assert table.entries
        assert {key.kernel for key in table.entries} <= {
            "gemm_sm90",
            "gemm_mma",
            "gemm_w4_sm90",
            "gemm_w4_few",
            "gemm_w4_mma",
        }


def test_a_table_survives_its_file() -> None:
    entry = Entry(configuration={"tile_n": 64}, time_us=1.5, q1_us=1.0, q3_us=2.0, m=60, source="abc")
    table = TimingTable({key_of("gemm_sm90", PROBLEM, KIND): entry})
    assert TimingTable.from_json(table.to_json({"gpu": "h200"})).entries == table.entries


def test_a_shipped_table_answers_on_any_driver_until_this_machine_was_timed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = remember(cache)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "test-gpu.json").write_text(path.read_text().replace('"time_us": 20.0', '"time_us": 33.0'))
    path.unlink()
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    # What ships holds for kernels that have changed a little since.
    monkeypatch.setattr(tuning, "source_hash", lambda kernel: "another")
    tuning.forget()
    entry = found(cache)
    assert entry is not None
    assert entry.time_us == 33.0
    remember(cache)
    own = found(cache)
    assert own is not None
    assert own.time_us == 20.0
    tuning.forget()


def test_predictions_take_what_was_timed(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    tile = list(candidates(PROBLEM))[3]
    entry = Entry(configuration=asdict(tile), time_us=20.0, q1_us=19.0, q3_us=21.0, m=50, source="")
    table = TimingTable({key_of("gemm_sm90", PROBLEM, KIND): entry})
    monkeypatch.setattr(tuning, "table", lambda gpu, local: table)
    family = FAMILIES[0]
    told = family.predict(Work(m=60, n=8192, k=8192, format="int8", bias=True), GPUS["h200"])
    assert (told.configuration, told.tuned) == (tile, True)
    assert told.time_us == pytest.approx(20.0 * 60 / 50)

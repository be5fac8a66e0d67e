"""The figures of a benchmark, and the ways to show them."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantkit.bench.plot import save_roofline
from quantkit.bench.result import Benchmark
from quantkit.bench.row import BenchRow
from quantkit.errors import FileError
from quantkit.graph import LeftAlone
from quantkit.kernels.gpus import get_gpu
from quantkit.kernels.timing import Timing
from quantkit.kernels.work import Work

H200 = get_gpu("h200")


def timing(us: float) -> Timing:
    return Timing(median_us=us, q1_us=us - 1, q3_us=us + 1, runs=25)


def row(
    us: float | None = 20.0, *, form: str = "int8", calls: int = 1, batch: int = 1, **peers: float
) -> BenchRow:
    work = Work(m=64, n=8192, k=8192, format=form)
    roofline_us, bound = work.roofline(H200)
    return BenchRow(
        layers=("fc1", "fc2"),
        op_type="MatMul",
        batch=batch,
        calls=calls,
        asked=form,
        work=work,
        kernel="gemm_sm90",
        configuration="64x64 swap",
        tuned=False,
        predicted_us=19.0,
        bf16_us=38.0,
        roofline_us=roofline_us,
        bound=bound,
        timing=None if us is None else timing(us),
        peers={name.replace("_", " "): timing(t) for name, t in peers.items()},
        refused={"Humming": "no such shape"},
        error=0.0,
        origin="calib/",
    )


def result(*rows: BenchRow, mode: str = "measured") -> Benchmark:
    left = (LeftAlone(node="dw", op_type="Conv", reason="depthwise"),)
    return Benchmark(model="net", gpu=H200, mode=mode, rows=rows, left=left, notes=("a note",))


def test_rates_are_operations_and_least_bytes_over_the_median() -> None:
    found = row(20.0)
    assert found.tflops == pytest.approx(2 * 64 * 8192 * 8192 / 20e-6 / 1e12)
    assert found.gb_per_s == pytest.approx((8192 * 8192 + 64 * 8192 * 3) / 20e-6 / 1e9)
    assert found.roofline_percent == pytest.approx(100 * found.roofline_us / 20)


def test_speedups_are_over_the_fastest_way_of_the_same_format_and_over_bf16() -> None:
    found = row(20.0, cuBLAS_bf16=50.0, cuBLASLt_fp8=40.0, cuBLASLt_fp8_fast=30.0, Triton=10.0)
    assert found.vs_bf16 == 2.5
    assert found.vs_same_format == 1.5
    assert found.speedup("Triton") == 0.5
    assert row(20.0).vs_bf16 is None
    assert row(None, cuBLAS_bf16=50.0).vs_bf16 is None


def test_a_prediction_stands_where_nothing_was_timed() -> None:
    assert row(None).time_us == 19.0
    assert row(20.0).time_us == 20.0


def test_totals_weigh_products_by_their_calls() -> None:
    fast, slow = row(10.0, calls=3, cuBLAS_bf16=20.0), row(100.0, calls=1, cuBLAS_bf16=50.0)
    ((key, told),) = result(fast, slow).totals().items()
    assert key == (1, "int8")
    assert told["time_us"] == 130
    assert told["speedup_over_cublas_bf16"] == pytest.approx((3 * 20 + 50) / 130)
    assert "speedup_over_cublaslt_same_format" not in told


def test_totals_of_batches_and_formats_are_apart() -> None:
    found = result(row(1.0), row(2.0, form="fp8"), row(4.0, batch=64)).totals()
    assert {key: told["time_us"] for key, told in found.items()} == {
        (1, "int8"): 1.0,
        (1, "fp8"): 2.0,
        (64, "int8"): 4.0,
    }


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".png"])
def test_the_same_figures_give_the_same_picture(tmp_path: Path, suffix: str) -> None:
    found = result(row(20.0, cuBLAS_bf16=50.0), row(30.0, form="fp8"))
    pictures = []
    for name in ("one", "two"):
        save_roofline(found, tmp_path / f"{name}{suffix}")
        pictures.append((tmp_path / f"{name}{suffix}").read_bytes())
    assert pictures[0] == pictures[1]
    assert suffix == ".png" or b"Date" not in pictures[0]


@pytest.mark.parametrize(
    ("error", "told", "wrong"),
    [(0.0, 0.0, False), (2e-3, 2e-3, False), (0.3, 0.3, True), (np.inf, "infinite", True)],
)
def test_more_than_rounding_is_wrong_and_an_infinite_error_is_json(
    error: float, told: object, wrong: bool
) -> None:
    found = replace(row(20.0), error=error)
    assert found.is_wrong == wrong
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["relative_error"] == told


def test_refusals_say_how_many_products_and_which_first() -> None:
    other = replace(row(30.0, form="fp8"), refused={"Humming": "no such shape", "nvmath": "K % 16"})
    assert result(row(20.0), other).refusals() == [
        "Humming refused 2 products (64 × 8192 × 8192 int8 first): no such shape",
        "nvmath refused 1 product (64 × 8192 × 8192 fp8): K % 16",
    ]


def test_what_was_not_compared_is_not_wrong() -> None:
    assert not replace(row(20.0), error=None).is_wrong


def test_a_sum_that_lacks_a_part_is_not_told() -> None:
    missing = replace(row(None), predicted_us=None, kernel="")
    assert result(row(1.0), missing, row(2.0, form="fp8")).totals().keys() == {(1, "fp8")}


def test_what_a_format_leaves_to_another_counts_in_its_sum() -> None:
    attention = replace(row(3.0, form="bf16"), asked="int4")
    weights = replace(row(1.0, form="int4"), asked="int4")
    ((key, told),) = result(attention, weights).totals().items()
    assert (key, told["time_us"]) == ((1, "int4"), 4.0)


def test_the_table_shows_what_its_mode_has_figures_for() -> None:
    measured = result(row(20.0, cuBLAS_bf16=50.0, Triton=10.0)).table()
    assert {"µs", "× bf16", "× same", "× Triton", "error"} <= set(measured.headers)
    assert "exact" in measured.rows[0]
    assert "fc1 +1" in measured.rows[0]
    predicted = result(row(None), mode="predicted").table()
    assert {"predicted µs", "roofline µs", "bound by"} <= set(predicted.headers)
    assert [dict(zip(predicted.headers, cells, strict=True))["× bf16"] for cells in predicted.rows] == [
        "2.00"
    ]
    assert "µs" not in predicted.headers
    emulated = result(row(None), mode="emulated").table()
    assert emulated.headers[-2:] == ("emulated", "error")


def test_json_and_csv_hold_every_row_and_each_peer() -> None:
    found = result(row(20.0, cuBLAS_bf16=50.0), row(30.0, Triton=9.0))
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [r["time_us"] for r in told["rows"]] == [20.0, 30.0]
    assert told["rows"][0]["peers_us"] == {"cuBLAS bf16": 50.0}
    assert told["rows"][0]["peers_quartiles_us"] == {"cuBLAS bf16": [49.0, 51.0]}
    assert told["rows"][0]["refused"] == {"Humming": "no such shape"}
    assert told["left"] == [{"node": "dw", "op_type": "Conv", "reason": "depthwise"}]
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [r["time_us"] for r in rows] == ["20.0", "30.0"]
    assert [r["Triton us"] for r in rows] == ["", "9.0"]
    assert rows[0]["layers"] == "fc1;fc2"


def test_a_notebook_gets_an_html_table() -> None:
    assert result(row())._repr_html_().startswith("<table>")
    assert repr(result(row())) == "Benchmark(model='net', gpu='h200', mode='measured', rows=1)"


@pytest.mark.parametrize(("suffix", "first"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_roofline_is_drawn_into_each_kind_of_picture(suffix: str, first: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"roofline.{suffix}"
    save_roofline(result(row(20.0, cuBLAS_bf16=50.0), row(30.0, form="bf16", Triton=9.0)), path)
    assert path.read_bytes().startswith(first)


def test_a_picture_of_another_kind_or_of_nothing_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"a\.bmp: a plot is written as one of \.png, \.svg, \.pdf"):
        save_roofline(result(row()), tmp_path / "a.bmp")
    with pytest.raises(FileError, match="no product has a time"):
        save_roofline(result(), tmp_path / "a.png")


def test_without_matplotlib_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(FileError, match=r"needs matplotlib .*pip install 'quantkit\[plot\]'"):
        save_roofline(result(row()), tmp_path / "a.png")


def test_shown_digits_are_three_and_large_times_are_whole() -> None:
    cells = dict(zip(result(row(12345.6)).table().headers, result(row(12345.6)).table().rows[0], strict=True))
    assert cells["µs"] == 12346
    assert isinstance(cells["TFLOP/s"], float)
    assert np.isclose(cells["TFLOP/s"], row(12345.6).tflops, rtol=5e-3)

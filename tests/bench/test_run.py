"""bench_model without a GPU: which model, which shapes, which activations, which kernels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import quantkit
from quantkit.bench import fetching, opening, run
from quantkit.bench.feeding import fits
from quantkit.bench.tune import tune_model
from quantkit.cache import CalibrationCache
from quantkit.data import InputSpec
from quantkit.errors import CacheError, DataError, KernelError, ModelError, SpecError, UnknownNameError
from quantkit.kernels.emulator import find_compiler
from quantkit.kernels.gemm_checks import LARGEST_SIDE
from tests.bench.quantized import BUILDERS, mxfp8_of_tensorrt
from tests.models import MODELS


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "why_no_gpu", lambda: "CuPy is not installed")


def test_without_arguments_it_is_the_model_of_the_cache_here(folder: Path) -> None:
    found = quantkit.bench_model()
    assert (found.model, found.mode, found.gpu.name) == ("model", "predicted", "h200")
    assert {row.work.format for row in found.rows} == {"int8", "fp8"}
    assert {row.batch for row in found.rows} == {1, 64}
    assert found.notes[0].startswith("no GPU here (CuPy is not installed): what would run on H200")
    assert "captured from calib (8 samples)" in found.notes[1]
    assert [x.reason for x in found.left] == ["depthwise: no product of matrices"]


def test_rows_grow_with_the_batch_and_layers_of_one_shape_are_one_row(folder: Path) -> None:
    found = quantkit.bench_model("model.onnx", formats=["int8"], batches=(1, 3))
    one, three = ([r for r in found.rows if r.batch == b] for b in (1, 3))
    assert [3 * r.work.m for r in one] == [r.work.m for r in three]
    assert len({(r.work.m, r.work.n, r.work.k) for r in one}) == len(one)
    assert ("node_Conv_1", "node_Conv_2") in {r.layers for r in one}
    assert sum(r.calls for r in one) == 7


def test_a_moved_data_folder_leaves_the_sample_that_the_cache_keeps(folder: Path) -> None:
    cache = CalibrationCache.load("model.calib")
    moved = replace(cache, data={**cache.data, "path": str(folder / "gone")})
    found = quantkit.bench_model(None, moved)
    assert "captured from the sample that the cache keeps (1 sample)" in found.notes[1]


def test_without_a_cache_activations_are_random_and_that_is_told(folder: Path) -> None:
    Path("model.calib").unlink()
    found = quantkit.bench_model("model.onnx", batches=[1])
    assert "random numbers" in found.notes[1]
    with pytest.raises(CacheError, match="holds no calibration cache"):
        quantkit.bench_model()


def test_a_cache_of_another_model_lends_nothing(folder: Path) -> None:
    path = MODELS["matmul"].save(folder)
    found = quantkit.bench_model(path, batches=[1])
    assert "random numbers" in found.notes[1]


def test_a_sample_fits_inputs_of_its_names_types_and_sizes() -> None:
    inputs = [InputSpec(name="x", dtype=np.float32, shape=("N", 3, "H"))]
    sample = {"x": np.zeros((1, 3, 7), np.float32)}
    assert fits(sample, inputs)
    assert fits(sample, [replace(inputs[0], shape=(8, 3, 7))])
    for other in ({"name": "y"}, {"dtype": np.int64}, {"shape": ("N", 3)}, {"shape": ("N", 4, "H")}):
        assert not fits(sample, [replace(inputs[0], **other)])


def test_a_quantized_file_is_run_in_its_own_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(BUILDERS["fp8_by_cast_and_mul"](), "cast.onnx")
    found = quantkit.bench_model("cast.onnx", batches=[4])
    assert [(r.work.m, r.work.n, r.work.k, r.work.format) for r in found.rows] == [(4, 6, 16, "fp8")]
    forced = quantkit.bench_model("cast.onnx", batches=[4], formats=["int8", "bf16"])
    assert [r.work.format for r in forced.rows] == ["int8", "bf16"]


@pytest.mark.parametrize(
    ("build", "form"),
    [
        (BUILDERS["mxfp4_of_a_newer_operator_set"], "mxfp4"),
        (BUILDERS["nvfp4_with_quantized_scales"], "nvfp4"),
        (BUILDERS["fp8_in_squares"], "fp8-block"),
        (mxfp8_of_tensorrt, "mxfp8"),
    ],
)
def test_what_onnx_runtime_cannot_run_is_run_on_real_activations_all_the_same(
    tmp_path: Path, build: Callable[[], onnx.ModelProto], form: str
) -> None:
    file = build()
    k = file.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    onnx.save(file, tmp_path / "file.onnx")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((5, k)).astype(np.float32))
    found = quantkit.bench_model(
        tmp_path / "file.onnx", batches=[3], data=tmp_path / "data.npy", emulate=find_compiler() is not None
    )
    (row,) = found.rows
    assert (row.work.m, row.work.k, row.work.format) == (3, k, form)
    assert row.kernel
    assert "activations: captured from data.npy (5 samples), repeated as needed" in found.notes
    assert row.error is None or row.error < 3e-3


def test_a_format_that_no_kernel_takes_is_a_row_without_one() -> None:
    found = quantkit.bench_model(shapes=[(1, 6, 32)], formats=["int2"], device_model="a100")
    (row,) = found.rows
    assert (row.work.format, row.work.n, row.work.k) == ("int2", 6, 32)
    assert row.kernel == "" and row.time_us is None and row.roofline_us > 0
    assert found.notes[-1] == "no kernel yet for int2 on sm_80"


def test_a_quantized_file_of_four_bits_has_a_kernel_on_every_gpu(tmp_path: Path) -> None:
    onnx.save(BUILDERS["nvfp4_with_quantized_scales"](), tmp_path / "four.onnx")
    found = quantkit.bench_model(tmp_path / "four.onnx", batches=[1], device_model="a100")
    (row,) = found.rows
    assert (row.work.format, row.work.n, row.work.k, row.kernel) == ("nvfp4", 6, 32, "gemm_w4_mma")


def test_shapes_need_no_model() -> None:
    found = quantkit.bench_model(shapes=[(64, 8192, 8192)], formats=["fp8"], device_model="H100")
    (row,) = found.rows
    assert (found.model, found.gpu.name, row.kernel, row.name) == (None, "h100", "gemm_sm90", "")
    assert "layer" not in found.table().headers


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shapes": [(1, 2)]}, SpecError, "shape 1x2: three sizes"),
        ({"shapes": [(1, 2, 0)]}, SpecError, "from 1 up"),
        ({"shapes": [(1, 2, 3)], "model": "m.onnx"}, SpecError, "give one of them"),
        ({"shapes": [(1, 2, 3)], "formats": ["int5"]}, UnknownNameError, "int5: no format of a product"),
        ({"shapes": [(1, 2, 3)], "device_model": "voodoo2"}, UnknownNameError, "voodoo2: no GPU known here"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options, error, message) -> None:
    with pytest.raises(error, match=message):
        quantkit.bench_model(**options)


def test_a_free_dimension_needs_a_size_or_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    free = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[batch,seq,8] x) => (float[batch,seq,4] y) '
        "<float[8,4] w = {" + ",".join(["1"] * 32) + "}> { y = MatMul (x, w) }"
    )
    onnx.save(free, "free.onnx")
    with pytest.raises(DataError, match=r"free dimension \(seq\).*give --dim seq=128"):
        quantkit.bench_model("free.onnx")
    found = quantkit.bench_model("free.onnx", dims={"seq": 7}, batches=[2], formats=["int8"])
    assert [r.work.m for r in found.rows] == [14]
    np.save("x.npy", np.ones((3, 5, 8), np.float32))
    found = quantkit.bench_model("free.onnx", data="x.npy", batches=[2], formats=["int8"])
    assert [r.work.m for r in found.rows] == [10]
    assert "captured from x.npy (3 samples)" in found.notes[1]


def test_attention_runs_in_bf16_where_a_format_is_of_weights_alone(tmp_path: Path) -> None:
    path = MODELS["matmul_activations"].save(tmp_path)
    tiny = MODELS["matmul_activations"]
    for form, wanted in (("int8", "int8"), ("int4", "bf16")):
        found = quantkit.bench_model(path, formats=[form], batches=[1], data=tiny.feeds(1))
        both_computed = [r for r in found.rows if r.work.format == wanted]
        assert both_computed
        heads = any("one for each head" in note for note in found.notes)
        assert heads == any(row.calls > len(row.layers) for row in found.rows)


@pytest.mark.skipif(find_compiler() is None, reason="the emulator needs a C++ compiler")
def test_emulated_corners_agree_with_the_oracle(folder: Path) -> None:
    model = quantkit.bench_model("model.onnx", emulate=True, batches=[1], formats=["int8"])
    shapes = quantkit.bench_model(shapes=[(500, 40, 576)], emulate=True, formats=["fp8"], device_model="a100")
    assert model.mode == shapes.mode == "emulated"
    for row in (*model.rows, *shapes.rows):
        assert row.error is not None
        # int8 sums are exact; fp8 sums of K = 576 lose bits of the accumulator alone.
        assert row.error == 0 if row.work.format == "int8" else row.error < 2e-3
        assert row.checked


def test_progress_counts_products(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = quantkit.bench_model(batches=[1], on_product=lambda done, count: seen.append((done, count)))
    assert seen == [(i + 1, len(found.rows)) for i in range(len(found.rows))]


def test_tuning_without_a_gpu_is_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.kernels.present.why_no_gpu", lambda: "CuPy is not installed")
    with pytest.raises(
        KernelError, match=r"no GPU here \(CuPy is not installed\); run this on a machine with"
    ):
        tune_model("model.onnx")


def test_the_cache_is_read_not_written(folder: Path) -> None:
    before = Path("model.calib").read_bytes()
    cache = CalibrationCache.load("model.calib")
    quantkit.bench_model(None, cache, batches=[1])
    assert Path("model.calib").read_bytes() == before


def test_what_a_model_is_fed_is_not_asked_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime hands out an input's own memory, which is gone when the batch is."""
    asked: list[list[str]] = []

    class Recorded(fetching.Session):
        def __init__(self, model: Any, *, outputs: list[str], **options: Any) -> None:
            asked.append(outputs)
            super().__init__(model, outputs=outputs, **options)

    monkeypatch.setattr(fetching, "Session", Recorded)
    monkeypatch.setattr(run, "_emulated", lambda case, family, prediction: {"origin": case.operands().origin})
    found = quantkit.bench_model("model.onnx", batches=[1], formats=["int8"], emulate=True)
    assert {row.origin for row in found.rows} == {"calib"}
    assert asked and not any("input" in names for names in asked)


def test_what_is_named_twice_is_run_once(folder: Path) -> None:
    once = quantkit.bench_model(formats=["int8"], batches=[2])
    twice = quantkit.bench_model(formats=["int8", "w8a8", "int8"], batches=[2, 2])
    assert [(r.layers, r.calls) for r in twice.rows] == [(r.layers, r.calls) for r in once.rows]
    assert twice.totals() == once.totals()
    shapes = quantkit.bench_model(shapes=[(1, 2, 3), (1, 2, 3)], formats=["fp8", "e4m3"])
    assert len(shapes.rows) == 1


@pytest.mark.parametrize("options", [{"batches": [2**31]}, {"shapes": [(1, LARGEST_SIDE + 1, 1)]}])
def test_more_rows_than_kernels_count_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"count up to [\d,]+; give (a smaller batch|smaller sizes)\."):
        quantkit.bench_model(**options)


def free(folder: Path, shape: str = "batch,seq,8") -> Path:
    """A model with a free dimension."""
    ones = ",".join(["1"] * 32)
    onnx.save(
        onnx.parser.parse_model(
            f'<ir_version: 9, opset_import: ["" : 20]> g (float[{shape}] x) => (float[{shape[:-1]}4] y) '
            f"<float[8,4] w = {{{ones}}}> {{ y = MatMul (x, w) }}"
        ),
        folder / "free.onnx",
    )
    return folder / "free.onnx"


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"seqq": 4}, r"free: no input has a free dimension seqq besides the batch \(it has seq\)"),
        ({"batch": 4}, r"give sizes of the batch as --batch"),
        (
            {"seq": 10**15},
            r"free: input x of 1 × 10+ × 8 does not fit into memory; give smaller sizes with --dim",
        ),
    ],
)
def test_sizes_of_dimensions_that_make_no_sense_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dims: dict[str, int], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        quantkit.bench_model(free(tmp_path), dims=dims)


def test_a_size_that_the_data_do_not_have_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.ones((3, 16, 8), np.float32))
    with pytest.raises(DataError, match=r"data.npy: dimension seq has size 16 there, not 4; leave out --dim"):
        quantkit.bench_model(free(tmp_path), data="data.npy", dims={"seq": 4})
    same = quantkit.bench_model(free(tmp_path), data="data.npy", dims={"seq": 16}, batches=[1])
    assert {r.work.m for r in same.rows} == {16}
    # A cache's own data give way: its histograms are there still.
    cache = quantkit.calibrate_model(free(tmp_path), "data.npy")
    other = quantkit.bench_model(free(tmp_path), cache, dims={"seq": 4}, batches=[1])
    assert {r.work.m for r in other.rows} == {4}
    assert any(note.startswith("activations: drawn from the histograms") for note in other.notes)


def test_a_dimension_without_a_name_asks_for_data_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"\(axis 1, unnamed\) and no data say how large it is; give --data\."
    ):
        quantkit.bench_model(free(tmp_path, "batch,?,8"))


def test_a_cache_that_was_named_and_does_not_serve_is_refused(folder: Path) -> None:
    path = MODELS["matmul"].save(folder)
    with pytest.raises(
        CacheError, match=r"model.calib: is of the model model, whose inputs matmul does not have"
    ):
        quantkit.bench_model(path, "model.calib")


def test_captured_numbers_that_are_not_finite_are_not_run_on_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[N,8] x) => (float[N,4] y) '
        "<float[8,4] w = {" + ",".join(["1"] * 32) + "}> { i = Log (x) y = MatMul (i, w) }"
    )
    onnx.save(model, "log.onnx")
    np.save("data.npy", np.zeros((3, 8), np.float32))
    monkeypatch.setattr(run, "_emulated", lambda case, family, prediction: {"origin": case.operands().origin})
    found = quantkit.bench_model("log.onnx", data="data.npy", batches=[1], formats=["int8"], emulate=True)
    assert [row.origin for row in found.rows] == ["random numbers"]


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_no_more_is_drawn_of_a_large_product_than_is_emulated() -> None:
    found = quantkit.bench_model(shapes=[(LARGEST_SIDE, LARGEST_SIDE, 64)], formats=["int8"], emulate=True)
    (row,) = found.rows
    assert (row.error, row.checked) == (0, "48 × 192 × 64")
    assert (
        found.notes[0] == "emulated on the CPU: the kernels and tiles for H200, on a corner of each product"
    )


def test_what_does_not_fit_into_memory_names_the_product(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(case: object, family: object, prediction: object) -> dict[str, Any]:
        raise MemoryError

    monkeypatch.setattr(run, "_emulated", full)
    with pytest.raises(
        KernelError, match=r"1x2x3 int8: does not fit into memory; give a smaller --batch or --shapes"
    ):
        quantkit.bench_model(shapes=[(1, 2, 3)], emulate=True)


def test_a_damaged_quantized_file_is_refused_in_one_line_that_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lacking, other = BUILDERS["qdq_matmul"](), BUILDERS["matmul_nbits"]()
    del lacking.graph.node[-1].input[1]
    lacking.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", 1, ["N", 5, 6]))
    onnx.save(lacking, "lacking.onnx")
    other.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", 1, ["N", None]))
    (n,) = (a for a in other.graph.node[0].attribute if a.name == "N")
    n.i = 1000
    onnx.save(other, "other.onnx")
    for name, said in (("lacking", "has input size 1 not in range"), ("other", "does not match")):
        with pytest.raises(ModelError, match=rf"^{name}\.onnx: not a valid ONNX model \(.*{said}"):
            quantkit.bench_model(f"{name}.onnx")
    assert capfd.readouterr().err == ""


def test_a_fault_of_our_own_is_no_fault_of_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **options: object) -> None:
        raise IndexError("ours")

    monkeypatch.setattr(opening, "cases_of_model", broken)
    with pytest.raises(IndexError, match="ours"):
        quantkit.bench_model("model.onnx")


def fixed_length(folder: Path) -> Path:
    """A model whose declared input is longer than it can be run on."""
    ones = ",".join(["1"] * 32)
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 20]> g (float[batch,seq,8] x) => (float[batch,16,4] y) '
            f"<float[8,4] w = {{{ones}}}, float[1,16,8] add = {{{','.join(['1'] * 128)}}}> "
            "{ a = Add (x, add) y = MatMul (a, w) }"
        ),
        folder / "fixed.onnx",
    )
    return folder / "fixed.onnx"


def test_data_that_the_model_cannot_be_run_on_are_refused_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.ones((3, 5, 8), np.float32))
    with pytest.raises(ModelError, match="fails when run on x"):
        quantkit.bench_model(fixed_length(tmp_path), data="data.npy")

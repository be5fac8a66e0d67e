"""Every preset for every target: what is written, what it means, and how much of the disk it takes.

The table says for each pair which operators stand in the file, or why there is none. Numbers are held against
arithmetic on the formats themselves, which shares nothing with solving, placing and emitting.
"""

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import quantkit
from quantkit.cache import CalibrationCache
from quantkit.decode import beyond_onnxruntime, decode
from quantkit.errors import PlanError
from quantkit.exported import Exported
from quantkit.formats import dequantize, size_bytes
from quantkit.graph import load_graph
from quantkit.planning.presets import list_presets
from quantkit.runtime import Session
from tests.models import model_of

K, N, OUT = 512, 384, 256
BATCH = 6


@cache
def model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    return model_of(
        """(float[B,512] x) => (float[B,256] y) {
        h = MatMul (x, w)
        r = Relu (h)
        y = Gemm <transB = 1> (r, v, b) }""",
        w=rng.normal(size=(K, N)).astype(np.float32) / K**0.5,
        v=rng.normal(size=(OUT, N)).astype(np.float32) / N**0.5,
        b=rng.normal(size=OUT).astype(np.float32),
    )


@cache
def calibration() -> CalibrationCache:
    data = np.random.default_rng(1).normal(size=(64, K)).astype(np.float32)
    return quantkit.calibrate_model(model(), data, method="minmax")


def export(preset: str, target: str, path: Path, **options: object) -> Exported:
    return quantkit.export_model(
        model(),
        calibration(),
        preset=preset,
        target=target,
        everything=True,
        out=path / f"{preset}.{target}.onnx",
        **options,  # type: ignore[arg-type]
    )


Q, DQ = "QuantizeLinear", "DequantizeLinear"
FLOAT_OPS = {"MatMul": 1, "Relu": 1, "Gemm": 1}
STATIC = {Q: 2, DQ: 4, **FLOAT_OPS}
WITH_BIAS = {Q: 2, DQ: 5, **FLOAT_OPS}
FP8_ORT = {Q: 2, "Cast": 4, "Mul": 4, **FLOAT_OPS}
SIXTEEN_BITS = {Q: 2, DQ: 2, "Cast": 2, "Mul": 2, **FLOAT_OPS}
PACKED = {"MatMulNBits": 2, "Relu": 1}
TILES = {DQ: 2, "Expand": 2, "Reshape": 2, **FLOAT_OPS}
NVFP4 = {DQ: 4, "Cast": 2, "Transpose": 1, **FLOAT_OPS}
NO_MATRICES = "has no matrices with"

# (preset, target, activations) → (least opset, operators), or the words of the refusal.
TABLE: dict[tuple[str, str, bool | None], tuple[int, dict[str, int]] | str] = {
    ("int8", "tensorrt", None): (19, STATIC),
    ("int8", "tensorrt", False): (19, {DQ: 2, **FLOAT_OPS}),
    ("int8", "ort", None): (19, WITH_BIAS),
    ("int8", "ort-cpu", None): (19, WITH_BIAS),
    ("fp8", "tensorrt", None): (19, STATIC),
    ("fp8", "ort", None): (21, FP8_ORT),
    ("fp8", "ort-cpu", None): (21, FP8_ORT),
    ("fp8-block", "tensorrt", None): (21, TILES),
    ("fp8-block", "ort", None): (21, TILES),
    ("fp8-block", "ort-cpu", None): (21, TILES),
    ("int4", "tensorrt", None): (21, {DQ: 2, **FLOAT_OPS}),
    ("int4", "ort", None): (21, PACKED),
    ("int4", "ort-cpu", None): (21, PACKED),
    ("w4a8", "tensorrt", None): (21, STATIC),
    ("w4a8", "ort", None): (21, {Q: 2, DQ: 2, **PACKED}),
    ("w4a8", "ort-cpu", None): (21, {Q: 2, DQ: 2, **PACKED}),
    ("w4a8-fp8", "tensorrt", None): (21, STATIC),
    ("w4a8-fp8", "ort", None): (21, {Q: 2, "Cast": 2, "Mul": 2, **PACKED}),
    ("w4a8-fp8", "ort-cpu", None): (21, {Q: 2, "Cast": 2, "Mul": 2, **PACKED}),
    ("nvfp4", "tensorrt", None): (23, NVFP4),
    ("nvfp4", "tensorrt", True): (23, {**NVFP4, DQ: 8, "TRT_FP4DynamicQuantize": 2}),
    ("nvfp4", "ort", None): NO_MATRICES,
    ("nvfp4", "ort-cpu", None): NO_MATRICES,
    ("mxfp4", "tensorrt", None): (24, {DQ: 2, "Transpose": 1, **FLOAT_OPS}),
    ("mxfp4", "ort", None): NO_MATRICES,
    ("mxfp4", "ort-cpu", None): NO_MATRICES,
    ("mxfp8", "tensorrt", None): (
        21,
        {"TRT_MXFP8DynamicQuantize": 2, "TRT_MXFP8DequantizeLinear": 4, "Transpose": 1, **FLOAT_OPS},
    ),
    ("mxfp8", "tensorrt", False): (21, {"TRT_MXFP8DequantizeLinear": 2, "Transpose": 1, **FLOAT_OPS}),
    ("mxfp8", "ort", None): NO_MATRICES,
    ("mxfp8", "ort-cpu", None): NO_MATRICES,
    ("int16", "tensorrt", None): "has no uint16",
    ("int16", "ort", None): (21, SIXTEEN_BITS),
    ("int16", "ort-cpu", None): (21, SIXTEEN_BITS),
    ("w16a16", "tensorrt", None): "has no int16",
    ("w16a16", "ort", None): (21, SIXTEEN_BITS),
    ("w16a16", "ort-cpu", None): (21, SIXTEEN_BITS),
    ("int2", "tensorrt", None): NO_MATRICES,
    ("int2", "ort", None): (21, PACKED),
    ("int2", "ort-cpu", None): (21, PACKED),
}
WRITTEN = [key for key, found in TABLE.items() if not isinstance(found, str)]


def operators(path: Path) -> dict[str, int]:
    return dict(Counter(node.op_type for node in ir.load(path).graph))


def test_every_preset_and_target_is_in_the_table() -> None:
    assert {p for p, _, _ in TABLE} == set(list_presets())
    assert {(p, t) for p, t, _ in TABLE} == {
        (p, t) for p in list_presets() for t in ("tensorrt", "ort", "ort-cpu")
    }


@pytest.mark.parametrize(("preset", "target", "activations"), TABLE)
def test_a_file_has_the_operators_of_its_target(
    preset: str, target: str, activations: bool | None, tmp_path: Path
) -> None:
    expected = TABLE[preset, target, activations]
    if isinstance(expected, str):
        with pytest.raises(PlanError, match=expected):
            export(preset, target, tmp_path, activations=activations)
        assert not list(tmp_path.iterdir())
        return
    exported = export(preset, target, tmp_path, activations=activations)
    opset, wanted = expected
    written = ir.load(exported.path)
    assert operators(exported.path) == wanted
    assert written.graph.opset_imports[""] == max(opset, load_graph(model()).opset)
    onnx.checker.check_model(str(exported.path), full_check=True)
    if target != "tensorrt":
        assert beyond_onnxruntime(written) == []


@pytest.mark.parametrize(("preset", "target", "activations"), WRITTEN)
def test_a_file_computes_what_its_formats_say(
    preset: str, target: str, activations: bool | None, tmp_path: Path
) -> None:
    exported = export(preset, target, tmp_path, activations=activations)
    graph, plan = load_graph(model()), exported.plan
    w, v = (dequantize(p.quantize(graph.array(p.name))) for p in plan.weights)
    x = np.random.default_rng(2).normal(size=(BATCH, K)).astype(np.float32)
    fed = plan.activations["x"].apply(x) if "x" in plan.activations else x
    written = ir.load(exported.path)
    runnable = decode(written) if beyond_onnxruntime(written) else written
    names = ["y", "r"]
    found = Session(runnable, outputs=names, optimize=False).run({"x": x})
    np.testing.assert_allclose(found["r"], np.maximum(fed @ w, 0), rtol=1e-4, atol=1e-5)
    # From the file's own r: near a rounding boundary the order of sums decides.
    hidden = plan.activations["r"].apply(found["r"]) if "r" in plan.activations else found["r"]
    bias = graph.array("b") if not plan.biases else plan.biases[0].qvalue * plan.biases[0].scale
    np.testing.assert_allclose(found["y"], hidden @ v.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("preset", "target", "activations"), WRITTEN)
def test_weights_take_their_theoretical_size(
    preset: str, target: str, activations: bool | None, tmp_path: Path
) -> None:
    exported = export(preset, target, tmp_path, activations=activations)
    graph = load_graph(model())
    theory = sum(size_bytes(graph.shape(p.name), p.spec) for p in exported.plan.weights)
    names = {p.name for p in exported.plan.weights}
    stored = sum(
        value.const_value.nbytes
        for name, value in ir.load(exported.path).graph.initializers.items()
        if value.const_value is not None and name.split("_")[0] in names
    )
    assert theory <= stored <= theory * 1.02


@pytest.mark.parametrize(
    ("preset", "options", "words"),
    [
        ("int4", {"group": 32}, "int4, block 32"),
        ("int4", {"group": 256}, "int4, block 256"),
        ("int4", {"group": "channel"}, "int4, per channel"),
        ("int4", {"symmetric": False}, "uint4, block 128, asymmetric"),
        ("int4", {"symmetric": False, "group": "channel"}, "uint4, per channel, asymmetric"),
        ("int2", {"group": 64}, "int2, block 64"),
        ("int2", {"symmetric": False}, "uint2, block 32, asymmetric"),
        ("fp8", {"per_tensor": True}, "fp8_e4m3"),
        ("int8", {"per_tensor": True}, "int8"),
    ],
)
def test_formats_have_their_options(
    preset: str, options: dict[str, object], words: str, tmp_path: Path
) -> None:
    exported = (
        export(preset, "ort", tmp_path, activations=False, **options)
        if preset
        in (
            "int8",
            "fp8",
        )
        else export(preset, "ort", tmp_path, **options)
    )
    assert {str(w.spec) for w in exported.plan.weights} == {words}
    assert exported.verification is not None
    assert exported.verification.plan_sqnr_db > 70


@pytest.mark.parametrize("preset", ["mxfp4", "mxfp8"])
def test_a_scale_rule_that_is_asked_for_is_followed_to_the_letter(preset: str, tmp_path: Path) -> None:
    scales = {}
    for rule in ("ocp", "rceil", "even"):
        exported = export(preset, "tensorrt", tmp_path, scale_rule=rule)
        w = exported.plan.weights[0]
        array = load_graph(model()).array("w")
        amax = np.abs(array.reshape(K // 32, 32, N)).max(axis=1)
        largest = w.spec.format.max
        exponent = {
            "ocp": np.floor(np.log2(amax)) - np.floor(np.log2(largest)),
            "rceil": np.ceil(np.log2(amax / largest)),
        }.get(rule)
        scales[rule] = w.qparams.scale
        if exponent is not None:
            np.testing.assert_array_equal(w.qparams.scale, 2.0**exponent)
    assert np.all((scales["even"] == scales["ocp"]) | (scales["even"] == 2 * scales["ocp"]))


# --- conventions, attribute by attribute --------------------------------------------------------------------


def nodes_of(path: Path, op_type: str) -> list[ir.Node]:
    return [node for node in ir.load(path).graph if node.op_type == op_type]


def attributes(node: ir.Node) -> dict[str, object]:
    return {name: a.value for name, a in node.attributes.items()}


def dtypes(node: ir.Node) -> list[str]:
    return [v.dtype.name for v in node.inputs if v is not None and v.dtype is not None]


def test_nvfp4_weights_are_written_as_nvidias_exporter_does(tmp_path: Path) -> None:
    exported = export("nvfp4", "tensorrt", tmp_path)
    scales, values = nodes_of(exported.path, DQ)[:2]
    assert dtypes(scales) == ["FLOAT8E4M3FN", "FLOAT"]
    assert attributes(scales) == {}
    assert scales.inputs[1] is not None
    assert scales.inputs[1].shape == []
    assert values.inputs[1] is scales.outputs[0]
    assert attributes(values) == {"axis": -1, "block_size": 16}
    codes = values.inputs[0]
    assert codes is not None
    assert codes.dtype == ir.DataType.FLOAT4E2M1
    assert codes.shape == [N, K]
    (cast,) = {u for u, _ in values.outputs[0].uses()}
    assert cast.op_type == "Cast"


def test_nvfp4_activations_go_through_tensorrts_own_operator(tmp_path: Path) -> None:
    exported = export("nvfp4", "tensorrt", tmp_path, activations=True)
    first = nodes_of(exported.path, "TRT_FP4DynamicQuantize")[0]
    assert first.domain == "trt"
    assert attributes(first) == {"axis": -1, "block_size": 16, "scale_type": 17}
    assert [v.dtype.name for v in first.outputs if v.dtype is not None] == ["FLOAT4E2M1", "FLOAT8E4M3FN"]
    scale = first.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    histogram = calibration().statistics["x"].histogram
    assert scale.const_value.numpy() == np.float32(max(histogram.max, -histogram.min) / (6 * 448))
    scales, values = (next(u for u, _ in v.uses()) for v in reversed(first.outputs))
    assert (scales.op_type, values.op_type) == (DQ, DQ)
    assert values.inputs[1] is scales.outputs[0]


def test_mxfp8_goes_through_tensorrts_own_operators(tmp_path: Path) -> None:
    exported = export("mxfp8", "tensorrt", tmp_path)
    quantize = nodes_of(exported.path, "TRT_MXFP8DynamicQuantize")[0]
    assert attributes(quantize) == {"axis": -1, "block_size": 32, "output_dtype": 17}
    for node in nodes_of(exported.path, "TRT_MXFP8DequantizeLinear"):
        assert node.domain == "trt"
        assert attributes(node) == {"axis": -1, "block_size": 32, "output_dtype": 1}
        assert dtypes(node) == ["FLOAT8E4M3FN", "UINT8"]


def test_mxfp4_has_e8m0_scales_along_the_last_axis(tmp_path: Path) -> None:
    exported = export("mxfp4", "tensorrt", tmp_path)
    for node in nodes_of(exported.path, DQ):
        assert dtypes(node) == ["FLOAT4E2M1", "FLOAT8E8M0"]
        assert attributes(node) == {"axis": -1, "block_size": 32, "output_dtype": 1}


def test_mxfp4_is_refused_for_tensorrt_10(tmp_path: Path) -> None:
    with pytest.raises(quantkit.QuantkitError, match="--trt 11 or nvfp4"):
        export("mxfp4", "tensorrt", tmp_path, target_options={"trt": 10})
    assert export("nvfp4", "tensorrt", tmp_path, target_options={"trt": 10}).path.exists()


def test_matmul_nbits_says_its_accuracy_level_only_when_asked(tmp_path: Path) -> None:
    (first, _) = nodes_of(export("int4", "ort", tmp_path).path, "MatMulNBits")
    assert attributes(first) == {"K": K, "N": N, "bits": 4, "block_size": 128}
    exported = export("int4", "ort", tmp_path, target_options={"accuracy_level": 4})
    (first, _) = nodes_of(exported.path, "MatMulNBits")
    assert attributes(first) == {"K": K, "N": N, "bits": 4, "block_size": 128, "accuracy_level": 4}
    assert exported.verification is not None
    assert exported.verification.plan_sqnr_db > 70


def test_tiles_are_blocks_whose_scales_are_repeated(tmp_path: Path) -> None:
    exported = export("fp8-block", "tensorrt", tmp_path)
    for node in nodes_of(exported.path, DQ):
        assert attributes(node) == {"axis": 0, "block_size": 128}
        assert dtypes(node) == ["FLOAT8E4M3FN", "FLOAT"]
    assert any("stay in float" in warning for warning in exported.warnings)

"""Casting what is not quantized: types where two meet, names, and the numbers that would not survive."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from quantkit.decode import beyond_onnxruntime, decode
from quantkit.graph import load_graph
from quantkit.graph.high_precision import cast_floats
from quantkit.runtime import Session
from tests.models import MODELS, TinyModel, model_of
from tests.plans import sqnr_db

FLOAT, FP16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
# Rounding errors of half a last place are 78 and 60 dB below a number; a handful of layers takes some of that.
FLOOR_DB = {FP16: 48.0, BF16: 30.0}

both = pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])


def read(text: str, *, opset: int = 20, domains: tuple[str, ...] = (), **weights: Any) -> ir.Model:
    """A model of the text, as loading cleans it."""
    return load_graph(model_of(text, opset=opset, domains=domains, **weights)).model


def written(nodes: list[Any], inputs: dict[str, list[Any]], *, opset: int = 21, **stored: Any) -> ir.Model:
    """A model of nodes and arrays of any type, as it stands."""
    graph = helper.make_graph(
        nodes,
        "written",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items()],
    )
    domains = sorted({n.domain for n in nodes} - {""})
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    )
    model.ir_version = 10 if opset < 23 else 11
    return ir.serde.deserialize_model(model)


def run(model: ir.Model, feeds: dict[str, Any], *, optimize: bool = False) -> dict[str, np.ndarray]:
    return Session(decode(model) if beyond_onnxruntime(model) else model, optimize=optimize, threads=1).run(
        feeds
    )


def types(model: ir.Model, op_type: str) -> list[ir.DataType | None]:
    """What the nodes of an operator put out."""
    return [n.outputs[0].dtype for n in model.graph if n.op_type == op_type]


def reasons(model: ir.Model, dtype: ir.DataType = FP16, **options: bool) -> dict[str, str]:
    """Operator → why one of them stays."""
    return {left.op_type: left.reason for left in cast_floats(model, dtype, **options)[1]}


# --- whole models -------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)
def test_every_model_is_valid_and_close_to_float(tiny: TinyModel, dtype: ir.DataType, tmp_path: Path) -> None:
    graph = load_graph(tiny.build())
    model, _ = cast_floats(graph.model, dtype)
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    feed = tiny.feeds(1)[0]
    exact, found = Session(graph.model, threads=1).run(feed), run(ir.load(tmp_path / "model.onnx"), feed)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if value.dtype == np.float32:
            assert found[name].dtype == np.float32
            assert sqnr_db(value, found[name]) > FLOOR_DB[dtype]


@both
@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2", "cct", "tiny_llama"])
def test_trained_models_stay_close_to_float(name: str, dtype: ir.DataType, shared_models: Path) -> None:
    graph = load_graph(shared_models / f"{name}.onnx")
    model, _ = cast_floats(graph.model, dtype)
    rng = np.random.default_rng(0)
    feed = {}
    for spec in graph.inputs:
        shape = [d if isinstance(d, int) else 2 if axis == 0 else 32 for axis, d in enumerate(spec.shape)]
        draw = (
            rng.integers(0, 60, shape)
            if np.issubdtype(spec.dtype, np.integer)
            else rng.standard_normal(shape)
        )
        feed[spec.name] = draw.astype(spec.dtype)
    exact, found = Session(graph.model).run(feed), run(model, feed)
    for output, value in exact.items():
        assert sqnr_db(value, found[output]) > FLOOR_DB[dtype]


@pytest.mark.parametrize(
    "name", ["conv_relu", "matmul", "layernorm_mlp", "residual_downsample", "masked_attention"]
)
def test_bfloat16_is_what_onnx_itself_makes_of_it(name: str) -> None:
    tiny = MODELS[name]
    graph = load_graph(tiny.build())
    model, _ = cast_floats(graph.model, BF16)
    feed = tiny.feeds(1)[0]
    outputs = list(run(model, feed).values())
    for value, found in zip(
        ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, feed), outputs, strict=True
    ):
        # The reference implementation also adds up in bfloat16.
        assert sqnr_db(np.asarray(value), found) > 25


# --- types where two meet -----------------------------------------------------------------------------------

MLP = """(float[N,8] x) => (float[N,4] y) <float[8,16] w0, float[16,4] w1, float[16] b> {
    h = Gemm (x, w0, b) r = Relu (h) y = MatMul (r, w1) }"""


@both
def test_inputs_and_outputs_stay_float32_behind_a_cast(dtype: ir.DataType) -> None:
    model, left = cast_floats(read(MLP), dtype)
    assert left == []
    assert [n.op_type for n in model.graph] == ["Cast", "Gemm", "Relu", "MatMul", "Cast"]
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [FLOAT, FLOAT]
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]
    assert {v.dtype for v in model.graph.initializers.values()} == {dtype}
    assert {v.name for n in model.graph for v in n.outputs} >= {"h", "r"}


@both
def test_inputs_and_outputs_are_cast_where_that_is_wanted(dtype: ir.DataType) -> None:
    model, _ = cast_floats(read(MLP), dtype, keep_io=False)
    assert [n.op_type for n in model.graph] == ["Gemm", "Relu", "MatMul"]
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [dtype, dtype]


def test_weights_are_cast_when_they_are_read() -> None:
    model, _ = cast_floats(read(MLP), FP16)
    assert all(isinstance(v.const_value, ir.LazyTensor) for v in model.graph.initializers.values())


def test_the_model_is_not_changed() -> None:
    given = read(MLP)
    before = ir.serde.serialize_model(given).SerializeToString()
    for dtype in (FP16, BF16):
        cast_floats(given, dtype, keep_io=False)
    assert ir.serde.serialize_model(given).SerializeToString() == before


def test_a_tensor_is_cast_once_for_all_its_readers() -> None:
    text = """(float[N,4] x) => (float[N,4] a, float[N,4] b, float[N,4] c) <float[4,4] w> {
        h = MatMul (x, w) a = Sqrt (h) b = Log (h) c = Relu (h) }"""
    model, _ = cast_floats(read(text), FP16)
    assert [n.op_type for n in model.graph].count("Cast") == 1 + 1 + 1


def test_bfloat16_raises_the_operator_set_to_the_one_that_has_its_convolutions() -> None:
    graph = load_graph(MODELS["conv_relu"].build())
    assert graph.opset < 22
    model, left = cast_floats(graph.model, BF16)
    assert (model.graph.opset_imports[""], model.ir_version, left) == (22, 10, [])
    assert types(model, "Conv") == [BF16, BF16]
    assert cast_floats(graph.model, FP16)[0].graph.opset_imports[""] == graph.opset


def test_an_operator_that_has_no_half_stays_in_float32() -> None:
    text = """(float[N,4,4,4] x) => (float[N,4,8,8] y) <float[4,4,1,1] w> {
        h = Conv (x, w) y = Resize <mode = "nearest"> (h, , scales) }"""
    scales = np.array([1, 1, 2, 2], np.float32)
    model, left = cast_floats(read(text, scales=scales), FP16)
    assert left == []
    # Its scales are float32 by the schema, whatever the data are.
    assert model.graph.initializers["scales"].dtype == FLOAT
    assert types(model, "Resize") == [FP16]


# --- numbers that would not survive -------------------------------------------------------------------------


def test_a_spelled_out_norm_sums_in_float32() -> None:
    text = """(float[N,64] x) => (float[N,64] y) <float[64] g> {
        p = Pow (x, two) m = ReduceMean <keepdims = 1> (p, axes) e = Add (m, eps) s = Sqrt (e)
        d = Div (x, s) y = Mul (d, g) }"""
    given = read(text, two=np.float32(2), axes=np.array([1]), eps=np.float32(1e-6))
    model, _ = cast_floats(given, FP16)
    for op_type in ("Pow", "ReduceMean", "Add", "Sqrt"):
        assert types(model, op_type) == [FLOAT]
    assert types(model, "Div") == types(model, "Mul") == [FP16]
    # The squares of these overflow float16.
    x = np.full((2, 64), 1000, np.float32)
    x[:, ::2] = -500
    exact = Session(given).run({"x": x})["y"]
    assert sqnr_db(exact, run(model, {"x": x})["y"]) > FLOOR_DB[FP16]
    assert types(cast_floats(given, FP16, norms=True)[0], "ReduceMean") == [FP16]


def test_a_square_by_mul_is_part_of_its_sum() -> None:
    text = """(float[N,64] x) => (float[N,1] y) {
        p = Mul (x, x) y = ReduceSum <keepdims = 1> (p, axes) }"""
    assert set(reasons(read(text, axes=np.array([1])))) == {"Mul", "ReduceSum"}


def test_a_norm_that_is_one_operator_is_cast() -> None:
    given = load_graph(MODELS["layernorm_mlp"].build()).model
    model, _ = cast_floats(given, FP16)
    assert set(types(model, "LayerNormalization")) == {FP16}


def test_a_constant_beyond_the_range_keeps_what_follows_up_to_the_softmax() -> None:
    text = """(float[N,4,4] x, bool[N,4,4] m) => (float[N,4,4] y) <float[4,4] w> {
        s = MatMul (x, w) t = Transpose <perm = [0, 1, 2]> (s) f = Where (m, t, low)
        p = Softmax <axis = -1> (f) y = MatMul (p, x) }"""
    given = read(text, low=np.float32(np.finfo(np.float32).min))
    for dtype in (FP16, BF16):
        model, left = cast_floats(given, dtype)
        assert [item.op_type for item in left] == ["Where", "Softmax"]
        assert "reaches 3.4e+38, beyond" in left[0].reason
        assert types(model, "MatMul") == [dtype, dtype]
        # A row that is masked altogether is uniform, and no NaN.
        x = np.random.default_rng(0).standard_normal((1, 4, 4)).astype(np.float32)
        mask = np.zeros((1, 4, 4), bool)
        mask[:, 1:] = True
        exact = Session(given).run({"x": x, "m": mask})["y"]
        assert sqnr_db(exact, run(model, {"x": x, "m": mask})["y"]) > FLOOR_DB[dtype]


def test_a_scalar_that_would_be_zero_stays() -> None:
    nodes = [helper.make_node("Add", ["x", "eps"], ["a"]), helper.make_node("Div", ["x", "a"], ["y"])]
    given = written(nodes, {"x": ["N", 4]}, eps=np.float32(1e-12))
    assert reasons(given)["Add"].endswith("is 1e-12, which is 0 in float16")
    assert reasons(given, BF16) == {}


def test_positions_and_their_angles_stay() -> None:
    text = """(int64[N,8] p, float[N,8,4] x) => (float[N,8,4] y) {
        f = Cast <to = 1> (p) u = Unsqueeze (f, last) a = MatMul (u, frequencies) c = Cos (a)
        y = Mul (x, c) }"""
    given = read(text, last=np.array([2]), frequencies=np.array([[1, 0.1, 0.01, 0.001]], np.float32))
    model, left = cast_floats(given, FP16)
    assert {item.op_type for item in left} == {"Cast", "Unsqueeze", "MatMul", "Cos"}
    assert types(model, "Mul") == [FP16]
    p, x = np.arange(50000, 50008).reshape(1, 8), np.ones((1, 8, 4), np.float32)
    exact = Session(given).run({"p": p, "x": x})["y"]
    assert sqnr_db(exact, run(model, {"p": p, "x": x})["y"]) > FLOOR_DB[FP16]


@pytest.mark.parametrize("size", [1e6, -7e4])
def test_a_weight_that_overflows_keeps_its_node(size: float) -> None:
    w = np.ones((8, 4), np.float32)
    w[3, 1] = size
    text = "(float[N,8] x) => (float[N,4] y) { y = MatMul (x, w) }"
    assert "its constant w reaches" in reasons(read(text, w=w))["MatMul"]
    assert reasons(read(text, w=w), BF16) == {}


def test_branches_stay_and_read_float32() -> None:
    graph = load_graph(MODELS["if_subgraph"].build())
    _, left = cast_floats(graph.model, FP16)
    assert [item.op_type for item in left] == ["If"]
    assert left[0].reason == "its branches or loop body stay in float32"


# --- quantization -------------------------------------------------------------------------------------------


def qdq(scale: float, *, opset: int, dtype: Any = np.int8) -> ir.Model:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["wq", "ws"], ["w"], axis=1),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    wq = np.random.default_rng(0).integers(-127, 128, (8, 4)).astype(np.int8)
    ws = np.linspace(0.001, 0.002, 4).astype(np.float16).astype(np.float32)
    return written(
        nodes, {"x": ["N", 8]}, opset=opset, s=np.float32(scale), z=np.zeros((), dtype), wq=wq, ws=ws
    )


@both
@pytest.mark.parametrize("opset", [19, 21, 23])
@pytest.mark.parametrize("codes", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn])
def test_scales_are_cast_and_codes_stay(dtype: ir.DataType, opset: int, codes: Any, tmp_path: Path) -> None:
    given = qdq(1 / 64, opset=opset, dtype=codes)
    model, left = cast_floats(given, dtype)
    assert left == []
    assert types(model, "DequantizeLinear") == [dtype, dtype]
    assert {n for n, v in model.graph.initializers.items() if v.dtype == dtype} == {
        f"s_{dtype.name.lower()}",
        f"ws_{dtype.name.lower()}",
    }
    ir.save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    x = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float16).astype(np.float32)
    exact, found = Session(given, optimize=False).run({"x": x})["y"], run(model, {"x": x})["y"]
    # bfloat16 moves x itself, and with it a few codes.
    assert sqnr_db(exact, found) > (FLOOR_DB[FP16] if dtype == FP16 else 25)


def test_a_scale_too_small_for_float16_stays_in_float32() -> None:
    model, left = cast_floats(qdq(3e-7, opset=21), FP16)
    assert [item.op_type for item in left] == ["QuantizeLinear", "DequantizeLinear"]
    assert "its scale s holds 3e-07, too small for the digits of float16" in left[0].reason
    assert types(model, "MatMul") == [FP16]
    assert cast_floats(qdq(3e-7, opset=21), BF16)[1] == []


@both
def test_scales_of_scales_stay_float32_and_the_weight_is_cast(dtype: ir.DataType, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["s8", "s32"], ["s"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["wide"], axis=0, block_size=16),
        helper.make_node("Cast", ["wide"], ["w"], to=TensorProto.FLOAT),
        helper.make_node(
            "TRT_FP4DynamicQuantize",
            ["x", "g"],
            ["c", "b"],
            domain="trt",
            axis=-1,
            block_size=16,
            scale_type=17,
        ),
        helper.make_node("DequantizeLinear", ["b", "g"], ["f"]),
        helper.make_node("DequantizeLinear", ["c", "f"], ["d"], axis=-1, block_size=16),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    stored = {
        "q": (rng.integers(-6, 7, (32, 8)) / 2).astype(ml_dtypes.float4_e2m1fn),
        "s8": rng.integers(1, 200, (2, 8)).astype(ml_dtypes.float8_e4m3fn),
        "s32": np.float32(1e-4),
        "g": np.float32(1e-3),
    }
    given = written(nodes, {"x": ["N", 32]}, opset=23, **stored)
    model, left = cast_floats(given, dtype)
    assert left == []
    assert {n: v.dtype for n, v in model.graph.initializers.items() if n in ("s32", "g")} == {
        "s32": FLOAT,
        "g": FLOAT,
    }
    assert types(model, "MatMul") == [dtype]
    dynamic = next(n for n in model.graph if n.op_type == "TRT_FP4DynamicQuantize")
    assert [v.dtype for v in dynamic.inputs if v is not None] == [dtype, FLOAT]
    x = rng.standard_normal((4, 32)).astype(np.float16).astype(np.float32)
    if dtype == FP16:
        assert sqnr_db(run(given, {"x": x})["y"], run(model, {"x": x})["y"]) > FLOOR_DB[FP16]


def test_mxfp8_puts_out_the_narrower_type() -> None:
    nodes = [
        helper.make_node(
            "TRT_MXFP8DynamicQuantize",
            ["x"],
            ["c", "s"],
            domain="trt",
            axis=-1,
            block_size=32,
            output_dtype=17,
        ),
        helper.make_node(
            "TRT_MXFP8DequantizeLinear",
            ["c", "s"],
            ["d"],
            domain="trt",
            axis=-1,
            block_size=32,
            output_dtype=1,
        ),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    given = written(nodes, {"x": ["N", 32]}, w=np.ones((32, 4), np.float32))
    model, _ = cast_floats(given, FP16)
    last = next(n for n in model.graph if n.op_type == "TRT_MXFP8DequantizeLinear")
    assert last.attributes["output_dtype"].as_int() == FP16
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float16).astype(np.float32)
    assert sqnr_db(run(given, {"x": x})["y"], run(model, {"x": x})["y"]) > FLOOR_DB[FP16]


def test_matmul_nbits_takes_scales_and_bias_along() -> None:
    rng = np.random.default_rng(0)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "b", "s", "", "", "c"],
        ["y"],
        domain="com.microsoft",
        K=32,
        N=8,
        bits=4,
        block_size=16,
    )
    stored = {
        "b": rng.integers(0, 256, (8, 2, 8)).astype(np.uint8),
        "s": rng.random((8, 2)).astype(np.float16).astype(np.float32),
        "c": np.ones(8, np.float32),
    }
    given = written([node], {"x": ["N", 32]}, **stored)
    model, left = cast_floats(given, FP16)
    assert left == []
    assert types(model, "MatMulNBits") == [FP16]
    x = rng.standard_normal((4, 32)).astype(np.float16).astype(np.float32)
    exact = Session(given, optimize=False).run({"x": x})["y"]
    assert sqnr_db(exact, run(model, {"x": x})["y"]) > FLOOR_DB[FP16]

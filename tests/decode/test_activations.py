"""Quantization of activations that ONNX Runtime has no kernels for, written as float operators: equal bit for bit."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from quantkit.decode import beyond_onnxruntime, decode
from quantkit.errors import ModelError
from quantkit.formats import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    QParams,
    QuantSpec,
    dynamic_qparams,
    fake_quantize,
)
from quantkit.runtime import Session
from tests.decode.constructs import Array, as_bits, model_of, outliers, run

NVFP4 = QuantSpec(format=FP4_E2M1, axis=-1, block_size=16, scale_format=FP8_E4M3, dynamic="block")
MXFP8 = QuantSpec(format=FP8_E4M3, axis=-1, block_size=32, scale_format=E8M0, dynamic="block")


def nvfp4_nodes(x: str = "x", *, axis: int = -1, to: int = TensorProto.FLOAT) -> list[Any]:
    """As NVIDIA's exporter writes it: the dynamic operator, then its two DequantizeLinear."""
    return [
        helper.make_node(
            "TRT_FP4DynamicQuantize", [x, "g"], ["codes", "scales"], domain="trt", axis=axis, block_size=16,
            scale_type=TensorProto.FLOAT8E4M3FN,
        ),
        helper.make_node("DequantizeLinear", ["scales", "g"], ["floats"]),
        helper.make_node("DequantizeLinear", ["codes", "floats"], ["wide"], axis=axis, block_size=16),
        helper.make_node("Cast", ["wide"], ["y"], to=to),
    ]  # fmt: skip


def mxfp8_nodes(*, axis: int = -1, to: int = TensorProto.FLOAT) -> list[Any]:
    """As NVIDIA's exporter writes it."""
    return [
        helper.make_node(
            "TRT_MXFP8DynamicQuantize", ["x"], ["codes", "scales"], domain="trt", axis=axis, block_size=32,
            output_dtype=TensorProto.FLOAT8E4M3FN,
        ),
        helper.make_node(
            "TRT_MXFP8DequantizeLinear", ["codes", "scales"], ["y"], domain="trt", axis=axis, block_size=32,
            output_dtype=to,
        ),
    ]  # fmt: skip


def global_scale(amax: float) -> Array:
    return np.asarray(amax / (6 * 448), np.float32)


def oracle(x: Array, spec: QuantSpec, scale: Array | None = None) -> Array:
    return fake_quantize(x, dynamic_qparams(x, spec, global_scale=scale), spec)


# --- NVFP4 --------------------------------------------------------------------------------------------------


def test_a_block_whose_scale_lies_between_two_codes_is_the_oracle_bit_for_bit() -> None:
    # amax / (6 · scale) is 58 to float32 and a hair more in float64; E4M3 has 56 and 60.
    x, g = np.full((1, 16), 0.334741, np.float32), np.asarray(0.0009618994, np.float32)
    ratio = 0.334741 / (6 * float(g))
    assert np.float32(ratio) == 58 < ratio
    found = run(model_of(nvfp4_nodes(), inputs={"x": [1, 16]}, g=g), {"x": x})
    np.testing.assert_array_equal(as_bits(found), as_bits(oracle(x, NVFP4, g)))


@pytest.mark.parametrize("shape", [(4, 64), (2, 3, 32), (5, 16), (3, 40), (2, 2, 2, 7), (16,)])
def test_dynamic_nvfp4_is_the_oracle_bit_for_bit(shape: tuple[int, ...]) -> None:
    x, g = outliers(*shape, seed=sum(shape)), global_scale(37.5)
    for declared in (list(shape), [*[None] * (len(shape) - 1), shape[-1]], [None] * len(shape)):
        found = run(model_of(nvfp4_nodes(), inputs={"x": declared}, g=g), {"x": x})
        np.testing.assert_array_equal(as_bits(found), as_bits(oracle(x, NVFP4, g)))


@settings(max_examples=60)
@given(
    hnp.arrays(np.float32, (2, 48), elements=st.floats(-(2.0**20), 2.0**20, width=32)),
    st.floats(2.0**-20, 2.0**20, width=32),
)
def test_dynamic_nvfp4_is_the_oracle_for_any_values(x: Array, amax: float) -> None:
    g = global_scale(amax)
    np.testing.assert_array_equal(as_bits(_NVFP4.run({"x": x, "g": g})["y"]), as_bits(oracle(x, NVFP4, g)))


# The scalar as an input, so that one session serves every example.
_NVFP4 = Session(decode(model_of(nvfp4_nodes(), inputs={"x": [2, 48], "g": []})), optimize=False, threads=1)


def test_scales_halfway_between_two_codes_go_to_the_even_one() -> None:
    # amax / (6 · g) = 17 and 19 lie between E4M3's 16, 18 and 20: both to the even mantissa, 16 and 20.
    g = np.asarray(1, np.float32)
    x = np.zeros((2, 16), np.float32)
    x[:, 0], x[:, 1] = (17 * 6, 19 * 6), (16 * 2.5, 20 * 2.5)
    found = run(model_of(nvfp4_nodes(), inputs={"x": [2, 16]}, g=g), {"x": x})
    np.testing.assert_array_equal(found[:, 0], [6 * 16, 6 * 20])
    # 2.5 in units of the scale lies between 2 and 3, and 2 is even.
    np.testing.assert_array_equal(found[:, 1], [2 * 16, 2 * 20])


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_blocks_can_lie_along_any_axis(axis: int) -> None:
    x, g = outliers(20, 36), global_scale(10)
    x[-1] = x[0]
    spec = QuantSpec(format=FP4_E2M1, axis=axis, block_size=16, scale_format=FP8_E4M3, dynamic="block")
    for declared in ([20, 36], [None, None]):
        found = run(model_of(nvfp4_nodes(axis=axis), inputs={"x": declared}, g=g), {"x": x})
        np.testing.assert_array_equal(as_bits(found), as_bits(oracle(x, spec, g)))


def test_half_precision_goes_in_and_comes_out() -> None:
    x, g = outliers(3, 32).astype(np.float16), global_scale(12)
    model = model_of(
        nvfp4_nodes(to=TensorProto.FLOAT16),
        inputs={"x": [3, 32]},
        input_type=TensorProto.FLOAT16,
        output_type=TensorProto.FLOAT16,
        g=g,
    )
    found = run(model, {"x": x})
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, oracle(x.astype(np.float32), NVFP4, g).astype(np.float16))


def test_a_nan_stays_one_and_its_block_alone_is_hurt() -> None:
    x, g = outliers(2, 32), global_scale(12)
    clean = oracle(x, NVFP4, g)
    x[0, 3] = np.nan
    found = run(model_of(nvfp4_nodes(), inputs={"x": [2, 32]}, g=g), {"x": x})
    assert np.isnan(found[0, 3])
    np.testing.assert_array_equal(found[0, 16:], clean[0, 16:])
    np.testing.assert_array_equal(found[1], clean[1])


def test_other_scale_types_are_refused() -> None:
    nodes = nvfp4_nodes()
    nodes[0].attribute[2].i = TensorProto.FLOAT8E5M2
    with pytest.raises(ModelError, match=r"TRT_FP4DynamicQuantize with scale_type 19, where only 17"):
        decode(model_of(nodes, inputs={"x": [2, 32]}, g=global_scale(1)))


# --- MXFP8 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 64), (2, 3, 32), (3, 40), (2, 2, 2, 7)])
@pytest.mark.parametrize("opset", [19, 21, 23])
def test_dynamic_mxfp8_is_the_oracle_bit_for_bit(shape: tuple[int, ...], opset: int) -> None:
    x = outliers(*shape, seed=sum(shape))
    model = model_of(mxfp8_nodes(), inputs={"x": [None, *shape[1:-1], None]}, opset=opset)
    np.testing.assert_array_equal(as_bits(run(model, {"x": x})), as_bits(oracle(x, MXFP8)))


@settings(max_examples=60)
@given(hnp.arrays(np.float32, (2, 64), elements=st.floats(-(2.0**126), 2.0**126, width=32)))
def test_dynamic_mxfp8_is_the_oracle_for_any_values(x: Array) -> None:
    np.testing.assert_array_equal(as_bits(_MXFP8.run({"x": x})["y"]), as_bits(oracle(x, MXFP8)))


_MXFP8 = Session(decode(model_of(mxfp8_nodes(), inputs={"x": [2, 64]})), optimize=False, threads=1)


@pytest.mark.parametrize("exponent", [-149, -127, -126, -20, 0, 8, 9, 126])
@pytest.mark.parametrize("factor", [1.0, 1.75, 1.7500001, 1.9999999])
def test_the_power_of_two_is_exact_at_its_edges(exponent: int, factor: float) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = np.ldexp(np.float32(factor), exponent)
    model = model_of(mxfp8_nodes(), inputs={"x": [1, 32]})
    np.testing.assert_array_equal(as_bits(run(model, {"x": x})), as_bits(oracle(x, MXFP8)))


# --- other quantization of activations ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["tensor", "channel", "block"])
def test_static_fp4_is_the_oracle(scale: str) -> None:
    x = outliers(5, 32)
    spec = {
        "tensor": QuantSpec(format=FP4_E2M1),
        "channel": QuantSpec(format=FP4_E2M1, axis=0),
        "block": QuantSpec(format=FP4_E2M1, axis=1, block_size=16),
    }[scale]
    s = {"tensor": np.array(0.7), "channel": np.arange(1, 6) / 3, "block": np.arange(1, 11).reshape(5, 2) / 3}
    held = s[scale].astype(np.float32)
    attributes = {"tensor": {}, "channel": {"axis": 0}, "block": {"axis": 1, "block_size": 16}}[scale]
    nodes = [
        helper.make_node(
            "QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.FLOAT4E2M1, **attributes
        ),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"], **attributes),
    ]
    found = run(model_of(nodes, inputs={"x": [5, 32]}, s=held), {"x": x})
    np.testing.assert_array_equal(as_bits(found), as_bits(fake_quantize(x, QParams(held), spec)))


def test_float8_under_mx_scales_is_the_oracle() -> None:
    x = outliers(4, 64)
    s = np.array([[0.5, 2], [1, 4], [0.125, 8], [1, 1]], np.float32)
    nodes = [
        helper.make_node(
            "QuantizeLinear", ["x", "s"], ["q"], axis=1, block_size=32, output_dtype=TensorProto.FLOAT8E4M3FN
        ),
        helper.make_node("Transpose", ["q"], ["t"]),
        helper.make_node("Transpose", ["t"], ["u"]),
        helper.make_node(
            "DequantizeLinear", ["u", "s"], ["y"], axis=1, block_size=32, output_dtype=TensorProto.FLOAT
        ),
    ]
    model = model_of(nodes, inputs={"x": [4, 64]}, opset=25, s=s.astype(ml_dtypes.float8_e8m0fnu))
    spec = QuantSpec(format=FP8_E4M3, axis=1, block_size=32)
    np.testing.assert_array_equal(as_bits(run(model, {"x": x})), as_bits(fake_quantize(x, QParams(s), spec)))


def test_codes_may_be_moved_before_they_are_dequantized() -> None:
    x = outliers(4, 32)
    s = np.asarray(0.5, np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.FLOAT4E2M1),
        helper.make_node("Reshape", ["q", "shape"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[2, 0, 1]),
        helper.make_node("DequantizeLinear", ["t", "s"], ["y"]),
    ]
    found = run(model_of(nodes, inputs={"x": [4, 32]}, s=s, shape=np.array([4, 4, 8])), {"x": x})
    exact = fake_quantize(x, QParams(s), QuantSpec(format=FP4_E2M1)).reshape(4, 4, 8).transpose(2, 0, 1)
    np.testing.assert_array_equal(found, exact)


def test_a_cast_to_fp4_rounds_half_to_even_and_saturates() -> None:
    x = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, -0.2, -5.1, 1e9], np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["q"], to=TensorProto.FLOAT4E2M1),
        helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT),
    ]
    found = run(model_of(nodes, inputs={"x": [11]}), {"x": x})
    np.testing.assert_array_equal(found, [0, 1, 1, 2, 2, 4, 4, 6, 0, -6, 6])


@pytest.mark.parametrize("opset", [19, 21])
def test_static_quantization_that_onnxruntime_runs_is_left_alone(opset: int) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    for dtype in (np.int8, np.uint8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        model = model_of(nodes, inputs={"x": [2, 8]}, opset=opset, s=np.float32(0.1), z=np.zeros((), dtype))
        assert [n.op_type for n in decode(model).graph] == ["QuantizeLinear", "DequantizeLinear"]


def test_dynamic_blocks_of_float8_run_as_they_are_and_are_the_oracle() -> None:
    """Scales computed by ONNX's own operators: amax / 448 of 128 elements, 1 where they are all zero."""
    nodes = [
        helper.make_node("Reshape", ["x", "blocks"], ["b"]),
        helper.make_node("Abs", ["b"], ["m"]),
        helper.make_node("ReduceMax", ["m", "last"], ["amax"], keepdims=0),
        helper.make_node("Div", ["amax", "max"], ["ratio"]),
        helper.make_node("Equal", ["amax", "zero"], ["empty"]),
        helper.make_node("Where", ["empty", "one", "ratio"], ["s"]),
        helper.make_node(
            "QuantizeLinear",
            ["x", "s"],
            ["q"],
            axis=-1,
            block_size=128,
            output_dtype=TensorProto.FLOAT8E4M3FN,
        ),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=-1, block_size=128),
    ]
    x = outliers(5, 384)
    constants = {"max": np.float32(448), "zero": np.float32(0), "one": np.float32(1)}
    model = model_of(
        nodes, inputs={"x": [5, 384]}, blocks=np.array([0, -1, 128]), last=np.array([2]), **constants
    )
    assert beyond_onnxruntime(model) == []
    spec = QuantSpec(format=FP8_E4M3, axis=-1, block_size=128, dynamic="block")
    for runnable in (model, decode(model)):
        found = Session(runnable, optimize=False, threads=1).run({"x": x})["y"]
        np.testing.assert_array_equal(as_bits(found), as_bits(oracle(x, spec)))


def test_an_unknown_operator_of_tensorrt_is_refused_by_name() -> None:
    nodes = [helper.make_node("TRT_Attention", ["x"], ["y"], name="att", domain="trt")]
    with pytest.raises(ModelError, match=r"^att: trt::TRT_Attention is an operator of TensorRT"):
        decode(model_of(nodes, inputs={"x": [2, 8]}))


def test_an_operator_set_without_float8_is_refused() -> None:
    with pytest.raises(ModelError, match=r"operator set 17, which has no float8; export it with opset 19"):
        decode(model_of(mxfp8_nodes(), inputs={"x": [2, 32]}, opset=17))


def test_a_branch_is_decoded_like_the_main_graph() -> None:
    branch = helper.make_graph(
        nvfp4_nodes(), "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "else",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["c"], ["out"], then_branch=branch, else_branch=other)
    x, g = outliers(2, 20), global_scale(4)
    for choice, exact in ((True, oracle(x, NVFP4, g)), (False, x)):
        model = model_of([node], inputs={"x": [2, 20]}, outputs=["out"], g=g, c=np.asarray(choice))
        np.testing.assert_array_equal(run(model, {"x": x}), exact)

"""Models that carry Q/DQ pairs: their scales stay bit for bit, only what is bare is added, nothing is rounded twice."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import ModelProto, numpy_helper

from quantkit import calibrate_model, export_model
from quantkit.export import get_emitter
from quantkit.export.verify import verify
from quantkit.graph.kept_scales import kept_scales
from quantkit.graph.quantized import find_quantized
from quantkit.planning.keeping import with_kept_scales
from tests.models import model_of
from tests.plans import Calibrated, calibrate, images

ALL = ("tensorrt", "ort", "ort-cpu", "ort-qoperator")
# Scales no calibration would come to.
XS, RS = np.float32(0.0317), np.float32(0.0123)
WS = np.linspace(0.002, 0.004, 8).astype(np.float32)
STORED = {
    "xs": XS,
    "xz": np.int8(0),
    "rs": RS,
    "u": np.uint8(0),
    "ws": WS,
    "z8": np.zeros(8, np.int8),
}
X = "xq = QuantizeLinear (x, xs, xz) xd = DequantizeLinear (xq, xs, xz)"
FLOAT_WEIGHT = """wq = QuantizeLinear <axis = 0> (w0, ws, z8)
        wd = DequantizeLinear <axis = 0> (wq, ws, z8)"""
CODES = "wd = DequantizeLinear <axis = 0> (wc, ws, z8)"


def convolutions(head: str, tail: str, **stored: np.ndarray) -> ModelProto:
    """A convolution to r[N, 8, 8, 8], as `head` writes it, and `tail` behind it."""
    return model_of(
        f"""(float[N,4,8,8] x) => (float[N,4,H,W] y)
        <float[8,4,3,3] w0, float[8] b0, float[4,8,1,1] w1, float[4] b1, float[4,8,1,1] w2, float[4] b2> {{
        {head}
        r = Relu (a)
        {tail} }}""",
        **STORED,
        **stored,
    )


SECOND = "y = Conv (r, w1, b1)"
POOLED = """p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
        pq = QuantizeLinear (p, rs, u) pd = DequantizeLinear (pq, rs, u)
        y = Conv (pd, w1, b1)"""
TWO_READERS = """rq = QuantizeLinear (r, rs, u) rd = DequantizeLinear (rq, rs, u)
        c = Conv (rd, w1, b1) d = Conv (r, w2, b2) y = Add (c, d)"""
BARE = "a = Conv <pads = [1,1,1,1]> (x, w0, b0)"
WEIGHT_CODES = np.random.default_rng(0).integers(-127, 128, (8, 4, 3, 3)).astype(np.int8)

MODELS = {
    "float weights behind Q/DQ": convolutions(
        f"{X} {FLOAT_WEIGHT} a = Conv <pads = [1,1,1,1]> (xd, wd, b0)", SECOND
    ),
    "codes stored": convolutions(
        f"{X} {CODES} a = Conv <pads = [1,1,1,1]> (xd, wd, b0)", SECOND, wc=WEIGHT_CODES
    ),
    "the input alone": convolutions(f"{X} a = Conv <pads = [1,1,1,1]> (xd, w0, b0)", SECOND),
    "a weight alone": convolutions(
        f"{CODES} a = Conv <pads = [1,1,1,1]> (x, wd, b0)", SECOND, wc=WEIGHT_CODES
    ),
    "one of two readers": convolutions(BARE, TWO_READERS),
    "behind a pool": convolutions(BARE, POOLED),
    "before a pool": convolutions(
        f"{X} p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (xd) a = Conv <pads = [1,1,1,1]> (p, w0, b0)",
        SECOND,
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_target = pytest.mark.parametrize("target", ALL)


@pytest.fixture(scope="module")
def held() -> dict[str, Calibrated]:
    return {name: calibrate(model, images(4, 8, 8)) for name, model in MODELS.items()}


def written(held: Calibrated, target: str, folder: Path) -> ModelProto:
    plan = held.plan(target)
    path = folder / "quantized.onnx"
    ir.save(get_emitter(target).emit(held.graph, plan), path)
    assert verify(path, held.graph, plan, held.feeds[0]).plan_sqnr_db > 100
    return onnx.load(path)


def stored(model: ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


@every_target
@every_model
def test_every_pair_of_the_model_is_in_the_file_with_its_numbers(
    name: str, target: str, held: dict[str, Calibrated], tmp_path: Path
) -> None:
    model = written(held[name], target, tmp_path)
    arrays = stored(model)
    readers = {n.output[0]: n for n in model.graph.node}
    for entry in find_quantized(held[name].graph)[0]:
        if target == "ort-qoperator" and entry.stored:
            # There the codes, under the same scales, are an operator's own.
            codes, scale = held[name].graph.node(entry.nodes[0]).inputs[:2]
            assert codes.name in {i for n in model.graph.node for i in n.input}
            np.testing.assert_array_equal(arrays[str(codes.name)], held[name].graph.array(str(codes.name)))
            given = arrays.get(str(scale.name), arrays.get(f"{scale.name}_spread"))
            np.testing.assert_array_equal(given.reshape(-1), entry.qparams.scale)
            continue
        first = held[name].graph.node(entry.nodes[0])
        kept = readers[str(first.outputs[0].name)]
        assert kept.op_type == first.op_type
        assert kept.input[0] == first.inputs[0].name
        scale = arrays[kept.input[1]]
        assert scale.dtype == np.float32
        np.testing.assert_array_equal(scale.reshape(-1), entry.qparams.scale.reshape(-1))
        np.testing.assert_array_equal(arrays[kept.input[2]].reshape(-1), entry.qparams.zero_point.reshape(-1))


@every_target
@every_model
def test_no_tensor_is_rounded_twice(
    name: str, target: str, held: dict[str, Calibrated], tmp_path: Path
) -> None:
    model = written(held[name], target, tmp_path)
    arrays = stored(model)
    makers = {o: n for n in model.graph.node for o in n.output}
    quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert max(Counter(n.input[0] for n in quantizers).values()) == 1
    for node in quantizers:
        before = makers.get(node.input[0])
        while before is not None and before.op_type == "MaxPool":
            before = makers.get(before.input[0])
        if before is not None and before.op_type == "DequantizeLinear":
            # On the same grid nothing is rounded.
            for index in (1, 2):
                np.testing.assert_array_equal(arrays[before.input[index]], arrays[node.input[index]])


@every_target
@every_model
def test_what_is_bare_is_quantized(
    name: str, target: str, held: dict[str, Calibrated], tmp_path: Path
) -> None:
    plan, graph = held[name].plan(target), held[name].graph
    taken = {r for e in find_quantized(graph)[0] for r in e.readers}
    added = {r for w in plan.weights for r in w.readers} | {
        r for a in plan.activations.values() for r in a.readers
    }
    everywhere = {a.name for a in plan.activations.values() if not a.readers}
    for node in graph.model.graph:
        for index in (0, 1) if node.op_type == "Conv" else ():
            reader = str(node.name), index
            planned = reader in added or str(node.inputs[index].name) in everywhere
            assert (reader in taken) + planned == 1


@pytest.mark.parametrize("target", ["ort", "ort-cpu", "ort-qoperator"])
@every_model
def test_integer_biases_have_the_scale_of_the_input_and_weight_that_they_are_added_to(
    name: str, target: str, held: dict[str, Calibrated]
) -> None:
    plan, graph = held[name].plan(target), held[name].graph
    own, planned = kept_scales(graph), {a.name: a for a in plan.activations.values()}
    weights = {r: w for w in plan.weights for r in w.readers}
    for bias in plan.biases:
        x = str(graph.node(bias.reader[0]).inputs[0].name)
        scale = planned[x].static.scale if x in planned else own[x][1].scale
        weight = weights[bias.reader[0], 1]
        np.testing.assert_array_equal(bias.scale, scale * weight.qparams.scale)
    # A bias is added in float only where the model has the weight's codes, or quantizes it, itself.
    assert {b.reader[0] for b in plan.biases} == {node for node, index in weights if index == 1}


def test_another_reader_of_a_tensor_reads_the_models_own_pair(
    held: dict[str, Calibrated], tmp_path: Path
) -> None:
    model = written(held["one of two readers"], "ort", tmp_path)
    readers = [n for n in model.graph.node if n.op_type == "Conv" and n.input[0] == "rd"]
    assert len(readers) == 2


def test_a_convolution_behind_the_models_own_input_is_one_integer_operator(
    held: dict[str, Calibrated], tmp_path: Path
) -> None:
    graph = written(held["behind a pool"], "ort-qoperator", tmp_path).graph
    assert "QLinearConv" in {n.op_type for n in graph.node}


def test_a_scale_of_other_bits_is_not_taken(held: dict[str, Calibrated]) -> None:
    one = held["one of two readers"]
    own = kept_scales(one.graph)
    fp8 = one.plan("ort", "fp8").activations
    assert with_kept_scales(fp8, own) == fp8
    assert with_kept_scales(fp8, {}) == fp8
    int8 = one.plan("ort").activations
    assert int8["r"].static.scale == RS
    np.testing.assert_allclose([int8["r"].range.lo, int8["r"].range.hi], [0, 255 * RS], rtol=1e-6)


def test_a_tensor_whose_channels_were_scaled_has_no_scale_of_the_models(held: dict[str, Calibrated]) -> None:
    one = held["one of two readers"]
    plans, own = one.plan("ort-cpu").activations, kept_scales(one.graph)
    widened = {"r": replace(plans["r"], qparams=plans["x"].qparams)}
    assert with_kept_scales(widened, own, but={"r"}) == widened
    assert with_kept_scales(widened, own)["r"].static.scale == RS


def test_an_export_tells_what_was_quantized_already(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(MODELS["codes stored"], path)
    cache = calibrate_model(path, images(4, 8, 8))
    exported = export_model(path, cache, target="ort-cpu", out=tmp_path / "out.onnx")
    told = exported.to_dict()["already_quantized"]
    assert told.keys() == {"x", "wc"}
    assert told["x"]["scale"] == float(XS)
    assert told["x"]["zero_point"] == 0
    assert told["x"]["role"] == "activation"
    assert told["x"]["format"].startswith("int8")
    assert [index for _, index in told["x"]["readers"]] == [0]
    assert told["wc"]["scale"] == WS.tolist()
    assert told["wc"]["zero_point"] == [0] * 8
    assert {entry.name for entry in exported.kept} == {"x", "wc"}


def test_an_export_of_a_float_model_has_nothing_to_tell(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(convolutions(BARE, SECOND), path)
    exported = export_model(path, calibrate_model(path, images(4, 8, 8)), out=tmp_path / "out.onnx")
    assert exported.kept == ()
    assert exported.to_dict()["already_quantized"] == {}

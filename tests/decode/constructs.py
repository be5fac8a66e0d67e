"""Low-precision constructs in small models: what the tests of decoding start from."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from quantkit.decode import decode
from quantkit.formats import QTensor, QuantSpec, Range, dequantize, qparams_from_range, quantize, range_of
from quantkit.runtime import Session

Array = np.ndarray[Any, Any]
IR_VERSIONS = {17: 8, 19: 9, 21: 10, 23: 11, 24: 12, 25: 13}


def model_of(
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Mapping[str, Sequence[int | str | None]] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 23,
    input_type: int = TensorProto.FLOAT,
    output_type: int = TensorProto.FLOAT,
    **stored: Array,
) -> ir.Model:
    """A model of these nodes; `stored` are the initializers, of any type that ml_dtypes has."""
    graph = helper.make_graph(
        list(nodes),
        "construct",
        [helper.make_tensor_value_info(n, input_type, s) for n, s in (inputs or {}).items()],
        [helper.make_tensor_value_info(n, output_type, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items()],
    )
    domains = sorted({n.domain for n in nodes} - {""})
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    made = helper.make_model(graph, opset_imports=imports)
    made.ir_version = IR_VERSIONS[opset]
    return ir.serde.deserialize_model(made)


def run(model: ir.Model, feeds: Mapping[str, Array] | None = None, *, optimize: bool = False) -> Array:
    """Decode a model, run it, and return its first output."""
    found = Session(decode(model), optimize=optimize, threads=1).run(feeds or {})
    return next(iter(found.values()))


def as_bits(array: Array) -> Array:
    """Floats as integers, so that equality is of bits; −0 counts as 0."""
    flat = np.asarray(array, np.float32) + np.float32(0)
    return flat.view(np.uint32)


def quantized(w: Array, spec: QuantSpec) -> QTensor:
    """Codes of a weight under the scales of its own range."""
    return quantize(w, qparams_from_range(range_of(w, spec), spec), spec)


def values(w: Array, spec: QuantSpec) -> Array:
    """What those codes stand for."""
    return dequantize(quantized(w, spec))


def outliers(*shape: int, seed: int = 0) -> Array:
    """Values of many magnitudes, with zeros among them and a row that is zero altogether."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 6, shape)
    x[rng.random(shape) < 0.05] = 0
    x.reshape(-1, shape[-1])[-1] = 0
    return x.astype(np.float32)


__all__ = ["Range", "as_bits", "ml_dtypes", "model_of", "outliers", "quantized", "run", "values"]

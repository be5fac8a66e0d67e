"""Models, presets and exports that the tests of folders for vLLM share."""

import numpy as np

import quantkit
from tests.models import model_of

K, N = 256, 48
ROWS = np.random.default_rng(1).normal(size=(8, 256)).astype(np.float32)

# Preset with its options → the format of what is stored. One row for every scheme.
PRESETS = {
    "int8": ({"preset": "int8"}, "int-quantized"),
    "int8 per tensor": ({"preset": "int8", "per_tensor": True}, "int-quantized"),
    "int8 weights": ({"preset": "int8", "activations": False}, "pack-quantized"),
    "fp8": ({"preset": "fp8", "everything": True}, "float-quantized"),
    "fp8 per tensor": ({"preset": "fp8", "per_tensor": True, "everything": True}, "float-quantized"),
    "fp8 weights": ({"preset": "fp8", "activations": False, "everything": True}, "float-quantized"),
    "fp8-block": ({"preset": "fp8-block"}, "float-quantized"),
    "int4": ({"preset": "int4", "group": 32}, "pack-quantized"),
    "int4 channel": ({"preset": "int4", "group": "channel"}, "pack-quantized"),
    "int4 zero points": ({"preset": "int4", "group": 16, "symmetric": False}, "pack-quantized"),
    "int4 channel zero points": (
        {"preset": "int4", "group": "channel", "symmetric": False},
        "pack-quantized",
    ),
    "w4a8": ({"preset": "w4a8", "group": 16}, "int-quantized"),
    "w4a8-fp8": ({"preset": "w4a8-fp8", "group": 16}, "pack-quantized"),
    "int2": ({"preset": "int2", "group": 16}, "pack-quantized"),
    "int2 zero points": ({"preset": "int2", "group": 16, "symmetric": False}, "pack-quantized"),
    "nvfp4": ({"preset": "nvfp4"}, "nvfp4-pack-quantized"),
    "nvfp4 activations": ({"preset": "nvfp4", "activations": True}, "nvfp4-pack-quantized"),
    "mxfp4": ({"preset": "mxfp4"}, "mxfp4-pack-quantized"),
    "mxfp4 activations": ({"preset": "mxfp4", "activations": True}, "mxfp4-pack-quantized"),
    "mxfp8": ({"preset": "mxfp8"}, "mxfp8-quantized"),
    "mxfp8 weights": ({"preset": "mxfp8", "activations": False}, "mxfp8-quantized"),
}


def dotted(text):
    """The model of a text whose identifiers have "__" for ".", which that syntax lacks."""
    model = model_of(text)
    for node in model.graph.node:
        node.input[:] = [name.replace("__", ".") for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("__", ".")
    return model


def two_layers():
    return dotted("""(float[B,256] x) => (float[B,32] y)
        <float[256,64] layers__0__up__weight, float[64] layers__0__up__bias, float[32,64] layers__1__weight,
         float[64] scale> {
        h = MatMul (x, layers__0__up__weight)
        s = Add (h, layers__0__up__bias)
        n = Mul (s, scale)
        r = Relu (n)
        y = Gemm <transB = 1> (r, layers__1__weight) }""")


def export(model, folder, cache=None, **options):
    return quantkit.export_model(model, cache, target="vllm", out=folder, **options)


def chain(*names):
    model = dotted("""(float[B,32] x) => (float[B,32] y) <float[32,32] v, float[32,32] w, float[32] norm__weight> {
        h = MatMul (x, v)
        n = Mul (h, norm__weight)
        y = MatMul (n, w) }""")
    model.graph.node[0].name, model.graph.node[2].name = names
    return model

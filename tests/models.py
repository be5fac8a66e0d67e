"""Tiny ONNX models of every awkward kind, in one table: `MODELS[name]`.

Each is a function that returns a ModelProto; its docstring says what is awkward about it. Graphs are written
in ONNX's own text syntax. Weights that are declared without a value are drawn from a seed; inputs are drawn
by their declared types, unless the decorator says how.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper, parser

Array = NDArray[Any]
Feed = dict[str, Array]
Draw = Callable[[np.random.Generator], Array]
Builder = Callable[[], ModelProto]


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A named model and how to feed it.

    `runs` is False where ONNX Runtime takes the model only after it was mended.
    """

    name: str
    about: str
    build: Builder
    draws: Mapping[str, Draw]
    runs: bool

    def feeds(self, count: int = 4, *, seed: int = 0) -> list[Feed]:
        """Return `count` complete feeds (symbolic dimensions are 1), the same ones for the same seed."""
        rng = np.random.default_rng(seed)
        graph = self.build().graph
        stored = {t.name for t in graph.initializer}
        inputs = [i for i in graph.input if i.name not in stored]
        return [{i.name: self.draws.get(i.name, _drawer(i))(rng) for i in inputs} for _ in range(count)]

    def save(self, folder: Path) -> Path:
        """Write the model to `folder/<name>.onnx` and return that path."""
        path = folder / f"{self.name}.onnx"
        onnx.save(self.build(), path)
        return path


MODELS: dict[str, TinyModel] = {}
# Valid, and run by ONNX Runtime, but beyond what quantkit reads.
REFUSED: dict[str, TinyModel] = {}


def tiny(
    *, table: dict[str, TinyModel] = MODELS, runs: bool = True, draws: Mapping[str, Draw] | None = None
) -> Callable[[Builder], Builder]:
    """Enter the decorated builder into the table; `draws` says how to draw the inputs of those names."""

    def enter(build: Builder) -> Builder:
        name = build.__name__
        table[name] = TinyModel(
            name=name, about=build.__doc__ or "", build=build, draws=draws or {}, runs=runs
        )
        return build

    return enter


def save_external(model: ModelProto, path: Path) -> None:
    """Write `model` with every weight in `<path>.data` beside it."""
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        location=f"{path.name}.data",
        size_threshold=0,
        convert_attribute=True,
    )


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Return N(0, 1) values, scaled by 1/√(elements per leading index): layers keep their magnitude."""
    fan_in = max(1, int(np.prod(shape[1:])))
    values: Array = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(fan_in)
    return values.astype(dtype)


def model_of(
    text: str,
    *,
    opset: int = 20,
    ir: int = 9,
    domains: tuple[str, ...] = (),
    functions: str = "",
    **weights: Array,
) -> ModelProto:
    """Return the model of an ONNX text graph `(inputs) => (outputs) <weights> { nodes }`.

    A weight that the text declares without a value is drawn from a seed; `weights` holds the others.
    """
    imports = ", ".join([f'"" : {opset}', *(f'"{d}" : 1' for d in domains)])
    model = parser.parse_model(f"<ir_version: {ir}, opset_import: [{imports}]> tiny {text} {functions}")
    for declared in model.graph.value_info:
        tensor = declared.type.tensor_type
        shape = [d.dim_value for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        weights[declared.name] = normal(*shape, seed=zlib.crc32(declared.name.encode()), dtype=dtype)
    del model.graph.value_info[:]
    model.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    return model


def list_weights_as_inputs(model: ModelProto) -> ModelProto:
    """Return `model` with every initializer among its inputs, as IR version 3 wants it."""
    for weight in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    return model


def _drawer(info: onnx.ValueInfoProto) -> Draw:
    tensor = info.type.tensor_type
    shape = [d.dim_value or 1 for d in tensor.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if dtype == np.bool_:
        return lambda rng: np.asarray(rng.random(shape) < 0.5)
    if np.issubdtype(dtype, np.integer):
        return lambda rng: rng.integers(0, 8, shape).astype(dtype)
    return lambda rng: np.asarray(rng.standard_normal(shape)).astype(dtype)


# --- convolutions -------------------------------------------------------------------------------------------


@tiny()
def conv_relu() -> ModelProto:
    """The plainest case: two convolutions, bias, Relu."""
    return model_of("""(float[N,3,8,8] x) => (float[N,8,8,8] y)
        <float[16,3,3,3] w0, float[16] b0, float[8,16,3,3] w1, float[8] b1> {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)
        r = Relu (a)
        c = Conv <pads = [1,1,1,1]> (r, w1, b1)
        y = Relu (c) }""")


@tiny()
def conv_no_bias() -> ModelProto:
    """Conv with two inputs; nothing behind it but the output."""
    return model_of("(float[N,3,8,8] x) => (float[N,4,6,6] y) <float[4,3,3,3] w> { y = Conv (x, w) }")


@tiny()
def conv_empty_bias() -> ModelProto:
    """Conv whose optional bias is given as the empty name."""
    model = model_of("(float[N,3,8,8] x) => (float[N,4,6,6] y) <float[4,3,3,3] w> { y = Conv (x, w) }")
    model.graph.node[0].input.append("")
    return model


@tiny()
def conv_auto_pad() -> ModelProto:
    """auto_pad, strides, a non-square kernel, and dilations."""
    return model_of("""(float[N,3,9,7] x) => (float[N,4,5,4] y)
        <float[4,3,3,2] w0, float[4,4,1,3] w1, float[4,4,3,1] w2> {
        a = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, w0)
        b = Conv <auto_pad = "SAME_LOWER"> (a, w1)
        y = Conv <dilations = [2,1], pads = [2,0,2,0]> (b, w2) }""")


@tiny()
def conv_depthwise() -> ModelProto:
    """An inverted residual: expand, depthwise, project, with Clip(0, 6)."""
    return model_of("""(float[N,4,8,8] x) => (float[N,4,8,8] y)
        <float[24,4,1,1] w0, float[24] b0, float[24,1,3,3] w1, float[24] b1, float[4,24,1,1] w2,
         float[4] b2, float zero = {0.0}, float six = {6.0}> {
        e = Conv (x, w0, b0)
        e6 = Clip (e, zero, six)
        d = Conv <group = 24, pads = [1,1,1,1]> (e6, w1, b1)
        d6 = Clip (d, zero, six)
        p = Conv (d6, w2, b2)
        y = Add (x, p) }""")


@tiny()
def conv_grouped() -> ModelProto:
    """Three groups, neither dense nor depthwise."""
    return model_of("""(float[N,6,8,8] x) => (float[N,9,6,6] y)
        <float[9,2,3,3] w, float[9] b> {
        y = Conv <group = 3> (x, w, b) }""")


@tiny()
def conv_transpose() -> ModelProto:
    """ConvTranspose keeps its output channels on axis 1 of the weight."""
    return model_of("""(float[N,6,4,4] x) => (float[N,5,9,9] y)
        <float[6,5,3,3] w, float[5] b> {
        y = ConvTranspose <strides = [2,2]> (x, w, b) }""")


@tiny()
def conv_transpose_grouped() -> ModelProto:
    """Axis 1 of a grouped ConvTranspose's weight holds the channels of one group only."""
    return model_of("""(float[N,6,4,4] x) => (float[N,8,6,6] y)
        <float[6,4,3,3] w, float[8] b> {
        y = ConvTranspose <group = 2> (x, w, b) }""")


@tiny()
def conv1d() -> ModelProto:
    """Rank 3."""
    return model_of("""(float[N,4,16] x) => (float[N,6,14] y)
        <float[6,4,3] w, float[6] b> {
        a = Conv (x, w, b) y = Relu (a) }""")


@tiny()
def conv3d() -> ModelProto:
    """Rank 5."""
    return model_of("""(float[N,2,5,5,5] x) => (float[N,3,3,3,3] y)
        <float[3,2,3,3,3] w, float[3] b> {
        y = Conv (x, w, b) }""")


@tiny()
def conv_dynamic_weight() -> ModelProto:
    """The filter is itself an activation."""
    return model_of("""(float[1,3,8,8] x, float[4,3,3,3] filter) => (float[1,4,6,6] y) {
        w = Tanh (filter)
        y = Conv (x, w) }""")


@tiny()
def conv_batchnorm() -> ModelProto:
    """BatchNormalization behind a convolution (folds), and one before (does not: padding is not scaled)."""
    bn = np.linspace(0.5, 1.5, 8, dtype=np.float32)
    return model_of(
        """(float[N,3,8,8] x) => (float[N,8,8,8] y)
        <float[8,3,3,3] w0, float[8,8,3,3] w1> {
        a = Conv <pads = [1,1,1,1]> (x, w0)
        n = BatchNormalization (a, scale, bias, mean, var)
        r = Relu (n)
        m = BatchNormalization (r, scale, bias, mean, var)
        y = Conv <pads = [1,1,1,1]> (m, w1) }""",
        scale=bn,
        bias=bn - 1,
        mean=bn[::-1] - 1,
        var=bn[::-1].copy(),
    )


@tiny()
def identity_chain() -> ModelProto:
    """Identity and inference-mode Dropout between layers, before the output, and on a weight."""
    return model_of("""(float[N,3,8,8] x) => (float[N,4,4,4] y)
        <float[4,3,3,3] w0, float[4] b0, float[4,4,3,3] w1> {
        i = Identity (x)
        w = Identity (w0)
        a = Conv (i, w, b0)
        d = Dropout (a)
        j = Identity (d)
        r = Relu (j)
        k = Identity (r)
        c = Conv (k, w1)
        y = Identity (c) }""")


@tiny()
def pass_through() -> ModelProto:
    """MaxPool, Transpose, Reshape, Flatten and Slice only pass values on: one scale serves them all."""
    return model_of("""(float[N,3,8,8] x) => (float[N,5] y)
        <float[8,3,3,3] w0, float[8] b0, float[6,8,3,3] w1, int64[1] starts = {1}, int64[1] ends = {4},
         int64[1] axes = {2}, int64[3] shape = {0,2,-1}, float[5,72] w2, float[5] b2> {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)
        r = Relu (a)
        p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
        t = Transpose <perm = [0,1,3,2]> (p)
        c = Conv <pads = [1,1,1,1]> (t, w1)
        s = Slice (c, starts, ends, axes)
        q = Reshape (s, shape)
        f = Flatten (q)
        y = Gemm <transB = 1> (f, w2, b2) }""")


@tiny()
def residual_identity() -> ModelProto:
    """The skip branch of the Add is the block's own input."""
    return model_of("""(float[N,3,8,8] x) => (float[N,8,8,8] y)
        <float[8,3,3,3] w0, float[8,8,3,3] w1, float[8,8,3,3] w2, float[8] b> {
        h = Conv <pads = [1,1,1,1]> (x, w0, b)
        s = Relu (h)
        a = Conv <pads = [1,1,1,1]> (s, w1, b)
        r = Relu (a)
        c = Conv <pads = [1,1,1,1]> (r, w2, b)
        z = Add (c, s)
        y = Relu (z) }""")


@tiny()
def residual_downsample() -> ModelProto:
    """Both inputs of the Add are convolutions, the skip branch comes first."""
    return model_of("""(float[N,4,8,8] x) => (float[N,8,4,4] y)
        <float[8,4,1,1] w0, float[8,4,3,3] w1, float[8,8,3,3] w2> {
        d = Conv <strides = [2,2]> (x, w0)
        a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w1)
        r = Relu (a)
        c = Conv <pads = [1,1,1,1]> (r, w2)
        z = Add (d, c)
        y = Relu (z) }""")


@tiny()
def add_to_itself() -> ModelProto:
    """One value is both inputs of an Add, and both inputs of a MatMul."""
    return model_of("""(float[N,4,4] x) => (float[N,4,4] y)
        <float[4,4] w> {
        h = MatMul (x, w)
        d = Add (h, h)
        y = MatMul (d, d) }""")


@tiny()
def concat_branches() -> ModelProto:
    """Concat of branches of very different range, one of them reaching it through a MaxPool."""
    return model_of(
        """(float[N,3,8,8] x) => (float[N,4,8,8] y)
        <float[4,3,3,3] w0, float[4,11,1,1] w2> {
        a = Conv <pads = [1,1,1,1]> (x, w0)
        b = Conv (x, w1)
        p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (x)
        c = Concat <axis = 1> (a, b, p)
        y = Conv (c, w2) }""",
        w1=100 * normal(4, 3, 1, 1),
    )


@tiny()
def silu_squeeze_excite() -> ModelProto:
    """SiLU reads a convolution's output twice; squeeze-and-excitation multiplies it by what it makes of its mean."""
    return model_of("""(float[N,4,8,8] x) => (float[N,4,8,8] y)
        <float[8,4,3,3] w0, float[8] b0, float[2,8,1,1] w1, float[2] b1, float[8,2,1,1] w2, float[8] b2,
         float[4,8,1,1] w3, float[4] b3> {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)
        s = Sigmoid (a)
        h = Mul (a, s)
        m = GlobalAveragePool (h)
        e = Conv (m, w1, b1)
        er = Relu (e)
        g = Conv (er, w2, b2)
        gs = HardSigmoid (g)
        z = Mul (h, gs)
        p = Conv (z, w3, b3)
        y = Add (p, x) }""")


@tiny()
def unet() -> ModelProto:
    """Down and up again: a skip reaches a Concat beside a ConvTranspose, and another beside a Resize."""
    return model_of(
        """(float[N,3,8,8] x) => (float[N,2,8,8] y)
        <float[4,3,3,3] w0, float[4] b0, float[8,4,3,3] w1, float[8] b1, float[8,4,2,2] w2, float[4] b2,
         float[4,8,3,3] w3, float[4] b3, float[2,12,1,1] w4, float[2] b4> {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)
        ar = Relu (a)
        p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (ar)
        c = Conv <pads = [1,1,1,1]> (p, w1, b1)
        cr = Relu (c)
        u = ConvTranspose <strides = [2,2]> (cr, w2, b2)
        j = Concat <axis = 1> (u, ar)
        d = Conv <pads = [1,1,1,1]> (j, w3, b3)
        dr = LeakyRelu (d)
        r = Resize <mode = "nearest"> (cr, , scales)
        k = Concat <axis = 1> (dr, r)
        y = Conv (k, w4, b4) }""",
        scales=np.array([1, 1, 2, 2], np.float32),
    )


@tiny()
def split_pad_shuffle() -> ModelProto:
    """Split, a reflecting Pad, AveragePool and DepthToSpace between convolutions; PRelu behind one."""
    return model_of(
        """(float[N,4,8,8] x) => (float[N,3,8,8] y)
        <float[8,4,3,3] w0, float[8] b0, float[8,1,1] slope, float[4,4,3,3] w1, float[12,4,3,3] w2, float[12] b2> {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)
        r = PRelu (a, slope)
        l, h = Split <axis = 1, num_outputs = 2> (r)
        q = Pad <mode = "reflect"> (l, around)
        c = Conv (q, w1)
        m = Mul (c, h)
        v = AveragePool <kernel_shape = [2,2], strides = [2,2]> (m)
        d = Conv <pads = [1,1,1,1]> (v, w2, b2)
        y = DepthToSpace <blocksize = 2> (d) }""",
        around=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    )


@tiny()
def residual_float_skip() -> ModelProto:
    """The skip of the Add is no convolution's, and a LayerNormalization reads the sum as well as the next block."""
    return model_of(
        """(float[N,4,8,8] x) => (float[N,4,8,8] y)
        <float[4,4,3,3] w0, float[4] b0, float[4,4,3,3] w1, float[8] g, float[8] b> {
        t = Tanh (x)
        c = Conv <pads = [1,1,1,1]> (t, w0, b0)
        s = Add (t, c)
        n = LayerNormalization (s, g, b)
        d = Conv <pads = [1,1,1,1]> (n, w1)
        z = Add (d, s)
        y = Relu (z) }"""
    )


# --- linear layers ------------------------------------------------------------------------------------------


@tiny()
def gemm() -> ModelProto:
    """Gemm with the weight as [K, N]; no bias."""
    return model_of("(float[N,8] x) => (float[N,5] y) <float[8,5] w> { y = Gemm (x, w) }")


@tiny()
def gemm_trans_a() -> ModelProto:
    """The activation comes transposed, so its channels lie on axis 0."""
    return model_of("""(float[8,N] x) => (float[N,5] y)
        <float[8,5] w, float[5] b> {
        y = Gemm <transA = 1> (x, w, b) }""")


@tiny()
def gemm_trans_b() -> ModelProto:
    """The weight as [N, K]: output channels on axis 0."""
    return model_of("""(float[N,8] x) => (float[N,5] y)
        <float[5,8] w, float[5] b> {
        y = Gemm <transB = 1> (x, w, b) }""")


@tiny()
def gemm_alpha_beta() -> ModelProto:
    """alpha, beta, and a bias that is a scalar."""
    return model_of("""(float[N,8] x) => (float[N,5] y)
        <float[5,8] w, float[1] b = {0.75}> {
        y = Gemm <alpha = 0.5, beta = -2.0, transB = 1> (x, w, b) }""")


@tiny()
def gemm_dynamic_bias() -> ModelProto:
    """The bias is an activation of the output's shape."""
    return model_of("(float[N,8] x, float[N,5] c) => (float[N,5] y) <float[8,5] w> { y = Gemm (x, w, c) }")


@tiny()
def matmul() -> ModelProto:
    """MatMul with bias as a separate Add, as exporters write linear layers."""
    return model_of("""(float[N,6,8] x) => (float[N,6,5] y)
        <float[8,5] w, float[5] b> {
        m = MatMul (x, w)
        a = Add (b, m)
        y = Relu (a) }""")


@tiny()
def matmul_weight_left() -> ModelProto:
    """The weight is the first input: its output channels are rows."""
    return model_of("(float[N,8,6] x) => (float[N,5,6] y) <float[5,8] w> { y = MatMul (w, x) }")


@tiny()
def matmul_batched_weight() -> ModelProto:
    """A weight of rank 3: one matrix a head."""
    return model_of("(float[N,3,6,8] x) => (float[N,3,6,5] y) <float[3,8,5] w> { y = MatMul (x, w) }")


@tiny()
def matmul_activations() -> ModelProto:
    """Attention: both inputs of two MatMuls are activations."""
    return model_of("""(float[N,6,8] x) => (float[N,6,8] y)
        <float[8,8] wq, float[8,8] wk, float[8,8] wv> {
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        v = MatMul (x, wv)
        kt = Transpose <perm = [0,2,1]> (k)
        s = MatMul (q, kt)
        p = Softmax <axis = -1> (s)
        y = MatMul (p, v) }""")


@tiny()
def matmul_gemv() -> ModelProto:
    """A weight of one column and a vector input: bound by memory, not worth quantizing."""
    return model_of("""(float[N,6,8] x, float[8] v) => (float[N,6,1] y, float[5] z)
        <float[8,1] w0, float[8,5] w1> {
        y = MatMul (x, w0)
        z = MatMul (v, w1) }""")


@tiny()
def matmul_single_row() -> ModelProto:
    """A static shape that has one row."""
    return model_of("(float[1,8] x) => (float[1,5] y) <float[8,5] w> { y = MatMul (x, w) }")


@tiny()
def layernorm_mlp() -> ModelProto:
    """LayerNormalization, two MatMuls and Gelu of one transformer block."""
    return model_of(
        """(float[N,6,8] x) => (float[N,6,8] y)
        <float[8] b, float[8,32] w0, float[32,8] w1> {
        n = LayerNormalization (x, g, b)
        u = MatMul (n, w0)
        h = Gelu (u)
        d = MatMul (h, w1)
        y = Add (x, d) }""",
        g=np.linspace(0.5, 2, 8, dtype=np.float32),
    )


# --- weights that are not plain initializers ----------------------------------------------------------------


@tiny()
def shared_weight() -> ModelProto:
    """One weight, two convolutions."""
    return model_of("""(float[N,4,8,8] x) => (float[N,4,4,4] y)
        <float[4,4,3,3] w, float[4] b0, float[4] b1> {
        a = Conv (x, w, b0)
        r = Relu (a)
        y = Conv (r, w, b1) }""")


@tiny()
def shared_weight_axes() -> ModelProto:
    """One weight, used with its output channels on axis 1 and on axis 0."""
    return model_of("""(float[N,6] x) => (float[N,6] y)
        <float[6,6] w> {
        h = MatMul (x, w)
        y = Gemm <transB = 1> (h, w) }""")


@tiny()
def shared_bias() -> ModelProto:
    """One bias serves two convolutions whose inputs have different scales."""
    return model_of(
        """(float[N,4,8,8] x) => (float[N,4,4,4] y)
        <float[4,4,3,3] w1, float[4] b> {
        a = Conv (x, w0, b)
        y = Conv (a, w1, b) }""",
        w0=50 * normal(4, 4, 3, 3),
    )


@tiny()
def tied_embedding() -> ModelProto:
    """The table of a Gather is, transposed, the weight of the last MatMul."""
    return model_of("""(int64[N,S] ids) => (float[N,S,8] y)
        <float[8,16] table> {
        h = Gather (table, ids)
        r = Relu (h)
        t = Transpose <perm = [1,0]> (table)
        y = MatMul (r, t) }""")


@tiny()
def constant_weight() -> ModelProto:
    """Weight and bias are Constant nodes."""
    model = model_of("(float[N,8] x) => (float[N,2] y) { y = Gemm (x, w, b) }")
    weights = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(normal(8, 2))),
        helper.make_node("Constant", [], ["b"], value_floats=[0.5, -0.5]),
    ]
    for node in weights:
        model.graph.node.insert(0, node)
    return model


@tiny()
def weight_behind_transpose() -> ModelProto:
    """Stored weights are transposed or reshaped before use, and are larger than constant folding's limit."""
    return model_of("""(float[N,96] x) => (float[N,96] y)
        <float[100,96] w0, float[10,10,96] w1, int64[2] shape = {100,96}> {
        t = Transpose <perm = [1,0]> (w0)
        h = MatMul (x, t)
        r = Relu (h)
        m = Reshape (w1, shape)
        y = MatMul (r, m) }""")


@tiny()
def weight_behind_cast() -> ModelProto:
    """The stored weights are float16 and bfloat16, cast to float before use."""
    return model_of("""(float[N,8] x) => (float[N,4] y)
        <float16[8,8] half, bfloat16[8,4] brain> {
        w0 = Cast <to = 1> (half)
        h = MatMul (x, w0)
        w1 = Cast <to = 1> (brain)
        y = MatMul (h, w1) }""")


@tiny()
def weight_only_quantized() -> ModelProto:
    """The weight is int8 behind a DequantizeLinear already; the activation is float."""
    return model_of(
        """(float[N,8] x) => (float[N,4] y)
        <float[4] s = {0.01,0.02,0.03,0.04}> {
        w = DequantizeLinear <axis = 1> (q, s)
        y = MatMul (x, w) }""",
        q=np.arange(-16, 16, dtype=np.int8).reshape(8, 4),
    )


@tiny()
def initializers_as_inputs() -> ModelProto:
    """IR version 3 lists every initializer among the graph's inputs."""
    return list_weights_as_inputs(
        model_of(
            """(float[N,3,8,8] x) => (float[N,4,6,6] y)
        <float[4,3,3,3] w, float[4] b> {
        y = Conv (x, w, b) }""",
            opset=8,
            ir=3,
        )
    )


@tiny()
def zero_weight_channel() -> ModelProto:
    """One output channel's weights are all zero, with and without a bias."""
    weight = normal(4, 3, 3, 3)
    weight[2] = 0
    return model_of(
        """(float[N,3,8,8] x) => (float[N,4,4,4] y)
        <float[4] b> {
        a = Conv (x, w0, b) y = Conv (a, w1) }""",
        w0=weight,
        w1=np.concatenate([weight, weight[:, :1]], axis=1),
    )


@tiny()
def tiny_weight_channel() -> ModelProto:
    """One channel's weights are subnormal, so a scale made from them would be zero; its bias is not small."""
    weight = normal(4, 3, 3, 3)
    weight[1] *= np.float32(1e-42)
    return model_of("(float[N,3,8,8] x) => (float[N,4,6,6] y) <float[4] b> { y = Conv (x, w, b) }", w=weight)


# --- values -------------------------------------------------------------------------------------------------


@tiny()
def dead_relu() -> ModelProto:
    """A Relu that never lets anything through: the next layer's input is constant zero."""
    return model_of(
        """(float[N,3,8,8] x) => (float[N,4,4,4] y)
        <float[4,3,3,3] w0, float[4,4,3,3] w1, float[4] b1> {
        a = Conv (x, w0, b0)
        r = Relu (a)
        y = Conv (r, w1, b1) }""",
        b0=np.full(4, -1000, np.float32),
    )


@tiny()
def infinite_activation() -> ModelProto:
    """−inf enters a MatMul, and all behind it is finite all the same: exp(log(relu(x)) @ w), w > 0."""
    return model_of(
        """(float[N,4,8] x) => (float[N,4,3] y)
        <float[5,3] w1> {
        r = Relu (x)
        l = Log (r)
        m = MatMul (l, w)
        e = Exp (m)
        y = MatMul (e, w1) }""",
        w=np.abs(normal(8, 5)),
    )


@tiny()
def nan_activation() -> ModelProto:
    """NaN enters a MatMul (the root of a negative number) and is replaced before the next."""
    return model_of("""(float[N,4,8] x) => (float[N,4,3] y)
        <float[8,5] w, float zero = {0.0}, float[5,3] w1> {
        s = Sqrt (x)
        m = MatMul (s, w)
        isnan = IsNaN (m)
        c = Where (isnan, zero, m)
        y = MatMul (c, w1) }""")


def _causal(_: np.random.Generator) -> Array:
    return np.triu(np.full((1, 6, 6), -np.inf, np.float32), k=1)


@tiny(draws={"mask": _causal})
def masked_attention() -> ModelProto:
    """Softmax with a −inf mask that comes in as an input."""
    return model_of("""(float[N,6,8] x, float[N,6,6] mask) => (float[N,6,8] y)
        <float[8,8] wq> {
        q = MatMul (x, wq)
        kt = Transpose <perm = [0,2,1]> (x)
        s = MatMul (q, kt)
        m = Add (s, mask)
        p = Softmax <axis = -1> (m)
        y = MatMul (p, x) }""")


@tiny(draws={"ids": lambda rng: rng.integers(0, 8, (1, 6)), "mask": _causal})
def ids_and_mask() -> ModelProto:
    """int64 ids, a float mask with −inf and a bool, the batch and the sequence dynamic."""
    return model_of("""(int64[N,S] ids, float[N,S,S] mask, bool[N] flip) => (float[N,S,8] y)
        <float[8,16] table, float[16,8] out, int64[3] column = {-1,1,1}> {
        h = Gather (table, ids)
        kt = Transpose <perm = [0,2,1]> (h)
        s = MatMul (h, kt)
        m = Add (s, mask)
        p = Softmax <axis = -1> (m)
        a = MatMul (p, h)
        f = Reshape (flip, column)
        n = Neg (a)
        w = Where (f, n, a)
        y = MatMul (w, out) }""")


# --- names --------------------------------------------------------------------------------------------------


@tiny()
def unnamed_nodes() -> ModelProto:
    """No node has a name."""
    return model_of("""(float[N,8] x) => (float[N,5] y)
        <float[8,8] w0, float[8,5] w1> {
        h = MatMul (x, w0) r = Relu (h) y = MatMul (r, w1) }""")


@tiny(runs=False)
def duplicate_node_names() -> ModelProto:
    """Every node has the same name, which onnx.checker lets pass and ONNX Runtime does not."""
    model = model_of("""(float[N,8] x) => (float[N,5] y)
        <float[8,8] w0, float[8,5] w1> {
        h = MatMul (x, w0) r = Relu (h) y = MatMul (r, w1) }""")
    for node in model.graph.node:
        node.name = "node"
    return model


@tiny()
def odd_names() -> ModelProto:
    """Slashes, colons, a colon with a space, quotes, spaces and letters beyond ASCII."""
    model = intermediate_output()
    names = {
        "x": "модель/вход: 0",
        "w0": "/блок/conv.weight:0",
        "b0": "bias with spaces",
        "r": "../up/one",
        "y": "出力\"'{}%s\\",
    }
    for node in model.graph.node:
        node.name = f"/{node.op_type}::узел {node.output[0]}"
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
    for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        value.name = names.get(value.name, value.name)
    return model


@tiny()
def taken_names() -> ModelProto:
    """The names that a quantizer likes to give are in use already."""
    return model_of("""(float[N,3,8,8] x) => (float[N,4,4,4] y)
        <float[4,3,3,3] w_quantized, float[4] w_zero_point, float[4,4,3,3] w_scale,
         float x_zero_point = {2.0}> {
        x_quantized = Conv (x, w_quantized, w_zero_point)
        x_scale = Relu (x_quantized)
        x_dequantized = Conv (x_scale, w_scale)
        x_DequantizeLinear_Output = Mul (x_dequantized, x_zero_point)
        y = Identity (x_DequantizeLinear_Output) }""")


# --- control flow, functions, other operators ---------------------------------------------------------------


@tiny()
def if_subgraph() -> ModelProto:
    """Both branches hold a MatMul on a value and a weight of the outer graph."""
    return model_of("""(float[N,8] x, bool flag) => (float[N,8] y)
        <float[8,8] w0, float[8,8] w1> {
        h = MatMul (x, w0)
        b = If (flag) <
            then_branch = g1 () => (float[N,8] t) { t = MatMul (h, w1) },
            else_branch = g2 () => (float[N,8] e) { r = Relu (h) e = MatMul (r, w1) }>
        y = MatMul (b, w1) }""")


@tiny()
def loop_subgraph() -> ModelProto:
    """The Loop's body multiplies its state by a weight of the outer graph."""
    return model_of("""(float[N,8] x) => (float[N,8] y)
        <float[8,8] w0, float[8,8] w1, int64 trips = {3}, bool go = {1}> {
        h = MatMul (x, w0)
        z = Loop (trips, go, h) <
            body = g (int64 i, bool c, float[N,8] s) => (bool c_out, float[N,8] s_out) {
                m = MatMul (s, w1)
                s_out = Tanh (m)
                c_out = Identity (c) }>
        y = MatMul (z, w0) }""")


@tiny()
def local_function() -> ModelProto:
    """The layers lie inside a function of the model."""
    return model_of(
        """(float[N,8] x) => (float[N,5] y)
        <float[8,8] w0, float[8] b0, float[8,5] w1, float[5] b1> {
        h = local.linear (x, w0, b0)
        y = local.linear (h, w1, b1) }""",
        ir=10,
        domains=("local",),
        functions="""<domain: "local", opset_import: ["" : 20]>
        linear (x, w, b) => (y) { m = MatMul (x, w) a = Add (m, b) y = Relu (a) }""",
    )


@tiny()
def contrib_operator() -> ModelProto:
    """An operator of ONNX Runtime's own domain between two layers."""
    return model_of(
        """(float[N,8] x) => (float[N,5] y)
        <float[8,8] w0, float[8,5] w1> {
        h = MatMul (x, w0)
        g = com.microsoft.QuickGelu (h)
        y = MatMul (g, w1) }""",
        domains=("com.microsoft",),
    )


@tiny()
def lstm() -> ModelProto:
    """An LSTM, with empty optional inputs and outputs, before a linear layer."""
    return model_of("""(float[6,N,8] x) => (float[6,N,5] y)
        <float[1,16,8] w, float[1,16,4] r, float[1,32] b, int64[1] axis = {1}, float[4,5] out> {
        h, , c = LSTM <hidden_size = 4> (x, w, r, b)
        s = Squeeze (h, axis)
        y = MatMul (s, out) }""")


@tiny()
def already_quantized() -> ModelProto:
    """Q/DQ pairs around the first convolution; the second is float."""
    return model_of(
        """(float[N,3,8,8] x) => (float[N,4,4,4] y)
        <float xs = {0.03}, float[4] ws = {0.001,0.002,0.003,0.004}, float[4,4,3,3] w1> {
        xq = QuantizeLinear (x, xs, xz)
        xd = DequantizeLinear (xq, xs, xz)
        wd = DequantizeLinear <axis = 0> (wq, ws, wz)
        a = Conv (xd, wd)
        r = Relu (a)
        y = Conv (r, w1) }""",
        xz=np.array(0, np.int8),
        wq=np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        wz=np.zeros(4, np.int8),
    )


@tiny()
def quantized_throughout() -> ModelProto:
    """As quantization-aware training leaves it: Q/DQ on every input, float weights among them, one transposed."""
    return model_of(
        """(float[N,8] x) => (float[N,4] y)
        <float xs = {0.03}, float[6] ws = {0.01,0.02,0.03,0.04,0.05,0.06}, float[8,6] w0, float rs = {0.02},
         float vs = {0.01}> {
        xq = QuantizeLinear (x, xs, z)
        xd = DequantizeLinear (xq, xs, z)
        wq = QuantizeLinear <axis = 1> (w0, ws, wz)
        wd = DequantizeLinear <axis = 1> (wq, ws, wz)
        a = MatMul (xd, wd)
        r = Relu (a)
        rq = QuantizeLinear (r, rs, u)
        rd = DequantizeLinear (rq, rs, u)
        vd = DequantizeLinear (vq, vs)
        vt = Transpose <perm = [1, 0]> (vd)
        bd = DequantizeLinear (bq, bs)
        y = Gemm (rd, vt, bd) }""",
        z=np.array(0, np.int8),
        u=np.array(3, np.uint8),
        wz=np.zeros(6, np.int8),
        vq=np.random.default_rng(0).integers(-127, 128, (4, 6)).astype(np.int8),
        bq=np.array([100, -2000, 30, 4], np.int32),
        bs=np.array(0.0002, np.float32),
    )


@tiny()
def clip_without_min() -> ModelProto:
    """Clip with its minimum left empty, and one with neither bound."""
    return model_of("""(float[N,3,8,8] x) => (float[N,4,4,4] y)
        <float[4,3,3,3] w0, float six = {6.0}, float[4,4,3,3] w1> {
        a = Conv (x, w0)
        c = Clip (a, , six)
        d = Clip (c)
        y = Conv (d, w1) }""")


@tiny()
def nothing_to_quantize() -> ModelProto:
    """Not one Conv, MatMul or Gemm."""
    return model_of("(float[N,8] x) => (float[N,8] y) { r = Relu (x) y = Softmax (r) }")


@tiny()
def empty_graph() -> ModelProto:
    """One Identity, which cleaning takes away."""
    return model_of("(float[N,8] x) => (float[N,8] y) { y = Identity (x) }")


# --- inputs and outputs -------------------------------------------------------------------------------------


@tiny()
def scalar_input() -> ModelProto:
    """A second input of rank 0."""
    return model_of("""(float[N,8] x, float temperature) => (float[N,5] y)
        <float[8,5] w> {
        m = MatMul (x, w) y = Mul (m, temperature) }""")


@tiny()
def fixed_batch() -> ModelProto:
    """The batch is 4 and nothing else."""
    return model_of("""(float[4,3,8,8] x) => (float[4,4,6,6] y)
        <float[4,3,3,3] w, float[4] b> {
        y = Conv (x, w, b) }""")


def _image(rng: np.random.Generator) -> Array:
    height, width = rng.integers(8, 17, 2)
    return rng.standard_normal((1, 3, height, width)).astype(np.float32)


@tiny(draws={"x": _image})
def dynamic_axes() -> ModelProto:
    """Height and width differ from sample to sample."""
    return model_of("""(float[N,3,H,W] x) => (float[N,5] y)
        <float[6,3,3,3] w0, float[6] b0, float[5,6] w1> {
        a = Conv (x, w0, b0)
        r = Relu (a)
        p = GlobalAveragePool (r)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, w1) }""")


@tiny()
def state() -> ModelProto:
    """A recurrent state without a batch axis goes in and comes out."""
    return model_of("""(float[N,8] x, float[2,8] state) => (float[N,5] y, float[2,8] next_state)
        <float[8,8] w0, float[8,5] w1, int64[1] axis = {0}> {
        s = MatMul (state, w0)
        next_state = Tanh (s)
        m = ReduceMean <keepdims = 0> (next_state, axis)
        h = Add (x, m)
        y = MatMul (h, w1) }""")


@tiny()
def intermediate_output() -> ModelProto:
    """One output is the Relu in the middle, which the next layer reads too."""
    return model_of("""(float[N,3,8,8] x) => (float[N,4,4,4] y, float[N,4,6,6] r)
        <float[4,3,3,3] w0, float[4] b0, float[4,4,3,3] w1> {
        a = Conv (x, w0, b0)
        r = Relu (a)
        y = Conv (r, w1) }""")


@tiny()
def input_as_output() -> ModelProto:
    """One input is handed out again untouched, and is read by a layer."""
    return model_of("(float[N,8] x) => (float[N,5] y, float[N,8] x) <float[8,5] w> { y = MatMul (x, w) }")


@tiny()
def initializer_as_output() -> ModelProto:
    """A weight is also an output."""
    return model_of("(float[N,8] x) => (float[N,5] y, float[8,5] w) <float[8,5] w> { y = MatMul (x, w) }")


@tiny()
def unused_input() -> ModelProto:
    """One input is read by nobody."""
    return model_of("(float[N,8] x, float[N,2] spare) => (float[N,5] y) <float[8,5] w> { y = MatMul (x, w) }")


@tiny()
def unused_output() -> ModelProto:
    """A layer whose result nobody reads, and a dead one behind it."""
    return model_of("""(float[N,8] x) => (float[N,5] y)
        <float[8,5] w> {
        y = MatMul (x, w) d = MatMul (x, w) e = Relu (d) }""")


@tiny()
def uint8_input() -> ModelProto:
    """Raw pixels come in; the model scales them."""
    return model_of(
        """(uint8[N,3,8,8] x) => (float[N,4,6,6] y)
        <float[4,3,3,3] w> {
        f = Cast <to = 1> (x)
        s = Mul (f, k)
        y = Conv (s, w) }""",
        k=np.array(1 / 255, np.float32),
    )


# --- types and opsets ---------------------------------------------------------------------------------------


@tiny()
def fp16() -> ModelProto:
    """Input, weights and output are float16."""
    return model_of("""(float16[N,3,8,8] x) => (float16[N,4,4,4] y)
        <float16[4,3,3,3] w0, float16[4] b0, float16[4,4,3,3] w1> {
        a = Conv (x, w0, b0)
        r = Relu (a)
        y = Conv (r, w1) }""")


@tiny()
def fp16_inside() -> ModelProto:
    """float32 at the door, float16 within."""
    return model_of("""(float[N,8] x) => (float[N,5] y)
        <float16[8,5] w> {
        h = Cast <to = 10> (x)
        m = MatMul (h, w)
        y = Cast <to = 1> (m) }""")


@tiny()
def float64() -> ModelProto:
    """Double precision throughout."""
    return model_of("(double[N,8] x) => (double[N,5] y) <double[8,5] w> { m = MatMul (x, w) y = Relu (m) }")


@tiny()
def opset8() -> ModelProto:
    """Clip with attributes, BatchNormalization of version 7, Dropout of version 7; IR 3."""
    ones = np.ones(4, np.float32)
    return list_weights_as_inputs(
        model_of(
            """(float[N,3,8,8] x) => (float[N,4,4,4] y)
        <float[4,3,3,3] w0, float[4,4,3,3] w1> {
        a = Conv (x, w0)
        n = BatchNormalization (a, one, one, one, one)
        c = Clip <min = 0.0, max = 6.0> (n)
        d = Dropout <ratio = 0.5> (c)
        y = Conv (d, w1) }""",
            opset=8,
            ir=3,
            one=ones,
        )
    )


@tiny()
def opset9() -> ModelProto:
    """Slice, Unsqueeze and ReduceMean with attributes, Gemm whose bias is obligatory; IR 4."""
    return model_of(
        """(float[N,8] x) => (float[N,1,5] y)
        <float[5,6] w, float[5] b> {
        s = Slice <axes = [1], starts = [1], ends = [7]> (x)
        g = Gemm <transB = 1> (s, w, b)
        y = Unsqueeze <axes = [1]> (g) }""",
        opset=9,
        ir=4,
    )


@tiny()
def opset11() -> ModelProto:
    """Clip with inputs, Squeeze with attributes, Softmax that flattens to two axes."""
    return model_of(
        """(float[N,4,8] x) => (float[N,4,5] y)
        <float[8,5] w, float zero = {0.0}> {
        u = Unsqueeze <axes = [1]> (x)
        m = MatMul (u, w)
        q = Squeeze <axes = [1]> (m)
        c = Clip (q, zero)
        y = Softmax <axis = 2> (c) }""",
        opset=11,
        ir=6,
    )


@tiny()
def opset13() -> ModelProto:
    """QuantizeLinear's first per-axis version, before int4, fp8 and blocks existed."""
    return model_of(
        """(float[N,3,8,8] x) => (float[N,4,6,6] y)
        <float[4,3,3,3] w, float[4] b> {
        a = Conv (x, w, b) y = Relu (a) }""",
        opset=13,
        ir=7,
    )


@tiny(table=REFUSED)
def opset24() -> ModelProto:
    """Newer than anything that quantkit emits."""
    return model_of("(float[N,8] x) => (float[N,5] y) <float[8,5] w> { y = MatMul (x, w) }", opset=24, ir=10)


def external_weights(path: Path) -> None:
    """Write the model `conv_relu` to `path` with its weights in a second file."""
    save_external(MODELS["conv_relu"].build(), path)

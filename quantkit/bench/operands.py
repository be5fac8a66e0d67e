"""What a product is run on: codes of a layer's real weight and of its captured activations, in the format asked for."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.bench.feeding import Captured
from quantkit.bench.layers import Layer
from quantkit.formats import (
    FP4_E2M1,
    FP8_E4M3,
    INT8,
    QParams,
    QTensor,
    dynamic_qparams,
    qparams_from_range,
    quantize,
    range_of,
)
from quantkit.formats.layout import scale_shape
from quantkit.formats.presets import ACTIVATION_SPECS, weight_spec
from quantkit.formats.spec import QuantSpec
from quantkit.kernels.family import Operands
from quantkit.kernels.w4.layout import two_levels
from quantkit.kernels.work import FORMATS, Work
from quantkit.statistics import FloatHistogram

# Rows of activations that are kept of a layer; more rows of a product repeat them.
ROWS = 512

# Which preset stores the weight, by the format of a product.
_WEIGHTS = {
    "fp8-block": "fp8-block",
    "w8a16": "int8",
    "mxfp4-fp8": "mxfp4",
    "mxfp4-fp4": "mxfp4",
    "nvfp4-fp4": "nvfp4",
}
_ACTIVATIONS = {"int8": INT8, "e4m3": FP8_E4M3, "e2m1": FP4_E2M1}
# Whose scales are small whole multiples of one number a row, as files have none.
_TWO_LEVELS = ("w4a8",)
# Formats whose activations have scales in blocks, and the preset that says which.
_IN_BLOCKS = {"fp8-block": "fp8-block", "mxfp8": "mxfp8", "mxfp4-fp4": "mxfp4", "nvfp4-fp4": "nvfp4"}


def operands_of(work: Work, layer: Layer, captured: Captured) -> Operands:
    """Return the operands of a layer's product, in the work's format.

    A weight that the file holds in that format is taken as it lies there, with its scales; so is the scale of its
    activations. Others are quantized here: weights by the largest magnitude of a row or block, activations by theirs.
    """
    limit = min(work.m, ROWS)
    name = layer.activations.tensor
    read = [t for t in (name, layer.weights.tensor) if t]
    real = all(t in captured.tensors for t in read) and all(_finite(captured.tensors[t]) for t in read)
    if real:
        rows, origin = layer.activation_rows(captured.tensors[name], limit), captured.origin
    elif name in captured.histograms and captured.histograms[name].finite_count:
        rows, origin = drawn(captured.histograms[name], limit, work.k), "drawn from the cache's histograms"
    else:
        rows, origin = _random(limit, work.k), "random numbers"
    stored = layer.format == work.format
    weight: QTensor | NDArray[Any]
    codes = layer.code_matrix() if stored else None
    blocks = _held_in_blocks(layer, work) if stored else None
    if codes is not None:
        weight = _held(*codes)
    elif blocks is not None:
        weight = blocks
    elif layer.is_constant or real:
        weight = _quantized(layer.weight_matrix(captured.tensors), work)
    else:
        weight = _quantized(_random(work.n, work.k), work)
    scale = layer.activations.scale if stored else None
    activations, params = _activation_codes(rows, work, scale)
    return Operands(
        activations=activations,
        scale=None if params is None else params.scale,
        weight=weight,
        bias=layer.bias,
        origin=origin,
        block=_block(work),
        global_scale=None if params is None else params.global_scale,
    )


def _finite(x: NDArray[Any]) -> bool:
    """Whether a captured tensor has a range to be quantized in."""
    return x.dtype.kind in "iub" or bool(np.isfinite(x.astype(np.float32)).all())


def random_operands(work: Work) -> Operands:
    """Return operands of normal random numbers: kernels run slower on them than on zeros, as on real data."""
    activations, params = _activation_codes(_random(min(work.m, ROWS), work.k), work, None)
    return Operands(
        activations=activations,
        scale=None if params is None else params.scale,
        weight=_quantized(_random(work.n, work.k), work),
        bias=np.ones(work.n, np.float32) if work.bias else None,
        origin="random numbers",
        block=_block(work),
        global_scale=None if params is None else params.global_scale,
    )


def exact_operands(work: Work, seed: int = 0) -> Operands:
    """Return operands of small whole numbers and scales that are powers of two: D has one right answer, bit for bit.

    Codes lie in −4 … 4, which every format of four bits holds; sums stay exact in whatever a tensor core adds in.
    """
    rng = np.random.default_rng([seed, work.m, work.n, work.k])
    fmt = FORMATS[work.format]

    def codes(rows: int, dtype: Any) -> NDArray[Any]:
        whole = np.arange(-4, 5, dtype=np.float32)
        return rng.choice(whole if np.dtype(dtype).name != "int2" else whole[2:6], (rows, work.k)).astype(
            dtype
        )

    block = _block(work)
    # Where every block of a sum has scales of its own, on both sides, sums have room for fewer bits of each.
    low, high = (-3, 3) if block is None else (-2, 2)

    def powers(shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.ldexp(np.float32(1), rng.integers(low, high, shape)).astype(np.float32)

    held = _ACTIVATIONS.get(fmt.activations)
    bias = rng.integers(-8, 9, work.n).astype(np.float32) if work.bias else None
    activations = codes(work.m, ml_dtypes.bfloat16 if held is None else held.dtype)
    scale = None if held is None else powers((1,) if block is None else (work.m, -(-work.k // block)))
    if work.format == "bf16":
        return Operands(
            activations=activations, scale=None, weight=codes(work.n, ml_dtypes.bfloat16), bias=bias
        )
    spec = _weight_spec(work)
    weight = codes(work.n, spec.format.dtype)
    scales = _held_scale(powers(scale_shape((work.n, work.k), spec)), work)
    zero = np.zeros(scales.shape, spec.format.dtype) if spec.format.kind == "integer" else None
    shared = np.asarray(0.5, np.float32) if spec.has_global_scale else None
    params = QParams(scales, zero, shared)
    return Operands(
        activations=activations,
        scale=scale,
        weight=QTensor(weight, params, spec),
        bias=bias,
        block=block,
        global_scale=shared if held == FP4_E2M1 else None,
    )


def drawn(histogram: FloatHistogram, rows: int, k: int) -> NDArray[np.float32]:
    """Return values [rows, k] drawn from a histogram, each evenly within its bin."""
    rng = np.random.default_rng(0)
    bins = histogram.bins()
    upto = np.cumsum(bins.counts)
    index = np.searchsorted(upto, rng.random((rows, k)) * upto[-1], side="right")
    low, high = bins.edges[index], bins.edges[index + 1]
    x: NDArray[np.float32] = (low + rng.random((rows, k)) * (high - low)).astype(np.float32)
    return x


def _block(work: Work) -> int | None:
    """Activations along K that share a scale."""
    preset = _IN_BLOCKS.get(work.format)
    return None if preset is None else ACTIVATION_SPECS[preset].block_size


def _activation_codes(
    rows: NDArray[np.float32], work: Work, scale: NDArray[np.float32] | None
) -> tuple[NDArray[Any], QParams | None]:
    if work.format in _IN_BLOCKS:
        blocks = ACTIVATION_SPECS[_IN_BLOCKS[work.format]]
        found = quantize(rows, dynamic_qparams(rows, blocks), blocks)
        return found.qvalue, found.qparams
    fmt = _ACTIVATIONS.get(FORMATS[work.format].activations)
    if fmt is None:
        return rows.astype(ml_dtypes.bfloat16), None
    spec = QuantSpec(format=fmt)
    params = qparams_from_range(range_of(rows, spec), spec)
    if scale is not None:
        params = QParams(scale.reshape(()).astype(np.float32), params.zero_point)
    return quantize(rows, params, spec).qvalue, QParams(params.scale.reshape(1), params.zero_point)


def _quantized(weight: NDArray[np.float32], work: Work) -> QTensor | NDArray[Any]:
    if work.format == "bf16":
        return weight.astype(ml_dtypes.bfloat16)
    spec = _weight_spec(work)
    # Scales of groups are stored in as many bits as the format's bytes are counted with.
    dtype = np.dtype(ml_dtypes.bfloat16) if FORMATS[work.format].scale_bits == 16 else None
    params = qparams_from_range(range_of(weight, spec), spec, scale_dtype=dtype)
    return quantize(
        weight, QParams(_held_scale(params.scale, work), params.zero_point, params.global_scale), spec
    )


def _held_scale(scale: NDArray[np.float32], work: Work) -> NDArray[np.float32]:
    """Return scales that the format can hold: of int4 by int8, small whole multiples of one number a row."""
    return two_levels(scale) if work.format in _TWO_LEVELS else scale


def _weight_spec(work: Work) -> QuantSpec:
    preset = _WEIGHTS.get(work.format, work.format)
    own = FORMATS[work.format].group
    size = (
        work.group if own is not None and work.group != own and not preset.startswith(("mx", "nv")) else None
    )
    return weight_spec(preset, channel_axis=0, contraction_axis=1, block_size=size)


def _held(codes: NDArray[Any], scale: NDArray[np.float32]) -> QTensor:
    """Codes as the file holds them."""
    fmt = INT8 if codes.dtype == np.int8 else FP8_E4M3
    spec = QuantSpec(format=fmt, axis=None if scale.size == 1 else 0)
    held = scale.reshape(()) if scale.size == 1 else scale
    zero = np.zeros(held.shape, fmt.dtype) if fmt.kind == "integer" else None
    return QTensor(codes, QParams(held, zero), spec)


def _held_in_blocks(layer: Layer, work: Work) -> QTensor | None:
    """A weight in blocks as the file holds it; None where kernels would not take it so."""
    found = layer.block_matrix()
    if found is None or work.format in _TWO_LEVELS:
        return None
    (codes, scale), spec = found, _weight_spec(work)
    shared = None
    if spec.block_shape is not None:
        height = spec.block_shape[0]
        tiles = scale[::height]
        if not np.array_equal(np.repeat(tiles, height, axis=0)[: len(scale)], scale):
            return None
        scale = tiles
    elif spec.block_size != layer.weights.block_size:
        return None
    if spec.has_global_scale:
        shared = layer.weights.global_scale
        if shared is None:
            return None
        shared = shared.astype(np.float32).reshape(())
        scale = (scale / shared).astype(ml_dtypes.float8_e4m3fn)
    elif FORMATS[work.format].scale_bits == 16:
        scale = scale.astype(ml_dtypes.bfloat16)
    scale = np.ascontiguousarray(scale.astype(np.float32))
    zero = np.zeros(scale.shape, spec.format.dtype) if spec.format.kind == "integer" else None
    return QTensor(codes.astype(spec.format.dtype), QParams(scale, zero, shared), spec)


def _random(rows: int, k: int) -> NDArray[np.float32]:
    """Normal numbers; of many rows a block is drawn and repeated, which no kernel can tell."""
    rng = np.random.default_rng(rows + k)
    few = max(1, min(rows, (1 << 22) // k))
    return np.resize(rng.standard_normal((few, k), np.float32), (rows, k))

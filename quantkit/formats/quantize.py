"""Values to codes, and the way back."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import SpecError
from quantkit.formats.layout import check_scales, slabs, spread
from quantkit.formats.qparams import QParams
from quantkit.formats.spec import QuantSpec


@dataclass(frozen=True)
class QTensor:
    """Codes and what they mean."""

    qvalue: NDArray[np.generic]
    qparams: QParams
    spec: QuantSpec


def quantize(x: NDArray[np.floating], qparams: QParams, spec: QuantSpec) -> QTensor:
    """Return the codes nearest to `x`.

    q = clip(round_half_even(x / scale) + zero_point, min, max), in float32 as ONNX's QuantizeLinear computes it,
    with the scale as it is stored, rounded, and times `global_scale` where there is one. Float formats are clipped
    first: a cast beyond their maximum would give NaN.

    Raises:
        SpecError: `x` does not fit the scales' shape.
    """
    fmt, scale = spec.format, qparams.effective_scale
    check_scales(scale, x.shape, spec)
    zero = None
    if fmt.kind == "integer":
        if qparams.zero_point is None:
            raise SpecError(
                f"{fmt.name}: an integer format needs a zero point; give 0 where it is symmetric."
            )
        check_scales(qparams.zero_point, x.shape, spec)
        zero = qparams.zero_point.astype(np.float32)
    codes = np.empty(x.shape, fmt.dtype)
    for rows, blocks in slabs(x.shape, spec):
        part = np.asarray(x[rows], np.float32)
        with np.errstate(over="ignore"):
            ratio = part / spread(scale[blocks], part.shape, spec)
        if zero is not None:
            ratio = np.rint(ratio) + spread(zero[blocks], part.shape, spec)
        codes[rows] = np.clip(ratio, fmt.min, fmt.max).astype(fmt.dtype)
    return QTensor(codes, qparams, spec)


def dequantize(qt: QTensor) -> NDArray[np.float32]:
    """Return the float32 values that `qt` stands for.

    x[i] = (qvalue[i] − zero_point) · scale, with scale repeated block_size times along axis.
    """
    shape, spec, scale = qt.qvalue.shape, qt.spec, qt.qparams.effective_scale
    check_scales(scale, shape, spec)
    zero = None if qt.qparams.zero_point is None else qt.qparams.zero_point.astype(np.float32)
    values = np.empty(shape, np.float32)
    for rows, blocks in slabs(shape, spec):
        part = np.asarray(qt.qvalue[rows], np.float32)
        if zero is not None:
            part = part - spread(zero[blocks], part.shape, spec)
        values[rows] = part * spread(scale[blocks], part.shape, spec)
    return values


def fake_quantize(x: NDArray[np.floating], qparams: QParams, spec: QuantSpec) -> NDArray[np.float32]:
    """Return `x` as it is after quantize and dequantize, float32."""
    return dequantize(quantize(x, qparams, spec))

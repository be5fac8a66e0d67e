"""Number formats: what a stored code means, and the three pure steps from range to codes and back.

Range(lo, hi) → QParams(scale, zero_point) → QTensor(qvalue, qparams, spec) → float32
"""

from quantkit.formats.format import (
    FP8_E4M3,
    FP8_E5M2,
    INT8,
    INT16,
    UINT8,
    UINT16,
    Format,
    get_format,
    list_formats,
)
from quantkit.formats.quantize import (
    QParams,
    QTensor,
    Range,
    dequantize,
    fake_quantize,
    qparams_from_range,
    quantize,
)
from quantkit.formats.spec import QuantSpec

__all__ = [
    "FP8_E4M3",
    "FP8_E5M2",
    "INT8",
    "INT16",
    "UINT8",
    "UINT16",
    "Format",
    "QParams",
    "QTensor",
    "QuantSpec",
    "Range",
    "dequantize",
    "fake_quantize",
    "get_format",
    "list_formats",
    "qparams_from_range",
    "quantize",
]

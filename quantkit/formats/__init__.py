"""Number formats: what a stored code means, and the three pure steps from range to codes and back.

Range(lo, hi) → QParams(scale, zero_point, global_scale) → QTensor(qvalue, qparams, spec) → float32
"""

from quantkit.formats.format import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    INT2,
    INT3,
    INT4,
    INT8,
    INT16,
    UINT2,
    UINT3,
    UINT4,
    UINT8,
    UINT16,
    Format,
    get_format,
    list_formats,
)
from quantkit.formats.layout import scale_shape, size_bytes
from quantkit.formats.qparams import QParams, Range, dynamic_qparams, qparams_from_range, range_of
from quantkit.formats.quantize import QTensor, dequantize, fake_quantize, quantize
from quantkit.formats.spec import QuantSpec, ScaleRule

__all__ = [
    "E8M0",
    "FP4_E2M1",
    "FP8_E4M3",
    "FP8_E5M2",
    "INT2",
    "INT3",
    "INT4",
    "INT8",
    "INT16",
    "UINT2",
    "UINT3",
    "UINT4",
    "UINT8",
    "UINT16",
    "Format",
    "QParams",
    "QTensor",
    "QuantSpec",
    "Range",
    "ScaleRule",
    "dequantize",
    "dynamic_qparams",
    "fake_quantize",
    "get_format",
    "list_formats",
    "qparams_from_range",
    "quantize",
    "range_of",
    "scale_shape",
    "size_bytes",
]

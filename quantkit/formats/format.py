"""Element types: the numbers that a code of so many bits can stand for."""

from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.plugins import Registry


@dataclass(frozen=True, kw_only=True)
class Format:
    """An element type.

    Attributes:
        name: the name it is registered under.
        bits: bits that a stored code takes.
        min: smallest finite value.
        max: largest finite value.
        dtype: the NumPy dtype that holds the codes, a byte or more each (ml_dtypes for what NumPy lacks).
        kind: "integer" codes are evenly spaced and can have a zero point; "float" codes are not and cannot.
    """

    name: str
    bits: int
    min: float
    max: float
    dtype: np.dtype = field(repr=False)
    kind: Literal["integer", "float"]

    @property
    def symmetric_max(self) -> float:
        """The code that amax maps to when zero lies on the middle code.

        127 for int8 and for uint8 (whose middle is 128), so −128 is never asked for (arXiv 2004.09602, section 3.1.1).
        """
        if self.kind == "float":
            return self.max
        return float(2 ** (self.bits - 1) - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric quantization: 0, or the middle code of an unsigned integer."""
        return 0 if self.kind == "float" or self.min < 0 else 2 ** (self.bits - 1)

    def codes(self) -> NDArray[np.generic]:
        """Every finite code in ascending order of its value, shape (n,), of `dtype`. For types of up to 16 bits."""
        if self.kind == "integer":
            return np.arange(int(self.min), int(self.max) + 1).astype(self.dtype)
        raw = np.arange(2**self.bits, dtype=np.uint8).view(self.dtype)
        values = raw.astype(np.float32)
        finite = raw[np.isfinite(values)]
        return finite[np.argsort(finite.astype(np.float32), kind="stable")]

    def magnitudes(self) -> NDArray[np.float64]:
        """The values ≥ 0 that a symmetric quantization can take, ascending, in units of the scale, shape (n,)."""
        if self.kind == "integer":
            return np.arange(self.symmetric_max + 1, dtype=np.float64)
        return np.unique(np.abs(self.codes().astype(np.float64)))


def _float(name: str, dtype: type) -> Format:
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return Format(
        name=name,
        bits=int(info.bits),
        min=float(info.min),
        max=float(info.max),
        dtype=np.dtype(dtype),
        kind="float",
    )


def _integer(name: str, dtype: type, bits: int | None = None) -> Format:
    info: Any = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    # Of a narrower integer only the middle of its dtype's codes is used.
    dropped = 0 if bits is None else int(info.bits) - bits
    return Format(
        name=name,
        bits=int(info.bits) - dropped,
        min=float(int(info.min) >> dropped),
        max=float(int(info.max) >> dropped),
        dtype=np.dtype(dtype),
        kind="integer",
    )


INT8 = _integer("int8", np.int8)
UINT8 = _integer("uint8", np.uint8)
INT16 = _integer("int16", np.int16)
UINT16 = _integer("uint16", np.uint16)
INT4 = _integer("int4", ml_dtypes.int4)
UINT4 = _integer("uint4", ml_dtypes.uint4)
# No file format has an element type of 3 bits: the codes lie in bytes until they are packed.
INT3 = _integer("int3", np.int8, bits=3)
UINT3 = _integer("uint3", np.uint8, bits=3)
INT2 = _integer("int2", ml_dtypes.int2)
UINT2 = _integer("uint2", ml_dtypes.uint2)
FP8_E4M3 = _float("fp8_e4m3", ml_dtypes.float8_e4m3fn)
FP8_E5M2 = _float("fp8_e5m2", ml_dtypes.float8_e5m2)
FP4_E2M1 = _float("fp4_e2m1", ml_dtypes.float4_e2m1fn)
# Powers of two without zero and without sign: a type for scales (OCP Microscaling Formats v1.0, section 5.4.1).
E8M0 = _float("e8m0", ml_dtypes.float8_e8m0fnu)

_REGISTRY: Registry[Format] = Registry(
    group="quantkit.formats",
    noun="format",
    builtin={
        f.name: f
        for f in (
            *(INT8, UINT8, INT16, UINT16, INT4, UINT4, INT3, UINT3, INT2, UINT2),
            *(FP8_E4M3, FP8_E5M2, FP4_E2M1, E8M0),
        )
    },
    check=lambda loaded: (
        "" if isinstance(loaded, Format) else f"is of type {type(loaded).__name__}, no Format"
    ),
)


def get_format(name: str) -> Format:
    """Return the format registered as `name`, built in or a plug-in's.

    Raises:
        UnknownNameError: nobody has registered it; the message gives the nearest names.
    """
    return _REGISTRY.get(name)


def list_formats() -> dict[str, str]:
    """Return every registered format's name, with "" or the error that keeps its plug-in from loading."""
    return _REGISTRY.status()

"""AIMET's encodings: JSON of what each tensor's quantizer was set to.

    0.6.1   {"activation_encodings": {name: [{"bitwidth", "dtype": "int", "is_symmetric": "True", "min", "max",
            "offset", "scale"}]}, "param_encodings": {…}}
    1.0.0   {"activation_encodings": [{"name", "bw", "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym",
            "scale": [s], "offset": [o]}], "param_encodings": […]}
    2.0.0   {"encodings": [{"name", "output_dtype": "int8", "y_scale", "y_zero_point"}]}, weights and activations alike

In the first two x = (q + offset) · scale with unsigned codes q, whether symmetric or not: offset is −128 where int8 is
symmetric. In the third y_zero_point is ONNX's. Files before 0.6.1 have its shape, without a dtype.

Source: AIMET's encoding format specification, https://quic.github.io/aimet-pages, and aimet_onnx.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeGuard

from quantkit import __version__
from quantkit.errors import CacheError
from quantkit.formats import UINT8, QuantSpec, Range, qparams_from_range
from quantkit.interchange.table import RangeTable, int8_scale, range_of_scale

Version = Literal["0.6.1", "1.0.0"]

_OTHERS = (
    "not encodings of AIMET by tensor name; export them with the ONNX model (0.6.1, 1.0.0 and 2.0.0 are read)"
)
_PER_CHANNEL = "a range per channel there; activations have one"
_UINT8 = QuantSpec(format=UINT8, symmetric=False)


def read_aimet(document: Any, what: str) -> RangeTable:
    """Return the ranges of the activations in a parsed encodings file.

    A symmetric encoding of b bits is taken as ±(2^(b−1) − 1) · scale, so that int8 has the very scale that the file
    gives; any other as [min, max]. Weights' encodings are left out: quantkit knows weights whole, and solves its own.

    Raises:
        CacheError: not such a file, or an encoding that means nothing; says which.
    """
    if not isinstance(document, dict):
        raise CacheError(f"{what}: {_OTHERS}.")
    version = str(document.get("version", "0.4.0"))
    ranges: dict[str, Range] = {}
    left_out: dict[str, str] = {}
    for name, encoding, is_weight in _entries(document, what):
        found = "a weight's encoding" if is_weight else _range(encoding, f"{what}: tensor {name}")
        if isinstance(found, str):
            left_out[name] = found
        else:
            ranges[name] = found
    if not ranges and not left_out:
        raise CacheError(f"{what}: encodings without a single tensor; export them again.")
    return RangeTable(format="aimet", written_by=f"AIMET {version}", ranges=ranges, left_out=left_out)


def write_aimet(ranges: Mapping[str, Range], version: Version = "1.0.0") -> bytes:
    """Return the bytes of an encodings file of 8-bit activations, without weights.

    A range [−amax, amax] becomes a symmetric encoding, any other one an asymmetric one that holds zero.
    """
    encodings = {name: _encoding(r) for name, r in sorted(ranges.items())}
    activations: object
    if version == "1.0.0":
        activations = [
            {
                "name": name,
                "bw": 8,
                "dtype": "INT",
                "enc_type": "PER_TENSOR",
                "is_sym": symmetric,
                "offset": [offset],
                "scale": [scale],
            }
            for name, (scale, offset, symmetric) in encodings.items()
        ]
    else:
        activations = {
            name: [
                {
                    "bitwidth": 8,
                    "dtype": "int",
                    "is_symmetric": str(symmetric),
                    "max": (offset + 255) * scale,
                    "min": offset * scale,
                    "offset": offset,
                    "scale": scale,
                }
            ]
            for name, (scale, offset, symmetric) in encodings.items()
        }
    document: dict[str, object] = {
        "activation_encodings": activations,
        "excluded_layers": [],
        "param_encodings": [] if version == "1.0.0" else {},
        "producer": {"name": "quantkit", "version": __version__},
        "quantizer_args": {"activation_bitwidth": 8, "dtype": "int"},
        "version": version,
    }
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _encoding(range_: Range) -> tuple[float, int, bool]:
    """Scale, offset of the smallest code, and whether the encoding is symmetric."""
    if range_.lo == -range_.hi:
        return float(int8_scale(range_)), -128, True
    qparams = qparams_from_range(range_, _UINT8)
    assert qparams.zero_point is not None
    return float(qparams.scale), -int(qparams.zero_point), False


def _entries(document: Mapping[str, Any], what: str) -> Iterator[tuple[str, Any, bool]]:
    """Name, encoding in the shape of 1.0.0 or 2.0.0, and whether it is known to be a weight's."""
    if "encodings" in document:
        parts = [(document["encodings"], False)]
    else:
        parts = [(document.get("activation_encodings"), False), (document.get("param_encodings", {}), True)]
    for part, is_weight in parts:
        if isinstance(part, dict):
            for name, encodings in part.items():
                if not isinstance(encodings, list) or not all(isinstance(e, dict) for e in encodings):
                    raise CacheError(f"{what}: {name}: {_OTHERS}.")
                yield name, _in_one(encodings), is_weight
        elif isinstance(part, list):
            for encoding in part:
                if not isinstance(encoding, dict) or not isinstance(encoding.get("name"), str):
                    raise CacheError(f"{what}: an encoding without a name; {_OTHERS}.")
                yield encoding["name"], encoding, is_weight
        else:
            raise CacheError(f"{what}: {_OTHERS}.")


def _in_one(encodings: list[dict[str, Any]]) -> dict[str, Any]:
    """A list of 0.6.1, one encoding a channel, as one encoding of 1.0.0."""
    first = encodings[0] if encodings else {}
    return {
        "bw": first.get("bitwidth"),
        "dtype": str(first.get("dtype", "int")),
        "scale": [e.get("scale") for e in encodings],
        "offset": [e.get("offset") for e in encodings],
        "min": [e.get("min") for e in encodings],
        "max": [e.get("max") for e in encodings],
    }


def _range(encoding: Mapping[str, Any], where: str) -> Range | str:
    """The range that an encoding stands for, or why it stands for none."""
    bits: Any
    if "output_dtype" in encoding:
        found = re.fullmatch(r"(u?)int(\d{1,2})", str(encoding["output_dtype"]))
        if found is None:
            return f"{encoding['output_dtype']} there"
        bits = int(found[2])
        scale, zero = encoding.get("y_scale"), encoding.get("y_zero_point", 0)
        if isinstance(scale, list) or isinstance(zero, list):
            return _PER_CHANNEL
        offset = -zero - (0 if found[1] else 2 ** (bits - 1)) if _is_number(zero) else zero
    else:
        if str(encoding.get("dtype", "int")).lower() != "int":
            return f"{encoding['dtype']} there"
        bits = encoding.get("bw")
        one_each = [_only(encoding.get(key)) for key in ("scale", "offset", "min", "max")]
        if (
            any(value is _MANY for value in one_each)
            or encoding.get("enc_type", "PER_TENSOR") != "PER_TENSOR"
        ):
            return _PER_CHANNEL
        scale, offset, lo, hi = one_each
        _check_ends(scale, offset, lo, hi, bits, where)
    if not (
        isinstance(bits, int) and 2 <= bits <= 32 and _is_number(scale) and _is_number(offset) and scale > 0
    ):
        raise CacheError(
            f"{where}: scale {scale}, offset {offset} and {bits} bits are no encoding; "
            "delete the entry, so that the tensor stays in float, or export again."
        )
    half = 2 ** (bits - 1)
    if offset in (-half, 1 - half):
        return range_of_scale(scale * (half - 1) / 127)
    return Range(offset * scale, (offset + 2 * half - 1) * scale)


def _check_ends(scale: Any, offset: Any, lo: Any, hi: Any, bits: Any, where: str) -> None:
    """Refuse a file whose own min is not its offset · scale: it counts offsets in another way."""
    if lo is None or not all(map(_is_number, (scale, offset, lo))):
        return
    if abs(lo - offset * scale) > abs(scale):
        raise CacheError(
            f"{where}: min {lo:.6g} is not offset · scale = {offset * scale:.6g}; offsets count from the smallest of "
            f"{bits} bits, −128 where 8 are symmetric: mend the file, or export again."
        )


_MANY = object()


def _only(value: Any) -> Any:
    """The number, from a list of one too; _MANY where there are several."""
    if isinstance(value, list):
        return _MANY if len(value) != 1 else value[0]
    return value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""TensorRT's calibration cache: what an `IInt8Calibrator` writes, and reads in place of calibrating.

    TRT-8601-EntropyCalibration2
    data: 3c008912
    (Unnamed Layer* 48) [Constant]_output: 3bbed4cb

A header of TensorRT's version and the algorithm, then one tensor a line: the bits of a float32, most significant
first, of the scale amax / 127. Names may hold colons and spaces; the last colon divides.

Source: TensorRT's sampleINT8, section "Calibration file"; the names of the four algorithms are those of
`nvinfer1::CalibrationAlgoType`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from quantkit.errors import CacheError
from quantkit.formats import Range
from quantkit.interchange.table import (
    BLANK,
    RangeTable,
    check_names,
    int8_scale,
    range_of_scale,
    text_lines,
)

ALGORITHMS = ("EntropyCalibration2", "EntropyCalibration", "MinMaxCalibration", "LegacyCalibration")

_HEADER = re.compile(r"TRT-([0-9A-Za-z.]+)-(\w+)")
_SCALE = re.compile(r"[0-9A-Fa-f]{8}")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line. TensorRT passes over a cache whose algorithm is not that of its calibrator.

    Attributes:
        version: of TensorRT, without dots: 8601, 100900.
        algorithm: one of `ALGORITHMS`.

    Raises:
        CacheError: no such algorithm, or the version is no number.
    """

    version: str = "8601"
    algorithm: str = "EntropyCalibration2"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise CacheError(
                f"TensorRT algorithm {self.algorithm}: no such algorithm; choose one of {', '.join(ALGORITHMS)}."
            )
        if not re.fullmatch(r"[0-9A-Za-z.]+", self.version):
            raise CacheError(
                f"TensorRT version {self.version}: write it without dots, such as 8601 or 100900."
            )

    @classmethod
    def parse(cls, line: str) -> "Header | None":
        """Return the header that `line` is; None if it is none."""
        found = _HEADER.fullmatch(line)
        return cls(version=found[1], algorithm=found[2]) if found and found[2] in ALGORITHMS else None

    def __str__(self) -> str:
        return f"TRT-{self.version}-{self.algorithm}"


def read_tensorrt(content: bytes, what: str) -> RangeTable:
    """Return the ranges [−127 · scale, 127 · scale] of a TensorRT calibration cache.

    Args:
        content: the file.
        what: its name, for messages.

    Raises:
        CacheError: not such a file, or a line that means nothing; says which.
    """
    lines = text_lines(content, what)
    _, first = next(lines, (1, ""))
    header = Header.parse(first)
    if header is None:
        raise CacheError(
            f"{what}: begins with {first[:60]!r}, not with TRT-<version>-<algorithm> of a TensorRT calibration cache "
            f"({', '.join(ALGORITHMS)}); give the file that the calibrator wrote."
        )
    ranges: dict[str, Range] = {}
    seen: dict[str, tuple[int, str]] = {}
    for number, line in lines:
        name, colon, digits = (part.strip(BLANK) for part in line.rpartition(":"))
        if not (colon and name and _SCALE.fullmatch(digits)):
            raise CacheError(
                f"{what}: line {number} is {line[:80]!r}, not a name, a colon and 8 hexadecimal digits; "
                "delete the line if the file was edited, else copy the file again."
            )
        earlier, known = seen.setdefault(name, (number, digits.lower()))
        if known != digits.lower():
            raise CacheError(
                f"{what}: line {number} gives {name} the scale {digits}, line {earlier} {known}; delete one of them."
            )
        ranges[name] = range_of_scale(_scale(digits, f"{what}: line {number} ({name})"))
    if not ranges:
        raise CacheError(f"{what}: a header without a single tensor; let the calibrator write it again.")
    return RangeTable(format="tensorrt", written_by=str(header), ranges=ranges)


def write_tensorrt(ranges: Mapping[str, Range], header: Header, what: str) -> bytes:
    """Return the bytes of a TensorRT calibration cache.

    Raises:
        CacheError: a name that does not fit on a line.
    """
    check_names(ranges, what)
    lines = [str(header)]
    lines += [f"{name}: {int(int8_scale(r).view(np.uint32)):08x}" for name, r in ranges.items()]
    return "".join(f"{line}\n" for line in lines).encode()


def _scale(digits: str, where: str) -> float:
    bits = int(digits, 16)
    scale = float(np.array(bits, np.uint32).view(np.float32))
    fault = None
    if np.isnan(scale):
        fault = "NaN"
    elif bits & 0x7FFFFFFF == 0:
        fault = "zero"
    elif bits >> 31:
        fault = "negative"
    elif np.isinf(scale):
        fault = "infinite"
    elif bits < 0x00800000:
        fault = "so small that GPUs take it for zero"
    if fault:
        raise CacheError(
            f"{where}: its scale {digits} is {fault}; delete the line, so that the tensor stays in float, "
            "or calibrate again."
        )
    return scale

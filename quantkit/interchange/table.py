"""What the files of other tools have in common: ranges by tensor name, and how such a file is refused."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from quantkit.errors import CacheError
from quantkit.formats import INT8, QuantSpec, Range, qparams_from_range

# As TensorRT has it: symmetric, 127 steps to either side.
_SPEC = QuantSpec(format=INT8)
BLANK = " \t\v\f"


@dataclass(frozen=True, kw_only=True)
class RangeTable:
    """What a file says of a model's activations.

    Attributes:
        format: "tensorrt", "ort" or "aimet".
        written_by: what made it, in the file's own words: TRT-8601-EntropyCalibration2.
        ranges: tensor name → range, of shape (), in the file's order.
        left_out: name → why what the file says of it is no range of an activation.
    """

    format: str
    written_by: str
    ranges: Mapping[str, Range]
    left_out: Mapping[str, str] = field(default_factory=dict)


def range_of_scale(scale: float) -> Range:
    """Return the range whose int8 scale is `scale`, to the last bit where that is a float32.

    amax = 127 · scale has at most 24 + 7 significant bits, so float64 holds it exactly, and amax / 127 gives back
    `scale`.
    """
    amax = 127.0 * scale
    return Range(-amax, amax)


def int8_scale(range_: Range) -> np.float32:
    """Return amax / 127 as float32: the scale that an exported INT8 file has for this range."""
    return np.float32(qparams_from_range(range_, _SPEC).scale)


def int8_amax(range_: Range) -> float:
    """Return the amax from which every reader gets that same scale.

    It is the range's own, but for ranges that are zero or nearly so, whose scale is not amax / 127.
    """
    scale, amax = int8_scale(range_), float(range_.amax)
    with np.errstate(under="ignore"):
        return amax if np.float32(amax / 127) == scale else 127.0 * float(scale)


def text_lines(content: bytes, what: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of every line that is not blank, without white space around it.

    Lines end as on Linux, Windows or old Macintoshes; a byte order mark is passed over.

    Raises:
        CacheError: a line is not UTF-8.
    """
    for number, line in enumerate(re.split(rb"\r\n|\n|\r", content.removeprefix(b"\xef\xbb\xbf")), 1):
        try:
            text = line.decode().strip(BLANK)
        except UnicodeDecodeError as error:
            raise CacheError(
                f"{what}: line {number} is not text (byte {line[error.start]:#04x}); "
                "give the text file that the other tool wrote."
            ) from error
        if text:
            yield number, text


def check_names(names: Iterable[str], what: str) -> None:
    """Do nothing if every name fits on a line of text, and is the same when read again.

    Raises:
        CacheError: one is not; it holds a line break, or begins or ends with white space.
    """
    for name in names:
        if not name or name != name.strip(BLANK) or re.search(r"[\r\n]", name):
            raise CacheError(
                f"{what}: the tensor name {name!r} does not fit on a line; rename it in the model, "
                "or choose a JSON format."
            )

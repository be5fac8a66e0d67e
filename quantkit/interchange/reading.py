"""Opening another tool's calibration file: which tool's it is, is told from its content."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import CacheError, UnknownNameError
from quantkit.interchange.aimet import read_aimet
from quantkit.interchange.onnxruntime import read_ort_flatbuffers, read_ort_json, read_ort_text
from quantkit.interchange.table import RangeTable
from quantkit.interchange.tensorrt import read_tensorrt

IMPORT_FORMATS = ("tensorrt", "ort", "aimet")

# A line of a TensorRT cache, by which one that lost its header is known.
_TENSORRT_LINE = re.compile(rb"[^\r\n]*:[ \t]*[0-9A-Fa-f]{8}[ \t]*(\r|\n|$)")
_TEXT_LINE = re.compile(rb"[^\r\n]*\S[ \t]+[-+0-9.eE]+[ \t]*(\r|\n|$)")


def read_table(path: str | os.PathLike[str], format: str | None = None) -> RangeTable:
    """Return what a calibration file of TensorRT, ONNX Runtime or AIMET says.

    Args:
        path: the file.
        format: one of `IMPORT_FORMATS`; None to tell it from the content. Which of its kinds a table of ONNX Runtime
            is (text, JSON, flatbuffers), is told from the content always.

    Raises:
        CacheError: it cannot be read, is of no known kind, or is damaged; the message says where.
        UnknownNameError: no such format.
    """
    if format is not None and format not in IMPORT_FORMATS:
        raise UnknownNameError(f"format {format}: no such format; choose one of {', '.join(IMPORT_FORMATS)}.")
    what = str(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CacheError(
            f"{what}: cannot be read ({(error.strerror or str(error)).lower()}); name the other tool's file."
        ) from error
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise CacheError(f"{what}: an empty file; give the calibration file that the other tool wrote.")
    if format == "tensorrt" or (format is None and (start[:4] == b"TRT-" or _TENSORRT_LINE.match(start))):
        return read_tensorrt(content, what)
    if format == "aimet" or start[:1] in b"{[":
        return _read_json(content, what, format)
    if b"\0" in content:
        return read_ort_flatbuffers(content, what)
    if format == "ort" or _TEXT_LINE.match(start):
        return read_ort_text(content, what)
    raise CacheError(
        f"{what}: begins with {start[:40].decode(errors='replace')!r}, which is neither TensorRT's cache, "
        "ONNX Runtime's table nor AIMET's encodings; give such a file, and --format to say which."
    )


def _read_json(content: bytes, what: str, format: str | None) -> RangeTable:
    try:
        document = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_twins)
        encodings = isinstance(document, dict) and {"activation_encodings", "encodings"} & document.keys()
        if format == "aimet" or (format is None and encodings):
            return read_aimet(document, what)
        return read_ort_json(document, what)
    except (ValueError, RecursionError) as error:
        raise CacheError(
            f"{what}: not readable JSON ({' '.join(str(error).split())}); copy the file again."
        ) from error


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, refused if one of its names comes twice with different values: which one is meant?"""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"{key} comes twice with different values")
    return found

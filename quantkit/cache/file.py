"""The bytes of a calibration cache: a safetensors file with one JSON text in its header.

    8 bytes   length of the header, little-endian
    header    JSON: {"__metadata__": {"quantkit": TEXT}, "ARRAY": {"dtype", "shape", "data_offsets"}, …}
    arrays    one after the other, little-endian

TEXT is JSON with "kind": "calibration", "schema": an integer, and whatever `CalibrationCache` says of itself.
One of the arrays, "sha256", is 32 bytes: the SHA-256 of the file with zeros in their place. A file that lost or
changed a bit anywhere is refused.

Any safetensors reader opens the file; nothing in it is executed (no pickle). Equal content gives equal bytes:
keys are sorted, arrays are ordered by safetensors (dtype, then name), there is no time and no place in it.

Source: https://huggingface.co/docs/safetensors, section "Format".
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from quantkit.errors import CacheError

# The newest that is read. What older readers would misread says 2: a cache of fixed ranges, which to them would be
# one without statistics.
SCHEMA = 2

_KEY = "quantkit"
_KIND = "calibration"
_CHECKSUM = "sha256"
# As safetensors itself: a longer header is not a header.
_MAX_HEADER_BYTES = 100_000_000

# What NumPy has no name for is stored as unsigned integers of the same bits.
_RAW: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "int4",
        "uint4",
    )
}


def encode(text: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the bytes of a cache that says `text` and holds `arrays`."""
    raw = {name: array.dtype.name for name, array in arrays.items() if array.dtype.name in _RAW}
    stored = {_CHECKSUM: np.zeros(hashlib.sha256().digest_size, np.uint8)} | {
        # Not ascontiguousarray: that would give a scalar an axis.
        name: np.array(array.view(f"u{array.itemsize}") if name in raw else array, order="C", copy=None)
        for name, array in arrays.items()
    }
    full = {"kind": _KIND, "schema": 2 if "ranges" in text else 1, "raw": raw, **text}
    encoded = json.dumps(full, sort_keys=True, separators=(",", ":"), allow_nan=False)
    # One key: safetensors keeps metadata in a hash table, whose order differs from run to run.
    return seal(safetensors.numpy.save(stored, metadata={_KEY: encoded}))


def seal(content: bytes) -> bytes:
    """Return a cache with its checksum put right, whatever stood there.

    Raises:
        KeyError: it has no place for one.
    """
    length = int.from_bytes(content[:8], "little")
    place = json.loads(content[8 : 8 + length])[_CHECKSUM]["data_offsets"]
    start, end = (8 + length + offset for offset in place)
    digest = hashlib.sha256(content[:start])
    digest.update(bytes(end - start))
    digest.update(memoryview(content)[end:])
    return content[:start] + digest.digest() + content[end:]


def decode(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return what the cache at `path` says and holds.

    Raises:
        CacheError: there is no such file, or it is no cache, is damaged, or is of another version of quantkit.
    """
    try:
        with Path(path).open("rb") as file:
            text = _read_text(file, path)
            file.seek(0)
            content = file.read()
        arrays = safetensors.numpy.load(content)
        if _CHECKSUM not in arrays:
            raise CacheError(f"{path}: written by an older quantkit, without a checksum; calibrate again.")
        if seal(content) != content:
            raise damaged(path, "its checksum does not fit its content")
        del arrays[_CHECKSUM]
    except OSError as error:
        raise CacheError(
            f"{path}: cannot be read ({(error.strerror or str(error)).lower()}); "
            "name a calibration cache, or make one with `quantkit calibrate`."
        ) from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise damaged(path, str(error)) from error
    for name, dtype in text["raw"].items():
        if name not in arrays or dtype not in _RAW or arrays[name].dtype != f"u{_RAW[dtype].itemsize}":
            raise damaged(path, f"{name} of type {dtype}")
        arrays[name] = arrays[name].view(_RAW[dtype])
    return text, arrays


def damaged(path: str | os.PathLike[str], reason: str) -> CacheError:
    """Return the error for a cache whose content makes no sense."""
    return CacheError(f"{path}: a damaged calibration cache ({_one_line(reason)}); calibrate again.")


def _read_text(file: BinaryIO, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON text, after reading nothing but the header."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    # Two bytes are the least JSON object; a model, an image or an archive gives a length beyond all bounds.
    if size == 0:
        raise CacheError(f"{path}: an empty file, not a calibration cache; calibrate again.")
    if start.startswith(b"TRT-"):
        raise CacheError(
            f"{path}: a TensorRT calibration cache; bring it in with `quantkit cache import {path} --model MODEL`."
        )
    if len(start) < 8 or not 2 <= length <= _MAX_HEADER_BYTES or file.read(1) != b"{":
        raise _not_a_cache(path, "not a safetensors file")
    if 8 + length > size:
        raise damaged(path, f"cut short: {size} bytes, of which its header alone needs {8 + length}")
    file.seek(8)
    try:
        header = json.loads(file.read(length))
        text = json.loads(header["__metadata__"][_KEY])
        if text["kind"] != _KIND:
            raise KeyError(_KEY)
    except (KeyError, TypeError, ValueError) as error:
        raise _not_a_cache(path, "a safetensors file without quantkit's metadata") from error
    schema = text.get("schema")
    if type(schema) is not int or schema < 1 or (schema <= SCHEMA and not isinstance(text.get("raw"), dict)):
        raise damaged(path, f"schema {schema}")
    if schema > SCHEMA:
        raise CacheError(
            f"{path}: written by a newer quantkit (schema {schema}, this one reads {SCHEMA}); "
            "update quantkit, or calibrate again."
        )
    try:
        data_end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (KeyError, TypeError, IndexError) as error:
        raise damaged(path, "its header makes no sense") from error
    if 8 + length + data_end > size:
        raise damaged(path, f"cut short: {size} of {8 + length + data_end} bytes")
    return dict(text)


def _not_a_cache(path: str | os.PathLike[str], found: str) -> CacheError:
    return CacheError(f"{path}: not a calibration cache ({found}); make one with `quantkit calibrate`.")


def _one_line(text: str) -> str:
    return " ".join(text.split())

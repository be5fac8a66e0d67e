"""Files of arrays: what they hold, by header, and their arrays, mapped where the format lets them be."""

import json
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import ml_dtypes
import numpy as np

from quantkit.data.inputs import Array, Dtype
from quantkit.errors import DataError

NAMELESS = ""
"""The key of an array that has no name: that of a .npy file."""

_SAFETENSORS_DTYPES: dict[str, Dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True)
class Header:
    """The shape and element type of an array that need not have been read."""

    shape: tuple[int, ...]
    dtype: Dtype


class Record(Protocol):
    """Arrays that belong together: one file, or one item of a Python iterable."""

    @property
    def where(self) -> str:
        """What messages call it."""

    def headers(self) -> Mapping[str, Header]:
        """Return what is there, by key."""

    def read(self, key: str) -> Array:
        """Return one array; it may be mapped from its file and is not to be written to."""


class NpyFile:
    """One .npy file, mapped into memory: rows are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path

    def headers(self) -> Mapping[str, Header]:
        """Return the header under the key NAMELESS."""
        with _reading(self._path), self._path.open("rb") as file:
            return {NAMELESS: _npy_header(file)}

    def read(self, key: str) -> Array:
        """Return the array, mapped."""
        with _reading(self._path):
            # Nothing can be mapped of an array without elements.
            empty = 0 in self.headers()[key].shape
            array: Array = np.load(self._path, mmap_mode=None if empty else "r", allow_pickle=False)
            return array


class NpzFile:
    """One .npz file; each of its arrays is read whole."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path

    def headers(self) -> Mapping[str, Header]:
        """Return the headers without decompressing the contents."""
        found = {}
        with _reading(self._path), zipfile.ZipFile(self._path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as member:
                        found[name.removesuffix(".npy")] = _npy_header(member)
        return found

    def read(self, key: str) -> Array:
        """Return one array, read whole."""
        with _reading(self._path), np.load(self._path, allow_pickle=False) as archive:
            array: Array = archive[key]
            return array


class SafetensorsFile:
    """One .safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path

    def headers(self) -> Mapping[str, Header]:
        """Return the headers of all tensors."""
        return {key: header for key, (header, _) in self._index().items()}

    def read(self, key: str) -> Array:
        """Return one tensor, mapped."""
        header, offset = self._index()[key]
        if 0 in header.shape:
            return np.zeros(header.shape, header.dtype)
        with _reading(self._path):
            return np.memmap(self._path, header.dtype, "r", offset, header.shape)

    def _index(self) -> dict[str, tuple[Header, int]]:
        from safetensors import SafetensorError, safe_open

        with _reading(self._path):
            try:
                with safe_open(self._path, framework="numpy"):
                    pass  # it checks the header, the offsets and the file's size
            except SafetensorError as error:
                raise ValueError(str(error)) from error
            with self._path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(size))
        found = {}
        for key, entry in entries.items():
            if key == "__metadata__":
                continue
            if entry["dtype"] not in _SAFETENSORS_DTYPES:
                raise DataError(f"{self.where}: tensor {key} is {entry['dtype']}; store a plain number type.")
            header = Header(tuple(entry["shape"]), _SAFETENSORS_DTYPES[entry["dtype"]])
            found[key] = (header, 8 + size + int(entry["data_offsets"][0]))
        return found


@dataclass(frozen=True)
class ArrayRecord:
    """Arrays that are in memory already."""

    where: str
    arrays: Mapping[str, Array]

    def headers(self) -> Mapping[str, Header]:
        """Return what is there, by key."""
        return {key: Header(array.shape, array.dtype) for key, array in self.arrays.items()}

    def read(self, key: str) -> Array:
        """Return one array."""
        return self.arrays[key]


ARRAY_FILES: dict[str, type[NpyFile] | type[NpzFile] | type[SafetensorsFile]] = {
    ".npy": NpyFile,
    ".npz": NpzFile,
    ".safetensors": SafetensorsFile,
}


def _npy_header(file: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError("a record array")  # the only use of version 3
    return Header(shape, dtype)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        SyntaxError,  # a damaged header: NumPy parses it as Python
        tokenize.TokenError,
        OverflowError,
        MemoryError,  # a damaged header asks for more than there is
        RuntimeError,  # an encrypted archive, or an unknown compression
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: cannot be read as {path.suffix.lower()} ({reason}); "
            "write it again, as plain arrays without pickled objects."
        ) from error

"""Gram matrices in a file of their own, `<stem>.gram`: written and read a layer at a time.

A safetensors file. For every view (see `Linear.view`) it holds VIEW/count, VIEW/products and VIEW/sums, one after the
other, and at its end "sha256", a row of 32 bytes for every view in order: the digest of its three arrays, so that a
layer whose bits have changed is refused when it is read. Its metadata has one key, "quantkit": JSON with "kind":
"gram", "schema", "views" and whatever is said of the model and the data.

Source: https://huggingface.co/docs/safetensors, section "Format".
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from quantkit.errors import CacheError
from quantkit.files import atomic_write
from quantkit.statistics import GramMatrix

SCHEMA = 1
SUFFIX = ".gram"
_KEY, _KIND, _CHECKSUM = "quantkit", "gram", "sha256"
_PARTS = ("count", "products", "sums")
_TYPES = {
    "count": ("I64", np.dtype("<i8")),
    "products": ("F64", np.dtype("<f8")),
    "sums": ("F64", np.dtype("<f8")),
}


def write_grams(
    path: str | os.PathLike[str],
    text: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
    grams: Iterable[tuple[str, GramMatrix]],
) -> None:
    """Write matrices as they come: no more of them stand in memory than `grams` itself holds.

    Args:
        path: the file; nothing is left of it if the work fails halfway.
        text: what is said of the model and the data, as JSON holds it.
        sizes: (groups, K) of every view, in the order in which they will come.
        grams: the views and their matrices, such as `observe_grams` yields.

    Raises:
        FileError: the file cannot be written there.
    """
    header = _header(text, sizes)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        digests = []
        expected = iter(sizes.items())
        for view, gram in grams:
            assert next(expected, None) == (view, (gram.groups, gram.size)), "in the order of their sizes"
            digest = hashlib.sha256()
            for part in _PARTS:
                content = np.ascontiguousarray(gram.to_arrays()[part], _TYPES[part][1])
                digest.update(content.data)
                file.write(content.data)
            digests.append(digest.digest())
            # Not to stand beside those of the next pass.
            del gram, content
        assert next(expected, None) is None, "as many as there are sizes"
        file.write(b"".join(digests))


class GramFile(Mapping[str, GramMatrix]):
    """The matrices of a file by view, each read when it is asked for.

    Attributes:
        path: the file.
        text: what is said of the model and the data.

    Raises:
        CacheError: there is no such file, or it is no such file, damaged, or of another version of quantkit; or, when
            a matrix is read, its bits have changed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                text = json.loads((file.metadata() or {})[_KEY])
                names = set(file.keys())
        except FileNotFoundError as error:
            raise CacheError(
                f"{path}: no such file; collect Gram matrices with `quantkit calibrate --collect gram`."
            ) from error
        except OSError as error:
            raise CacheError(
                f"{path}: cannot be read ({error.strerror or error}); name a file of Gram matrices."
            ) from error
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"{path}: not a file of Gram matrices ({_one_line(error)}); make one with "
                "`quantkit calibrate --collect gram`."
            ) from error
        if not isinstance(text, dict) or text.get("kind") != _KIND:
            raise CacheError(
                f"{path}: a safetensors file of another kind; give the .gram file of a calibration."
            )
        if text.get("schema") != SCHEMA:
            raise CacheError(
                f"{path}: schema {text.get('schema')}, this quantkit reads {SCHEMA}; "
                "update quantkit, or collect the matrices again."
            )
        views = text.get("views")
        if not isinstance(views, list) or {f"{v}/{p}" for v in views for p in _PARTS} | {_CHECKSUM} != names:
            raise CacheError(f"{path}: damaged (its list of layers is not what it holds); collect it again.")
        self._views: list[str] = views
        self.text: dict[str, Any] = {k: v for k, v in text.items() if k not in ("kind", "schema", "views")}

    def __getitem__(self, view: str) -> GramMatrix:
        if view not in self._views:
            raise KeyError(view)
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                arrays: dict[str, NDArray[Any]] = {part: file.get_tensor(f"{view}/{part}") for part in _PARTS}
                wanted = file.get_tensor(_CHECKSUM)[self._views.index(view)].tobytes()
        except (OSError, safetensors.SafetensorError, IndexError) as error:
            raise CacheError(
                f"{self.path}: {view}: cannot be read ({_one_line(error)}); collect it again."
            ) from error
        digest = hashlib.sha256()
        for part in _PARTS:
            digest.update(np.ascontiguousarray(arrays[part]).data)
        if digest.digest() != wanted:
            raise CacheError(f"{self.path}: {view}: damaged (its checksum does not fit); collect it again.")
        return GramMatrix.from_arrays(arrays)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return (groups, K) of every view; no matrix is read."""
        with safetensors.safe_open(self.path, framework="numpy") as file:
            shapes = {view: file.get_slice(f"{view}/sums").get_shape() for view in self._views}
        return {view: (shape[0], shape[1]) for view, shape in shapes.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __contains__(self, view: object) -> bool:
        # Mapping's own would read the matrix.
        return view in self._views


def merge_grams(path: str | os.PathLike[str], parts: Sequence[GramFile], data: Mapping[str, Any]) -> None:
    """Write the matrices of all parts together: their sums, a layer at a time.

    Args:
        path: the file to write.
        parts: files of one model, over different samples.
        data: what is said of all samples.

    Raises:
        CacheError: they are not of one model, or one is damaged.
        FileError: the file cannot be written there.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.text.get("fingerprint") != first.text.get("fingerprint") or set(part) != set(first):
            raise CacheError(
                f"{first.path} and {part.path}: Gram matrices of different models; merge those of one."
            )
    merged = ((view, reduce(GramMatrix.merge, (part[view] for part in parts))) for view in first)
    write_grams(path, {**first.text, "data": dict(data)}, first.sizes(), merged)


def _header(text: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]) -> bytes:
    said = {**text, "kind": _KIND, "schema": SCHEMA, "views": list(sizes)}
    encoded = json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=False)
    header: dict[str, Any] = {"__metadata__": {_KEY: encoded}}
    at = 0

    def enter(name: str, dtype: str, shape: tuple[int, ...], itemsize: int) -> None:
        nonlocal at
        length = itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + length]}
        at += length

    for view, (groups, size) in sizes.items():
        shapes = {"count": (1,), "products": (groups, size, size), "sums": (groups, size)}
        for part in _PARTS:
            enter(f"{view}/{part}", _TYPES[part][0], shapes[part], 8)
    enter(_CHECKSUM, "U8", (len(sizes), hashlib.sha256().digest_size), 1)
    content = json.dumps(header, separators=(",", ":")).encode()
    # Arrays of float64 begin where their size divides the place.
    return content + b" " * (-len(content) % 8)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

"""The right answers that an evaluation is measured against."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkit.data.casting import Misfit, cast
from quantkit.data.files import ARRAY_FILES, NAMELESS
from quantkit.data.inputs import Array, array_type
from quantkit.data.matching import LABEL_NAMES
from quantkit.data.python_data import record
from quantkit.errors import DataError

# A position without a right answer, as PyTorch's cross-entropy leaves it out.
IGNORED_LABEL = -100


def open_labels(data: object, count: int | None = None) -> NDArray[np.int64]:
    """Return integer labels, shape (samples,) or, for sequences, (samples, positions).

    A label is a class, counted from 0, or −100 where there is none to judge by. Floats are taken that are whole.

    Args:
        data: a .npy file; a .npz or .safetensors file with a key labels, label, targets, target or y, with a
            single array, or with the key written after a colon ("eval.npz:classes"); a .txt file of one
            integer a line; or an array or list.
        count: the number of samples there are; the first `count` labels are returned.

    Raises:
        DataError: no labels are there, they are no integers, fewer than `count`, negative, or all −100.
    """
    if isinstance(data, str | os.PathLike):
        where, found = _from_path(os.fspath(data))
    else:
        where, arrays = "labels", record("labels", data, ()).arrays
        if NAMELESS not in arrays:
            raise DataError("labels: found a dict of arrays; give one array, one label a sample.")
        found = arrays[NAMELESS]
    if found.ndim > 1 and found.shape[-1] == 1:
        found = found[..., 0]
    if found.ndim == 0 or found.size == 0:
        raise DataError(
            f"{where}: found {array_type(found.dtype, found.shape)}; give one integer label a sample."
        )
    try:
        labels = cast(found, np.dtype(np.int64))
    except Misfit as misfit:
        raise DataError(f"{where}: found {misfit.found}; labels are integers; {misfit.mend}.") from None
    if count is not None and len(labels) < count:
        raise DataError(
            f"{where}: {len(labels)} labels for {count} samples; give one a sample, in their order."
        )
    check_labels(labels, where)
    if np.all(labels[:count] == IGNORED_LABEL):
        raise DataError(
            f"{where}: every label is {IGNORED_LABEL}, which is left out; give the right classes."
        )
    return labels[:count]


def check_labels(labels: Array, where: str) -> None:
    """Refuse negative labels but −100.

    Raises:
        DataError: there are some.
    """
    wrong = labels[(labels < 0) & (labels != IGNORED_LABEL)]
    if wrong.size:
        raise DataError(
            f"{where}: {wrong.size} labels are negative, the first {wrong.flat[0]}; count classes from 0, and write "
            f"{IGNORED_LABEL} where there is none."
        )


def _from_path(given: str) -> tuple[str, Array]:
    path, key = Path(given).expanduser(), None
    if not path.exists() and ":" in path.name:
        stem, key = str(path).rsplit(":", 1)
        path = Path(stem)
    if not path.is_file():
        raise DataError(f"{path}: no such file of labels; give a .npy, .npz or .txt file.")
    if path.suffix.lower() == ".txt":
        return str(path), _from_text(path)
    if path.suffix.lower() not in ARRAY_FILES:
        raise DataError(
            f"{path}: labels are not read from {path.suffix or 'such a'} file; give .npy, .npz or .txt."
        )
    file = ARRAY_FILES[path.suffix.lower()](path)
    headers = file.headers()
    if key is None:
        named = [k for k in headers if k.lower() in LABEL_NAMES]
        keys = named if named else list(headers)
        if len(keys) != 1:
            raise DataError(
                f"{path}: which of {', '.join(keys) or 'no arrays'} are the labels is not clear; "
                f"name the key, {path.name}:KEY."
            )
        key = keys[0]
    elif key not in headers:
        raise DataError(f"{path}: no array {key}; found {', '.join(headers)}.")
    return str(path), file.read(key)


def _from_text(path: Path) -> NDArray[np.int64]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); write one integer a line.") from error
    labels = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            labels.append(int(line))
        except ValueError:
            raise DataError(f"{path}: line {number} is {line.strip()!r}; write one integer a line.") from None
    return np.array(labels, np.int64)

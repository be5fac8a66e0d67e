"""Data that is a Python object: arrays, dicts of them, and iterables, data sets and readers of those."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from quantkit.data.files import NAMELESS, ArrayRecord
from quantkit.data.inputs import Array, InputSpec
from quantkit.errors import DataError


def is_array(value: object) -> bool:
    """Whether `value` is an array, of NumPy's or of another library."""
    return not isinstance(value, np.generic) and any(
        hasattr(value, name) for name in ("__array__", "__array_interface__", "__cuda_array_interface__")
    )


def is_record(data: object) -> bool:
    """Whether `data` is one array or one dict of arrays, not an iterable of them."""
    return is_array(data) or isinstance(data, Mapping | np.generic)


def record(where: str, item: object, inputs: Sequence[InputSpec]) -> ArrayRecord:
    """Return one item as arrays by name.

    An item is an array (for a model with one input), a mapping of names to arrays, or a tuple or list of
    arrays in the order of the inputs, which may end with the label: what a data set of (x, y) yields.

    Raises:
        DataError: it is none of these, or is no plain array.
    """
    if isinstance(item, Mapping):
        return ArrayRecord(where, {str(key): _array(where, value) for key, value in item.items()})
    if isinstance(item, tuple | list) and item and (is_array(item[0]) or isinstance(item[0], Mapping)):
        if isinstance(item[0], Mapping):
            return record(where, item[0], inputs)
        if not len(inputs) <= len(item) <= len(inputs) + 1:
            raise DataError(
                f"{where}: {len(item)} arrays; the model wants {', '.join(map(str, inputs))}; "
                "give them in that order, or as a dict by name."
            )
        return ArrayRecord(
            where, {s.name: _array(where, value) for s, value in zip(inputs, item, strict=False)}
        )
    return ArrayRecord(where, {NAMELESS: _array(where, item)})


def items(data: object) -> Callable[[], Iterator[object]]:
    """Return what starts an iteration over `data`.

    `data` may be any iterable, something with `__len__` and `__getitem__` (a map-style data set), a reader
    with `get_next()` (ONNX Runtime's CalibrationDataReader), or a function that returns one of these. An
    iterator can be gone through once; the second time is an error, not an empty data set.

    Raises:
        DataError: it is none of these.
    """
    if hasattr(data, "get_next"):
        get_next = data.get_next
        return _once(lambda: iter(get_next, None), rewind=getattr(data, "rewind", None))
    if isinstance(data, Iterable):
        if isinstance(data, Iterator):
            return _once(lambda: data, rewind=None)
        return lambda: iter(data)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        # Not the sequence protocol: a data set need not raise IndexError past its end.
        return lambda: (data[i] for i in range(len(data)))
    if callable(data):
        return lambda: items(data())()
    raise DataError(
        f"data of type {type(data).__name__}: neither a path nor something to iterate over; "
        "give a folder, an array, or an iterable of arrays or of dicts by input name."
    )


def _once(
    begin: Callable[[], Iterator[object]], *, rewind: Callable[[], object] | None
) -> Callable[[], Iterator[object]]:
    started = False

    def start() -> Iterator[object]:
        nonlocal started
        if started:
            if rewind is None:
                raise DataError(
                    "data: this iterator has been gone through already and cannot start again; "
                    "give a list, or a function that returns a new iterator."
                )
            rewind()
        started = True
        return begin()

    return start


def _array(where: str, value: Any) -> Array:
    try:
        # A tensor of another library: cut from its graph, brought to the host.
        for step in ("detach", "cpu"):
            if callable(getattr(value, step, None)):
                value = getattr(value, step)()
        if hasattr(value, "__cuda_array_interface__") and callable(getattr(value, "get", None)):
            value = value.get()
        array: Array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: {type(value).__name__} does not become an array ({' '.join(str(error).split())}); "
            "give arrays of plain numbers, one item a sample where their shapes differ."
        ) from error
    if array.dtype.hasobject and not all(isinstance(v, str) for v in array.flat):
        raise DataError(
            f"{where}: found {type(value).__name__}, which holds no numbers; give arrays of numbers."
        )
    return array

"""Casts that lose nothing but float precision."""

from typing import Any

import numpy as np

from quantkit.data.inputs import Array, Dtype


class Misfit(Exception):  # noqa: N818 - a verdict, turned into a DataError where the place is known
    """Why an array does not fit an input, and the mend; the caller adds which array and which input."""

    def __init__(self, found: str, mend: str) -> None:
        super().__init__(found, mend)
        self.found = found
        self.mend = mend


def kind(dtype: Dtype) -> str:
    """Return "float", "int", "bool", "string", or "other" (complex, dates, records, Python objects).

    By name, because ml_dtypes' types all have NumPy's kind "V".
    """
    if dtype.name.startswith(("float", "bfloat")):
        return "float"
    if dtype.name.startswith(("int", "uint")):
        return "int"
    if dtype.kind == "b":
        return "bool"
    return "string" if dtype.kind in "UT" else "other"


def check_castable(found: Dtype, wanted: Dtype) -> None:
    """Refuse element types that no values could make right.

    Raises:
        Misfit: pixels (uint8) for a float input, or a type that is neither number nor string.
    """
    if _is_unnamed_ml_dtype(found, wanted):
        return
    if found == np.uint8 and kind(wanted) == "float":
        raise Misfit(
            "uint8 values, which look like pixels",
            "say how pixels are scaled: --mean and --std, or --image-preset 0-1 for 0…1 (image= in Python); "
            f"or store them as {wanted.name}",
        )
    if found.hasobject and wanted.kind != "O":
        raise Misfit("Python objects", f"store plain {wanted.name} arrays")
    is_text = wanted.kind in "OUT"
    if (kind(found) == "other" and not (is_text and found.hasobject)) or (kind(found) == "string") != is_text:
        raise Misfit(f"{found.name} values", f"store them as {'strings' if is_text else wanted.name}")


def cast(array: Array, dtype: Dtype, *, masks: bool = False) -> Array:
    """Return `array` as a new C-contiguous array of `dtype`, every value kept (floats: rounded).

    Floats may lose precision but not overflow; to an integer or bool only values that it holds exactly.

    Raises:
        Misfit: the values do not fit, or are not finite (−inf is taken where it `masks`).
    """
    check_castable(array.dtype, dtype)
    if _is_unnamed_ml_dtype(array.dtype, dtype):
        array = array.view(dtype)
    if dtype.kind in "OUT":
        return np.array(array, dtype=object, order="C")
    if kind(array.dtype) == "float":
        _check_finite(array, masks=masks)
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.array(array, dtype=dtype, order="C")
    if result.dtype == array.dtype:
        return result
    if kind(dtype) == "float" and kind(array.dtype) == "float":
        if bool((~np.isfinite(result) & np.isfinite(array)).any()):
            raise Misfit(
                f"{_extreme(array)!r}, which overflows {dtype.name}",
                "scale the data as the model was trained",
            )
    elif not _same_values(array, result):
        raise Misfit(
            f"{array.dtype.name} values that {dtype.name} does not hold exactly",
            f"store them as {dtype.name}",
        )
    return result


def _is_unnamed_ml_dtype(found: Dtype, wanted: Dtype) -> bool:
    # np.save writes bfloat16 as void of two bytes: the .npy format has no name for it.
    return (
        found.kind == "V"
        and found.names is None
        and found.name.startswith("void")
        and wanted.kind == "V"
        and (found.itemsize == wanted.itemsize)
    )


def _check_finite(array: Array, *, masks: bool) -> None:
    finite = np.isfinite(array)
    if finite.all() or (masks and bool((finite | np.isneginf(array)).all())):
        return
    nan = int(np.count_nonzero(np.isnan(array)))
    inf = array.size - int(np.count_nonzero(finite)) - nan
    what = " and ".join(f"{n} {name}" for n, name in ((nan, "NaN"), (inf, "Inf")) if n)
    raise Misfit(f"{what} among {array.size} values", "leave that sample out or mend how it was made")


def _same_values(before: Array, after: Array) -> bool:
    if kind(after.dtype) == "float" and bool((np.abs(after.astype(np.float64)) >= 2.0**63).any()):
        return False  # what casting back gives then depends on the processor
    # An overflow can come back by the same way (int64 → uint64 → int64): the signs must agree too.
    with np.errstate(over="ignore", invalid="ignore"):
        back = after.astype(before.dtype)
    return bool(np.array_equal(back, before) and np.array_equal(after < 0, before < 0))


def _extreme(array: Array) -> Any:
    return float(array.flat[int(np.abs(array).argmax())])

"""ONNX Runtime's calibration tables, as its `write_calibration_table` and `save_tensors_data` write them.

    calibration.cache          name amax                                        (text)
    calibration.flatbuffers    name → amax, both strings                        (see `ort_flatbuffers`)
    calibration.json           {"name": {"lowest": …, "highest": …, "CLS": "TensorData"}}
    save_tensors_data          {"CLS": "TensorsData", "data": {as above}, "calibration_method": …}

A number is a plain one, or {"data": …, "dtype": "float32", "CLS": "numpy.array"}; files of older versions have
[lowest, highest] or amax alone in place of the object. The first two files hold max(lowest, highest), which is amax
only where the calibrator was symmetric: of a range [−3, 2] they say 2. The JSON has both ends.

Source: onnxruntime.quantization, `quant_utils.py` and `calibrate.py` of 1.31.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantkit.errors import CacheError
from quantkit.formats import Range
from quantkit.interchange.ort_flatbuffers import read_pairs, write_pairs
from quantkit.interchange.table import RangeTable, check_names, int8_amax, text_lines

# Method → the name that ONNX Runtime has for it; ranges of another method pass for MinMax, as they are ranges alike.
_METHODS = {"entropy": "Entropy", "minmax": "MinMax", "percentile": "Percentile"}
_LINE = re.compile(r"(.*[^ \t\v\f])[ \t]+([^ \t]+)", re.DOTALL)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def read_ort_text(content: bytes, what: str) -> RangeTable:
    """Return the ranges [−amax, amax] of a `calibration.cache`, one "name amax" a line.

    Raises:
        CacheError: a line that is none such; says which.
    """
    pairs = []
    for number, line in text_lines(content, what):
        found = _LINE.fullmatch(line)
        if found is None:
            raise CacheError(
                f"{what}: line {number} is {line[:80]!r}, not a name and a number; "
                "delete the line if the file was edited, else copy the file again."
            )
        pairs.append((found[1], found[2], f"line {number} ({found[1]})"))
    return _table_of_amax(pairs, what, "calibration.cache")


def read_ort_flatbuffers(content: bytes, what: str) -> RangeTable:
    """Return the ranges [−amax, amax] of a `calibration.flatbuffers`.

    Raises:
        CacheError: not such a file, or an amax that is none.
    """
    pairs = [(name, value, f"tensor {name}") for name, value in read_pairs(content, what)]
    return _table_of_amax(pairs, what, "calibration.flatbuffers")


def read_ort_json(document: Any, what: str) -> RangeTable:
    """Return the ranges [lowest, highest] of a parsed JSON table.

    Raises:
        CacheError: it is none, or an end is no finite number.
    """
    entries = document
    written_by = "calibration.json"
    if isinstance(document, dict) and document.get("CLS") == "TensorsData":
        entries = document.get("data")
        method = document.get("calibration_method")
        written_by = str(method.get("value")) if isinstance(method, dict) else "TensorsData"
    if not isinstance(entries, dict) or not entries:
        raise CacheError(
            f"{what}: not a calibration table of ONNX Runtime (names with their lowest and highest); "
            "give calibration.json, or what save_tensors_data wrote."
        )
    ranges, left_out = {}, {}
    for name, entry in entries.items():
        ends = _ends(entry, f"{what}: tensor {name}")
        if isinstance(ends, str):
            left_out[name] = ends
        else:
            ranges[name] = ends
    return RangeTable(format="ort", written_by=written_by, ranges=ranges, left_out=left_out)


def write_ort_text(ranges: Mapping[str, Range], what: str) -> bytes:
    """Return the bytes of a `calibration.cache`.

    Raises:
        CacheError: a name that does not fit on a line.
    """
    check_names(ranges, what)
    return "".join(f"{name} {int8_amax(r)!r}\n" for name, r in sorted(ranges.items())).encode()


def write_ort_flatbuffers(ranges: Mapping[str, Range]) -> bytes:
    """Return the bytes of a `calibration.flatbuffers`: those of ONNX Runtime's own writer."""
    return write_pairs([(name, repr(int8_amax(r))) for name, r in sorted(ranges.items())])


def write_ort_json(ranges: Mapping[str, Range], method: str) -> bytes:
    """Return the bytes of the JSON that ONNX Runtime's `load_tensors_data` reads.

    Args:
        ranges: tensor name → range.
        method: the calibration method, quantkit's name.
    """

    def number(value: float) -> dict[str, object]:
        return {"data": value, "dtype": "float32", "CLS": "numpy.array"}

    document = {
        "CLS": "TensorsData",
        "data": {
            name: {"lowest": number(float(r.lo)), "highest": number(float(r.hi)), "CLS": "TensorData"}
            for name, r in sorted(ranges.items())
        },
        "calibration_method": {
            "CLS": "CalibrationMethod",
            "value": f"CalibrationMethod.{_METHODS.get(method, 'MinMax')}",
        },
        "smooth_quant": False,
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False).encode()


def _table_of_amax(pairs: list[tuple[str, str, str]], what: str, written_by: str) -> RangeTable:
    ranges: dict[str, Range] = {}
    for name, value, where in pairs:
        amax = _number(value)
        if amax is None or not 0 < amax <= _FLOAT32_MAX:
            raise CacheError(
                f"{what}: {where}: {value[:40]!r} is no amax, a positive number (the file holds max(lowest, highest), "
                "right for symmetric calibration only); import the calibration.json that lies beside it."
            )
        found = Range(-amax, amax)
        if ranges.setdefault(name, found) != found:
            raise CacheError(f"{what}: {where}: the name comes twice with different values; delete one.")
    if not ranges:
        raise CacheError(
            f"{what}: a calibration table without a single tensor; let the calibrator write it again."
        )
    return RangeTable(format="ort", written_by=written_by, ranges=ranges)


def _ends(entry: Any, where: str) -> Range | str:
    """The range that an entry of the JSON says, or why it says none."""
    if isinstance(entry, dict) and "data" not in entry:
        if "lowest" not in entry or "highest" not in entry:
            return "no lowest and highest there"
        parts = [_flat(entry["lowest"]), _flat(entry["highest"])]
        if len(parts[0]) != 1 or len(parts[1]) != 1:
            return "a range per channel there; activations have one"
        lo, hi = (_number(part[0]) for part in parts)
    else:
        values = [_number(value) for value in _flat(entry)]
        if len(values) == 1:
            hi = values[0]
            lo = None if hi is None else -hi
        elif len(values) == 2:
            lo, hi = values
        else:
            return "a range per channel there; activations have one"
    if lo is None or hi is None or not -_FLOAT32_MAX <= lo <= hi <= _FLOAT32_MAX:
        raise CacheError(
            f"{where}: {json.dumps(entry)[:80]} is no range, two finite numbers lowest ≤ highest; "
            "delete the entry, so that the tensor stays in float, or calibrate again."
        )
    return Range(lo, hi)


def _flat(value: Any) -> list[Any]:
    """The numbers of an entry, however deep in lists."""
    if isinstance(value, dict):
        return _flat(value.get("data"))
    if isinstance(value, list):
        return [number for part in value for number in _flat(part)]
    return [value]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None

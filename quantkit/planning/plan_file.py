"""Plans as files: JSON that people read and change, with what is long in a safetensors file beside it.

Up to 16 numbers of a scale, zero point or code stand in the JSON; of more it holds the array's name in the file beside.
Floats are written so that they read back bit for bit.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from quantkit.errors import PlanError, QuantkitError
from quantkit.files import atomic_write
from quantkit.formats import QParams, QuantSpec, Range, get_format
from quantkit.graph import LeftAlone
from quantkit.planning.plan import ActivationPlan, BiasPlan, ModelEdits, Plan, Reader, WeightPlan

_Read = TypeVar("_Read")

_VERSION = 1
_IN_JSON = 16
_SPEC_DEFAULTS = {
    "axis": None,
    "block_size": None,
    "block_shape": None,
    "symmetric": True,
    "scale_format": None,
    "scale_rule": "rceil",
    "dynamic": None,
}


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan; its long arrays go into `<path>.safetensors`.

    Raises:
        FileError: it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    found = {
        "quantkit_plan": _VERSION,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "preset": plan.preset,
        "target": plan.target,
        "method": plan.method,
        "activations": [_activation(a) for a in plan.activations.values()],
        "weights": [_weight(w, arrays) for w in plan.weights],
        "biases": [_bias(b, arrays) for b in plan.biases],
        "nodes": dict(plan.nodes),
        "formats": dict(plan.formats),
        "left": [{"node": x.node, "op_type": x.op_type, "reason": x.reason} for x in plan.left],
    }
    if plan.edits is not None:
        found["edits"] = _edits(plan.edits, arrays)
    with atomic_write(path) as temporary:
        if arrays:
            beside = temporary.with_name(_beside(temporary).name)
            # `save_file` would leave a file that its owner alone can read.
            beside.write_bytes(save({name: np.ascontiguousarray(a) for name, a in sorted(arrays.items())}))
        temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan that `save_plan` wrote, and that somebody may have changed since.

    Raises:
        PlanError: there is no such file, it is no plan, or something in it cannot be.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror}); give the path of a plan.") from error
    except ValueError as error:
        raise PlanError(f"{path}: not JSON ({error}); give a plan that --plan-out wrote.") from error
    if not isinstance(found, dict) or found.get("quantkit_plan") != _VERSION:
        raise PlanError(
            f"{path}: no plan of version {_VERSION}; give a file that `quantkit export --plan-out` wrote."
        )
    beside = _beside(path)
    try:
        arrays = load_file(beside) if beside.exists() else {}
    except (OSError, SafetensorError) as error:
        raise PlanError(
            f"{beside}: cannot be read ({error}); write the plan again with --plan-out."
        ) from error
    try:
        return _read_plan(found, arrays)
    except PlanError as error:
        raise PlanError(f"{path}: {error}; mend it, or take a plan anew.") from error


def _read_plan(found: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Plan:
    activations: dict[str, ActivationPlan] = {}
    for activation in _read_all("activation", found.get("activations"), _read_activation):
        known = activation.name in activations
        activations[f"{activation.name}, {activation.spec}" if known else activation.name] = activation
    weights = _read_all("weight", found.get("weights"), lambda e: _read_weight(e, arrays))
    biases = _read_all("bias", found.get("biases"), lambda e: _read_bias(e, arrays))
    (plan,) = _read_all(
        "plan",
        [found],
        lambda e: Plan(
            model=str(e["model"]),
            fingerprint=str(e["fingerprint"]),
            preset=str(e["preset"]),
            target=str(e["target"]),
            method=str(e["method"]),
            activations=activations,
            weights=weights,
            biases=biases,
            nodes={str(k): str(v) for k, v in e["nodes"].items()},
            left=[
                LeftAlone(node=str(x["node"]), op_type=str(x["op_type"]), reason=str(x["reason"]))
                for x in e["left"]
            ],
            formats={str(k): str(v) for k, v in e["formats"].items()},
            edits=None if e.get("edits") is None else _read_edits(e["edits"], arrays),
        ),
    )
    return plan


def _read_all(what: str, entries: Any, read: Callable[[dict[str, Any]], _Read]) -> list[_Read]:
    """Read every entry of a list; an error names the one that it is about."""
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise PlanError(f"{what}: not a list of tables")
    found = []
    for number, entry in enumerate(entries):
        where = f"{what} {entry.get('name', number)}"
        try:
            found.append(read(entry))
        except KeyError as error:
            raise PlanError(f"{where}: {error.args[0]} is missing") from error
        except (TypeError, ValueError, AttributeError, OverflowError, QuantkitError) as error:
            raise PlanError(f"{where}: {str(error).rstrip('.')}") from error
    return found


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.safetensors")


def _activation(plan: ActivationPlan) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": plan.name, **_spec(plan.spec)}
    if plan.range is not None:
        entry["range"] = [float(plan.range.lo), float(plan.range.hi)]
    if plan.qparams is not None:
        entry["scale"] = float(plan.qparams.scale)
        if plan.qparams.zero_point is not None:
            entry["zero_point"] = int(plan.qparams.zero_point)
    if plan.global_scale is not None:
        entry["global_scale"] = float(plan.global_scale)
    if plan.readers:
        entry["readers"] = [list(reader) for reader in plan.readers]
    return entry


def _read_activation(entry: Mapping[str, Any]) -> ActivationPlan:
    spec = _read_spec(entry)
    range_ = entry.get("range")
    qparams = None
    if spec.dynamic is None:
        zero = entry.get("zero_point")
        if zero is not None and not (zero == int(zero) and spec.format.min <= zero <= spec.format.max):
            raise ValueError(f"zero point {zero} is no {spec.format.name}")
        scale = _scale(np.asarray(entry["scale"], np.float32), ())
        if scale == 0:
            raise ValueError("a scale of 0, by which nothing can be divided")
        qparams = QParams(
            scale,
            None if zero is None else np.asarray(zero).astype(spec.format.dtype),
        )
    shared = entry.get("global_scale")
    return ActivationPlan(
        name=str(entry["name"]),
        spec=spec,
        range=None if range_ is None else Range(*(np.float64(end) for end in range_)),
        qparams=qparams,
        readers=_readers(entry.get("readers", ())),
        global_scale=None if shared is None else _scale(np.asarray(shared, np.float32), ()),
    )


def _weight(plan: WeightPlan, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    key = f"{plan.name}:{plan.readers[0][0]}"
    entry = {"name": plan.name, **_spec(plan.spec), "readers": [list(reader) for reader in plan.readers]}
    entry["scale"] = _array(plan.qparams.scale, f"{key}:scale", arrays)
    if plan.qparams.zero_point is not None and plan.qparams.zero_point.any():
        entry["zero_point"] = _array(plan.qparams.zero_point, f"{key}:zero_point", arrays)
    if plan.qparams.global_scale is not None:
        entry["global_scale"] = float(plan.qparams.global_scale)
    if plan.codes is not None:
        entry["codes"] = _array(_plain(plan.codes, plan.spec), f"{key}:codes", arrays)
    return entry


def _read_weight(entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> WeightPlan:
    spec = _read_spec(entry)
    scale = _scale(_read_array(entry["scale"], arrays).astype(np.float32), None)
    zero_point: NDArray[np.generic] | None = None
    if spec.format.kind == "integer":
        zero_point = (
            _codes(_read_array(entry["zero_point"], arrays), spec).reshape(scale.shape)
            if "zero_point" in entry
            else np.zeros(scale.shape).astype(spec.format.dtype)
        )
    shared = entry.get("global_scale")
    return WeightPlan(
        name=str(entry["name"]),
        spec=spec,
        qparams=QParams(
            scale, zero_point, None if shared is None else _scale(np.asarray(shared, np.float32), ())
        ),
        readers=_some_readers(entry["readers"]),
        codes=_codes(_read_array(entry["codes"], arrays), spec) if "codes" in entry else None,
    )


def _bias(plan: BiasPlan, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    key = f"{plan.name}:{plan.reader[0]}"
    return {
        "name": plan.name,
        "reader": list(plan.reader),
        "scale": _array(plan.scale, f"{key}:scale", arrays),
        "codes": _array(plan.qvalue, f"{key}:codes", arrays),
    }


def _read_bias(entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> BiasPlan:
    return BiasPlan(
        name=str(entry["name"]),
        qvalue=_read_array(entry["codes"], arrays).astype(np.int32),
        scale=_scale(_read_array(entry["scale"], arrays).astype(np.float32), None),
        reader=_readers([entry["reader"]])[0],
    )


def _edits(edits: ModelEdits, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "fingerprint": edits.fingerprint,
        "scales": {t: _array(a, f"{t}:channels", arrays) for t, a in edits.scales.items()},
        "inserted": list(edits.inserted),
        "unclipped": list(edits.unclipped),
        "biases": {n: _array(a, f"{n}:bias", arrays) for n, a in edits.biases.items()},
    }


def _read_edits(entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> ModelEdits:
    scales = {str(t): _read_array(a, arrays).astype(np.float64) for t, a in entry["scales"].items()}
    biases = {str(n): _read_array(a, arrays).astype(np.float64) for n, a in entry["biases"].items()}
    if not all(np.isfinite(a).all() and (a > 0).all() for a in scales.values()):
        raise ValueError("edits: a scale of channels that is not a positive number")
    if not all(np.isfinite(a).all() for a in biases.values()):
        raise ValueError("edits: a bias that is not finite")
    return ModelEdits(
        fingerprint=str(entry["fingerprint"]),
        scales=scales,
        inserted=tuple(str(t) for t in entry["inserted"]),
        unclipped=tuple(str(t) for t in entry["unclipped"]),
        biases=biases,
    )


def _spec(spec: QuantSpec) -> dict[str, Any]:
    entry: dict[str, Any] = {"format": spec.format.name}
    for name, default in _SPEC_DEFAULTS.items():
        value = getattr(spec, name)
        if value != default:
            entry[name] = value.name if name == "scale_format" else value
    return entry


def _read_spec(entry: Mapping[str, Any]) -> QuantSpec:
    options = {name: entry[name] for name in _SPEC_DEFAULTS if name in entry}
    if options.get("scale_format") is not None:
        options["scale_format"] = get_format(options["scale_format"])
    if options.get("block_shape") is not None:
        height, width = options["block_shape"]
        options["block_shape"] = (int(height), int(width))
    return QuantSpec(format=get_format(entry["format"]), **options)


def _array(array: np.ndarray, key: str, arrays: dict[str, np.ndarray]) -> Any:
    """Return the array for JSON: its numbers, or where it lies."""
    if array.dtype.kind not in "iuf":
        # Types that neither JSON nor safetensors know: the floats that they stand for, which hold them exactly.
        array = array.astype(np.float32)
    if array.size <= _IN_JSON:
        return array.tolist()
    arrays[key] = array
    return {"in": key}


def _plain(codes: NDArray[np.generic], spec: QuantSpec) -> NDArray[np.generic]:
    """Codes of few bits as bytes, where they are integers."""
    if spec.format.kind != "integer" or spec.format.bits > 8:
        return codes
    return codes.astype(np.int8 if spec.format.min < 0 else np.uint8)


def _read_array(entry: Any, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    if not isinstance(entry, dict):
        return np.asarray(entry)
    key = entry["in"]
    if key not in arrays:
        raise ValueError(f"{key} is not in the safetensors file beside it")
    return arrays[key]


def _codes(array: np.ndarray, spec: QuantSpec) -> NDArray[np.generic]:
    if array.size and not (spec.format.min <= array.min() and array.max() <= spec.format.max):
        raise ValueError(f"codes beyond {spec.format.name}")
    return array.astype(spec.format.dtype)


def _scale(scale: NDArray[np.float32], shape: tuple[int, ...] | None) -> NDArray[np.float32]:
    if (
        not np.all(np.isfinite(scale))
        or not np.all(scale >= 0)
        or (shape is not None and scale.shape != shape)
    ):
        raise ValueError("a scale is a positive number")
    return scale


def _readers(entries: Any) -> tuple[Reader, ...]:
    readers = tuple((str(node), int(index)) for node, index in entries)
    if any(index < 0 for _, index in readers):
        raise ValueError("readers: an input of a node is counted from 0")
    return readers


def _some_readers(entries: Any) -> tuple[Reader, ...]:
    readers = _readers(entries)
    if not readers:
        raise ValueError("nobody reads it: readers is empty")
    return readers

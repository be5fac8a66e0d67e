"""Caches from the calibration files of other tools, and such files from caches."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from quantkit import __version__
from quantkit.cache import IMPORTED, CalibrationCache, ModelIdentity
from quantkit.calibrators import Calibrator, solve_range
from quantkit.errors import CacheError, UnknownNameError
from quantkit.export.tensorrt import TARGET
from quantkit.files import atomic_write, check_output
from quantkit.formats import Range
from quantkit.graph import Graph, ModelLike, find_sites, load_graph, sharing_groups
from quantkit.interchange.aimet import write_aimet
from quantkit.interchange.onnxruntime import write_ort_flatbuffers, write_ort_json, write_ort_text
from quantkit.interchange.reading import read_table
from quantkit.interchange.tensorrt import Header, write_tensorrt
from quantkit.planning.presets import get_preset
from quantkit.planning.solve import calibrator_of, solve
from quantkit.statistics import FloatHistogram
from quantkit.tables import Cell, Table

EXPORT_FORMATS = ("tensorrt", "ort", "ort-json", "ort-flatbuffers", "aimet", "aimet-0.6.1")

# Names that a line holds; JSON has all of them.
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A cache of another tool's ranges, and how its names met the model's. All names are sorted.

    Attributes:
        cache: every range of the file, those the model has no use for too.
        used: tensors that can be quantized and have a range.
        missing: tensors that could be quantized, but the file says nothing of; what reads them stays in float.
        idle: tensors of the model that have a range, and no place where they would be quantized.
        cleaned_away: tensors of the model's file that went as the graph was cleaned: a BatchNormalization's input.
        unknown: names that are not in the model: what the other tool made up, "(Unnamed Layer* 48) …".
        left_out: name → why what the file says of it is no range of an activation.
    """

    cache: CalibrationCache
    used: tuple[str, ...]
    missing: tuple[str, ...]
    idle: tuple[str, ...]
    cleaned_away: tuple[str, ...]
    unknown: tuple[str, ...]
    left_out: Mapping[str, str]

    def table(self) -> Table:
        """Return how many names met, and which did not."""
        rows: list[tuple[Cell, ...]] = [("ranges used", len(self.used), "")]
        for what, names in (
            ("not in the file: stay in float", self.missing),
            ("not in the model", self.unknown),
            ("gone from the cleaned graph", self.cleaned_away),
            ("nothing to quantize there", self.idle),
        ):
            if names:
                rows.append((what, len(names), _some(names)))
        for reason in sorted(set(self.left_out.values())):
            names = tuple(name for name, why in self.left_out.items() if why == reason)
            rows.append((f"left out: {reason}", len(names), _some(names)))
        return Table(("tensors", "count", "names"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON would hold it."""
        return {
            **self.cache.data,
            "model": self.cache.model.path,
            "fingerprint": self.cache.model.fingerprint,
            "used": list(self.used),
            "not_in_file": list(self.missing),
            "not_in_model": list(self.unknown),
            "gone_from_graph": list(self.cleaned_away),
            "nothing_to_quantize": list(self.idle),
            "left_out": dict(self.left_out),
        }


@dataclass(frozen=True, kw_only=True)
class ExportedTable:
    """A written file of another tool.

    Attributes:
        path: the file.
        format: one of `EXPORT_FORMATS`.
        method: what solved its ranges.
        ranges: tensor name → the range written.
        left_out: name → why the tensor is not in the file.
    """

    path: Path
    format: str
    method: str
    ranges: Mapping[str, Range]
    left_out: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON would hold it."""
        return {
            "path": str(self.path),
            "format": self.format,
            "method": self.method,
            "ranges": {name: [float(r.lo), float(r.hi)] for name, r in self.ranges.items()},
            "left_out": dict(self.left_out),
        }


def import_cache(file: str | os.PathLike[str], model: ModelLike, *, format: str | None = None) -> Imported:
    """Return the fixed ranges that a calibration file of TensorRT, ONNX Runtime or AIMET holds, for a model.

    Names are those of the model's tensors; they meet the graph as quantkit cleans it, where most keep their names.

    Args:
        file: the other tool's file.
        model: the float model that it was calibrated with.
        format: tensorrt, ort or aimet; None to tell it from the content.

    Raises:
        CacheError: the file cannot be read or is damaged, or no tensor of it can be quantized in this model.
        ModelError: the model cannot be read.
    """
    table = read_table(file, format)
    graph = load_graph(model)
    weights = graph.model.graph.initializers
    left_out = dict(table.left_out) | {name: "a weight" for name in table.ranges if name in weights}
    ranges = {name: range_ for name, range_ in table.ranges.items() if name not in left_out}
    quantizable = {site.name for site in find_sites(graph)[0] if site.role not in ("weight", "embedding")}
    original = _names(model) | graph.values.keys()
    what = str(graph.path or graph.name)
    if not quantizable & ranges.keys():
        raise CacheError(
            f"{file}: none of its {len(ranges)} tensors ({_some(sorted(ranges)) or 'none at all'}) is one that {what} "
            "could quantize; name the model that it was calibrated with."
        )
    cache = CalibrationCache(
        model=ModelIdentity(
            path=str(graph.path) if graph.path else "", name=graph.name, fingerprint=graph.fingerprint
        ),
        statistics={},
        sample_fingerprints=np.empty(0, np.uint64),
        data={"file": str(file), "format": table.format, "written_by": table.written_by},
        method=IMPORTED,
        method_options={},
        probe={},
        versions={"quantkit": __version__},
        ranges=ranges,
    )
    return Imported(
        cache=cache,
        used=tuple(sorted(ranges.keys() & quantizable)),
        missing=tuple(sorted(quantizable - ranges.keys())),
        idle=tuple(sorted((ranges.keys() & graph.values.keys()) - quantizable)),
        cleaned_away=tuple(sorted((ranges.keys() & original) - graph.values.keys())),
        unknown=tuple(sorted(ranges.keys() - original)),
        left_out=dict(sorted(left_out.items())),
    )


def export_cache(
    cache: CalibrationCache | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str,
    method: str | None = None,
    method_options: Mapping[str, Any] | None = None,
    model: ModelLike | None = None,
    trt: str | None = None,
    algorithm: str | None = None,
) -> ExportedTable:
    """Solve the ranges of a cache for int8 as TensorRT means it, and write them as another tool's file.

    The ranges are those of `export_model(preset="int8", target="tensorrt")`, and so are the scales, to the last bit,
    but in AIMET's encodings: of a range that is not ±amax those are asymmetric, see `write_aimet`. Tensors that are not
    quantized there, such as a convolution's output, have a range too: TensorRT wants one of every tensor.

    Args:
        cache: a cache or its path, measured or imported.
        out: the file to write.
        format: tensorrt, ort (text), ort-json, ort-flatbuffers, aimet (1.0.0) or aimet-0.6.1.
        method: the calibration method; None for the cache's.
        method_options: its options.
        model: the float model; None for the one the cache was made from. Fixed ranges need none.
        trt: for tensorrt, the version of TensorRT that the file names, without dots; None for that of the imported
            file, or 8601.
        algorithm: for tensorrt, one of `tensorrt.ALGORITHMS`; None for that of the imported file, or
            EntropyCalibration2, which trtexec and Polygraphy look for.

    Raises:
        CacheError: the cache is damaged, of another model, or its model is not there; a name that does not fit.
        UnknownNameError: no such format or method.
        FileError: the file cannot be written, or is an input.
    """
    if format not in EXPORT_FORMATS:
        raise UnknownNameError(f"format {format}: no such format; choose one of {', '.join(EXPORT_FORMATS)}.")
    if format != "tensorrt" and (trt or algorithm):
        raise CacheError(
            f"format {format}: has no TensorRT version or algorithm; give those with tensorrt alone."
        )
    held = cache if isinstance(cache, CalibrationCache) else CalibrationCache.load(cache)
    calibrator = calibrator_of(held, method, method_options)
    header = _header(held, trt, algorithm)
    check_output(
        out, inputs=[held.model.path or None, None if isinstance(cache, CalibrationCache) else cache]
    )
    ranges: Mapping[str, Range] = held.ranges
    left_out: dict[str, str] = {}
    if calibrator is not None:
        ranges, left_out = _solve_all(held, _graph_of(held, model), calibrator)
    used = IMPORTED if calibrator is None else calibrator.name
    path = Path(out)
    content = _encode(ranges, format, header, used, str(path))
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return ExportedTable(path=path, format=format, method=used, ranges=ranges, left_out=left_out)


def _encode(ranges: Mapping[str, Range], format: str, header: Header, method: str, what: str) -> bytes:
    match format:
        case "tensorrt":
            return write_tensorrt(ranges, header, what)
        case "ort":
            return write_ort_text(ranges, what)
        case "ort-json":
            return write_ort_json(ranges, method)
        case "ort-flatbuffers":
            return write_ort_flatbuffers(ranges)
        case "aimet-0.6.1":
            return write_aimet(ranges, "0.6.1")
        case _:
            return write_aimet(ranges)


def _header(cache: CalibrationCache, trt: str | None, algorithm: str | None) -> Header:
    known = Header.parse(str(cache.data.get("written_by", ""))) or Header()
    return Header(version=trt or known.version, algorithm=algorithm or known.algorithm)


def _graph_of(cache: CalibrationCache, model: ModelLike | None) -> Graph:
    """The model, which says what tensors share a scale."""
    if model is None and not (cache.model.path and Path(cache.model.path).exists()):
        raise CacheError(
            f"cache: its model {cache.model.path or cache.model.name} is not there; give the model too."
        )
    graph = load_graph(cache.model.path if model is None else model)
    cache.check_model(graph.fingerprint, str(graph.path or graph.name))
    return graph


def _solve_all(
    cache: CalibrationCache, graph: Graph, calibrator: Calibrator
) -> tuple[dict[str, Range], dict[str, str]]:
    """The range of every tensor, and of those that have none the reason."""
    histograms, left_out = {}, {}
    for name, tensor in cache.statistics.items():
        seen = tensor.histogram
        if seen.finite_count == 0:
            left_out[name] = "no value was observed"
        elif seen.nan_count or seen.inf_count:
            left_out[name] = "NaN or infinity was observed"
        else:
            histograms[name] = seen
    preset = get_preset("int8")
    every = {name: tensor.histogram for name, tensor in cache.statistics.items()}
    plan = solve(graph, every, preset=preset, target=TARGET, calibrator=calibrator)
    ranges = {a.name: a.range for a in plan.activations.values() if a.range is not None}
    tied = sharing_groups(graph)
    for group in [*tied, *({name} for name in histograms)]:
        bare = sorted((group & histograms.keys()) - ranges.keys())
        if not bare:
            continue
        # What is quantized in the group has one range already: the others share it.
        known = next((ranges[name] for name in sorted(group & ranges.keys())), None)
        if known is None:
            merged = reduce(FloatHistogram.merge, (histograms[name] for name in bare))
            known = solve_range(calibrator, merged, TARGET.int8_activations, tensor=bare[0])
        ranges |= dict.fromkeys(bare, known)
    return dict(sorted(ranges.items())), left_out


def _names(model: ModelLike) -> set[str]:
    """The tensors of the main graph before it is cleaned."""
    if isinstance(model, Graph):
        return set(model.values)
    if isinstance(model, onnx.ModelProto):
        nodes = model.graph.node
        return {i.name for i in model.graph.input} | {name for node in nodes for name in node.output}
    graph = (model if isinstance(model, ir.Model) else ir.load(Path(model))).graph
    return {str(v.name) for v in graph.inputs} | {str(v.name) for node in graph for v in node.outputs}


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

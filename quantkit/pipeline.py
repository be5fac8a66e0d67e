"""The Python API: calibrate a model, export it, evaluate it. The command line calls these and nothing else.

cache = quantkit.calibrate_model("model.onnx", "calib/", method="entropy")
exported = quantkit.export_model("model.onnx", cache, preset="int8")
quantkit.evaluate_model("model.onnx", exported.path, "eval/", labels="labels.npy")
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tqdm import tqdm

from quantkit import __version__
from quantkit.cache import CalibrationCache, ModelIdentity
from quantkit.calibrators import get_calibrator
from quantkit.data import ImagePreprocessing, SampleSource, fill_batch, open_data, open_labels
from quantkit.diagnose import clipping_warnings
from quantkit.errors import CacheError, DataError
from quantkit.evaluate import evaluate
from quantkit.evaluation import Evaluation
from quantkit.export import get_emitter
from quantkit.export.verify import Verification, verify
from quantkit.files import atomic_write, check_output
from quantkit.formats import Range
from quantkit.graph import Graph, ModelLike, load_graph
from quantkit.interchange.probe import made_up_probe
from quantkit.model_files import model_files
from quantkit.observe import observe
from quantkit.plan import Plan
from quantkit.presets import get_preset
from quantkit.solve import calibrator_of, solve, weight_method_of
from quantkit.tables import Cell, Table

# Files beyond this keep their weights beside them: protobuf holds 2 GiB at most.
_EXTERNAL_BYTES = 2**31 - 2**24


def calibrate_model(
    model: ModelLike,
    data: object,
    *,
    method: str = "entropy",
    method_options: Mapping[str, Any] | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    image: ImagePreprocessing | None = None,
    mapping: Mapping[str, str] | None = None,
    max_memory: int | None = None,
    progress: bool = False,
) -> CalibrationCache:
    """Run the float model once over the data and return the statistics of everything that could be quantized.

    The cache serves every method, format and target; `method` is only what an export takes unless told otherwise.

    Args:
        model: path of an .onnx file, or a model in memory.
        data: a path or Python data; see `quantkit.data.open_data`.
        method: entropy, minmax, percentile, mse, or a plug-in's.
        method_options: its options, such as {"percentile": 99.99}.
        samples: at most so many, from the start.
        batch_size: samples to run at a time; None for what memory allows, at most 32.
        image: how pixels become input values.
        mapping: {input: key} where the arrays are not named as the inputs.
        max_memory: bytes that fetched tensors may take; None for 96 MiB, and for what a given batch size needs.
        progress: show a bar.

    Raises:
        ModelError: the model cannot be read or run.
        DataError: the data are missing or do not fit.
        UnknownNameError, SpecError: the method or its options are unknown.
    """
    options = dict(method_options or {})
    get_calibrator(method, **options)
    graph = load_graph(model)
    source = open_data(data, graph.inputs, image=image, samples=samples, mapping=mapping)
    with _bar("calibrate", source, progress) as bar:
        found = observe(
            graph,
            source,
            batch_size=batch_size,
            max_memory=max_memory,
            on_samples=lambda count: bar.update(count),
        )
    return CalibrationCache(
        model=ModelIdentity(
            path=str(graph.path) if graph.path else "", name=graph.name, fingerprint=graph.fingerprint
        ),
        statistics=found.statistics,
        sample_fingerprints=found.fingerprints,
        data=source.description,
        method=method,
        method_options=options,
        probe=found.probe,
        versions=_versions(),
    )


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written model.

    Attributes:
        path: the file.
        plan: what was quantized, how, and what was not.
        size_bytes: of the file and its external data.
        float_size_bytes: of the float model's weights.
        verification: what running it once showed; None where the cache held no sample to run.
        warnings: what the user should know before trusting it.
    """

    path: Path
    plan: Plan
    size_bytes: int
    float_size_bytes: int
    verification: Verification | None
    warnings: tuple[str, ...] = ()

    def table(self) -> Table:
        """Return what was quantized, by operator, and what was left, by reason."""
        done: dict[str, int] = {}
        for op_type in self.plan.nodes.values():
            done[op_type] = done.get(op_type, 0) + 1
        kept: dict[tuple[str, str], int] = {}
        for left in self.plan.left:
            kept[left.op_type, left.reason] = kept.get((left.op_type, left.reason), 0) + 1
        rows: list[tuple[Cell, ...]] = [(op_type, count, None, "") for op_type, count in sorted(done.items())]
        rows += [(op_type, None, count, reason) for (op_type, reason), count in sorted(kept.items())]
        return Table(("operator", "quantized", "float", "why"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON would hold it."""
        return {
            "path": str(self.path),
            "model": self.plan.model,
            "preset": self.plan.preset,
            "target": self.plan.target,
            "method": self.plan.method,
            "quantized": dict(self.plan.nodes),
            "left_in_float": [
                {"node": left.node, "op_type": left.op_type, "reason": left.reason} for left in self.plan.left
            ],
            "activations": {
                name: {
                    "format": str(a.spec),
                    "scale": float(a.qparams.scale),
                    "zero_point": None if a.qparams.zero_point is None else int(a.qparams.zero_point),
                    "range": [float(a.range.lo), float(a.range.hi)],
                }
                for name, a in self.plan.activations.items()
            },
            "size_bytes": self.size_bytes,
            "float_size_bytes": self.float_size_bytes,
            "warnings": list(self.warnings),
            "verified_sqnr_db": None
            if self.verification is None
            else _finite(self.verification.plan_sqnr_db),
        }

    def __str__(self) -> str:
        return self.table().text()

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"Exported(path={str(self.path)!r}, preset={plan.preset!r}, target={plan.target!r}, "
            f"method={plan.method!r}, quantized={len(plan.nodes)}, left_in_float={len(plan.left)})"
        )

    def _repr_html_(self) -> str:
        return self.table().html()


def export_model(
    model: ModelLike | None,
    cache: CalibrationCache | str | os.PathLike[str] | None = None,
    *,
    preset: str = "int8",
    method: str | None = None,
    method_options: Mapping[str, Any] | None = None,
    target: str = "tensorrt",
    everything: bool = False,
    group: int | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Exported:
    """Solve a plan from the cache and write the quantized model; the float model is not run over data again.

    The file is opened again, checked, run once on a sample that the cache keeps, and compared with NumPy's reading
    of the plan before it gets its name.

    Args:
        model: the float model; None for the one the cache was made from.
        cache: a cache or its path; None for a preset that quantizes weights alone.
        preset: int8, fp8, or int4 (weights alone).
        method: the calibration method; None for the cache's. For int4 how weights are solved, mse (unless given) or
            amax.
        method_options: its options.
        target: tensorrt, ort, ort-cpu, or a plug-in's.
        everything: quantize also what the preset leaves in float for speed or accuracy.
        group: weights that share a scale, for presets in groups (int4); None for 128.
        out: the file to write; None for `<stem>.<preset>[.<target> unless tensorrt].onnx` in the current folder.

    Raises:
        CacheError: the cache is damaged or of another model, or its ranges are fixed and `method` is another one.
        ExportError: the written file failed its check.
        FileError: it could not be written, or is one of the float model's, or the cache.
    """
    held = CalibrationCache.load(cache) if isinstance(cache, str | os.PathLike) else cache
    emitter, wanted = get_emitter(target), get_preset(preset, block_size=group)
    if held is None and (wanted.activations is not None or model is None):
        raise CacheError(
            f"export: {preset} needs {'a calibration cache' if wanted.activations else 'the model, or its cache'}; "
            "give one, or run `quantkit calibrate` first."
        )
    weight_method = weight_method_of(wanted, method)
    calibrator = (
        None if held is None or wanted.activations is None else calibrator_of(held, method, method_options)
    )
    if model is None:
        assert held is not None
        model = held.find_model("cache" if isinstance(cache, CalibrationCache | None) else cache)
    graph = load_graph(model)
    if held is not None:
        held.check_model(graph.fingerprint, str(graph.path or graph.name))
    path = Path(out) if out is not None else Path(default_name(graph.name, preset, target))
    read = [
        *(model_files(graph.path) if graph.path else ()),
        None if isinstance(cache, CalibrationCache) else cache,
    ]
    check_output(path, inputs=read)
    if graph.weight_bytes > _EXTERNAL_BYTES:
        check_output(_external(Path(os.path.realpath(path))), inputs=read)
    histograms = {} if held is None else {name: s.histogram for name, s in held.statistics.items()}
    ranges = {} if held is None else held.ranges
    plan = solve(
        graph,
        histograms,
        preset=wanted,
        target=emitter.target,
        calibrator=calibrator,
        everything=everything,
        ranges=ranges,
        weight_method=weight_method,
    )
    written = emitter.emit(graph, plan)
    probe = {} if held is None else fill_batch(dict(held.probe), graph.inputs)
    if held is None or ranges:
        probe = made_up_probe(graph, ranges)
    with atomic_write(path) as temporary:
        save(written, temporary)
        checked = verify(temporary, graph, plan, probe) if probe else None
        size = sum(file.stat().st_size for file in temporary.parent.iterdir())
    return Exported(
        path=path,
        plan=plan,
        size_bytes=size,
        float_size_bytes=graph.weight_bytes,
        verification=checked,
        warnings=tuple(
            _made_up_warnings(plan, probe, ranges)
            if held is None or ranges
            else clipping_warnings(plan, histograms)
        ),
    )


def evaluate_model(
    model: ModelLike,
    quantized: str | os.PathLike[str] | Graph,
    data: object,
    *,
    labels: object = None,
    per_layer: bool = False,
    optimize: bool = False,
    samples: int | None = None,
    batch_size: int | None = None,
    image: ImagePreprocessing | None = None,
    mapping: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run both models over the data and say what the quantized one lost.

    Args:
        model: the float model.
        quantized: the quantized file.
        data: as for `calibrate_model`.
        labels: a path or array of integers, one a sample (or a row a sample for sequences); "next-token" for the
            model's own integer input shifted by one; None for a comparison of outputs alone.
        per_layer: also the SQNR of every linear operator's output.
        optimize: run the quantized file with all of ONNX Runtime's optimizations. By default it is judged at
            ORT_ENABLE_BASIC: above that, and in one pass even there, the CPU provider changes some quantized models.
        samples: at most so many, from the start.
        batch_size: samples to run at a time.
        image, mapping, progress: as for `calibrate_model`.

    Raises:
        ModelError, DataError: see `calibrate_model`; also when the two files are not of one network, or there are not
            as many labels as samples (with `samples`, labels beyond it are left aside).
    """
    graph = load_graph(model)
    source = open_data(data, graph.inputs, image=image, samples=samples, mapping=mapping)
    next_token = isinstance(labels, str) and labels == "next-token"
    known = None if labels is None or next_token else _labels_of(source, labels, limited=samples is not None)
    with _bar("evaluate", source, progress) as bar:
        return evaluate(
            graph,
            quantized if isinstance(quantized, Graph) else Path(quantized),
            source,
            labels=known,
            next_token=next_token,
            per_layer=per_layer,
            optimize=optimize,
            batch_size=batch_size,
            on_samples=lambda count: bar.update(count),
        )


def _made_up_warnings(
    plan: Plan, probe: Mapping[str, NDArray[Any]], ranges: Mapping[str, Range]
) -> list[str]:
    """What an export without a real sample leaves open."""
    why = "the imported ranges come without a sample" if ranges else "no calibration, so no sample"
    found = [
        f"{why}: the file was run on made-up input alone; evaluate it on real data"
        if probe
        else f"{why}, and no made-up input runs: the file was not run; evaluate it on real data"
    ]
    if ranges and any(
        (a.spec.format.kind, a.spec.format.bits) != ("integer", 8) for a in plan.activations.values()
    ):
        found.append(
            f"the imported ranges were chosen for 8-bit integers, and {plan.preset} clips at them too; "
            "ranges of its own need `quantkit calibrate`"
        )
    return found


def default_name(stem: str, preset: str, target: str) -> str:
    """Return the name of the exported file: `<stem>.<preset>[.<target> unless tensorrt].onnx`."""
    return f"{stem}.{preset}.onnx" if target == "tensorrt" else f"{stem}.{preset}.{target}.onnx"


def save(model: ir.Model, path: Path) -> None:
    """Write the model, its weights beside it where protobuf could not hold them."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=_external(path).name if size > _EXTERNAL_BYTES else None)


def _external(path: Path) -> Path:
    """The file beside a model that holds its weights, where they are many."""
    return path.with_name(f"{path.name}.data")


def _labels_of(source: SampleSource, labels: object, *, limited: bool) -> NDArray[np.int64]:
    """The labels, as many as there are samples, as far as their number is known beforehand."""
    known, count = open_labels(labels), _count(source)
    if count is not None and (len(known) < count or (len(known) > count and not limited)):
        what = labels if isinstance(labels, str | os.PathLike) else "labels"
        raise DataError(
            f"{what}: {len(known)} labels for {count} samples; give one a sample, in their order."
        )
    return known


def _bar(what: str, source: SampleSource, progress: bool) -> "tqdm[NoReturn]":
    # Short work shows no bar; what takes longer shows that it lives.
    return tqdm(total=_count(source), desc=what, unit="sample", disable=not progress, leave=False, delay=0.5)


def _count(source: SampleSource) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


def _versions() -> dict[str, str]:
    found = {"quantkit": __version__}
    for package in ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            # Only one of the two ONNX Runtimes is ever installed.
            continue
    return found


def _finite(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)

"""Running models over data: calibrate a float model, evaluate a quantized one. What lies between is `exporting`.

cache = quantkit.calibrate_model("model.onnx", "calib/", method="entropy")
exported = quantkit.export_model("model.onnx", cache, preset="int8")
quantkit.evaluate_model("model.onnx", exported.path, "eval/", labels="labels.npy")
"""

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from quantkit import __version__
from quantkit.cache import CalibrationCache, ModelIdentity
from quantkit.calibrators import get_calibrator
from quantkit.data import ImagePreprocessing, SampleSource, open_data, open_labels
from quantkit.errors import DataError
from quantkit.evaluate import evaluate
from quantkit.evaluation import Evaluation
from quantkit.graph import Graph, ModelLike, load_graph
from quantkit.observe import observe


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

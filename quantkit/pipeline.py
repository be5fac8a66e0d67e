"""Running models over data: calibrate a float model, evaluate a quantized one. What lies between is `exporting`.

cache = quantkit.calibrate_model("model.onnx", "calib/", method="entropy")
exported = quantkit.export_model("model.onnx", cache, preset="int8")
quantkit.evaluate_model("model.onnx", exported.path, "eval/", labels="labels.npy")
"""

import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from quantkit import __version__
from quantkit.cache import CalibrationCache, ModelIdentity
from quantkit.cache.gram_file import write_grams
from quantkit.calibrators import get_calibrator
from quantkit.data import ImagePreprocessing, SampleSource, open_data, open_labels
from quantkit.errors import DataError, ModelError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.evaluation import Evaluation
from quantkit.graph import Graph, ModelLike, load_graph
from quantkit.graph.linears import find_linears
from quantkit.observing.grams import GramWork, divide_grams, observe_grams
from quantkit.observing.observe import observe
from quantkit.planning.methods import parse_methods


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
    device: str = "cpu",
    progress: bool = False,
) -> CalibrationCache:
    """Run the float model once over the data and return the statistics of everything that could be quantized.

    The cache serves every method, format and target; `method` is only what an export takes unless told otherwise.

    Args:
        model: path of an .onnx file, or a model in memory.
        data: a path or Python data; see `quantkit.data.open_data`.
        method: entropy, minmax, percentile, mse, or a plug-in's, alone or with methods that protect accuracy
            ("smoothquant+percentile", "awq+gptq"); those that need Gram matrices need `collect_grams` too.
        method_options: the calibrator's options, such as {"percentile": 99.99}.
        samples: at most so many, from the start.
        batch_size: samples to run at a time; None for what memory allows, at most 32.
        image: how pixels become input values.
        mapping: {input: key} where the arrays are not named as the inputs.
        max_memory: bytes that fetched tensors may take; None for 96 MiB (1 GiB of a GPU's), and for what a given batch
            size needs.
        device: "cpu", or "cuda" to run the model by ONNX Runtime's CUDA provider and reduce tensors where they lie.
        progress: show a bar.

    Raises:
        ModelError: the model cannot be read or run.
        DataError: the data are missing or do not fit.
        UnknownNameError, SpecError: the method or its options are unknown.
    """
    options = dict(method_options or {})
    ranges = parse_methods(method).ranges
    if ranges is not None:
        get_calibrator(ranges, **options)
    graph = load_graph(model)
    source = open_data(data, graph.inputs, image=image, samples=samples, mapping=mapping)
    with _bar("calibrate", source, progress) as bar:
        found = observe(
            graph,
            source,
            batch_size=batch_size,
            max_memory=max_memory,
            device=device,
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


def collect_grams(
    model: ModelLike,
    data: object,
    path: str | os.PathLike[str],
    *,
    samples: int | None = None,
    batch_size: int | None = None,
    image: ImagePreprocessing | None = None,
    mapping: Mapping[str, str] | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    on_work: Callable[[GramWork], object] = lambda work: None,
    progress: bool = False,
) -> GramWork:
    """Run the float model over the data and write the Gram matrices of its linear layers' inputs to a file.

    They are what AWQ and GPTQ solve from. `export_model` finds them beside a cache of the same stem, in `<stem>.gram`.

    Args:
        model, data, samples, batch_size, image, mapping, progress: as for `calibrate_model`; the data are gone through
            once a pass.
        path: the file to write.
        max_memory: bytes for the matrices of a pass and the tensors of a batch; where not all matrices fit, the model
            runs once for every part of them that does. None for 1 GiB.
        device: "cpu", or "cuda" to run the model and multiply its tensors on a GPU.
        on_work: called with what it will take before anything is run.

    Returns:
        What it took: passes, memory, the file's bytes.

    Raises:
        ModelError, DataError: as `calibrate_model`; or there is no linear layer.
        FileError: the file cannot be written there.
    """
    graph = load_graph(model)
    source = open_data(data, graph.inputs, image=image, samples=samples, mapping=mapping)
    linears = find_linears(graph)
    if not linears:
        raise ModelError(
            f"{graph.path or graph.name}: no Conv, MatMul or Gemm with a constant weight, so there are no Gram "
            "matrices to collect; leave them out."
        )
    work = divide_grams(graph, source, linears.values(), batch_size=batch_size, max_memory=max_memory)
    on_work(work)
    text = {
        "model": graph.name,
        "fingerprint": graph.fingerprint,
        "data": source.description,
        "versions": _versions(),
    }
    sizes = {view: (work.views[view].groups, work.views[view].size) for part in work.passes for view in part}
    with _bar("collect", source, progress, passes=len(work.passes)) as bar:
        found = observe_grams(graph, source, work, device=device, on_samples=lambda count: bar.update(count))
        write_grams(path, text, sizes, found)
    return work


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


def _bar(what: str, source: SampleSource, progress: bool, *, passes: int = 1) -> "tqdm[NoReturn]":
    # Short work shows no bar; what takes longer shows that it lives.
    count = _count(source)
    return tqdm(
        total=count and count * passes, desc=what, unit="sample", disable=not progress, leave=False, delay=0.5
    )


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

"""Which model, cache and data a benchmark is of, and what cannot be opened."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from quantkit.bench.cases import Products, cases_of_model
from quantkit.bench.feeding import fits
from quantkit.cache import CalibrationCache, find_cache
from quantkit.data import ImagePreprocessing, SampleSource, open_data
from quantkit.errors import CacheError, ModelError, QuantkitError, SpecError
from quantkit.graph import Graph, ModelLike, load_graph
from quantkit.graph.clean import NEWEST_OPSET, quiet
from quantkit.runtime import Session, reason


def products_of(
    model: ModelLike | None,
    cache: CalibrationCache | str | os.PathLike[str] | None,
    *,
    formats: Sequence[str] | None,
    batches: Sequence[int],
    data: object = None,
    image: ImagePreprocessing | None = None,
    mapping: Mapping[str, str] | None = None,
    dims: Mapping[str, int] | None = None,
) -> tuple[Products, str]:
    """Return the products of a model, as `bench_model` runs them, and its name.

    Raises:
        ModelError, DataError, CacheError, UnknownNameError, SpecError: as `bench_model` does.
    """
    if min(batches, default=0) < 1:
        raise SpecError(f"batch {', '.join(map(str, batches))}: give sizes from 1 up.")
    held = CalibrationCache.load(cache) if isinstance(cache, str | os.PathLike) else cache
    if model is None:
        path = None if held is not None else find_cache(".")
        held = held or CalibrationCache.load(path or "")
        model = held.find_model(path or "cache")
        graph = load_graph(model)
        held.check_model(graph.fingerprint, str(graph.path or graph.name))
    else:
        graph = _opened(model)
        if held is None:
            held = _cache_here(graph)
        elif not _serves(held, graph):
            raise CacheError(
                f"{cache if isinstance(cache, str | os.PathLike) else 'cache'}: is of the model {held.model.name}, "
                f"whose inputs {graph.name} does not have; name the cache of its float model, or leave --cache out."
            )
    source: SampleSource | None = None
    if data is not None:
        source = open_data(data, graph.inputs, image=image, mapping=mapping)
    try:
        found = cases_of_model(
            graph, formats=formats, batches=batches, cache=held, source=source, dims=dims or {}
        )
    except (QuantkitError, MemoryError):
        raise
    except Exception as error:
        # A quantized file is read as it lies, which a damaged one does not survive: whose fault it is, ONNX says.
        said = _why_invalid(graph)
        if said is None:
            raise
        raise ModelError(
            f"{graph.path or graph.name}: not a valid ONNX model ({said}); export it again."
        ) from error
    return found, graph.name


def _why_invalid(graph: Graph) -> str | None:
    """What ONNX's checker says of a model, else ONNX Runtime, which knows operators of its own; None for nothing."""
    try:
        onnx.checker.check_model(
            ir.to_proto(graph.model) if graph.path is None else str(graph.path), full_check=True
        )
        Session(graph.path or graph.model, optimize=False)
    except Exception as error:
        return reason(error.__cause__ or error)
    return None


def _opened(model: ModelLike) -> Graph:
    """The graph of a model, also of a file whose scales are of a type that came with a newer operator set (E8M0)."""
    if isinstance(model, str | os.PathLike) and (Path(model) / "config.json").is_file():
        raise ModelError(
            f"{os.fspath(model)}: is a folder for vLLM, which holds no graph to take shapes from; "
            "give the ONNX model that it was made of, and --format."
        )
    if isinstance(model, str | os.PathLike) and os.path.isfile(model):
        try:
            with quiet():
                raw = ir.load(model)
        except Exception:
            # `load_graph` says what is wrong with it.
            return load_graph(model)
        if raw.graph.opset_imports.get("", 0) == NEWEST_OPSET + 1 and any(
            value.dtype == ir.DataType.FLOAT8E8M0 for value in raw.graph.initializers.values()
        ):
            # Nothing but these scales is of that operator set, and they are read here, not run.
            raw.graph.opset_imports[""] = NEWEST_OPSET
            path = Path(model)
            return Graph(load_graph(raw).model, path.stem, path)
    return load_graph(model)


def _cache_here(graph: Graph) -> CalibrationCache | None:
    """The cache of this folder, if it is of a model with these inputs: the float one of a quantized file."""
    try:
        held = CalibrationCache.load(find_cache("."))
    except CacheError:
        # Real activations are a gift: without a cache, or with several, they are drawn otherwise, and that is told.
        return None
    return held if _serves(held, graph) else None


def _serves(held: CalibrationCache, graph: Graph) -> bool:
    """Whether a cache is of this model, or of one with the same inputs, as a quantized file's float model is."""
    return held.model.fingerprint == graph.fingerprint or fits(held.probe, graph.inputs)

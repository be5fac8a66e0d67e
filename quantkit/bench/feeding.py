"""What a model is run on, so that its products have shapes and real activations."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray

from quantkit.bench.fetching import PART_BYTES, Fetched, shapes_of
from quantkit.cache import CalibrationCache
from quantkit.data import (
    InputSpec,
    Sample,
    SampleSource,
    batch_axes,
    batch_length,
    batches,
    fill_batch,
    fixed_batch_size,
    reopen_data,
)
from quantkit.decode import decode
from quantkit.errors import DataError, ModelError
from quantkit.graph import Graph
from quantkit.statistics import FloatHistogram

# Samples of the batch that activations are taken from, where their tensors are no larger together than a part.
_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The tensors that products read, of one run.

    Attributes:
        shapes: of each tensor, for `samples` samples.
        tensors: their contents; empty where the model was run on made-up input, or not at all.
        samples: how many were run together.
        origin: in words, where activations come from.
        histograms: of the calibration, by tensor, to draw from where there are no tensors.
        failure: why the model could not be run on the input that there was; "" where it was, or there was none.
    """

    shapes: Mapping[str, tuple[int, ...]]
    samples: int
    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    origin: str = "random numbers"
    histograms: Mapping[str, FloatHistogram] = field(default_factory=dict)
    failure: str = ""


def capture(
    graph: Graph,
    together: Sequence[Sequence[str]],
    *,
    cache: CalibrationCache | None,
    source: SampleSource | None,
    dims: Mapping[str, int],
) -> Captured:
    """Run the model on one batch and return the tensors of these names, with their shapes.

    The batch is of `source`, else of the data that `cache` was made from, else the sample it keeps; with none of
    them, or where `dims` gives another size than they have, the input is made up, for the shapes alone. Where the
    tensors of a whole batch are large, it is one sample. Contents are fetched when they are asked for.

    Args:
        together: the names that each layer reads.

    Raises:
        DataError: without real input, a free dimension besides the batch has no size in `dims`; `dims` names one that
            there is not, or another size than `source` has.
        ModelError: neither ONNX Runtime nor shape inference finds the shapes; it cannot be run on `source`.
    """
    inputs = graph.inputs
    _check_dims(dims, inputs, graph.name)
    histograms = {} if cache is None else {n: s.histogram for n, s in cache.statistics.items()}
    found = _real(inputs, cache, source)
    other = {} if found is None else _other_sizes(found[0], inputs, dims)
    if found is not None and other:
        if source is not None:
            name, size = next(iter(other.items()))
            raise DataError(
                f"{found[1]}: dimension {name} has size {size} there, not {dims[name]}; leave out --dim, or --data."
            )
        found = None
    batch, origin = found if found is not None else (_made_up(inputs, dims, graph.name), "")
    axes = batch_axes(inputs)
    wanted = list(dict.fromkeys(name for names in together for name in names))
    try:
        model, shapes = _run(graph, wanted, batch)
        several = batch_length(batch, axes) > 1 and fixed_batch_size(inputs) is None
        if several and 4 * sum(map(prod, shapes.values())) > PART_BYTES:
            batch = {name: _first(array, axes[name]) for name, array in batch.items()}
            model, shapes = _run(graph, wanted, batch)
    except ModelError as error:
        if source is not None:
            raise
        shapes = _inferred(graph, wanted, batch)
        failure = str(error) if found is not None else ""
        return Captured(
            shapes=shapes, samples=batch_length(batch, axes), histograms=histograms, failure=failure
        )
    samples = batch_length(batch, axes)
    if found is None:
        return Captured(shapes=shapes, samples=samples, histograms=histograms)
    tensors = Fetched(model, batch, together, shapes)
    return Captured(shapes=shapes, samples=samples, tensors=tensors, origin=origin, histograms=histograms)


def _run(graph: Graph, names: Sequence[str], batch: Sample) -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
    """Return the model as ONNX Runtime runs it, and the shapes that these tensors have then.

    Raises:
        ModelError: ONNX Runtime can run it in no way.
    """
    # What is fed is not asked back: ONNX Runtime would hand out the memory of the batch, which is gone first.
    made = [name for name in names if name not in batch]
    fed = {name: tuple(batch[name].shape) for name in names if name in batch}
    try:
        return graph.model, fed | shapes_of(graph.model, made, batch)
    except ModelError as error:
        # It lacks kernels for four-bit floats, MX scales and TensorRT's operators: what they mean can be run.
        with suppress(ModelError):
            decoded = decode(graph.model)
            if {str(value.name) for node in decoded.graph for value in node.outputs}.issuperset(made):
                return decoded, fed | shapes_of(decoded, made, batch)
        raise error


def _first(array: NDArray[Any], axis: int | None) -> NDArray[Any]:
    """The first sample of a batch, as a batch of one."""
    return array if axis is None else np.ascontiguousarray(np.take(array, [0], axis))


def _real(
    inputs: Sequence[InputSpec], cache: CalibrationCache | None, source: SampleSource | None
) -> tuple[Sample, str] | None:
    if source is None and cache is not None:
        try:
            source = reopen_data(cache.data, inputs)
        except DataError:
            # They have been moved, or came from Python: the cache keeps one sample for such a day.
            source = None
    if source is not None:
        batch = next(iter(batches(source, inputs, _SAMPLES)))
        return batch, _name_of(source)
    if cache is not None and fits(cache.probe, inputs):
        return fill_batch(dict(cache.probe), inputs), "the sample that the cache keeps"
    return None


def fits(sample: Mapping[str, NDArray[Any]], inputs: Sequence[InputSpec]) -> bool:
    """Return whether a sample is one that these inputs take: names, types, ranks, and sizes beside the batch."""
    axes = batch_axes(inputs)
    return {spec.name for spec in inputs} == set(sample) and all(
        sample[spec.name].dtype == spec.dtype
        and sample[spec.name].ndim == len(spec.shape)
        and all(
            not isinstance(dim, int) or axis == axes[spec.name] or dim == size
            for axis, (dim, size) in enumerate(zip(spec.shape, sample[spec.name].shape, strict=True))
        )
        for spec in inputs
    )


def _name_of(source: SampleSource) -> str:
    path = source.description.get("path")
    return Path(path).name if isinstance(path, str) else "the data given"


def _check_dims(dims: Mapping[str, int], inputs: Sequence[InputSpec], name: str) -> None:
    axes = batch_axes(inputs)
    free = dict.fromkeys(
        dim
        for spec in inputs
        for axis, dim in enumerate(spec.shape)
        if isinstance(dim, str) and axis != axes[spec.name]
    )
    for dim in dims:
        if dim not in free:
            has = f"it has {', '.join(free)}" if free else "it has none"
            raise DataError(
                f"{name}: no input has a free dimension {dim} besides the batch ({has}); leave out --dim {dim}, and "
                "give sizes of the batch as --batch."
            )


def _other_sizes(batch: Sample, inputs: Sequence[InputSpec], dims: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a batch's dimensions that `dims` wants otherwise."""
    return {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, batch[spec.name].shape, strict=True)
        if isinstance(dim, str) and dims.get(dim, size) != size
    }


def _made_up(inputs: Sequence[InputSpec], dims: Mapping[str, int], name: str) -> Sample:
    """Zeros of the right shapes: they say nothing but how large things are."""
    axes, fixed = batch_axes(inputs), fixed_batch_size(inputs)
    found = {}
    for spec in inputs:
        shape = []
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                shape.append(dim)
            elif axis == axes[spec.name]:
                shape.append(fixed or 1)
            elif dim is not None and dim in dims:
                shape.append(dims[dim])
            else:
                what, mend = (
                    (dim, f"--dim {dim}=128, or --data") if dim else (f"axis {axis}, unnamed", "--data")
                )
                raise DataError(
                    f"{name}: input {spec} has a free dimension ({what}) and no data say how large it is; give {mend}."
                )
        try:
            found[spec.name] = np.zeros(shape, spec.dtype)
        except (MemoryError, ValueError) as error:
            sizes = " × ".join(map(str, shape))
            raise DataError(
                f"{name}: input {spec.name} of {sizes} does not fit into memory; give smaller sizes with --dim."
            ) from error
    return found


def _inferred(graph: Graph, names: Sequence[str], batch: Sample) -> dict[str, tuple[int, ...]]:
    model = graph.model.clone()
    for value in model.graph.inputs:
        if str(value.name) in batch:
            value.shape = ir.Shape(batch[str(value.name)].shape)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    passes.ShapeInferencePass()(model)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    values.update({str(v.name): v for v in model.graph.inputs})
    found = {}
    for name in names:
        shape = values[name].shape
        if shape is None or not all(isinstance(d, int) for d in shape):
            raise ModelError(
                f"{graph.name}: ONNX Runtime cannot run it and the shape of {name} cannot be inferred; "
                "give the shapes with --shapes."
            )
        found[name] = tuple(int(d) for d in shape)  # type: ignore[arg-type]
    return found

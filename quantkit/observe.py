"""Running the float model once and reducing every tensor that could be quantized as it arrives."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray

from quantkit.data import Sample, SampleSource, batch_axes, batches, fixed_batch_size, sample_fingerprint
from quantkit.errors import DataError
from quantkit.graph import Graph, find_sites
from quantkit.runtime import Session
from quantkit.statistics import ChannelStats, FloatHistogram
from quantkit.statistics.tensor import TensorStatistics

DEFAULT_MAX_MEMORY = 128 * 2**20
_LARGEST_AUTOMATIC_BATCH = 32


@dataclass(kw_only=True)
class Observation:
    """What one run over the data gathered.

    Attributes:
        statistics: by tensor name.
        fingerprints: of the samples, uint64, in the order they were seen.
        probe: the sample of the smallest fingerprint, input name → array.
        batch_size: samples that were run at a time.
        passes: how often each batch was run, because its tensors did not fit into memory together.
    """

    statistics: dict[str, TensorStatistics]
    fingerprints: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    probe: Sample = field(default_factory=dict)
    batch_size: int = 1
    passes: int = 1


def observe(
    graph: Graph,
    source: SampleSource,
    *,
    batch_size: int | None = None,
    max_memory: int | None = None,
    on_samples: Callable[[int], None] = lambda count: None,
) -> Observation:
    """Run the model over the data and return the statistics of every site of every target.

    The tensors of one batch arrive together, and those of the next are computed while they are reduced, so memory is
    twice a batch's tensors whatever the number of samples.

    Args:
        graph: the cleaned model. It runs with all of ONNX Runtime's optimizations: below them, tensors of some
            models change with the batch size.
        source: the samples.
        batch_size: samples to run at a time; None for as many as `max_memory` lets, at most 32.
        max_memory: bytes that fetched tensors may take at any moment; where a batch's do not fit, it is run several
            times for a part of them each. None for 128 MiB, and for whatever a given batch size needs: which
            tensors are fetched together decides what ONNX Runtime fuses, so it can move their last bits.
        on_samples: called with the number of samples done since its last call.

    Raises:
        DataError: no samples, or samples that do not fit.
        ModelError: the model does not run.
    """
    wanted = _wanted(graph)
    first, samples = _peek(source)
    sizes = _sizes(graph, first, list(wanted))
    axes = batch_axes(graph.inputs)
    budget = max_memory or DEFAULT_MAX_MEMORY
    size = fixed_batch_size(graph.inputs) or batch_size or _automatic_batch(sum(sizes.values()), budget)
    if max_memory is None and batch_size is not None:
        budget = 2 * size * sum(sizes.values())
    fed = {spec.name for spec in graph.inputs}
    groups = _groups({n: b for n, b in sizes.items() if n not in fed}, size, budget)
    sessions = [Session(graph.model, outputs=group) for group in groups] or [Session(graph.model)]

    found = Observation(
        statistics={name: _empty(graph, name, axis) for name, axis in wanted.items()},
        batch_size=size,
        passes=len(sessions),
    )
    fingerprints: list[int] = []
    smallest = [2**64]

    def reduce(batch: Sample, tensors: Sample, *, first_of_batch: bool) -> None:
        for name, array in chain(tensors.items(), batch.items() if first_of_batch else ()):
            statistics = found.statistics.get(name)
            if statistics is not None:
                statistics.histogram.observe(array)
                if statistics.channels is not None:
                    statistics.channels.observe(array)
        if first_of_batch:
            for sample in _samples_of(batch, axes):
                key = int.from_bytes(sample_fingerprint(sample), "little")
                if key < smallest[0]:
                    smallest[0] = key
                    found.probe = {name: array.copy() for name, array in sample.items()}
                fingerprints.append(key)
            on_samples(_count_of(batch, axes))

    with ThreadPoolExecutor(max_workers=1) as runner:
        running: tuple[Sample, Future[Sample], bool] | None = None
        for batch in batches(samples, graph.inputs, size):
            for index, session in enumerate(sessions):
                started = runner.submit(session.run, batch)
                if running is not None:
                    reduce(running[0], running[1].result(), first_of_batch=running[2])
                running = (batch, started, index == 0)
        if running is not None:
            reduce(running[0], running[1].result(), first_of_batch=running[2])
    found.fingerprints = np.array(fingerprints, np.uint64)
    return found


def _wanted(graph: Graph) -> dict[str, int | None]:
    """Every activation of every site, with the axis of its channels where a linear operator contracts one."""
    wanted: dict[str, int | None] = {}
    for site in find_sites(graph)[0]:
        if site.role != "weight":
            axis = site.axis if site.role == "input" else None
            wanted[site.name] = wanted.get(site.name) if wanted.get(site.name) is not None else axis
    if not wanted:
        raise DataError(f"{graph.name}: no Conv, MatMul or Gemm that can be quantized; there is nothing to calibrate.")
    return wanted


def _empty(graph: Graph, name: str, axis: int | None) -> TensorStatistics:
    value = graph.values[name]
    return TensorStatistics(
        histogram=FloatHistogram(),
        channels=None if axis is None else ChannelStats(axis),
        dtype=np.dtype(value.dtype.numpy()).name if value.dtype is not None else "float32",
        shape=tuple(d if isinstance(d, int) else d.value for d in value.shape) if value.shape is not None else (),
    )


def _peek(source: SampleSource) -> tuple[Sample, Iterator[Sample]]:
    samples = iter(source)
    head = list(islice(samples, 1))
    if not head:
        raise DataError("data: no samples; give real inputs of the model.")
    return head[0], chain(head, samples)


def _sizes(graph: Graph, sample: Sample, names: Sequence[str]) -> dict[str, int]:
    """Bytes of each tensor for one sample, by shape inference; what it cannot tell counts as the largest input."""
    model = graph.model.clone()
    for value in model.graph.inputs:
        if str(value.name) in sample:
            value.shape = ir.Shape(sample[str(value.name)].shape)
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    passes.ShapeInferencePass()(model)
    values = {str(v.name): v for node in model.graph for v in node.outputs} | {
        str(v.name): v for v in model.graph.inputs
    }
    largest = max(array.nbytes for array in sample.values())
    sizes = {}
    for name in names:
        value = values[name]
        known = value.shape is not None and all(isinstance(d, int) for d in value.shape)
        itemsize = value.dtype.itemsize if value.dtype is not None else 4
        count = int(np.prod([d for d in value.shape if isinstance(d, int)])) if value.shape is not None else 0
        sizes[name] = int(count * itemsize) if known else largest
    return sizes


def _automatic_batch(sample_bytes: int, max_memory: int) -> int:
    return max(1, min(_LARGEST_AUTOMATIC_BATCH, max_memory // 2 // max(sample_bytes, 1)))


def _groups(sizes: dict[str, int], batch_size: int, max_memory: int) -> list[list[str]]:
    """Split the tensors, in order, so that two groups of a batch fit into the memory."""
    groups: list[list[str]] = []
    filled = max_memory
    for name, size in sizes.items():
        if 2 * (filled + size * batch_size) > max_memory:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size * batch_size
    return groups


def _samples_of(batch: Sample, axes: dict[str, int | None]) -> Iterator[Sample]:
    for i in range(_count_of(batch, axes)):
        yield {
            name: array if axes[name] is None else array.take([i], axis=axes[name]) for name, array in batch.items()
        }


def _count_of(batch: Sample, axes: dict[str, int | None]) -> int:
    return next((batch[name].shape[axis] for name, axis in axes.items() if axis is not None), 1)

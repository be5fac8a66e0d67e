"""Running the float model once and reducing every tensor that could be quantized as it arrives."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from quantkit.data import (
    Sample,
    SampleSource,
    batch_axes,
    batch_length,
    batches,
    fixed_batch_size,
    peek,
    sample_fingerprint,
)
from quantkit.errors import DataError
from quantkit.graph import Graph, find_sites
from quantkit.memory import DEFAULT_MAX_MEMORY, fitting_batch, tensor_bytes
from quantkit.runtime import Session
from quantkit.statistics import ChannelStats, FloatHistogram
from quantkit.statistics.tensor import TensorStatistics


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
    on_samples: Callable[[int], object] = lambda count: None,
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
    first, samples = peek(source)
    sizes = tensor_bytes(graph, first, list(wanted))
    axes = batch_axes(graph.inputs)
    budget = max_memory or DEFAULT_MAX_MEMORY
    size = fixed_batch_size(graph.inputs) or batch_size or fitting_batch(sum(sizes.values()), budget // 2)
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
            on_samples(batch_length(batch, axes))

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
        raise DataError(
            f"{graph.name}: no Conv, MatMul or Gemm that can be quantized; there is nothing to calibrate."
        )
    return wanted


def _empty(graph: Graph, name: str, axis: int | None) -> TensorStatistics:
    value = graph.values[name]
    return TensorStatistics(
        histogram=FloatHistogram(),
        channels=None if axis is None else ChannelStats(axis),
        dtype=np.dtype(value.dtype.numpy()).name if value.dtype is not None else "float32",
        shape=tuple(d if isinstance(d, int) else d.value for d in value.shape)
        if value.shape is not None
        else (),
    )


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
    for i in range(batch_length(batch, axes)):
        yield {
            name: array if axes[name] is None else array.take([i], axis=axes[name])
            for name, array in batch.items()
        }

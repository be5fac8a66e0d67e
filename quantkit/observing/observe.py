"""Running the float model once and reducing every tensor that could be quantized as it arrives."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock
from typing import Any

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
from quantkit.errors import ModelError
from quantkit.graph import Graph, find_sites
from quantkit.graph.sites import QUANTIZED_ALREADY
from quantkit.graph.value_sources import value_sources
from quantkit.memory import fitting_batch, tensor_bytes
from quantkit.observing.devices import Processors, device_of
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
    device: str = "cpu",
    on_samples: Callable[[int], object] = lambda count: None,
) -> Observation:
    """Run the model over the data and return the statistics of every site of every target.

    On the CPU batches are run side by side, one a processor, and each is reduced by the thread that ran it: a run then
    needs no other thread, and does not wait while tensors are counted. On a GPU one batch is run at a time, and its
    tensors are counted where they lie. Memory is that of the tensors of the batches under way, whatever the number of
    samples. Equal tensors are counted alike on both, bit for bit; their sums agree to 1e-12.

    Args:
        graph: the cleaned model. It runs with all of ONNX Runtime's optimizations: below them, tensors of some
            models change with the batch size.
        source: the samples.
        batch_size: samples to run at a time; None for as many as `max_memory` lets, at most 32.
        max_memory: bytes that fetched tensors may take at any moment; where a batch's do not fit, it is run several
            times for a part of them each. None for 96 MiB (1 GiB of a GPU's), and for whatever a given batch size
            needs: which tensors are fetched together decides what ONNX Runtime fuses, so it can move their last bits.
        device: "cpu", or "cuda" for ONNX Runtime's CUDA provider and statistics by CuPy.
        on_samples: called with the number of samples done since its last call.

    Raises:
        DataError: no samples, or samples that do not fit.
        ModelError: the model does not run, or has nothing to quantize; or ONNX Runtime has no CUDA provider.
        UnknownNameError: there is no such device.
        KernelError: device is "cuda", and there is no GPU or no CuPy.
    """
    place = device_of(device)
    wanted = _wanted(graph)
    first, samples = peek(source)
    axes = batch_axes(graph.inputs)
    sizes = tensor_bytes(graph, first, list(wanted))
    work = _divide(graph, source, sizes, place, batch_size=batch_size, max_memory=max_memory)
    sessions = [
        Session(graph.model, outputs=group, threads=work.threads, provider=place.provider)
        for group in work.groups
    ]
    found = Observation(
        statistics={name: _empty(graph, name, axis) for name, axis in wanted.items()},
        batch_size=work.batch_size,
        passes=len(sessions),
    )
    locks = {name: Lock() for name in wanted}

    def run(batch: Sample) -> tuple[dict[str, ChannelStats], list[int]]:
        """Run a batch and count its tensors; return what must be added in the batches' order."""
        parts: dict[str, ChannelStats] = {}
        feeds = place.feeds(batch)
        for tensors in chain([dict(feeds)], (place.run(session, feeds) for session in sessions)):
            while tensors:
                name, tensor = tensors.popitem()
                if name in wanted:
                    parts |= _count(name, tensor, found.statistics[name], locks[name], place)
        return parts, [_key(sample) for sample in _samples_of(batch, axes)]

    fingerprints: list[int] = []
    smallest = 2**64
    with ThreadPoolExecutor(max_workers=work.workers) as pool:
        under_way: deque[tuple[Sample, Future[tuple[dict[str, ChannelStats], list[int]]]]] = deque()

        def finish() -> None:
            nonlocal smallest
            batch, future = under_way.popleft()
            parts, keys = future.result()
            for name, part in parts.items():
                channels = found.statistics[name].channels
                assert channels is not None
                channels.add(part)
            for key, sample in zip(keys, _samples_of(batch, axes), strict=True):
                if key < smallest:
                    smallest, found.probe = key, {n: a.copy() for n, a in sample.items()}
            fingerprints.extend(keys)
            on_samples(len(keys))

        try:
            for batch in batches(samples, graph.inputs, work.batch_size):
                under_way.append((batch, pool.submit(run, batch)))
                if len(under_way) > work.workers:
                    finish()
            while under_way:
                finish()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    found.fingerprints = np.array(fingerprints, np.uint64)
    return found


def _samples_of(batch: Sample, axes: dict[str, int | None]) -> Iterator[Sample]:
    """The samples of a batch, as views."""
    for i in range(batch_length(batch, axes)):
        yield {
            name: array if (axis := axes[name]) is None else array[(slice(None),) * axis + (slice(i, i + 1),)]
            for name, array in batch.items()
        }


def _key(sample: Sample) -> int:
    return int.from_bytes(sample_fingerprint(sample), "little")


@dataclass(frozen=True, kw_only=True)
class _Work:
    """How the work is divided: `workers` batches at a time, each run by `threads` threads, once for every group."""

    batch_size: int
    workers: int
    threads: int
    groups: list[list[str]]


def _divide(
    graph: Graph,
    source: SampleSource,
    sizes: dict[str, int],
    place: Processors,
    *,
    batch_size: int | None,
    max_memory: int | None,
) -> _Work:
    processors, sample_bytes = place.workers, max(sum(sizes.values()), 1)
    budget = max_memory or place.memory
    given = fixed_batch_size(graph.inputs) or batch_size
    if given is None:
        workers = max(1, min(processors, budget // sample_bytes))
        size = fitting_batch(sample_bytes, budget // workers)
        with contextlib.suppress(TypeError):  # a source that does not know its length
            size = max(1, min(size, -(-len(source) // workers)))
    else:
        size = given
        workers = max(1, min(processors, budget // (size * sample_bytes)))
        if max_memory is None:
            budget = max(budget, size * sample_bytes)
    fed = {spec.name for spec in graph.inputs}
    groups = _groups({n: b * size for n, b in sizes.items() if n not in fed}, budget // workers)
    return _Work(batch_size=size, workers=workers, threads=place.threads(workers), groups=groups)


def _count(
    name: str, tensor: Any, statistics: TensorStatistics, lock: Lock, place: Processors
) -> dict[str, ChannelStats]:
    """Count the tensor; return its channels' statistics, of this tensor alone."""
    part = None if statistics.channels is None else ChannelStats(statistics.channels.axis)
    counts = place.observe(tensor, part, exponent=statistics.histogram.exponent)
    if counts is not None:
        with lock:
            statistics.histogram.include(counts)
    return {} if part is None else {name: part}


def _wanted(graph: Graph) -> dict[str, int | None]:
    """Every activation of every site, with the axis of its channels where a linear operator contracts one.

    And what the values of attentions are made of, with its channels.
    """
    wanted: dict[str, int | None] = {}
    sites, left = find_sites(graph)
    for site in sites:
        if site.role not in ("weight", "embedding"):
            axis = site.axis if site.role == "input" else None
            wanted[site.name] = wanted.get(site.name) if wanted.get(site.name) is not None else axis
    for source, _ in value_sources(graph).values():
        # Of these channels smoothing must know what it makes of the values.
        wanted[source] = -1
    # The tensors of an Add alone serve no export: it is quantized for the sake of a convolution beside it.
    if not any(site.role in ("input", "weight") for site in sites):
        reasons = "; ".join(f"{x.op_type} {x.node}: {x.reason}" for x in left[:3]) or "it has none at all"
        mend = (
            "give the float model it was made from"
            if any(x.reason == QUANTIZED_ALREADY for x in left)
            else "give a float model whose layers have constant weights"
        )
        raise ModelError(
            f"{graph.path or graph.name}: no Conv, MatMul or Gemm that can be quantized ({reasons}), so there is "
            f"nothing to calibrate; {mend}."
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


def _groups(sizes: dict[str, int], memory: int) -> list[list[str]]:
    """Split tensors of so many bytes, in order, into groups that fit into the memory; a large one is alone."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > memory:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups

"""Running the float model for the Gram matrices of its linear layers' inputs, as many layers at a time as fit."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.data import SampleSource, batch_axes, batch_length, batches, fixed_batch_size, peek
from quantkit.graph import Graph
from quantkit.graph.linears import Linear
from quantkit.memory import fitting_batch, release, tensor_bytes
from quantkit.observing.devices import Collects, Processors, device_of
from quantkit.runtime import Session
from quantkit.statistics.gram import GramMatrix, gram_bytes, working_bytes
from quantkit.statistics.patches import PATCHES_BYTES, patches, same_pads

# Beside the matrices themselves, what is fetched of the model and cut into patches.
DEFAULT_GRAM_MEMORY = 1 << 30


@dataclass(frozen=True, kw_only=True)
class GramWork:
    """What collecting will take, known before it starts.

    Attributes:
        passes: the views of each run over the data.
        views: a linear operator of every view.
        file_bytes: of all matrices together.
        memory_bytes: of the largest pass: its matrices, the tensors of a batch, and what one product takes. What
            the runtime needs to run the model, its weights and its own tensors, comes on top.
        batch_size: samples run at a time.
    """

    passes: list[list[str]]
    views: dict[str, Linear]
    file_bytes: int
    memory_bytes: int
    batch_size: int


def divide_grams(
    graph: Graph,
    source: SampleSource,
    linears: Iterable[Linear],
    *,
    batch_size: int | None = None,
    max_memory: int | None = None,
) -> GramWork:
    """Return how the Gram matrices of these operators' inputs are collected.

    Args:
        graph: the cleaned model.
        source: the samples; the first tells how large tensors are.
        linears: of `find_linears`; those that read a tensor alike share a matrix.
        batch_size: samples to run at a time; None for as many as fit, at most 32.
        max_memory: bytes for a pass, as `GramWork.memory_bytes` counts them; a matrix that needs more has a pass of
            its own. None for 1 GiB.

    Raises:
        DataError: no samples.
    """
    views: dict[str, Linear] = {}
    for linear in linears:
        views.setdefault(linear.view, linear)
    budget = max_memory or DEFAULT_GRAM_MEMORY
    first, _ = peek(source)
    sizes = tensor_bytes(graph, first, sorted({v.tensor for v in views.values()}))
    # A quarter for tensors.
    largest = max(sizes.values(), default=1)
    size = fixed_batch_size(graph.inputs) or batch_size or fitting_batch(largest, budget // 4)
    # Of what is fed, the batch that runs and the next one.
    fed = 2 * size * sum(array.nbytes for array in first.values())
    passes: list[list[str]] = []
    filled = working = most = 0
    for view, linear in views.items():
        needed = gram_bytes(linear.size, linear.groups) + size * sizes[linear.tensor]
        product = working_bytes(linear.size) + (0 if linear.window is None else PATCHES_BYTES)
        if not passes or filled + needed + max(working, product) > budget:
            passes.append([])
            filled, working = fed, 0
        passes[-1].append(view)
        filled, working = filled + needed, max(working, product)
        most = max(most, filled + working)
    return GramWork(
        passes=passes,
        views=views,
        file_bytes=sum(gram_bytes(v.size, v.groups) for v in views.values()),
        memory_bytes=most,
        batch_size=size,
    )


def observe_grams(
    graph: Graph,
    source: SampleSource,
    work: GramWork,
    *,
    device: str = "cpu",
    on_samples: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[str, GramMatrix]]:
    """Run the model once a pass and yield every view with its matrix, in the order of `work`.

    The matrices of a pass are yielded at its end, and the next begins when the last of them is taken.

    Args:
        graph, source: those that `work` was made of; the source is gone through once a pass.
        work: from `divide_grams`.
        device: "cpu", or "cuda" to run the model and multiply its tensors on a GPU.
        on_samples: called with the number of samples done since its last call.

    Raises:
        DataError: no samples, or samples that do not fit.
        ModelError: the model does not run; or ONNX Runtime has no CUDA provider.
        UnknownNameError: there is no such device.
        KernelError: device is "cuda", and there is no GPU or no CuPy.
    """
    place = device_of(device)
    for part in work.passes:
        grams = _collect(graph, source, work, part, place, on_samples)
        release()
        for view in part:
            # What was taken is gone: the next pass needs the room.
            yield view, grams.pop(view).result()


def _collect(
    graph: Graph,
    source: SampleSource,
    work: GramWork,
    part: list[str],
    place: Processors,
    on_samples: Callable[[int], object],
) -> dict[str, Collects]:
    """One pass. A function, so that the session and the last batch are gone when its matrices are taken."""
    axes = batch_axes(graph.inputs)
    fed = {spec.name for spec in graph.inputs}
    grams = {view: place.gram(work.views[view].size, work.views[view].groups) for view in part}
    readers: dict[str, list[str]] = {}
    for view in part:
        readers.setdefault(work.views[view].tensor, []).append(view)
    fetched = [name for name in readers if name not in fed]
    # As calibration runs it: with all optimizations.
    session = Session(graph.model, outputs=fetched, provider=place.provider) if fetched else None
    for batch in batches(source, graph.inputs, work.batch_size):
        feeds = place.feeds(batch)
        tensors = feeds if session is None else {**feeds, **place.run(session, feeds)}
        for name, reading in readers.items():
            _take(tensors.pop(name), [(work.views[view], grams[view]) for view in reading], place)
        on_samples(batch_length(batch, axes))
    return grams


def _take(tensor: Any, reading: list[tuple[Linear, Collects]], place: Processors) -> None:
    array = place.array(tensor)
    for linear, gram in reading:
        for rows in vectors(array, linear, cut=place.patches):
            gram.observe(rows)
    place.wait()


def vectors(x: Any, linear: Linear, *, cut: Callable[..., Iterator[Any]] = patches) -> Iterator[Any]:
    """Yield the vectors of an input that a linear operator multiplies, of shape (groups, vectors, K).

    Args:
        x: the input, NumPy's or CuPy's.
        linear: the operator.
        cut: what cuts the input of a convolution into patches.
    """
    if linear.window is None:
        yield np.moveaxis(x, linear.input_axis, -1).reshape(1, -1, x.shape[linear.input_axis])
        return
    w = linear.window
    pads = w.pads
    if pads is None:
        pads = tuple(
            same_pads(
                x.shape[2:],
                kernel=w.kernel,
                strides=w.strides,
                dilations=w.dilations,
                lower=w.auto_pad == "SAME_LOWER",
            )
        )
    yield from cut(x, kernel=w.kernel, strides=w.strides, pads=pads, dilations=w.dilations, groups=w.groups)

"""How many samples can be run at a time: what a model's tensors take, known before it runs."""

import ctypes
import os
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from quantkit.data import Sample
from quantkit.graph import Graph
from quantkit.graph.clean import quiet

# Two batches of tensors live at a time, beside what the runtime needs itself.
DEFAULT_MAX_MEMORY = 96 * 2**20
# The same of a GPU, where one batch is run at a time.
DEFAULT_DEVICE_MEMORY = 2**30
# Beyond this a larger batch is no faster on a CPU.
_LARGEST_BATCH = 32


def tensor_bytes(graph: Graph, sample: Sample, names: Sequence[str]) -> dict[str, int]:
    """Return the bytes of each tensor for one sample, by shape inference from the sample's own shapes.

    A tensor whose shape cannot be told counts as much as the largest input.
    """
    model = graph.model.clone()
    for value in model.graph.inputs:
        if str(value.name) in sample:
            value.shape = ir.Shape(sample[str(value.name)].shape)
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    with quiet():  # a model that fits one batch size alone cannot be told for one sample
        passes.ShapeInferencePass()(model)
    values = {str(v.name): v for v in model.graph.inputs} | {
        str(v.name): v for node in model.graph for v in node.outputs
    }
    largest = max(array.nbytes for array in sample.values())
    return {name: _bytes_of(values[name], largest) for name in names}


def fitting_batch(sample_bytes: int, memory: int) -> int:
    """Return how many samples of so many bytes fit into `memory`: at least 1, at most 32."""
    return max(1, min(_LARGEST_BATCH, memory // max(sample_bytes, 1)))


def release() -> None:
    """Give what was freed back to the system: glibc keeps hundreds of MiB of a session that has ended."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _bytes_of(value: ir.Value, otherwise: int) -> int:
    dims = [] if value.shape is None else [d for d in value.shape if isinstance(d, int)]
    if value.shape is None or len(dims) != len(value.shape):
        return otherwise
    itemsize = 4 if value.dtype is None else value.dtype.itemsize
    return int(np.prod(dims, dtype=np.float64) * itemsize)

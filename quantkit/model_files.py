"""Which files an ONNX model lies in: its own, and those that hold its weights."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def model_files(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a model, then those of its external data (a file as often as tensors lie in it).

    A file that is no model, or is not there, has nothing but itself. Weights are not read.
    """
    # Here, for it takes long: who only needs the first path does not wait.
    import onnx

    model = Path(path)
    yield model
    try:
        found = onnx.load(model, load_external_data=False)
    except Exception:
        # Whatever protobuf makes of another file: reading the model says it, when its turn has come.
        return
    for tensor in (*_tensors_of_graph(found.graph), *_tensors(n for f in found.functions for n in f.node)):
        for entry in tensor.external_data:
            if entry.key == "location":
                yield model.parent / entry.value


def _tensors_of_graph(graph: "onnx.GraphProto") -> "Iterator[onnx.TensorProto]":
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors(graph.node)


def _tensors(nodes: "Iterable[onnx.NodeProto]") -> "Iterator[onnx.TensorProto]":
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors_of_graph(graph)

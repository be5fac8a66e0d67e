"""A graph as lines of text and as one digest: the same on every machine, however the file was written."""

import hashlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from quantkit.graph.tensors import read_tensor


def fingerprint_of(model: ir.Model) -> str:
    """Return SHA-256 over the structure, names and weights: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for line in _describe(model):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _describe(model: ir.Model) -> Iterator[str]:
    """The structure as lines of text that do not depend on how the file was written."""
    graph = model.graph
    yield repr(sorted(graph.opset_imports.items()))
    yield repr(
        [(v.name, str(v.dtype), str(v.shape)) for v in graph.inputs if v.name not in graph.initializers]
    )
    yield repr([v.name for v in graph.outputs])
    yield from _describe_weights(graph)
    for node in graph:
        yield from _describe_node(node)


def _describe_weights(graph: ir.Graph) -> Iterator[str]:
    for name, value in sorted(graph.initializers.items()):
        assert value.const_value is not None
        yield f"{name} {_digest(value.const_value)}"


def _digest(tensor: ir.TensorProtocol) -> str:
    """Type, shape and contents in one line."""
    if tensor.dtype == ir.DataType.STRING:
        return f"{tuple(tensor.shape)} {tensor.numpy().tolist()!r}"
    array = np.ascontiguousarray(read_tensor(tensor))
    contents = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {contents}"


def _describe_node(node: ir.Node) -> Iterator[str]:
    names = [v.name if v is not None else "" for v in node.inputs], [v.name for v in node.outputs]
    yield f"{node.domain}::{node.op_type} {names}"
    for key, attribute in sorted(node.attributes.items()):
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            one = attribute.type == ir.AttributeType.GRAPH
            for graph in (attribute.as_graph(),) if one else attribute.as_graphs():
                yield f"{key} {[v.name for v in graph.inputs]} {[v.name for v in graph.outputs]}"
                yield from _describe_weights(graph)
                for inner in graph:
                    yield from _describe_node(inner)
        elif attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            yield f"{key} {_digest(tensor)}"
        else:
            yield f"{key} {attribute.value!r}"

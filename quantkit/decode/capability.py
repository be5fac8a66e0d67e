"""What a model holds that ONNX Runtime's CPU provider cannot run, as measured with 1.31."""

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

TENSORRT_DOMAIN = "trt"
CONTRIB_DOMAIN = "com.microsoft"
_NO_KERNELS = {
    ir.DataType.FLOAT4E2M1: "FP4 (float4e2m1)",
    ir.DataType.FLOAT8E8M0: "MX scales (float8e8m0)",
    ir.DataType.BFLOAT16: "bfloat16",
}


def beyond_onnxruntime(model: ir.Model) -> list[str]:
    """Return what ONNX Runtime has no kernels for, each in a few words; empty where it runs the model.

    Types: float4e2m1 outside of GatherBlockQuantized, float8e8m0, bfloat16. Operators: TensorRT's own, and MatMulNBits
    of 3 bits, or of 8 with float zero points.
    """
    found: Counter[str] = Counter()
    types: set[str] = set()
    for node in nodes_of(model.graph):
        if node.domain == TENSORRT_DOMAIN:
            found[f"{TENSORRT_DOMAIN}::{node.op_type}"] += 1
        elif is_matmul_nbits(node) and not _has_kernel(node):
            found[f"MatMulNBits of {node.attributes['bits'].as_int()} bits"] += 1
        types |= {_NO_KERNELS[dtype] for dtype in _types(node) if dtype in _NO_KERNELS}
    types |= {_NO_KERNELS[v.dtype] for v in model.graph.inputs if v.dtype in _NO_KERNELS}
    return [*sorted(types), *(f"{count} × {name}" for name, count in sorted(found.items()))]


def nodes_of(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield every node, those of branches and loop bodies before the node that holds them."""
    for node in graph:
        for inner in graphs_of(node):
            yield from nodes_of(inner)
        yield node


def graphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the branches and loop bodies of a node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def is_matmul_nbits(node: ir.Node) -> bool:
    """Whether this is ONNX Runtime's product with a packed weight."""
    return node.domain == CONTRIB_DOMAIN and node.op_type == "MatMulNBits"


def is_quantized_gather(node: ir.Node) -> bool:
    """Whether this is ONNX Runtime's look-up in a packed table."""
    return node.domain == CONTRIB_DOMAIN and node.op_type == "GatherBlockQuantized"


def _has_kernel(node: ir.Node) -> bool:
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else 4
    zero = node.inputs[3] if len(node.inputs) > 3 else None
    return bits != 3 and (bits != 8 or zero is None or zero.dtype == ir.DataType.UINT8)


def _types(node: ir.Node) -> Iterator[ir.DataType]:
    """The element types that a node reads, writes, or names."""
    for value in node.inputs:
        # It has a kernel for tables of FP4, if for nothing else.
        if value is not None and value.dtype is not None and not is_quantized_gather(node):
            yield value.dtype
    for value in node.outputs:
        if value.dtype is not None:
            yield value.dtype
    for name in ("to", "output_dtype"):
        if name in node.attributes:
            yield ir.DataType(node.attributes[name].as_int())
    if node.op_type == "Constant" and "value" in node.attributes:
        yield node.attributes["value"].as_tensor().dtype

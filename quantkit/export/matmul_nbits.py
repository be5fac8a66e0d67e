"""Weights in 4-bit blocks as ONNX Runtime's own operator: com.microsoft MatMulNBits, on its CPU and CUDA providers."""

import onnx_ir as ir

from quantkit.export.writer import Writer
from quantkit.formats.matmul_nbits import to_matmul_nbits
from quantkit.plan import WeightPlan

_DOMAIN = "com.microsoft"
# A power of two from 16 up is all that the operator takes; 3 bits, and 8 bits with float zero points, fail (1.31).
_LEAST_BLOCK = 16
_BITS = (2, 4, 8)


def holds_matmul_nbits(plan: WeightPlan, readers: list[ir.Node]) -> bool:
    """Whether every reader of this weight can be MatMulNBits: y = x @ W, or a plain Gemm, with W a matrix in blocks."""
    spec, size = plan.qtensor.spec, plan.qtensor.spec.block_size
    return (
        spec.format.kind == "integer"
        and spec.format.bits in _BITS
        and plan.qtensor.qvalue.ndim == 2
        and size is not None
        and size >= _LEAST_BLOCK
        and size & (size - 1) == 0
        and all(index == 1 for _, index in plan.readers)
        and all(_is_plain(node) for node in readers)
    )


def write_matmul_nbits(writer: Writer, plan: WeightPlan) -> None:
    """Replace the readers of a weight by MatMulNBits; their outputs keep their names."""
    packed = to_matmul_nbits(plan.qtensor)
    dtype = writer.values[plan.name].dtype or ir.DataType.FLOAT
    codes = writer.constant(f"{plan.name}_quantized", packed.b, ir.DataType.UINT8)
    scales = writer.constant(f"{plan.name}_scale", packed.scales, dtype)
    zero = None
    if packed.zero_points is not None:
        zero = writer.constant(f"{plan.name}_zero_point", packed.zero_points, ir.DataType.UINT8)
    writer.model.graph.opset_imports[_DOMAIN] = 1
    for name, _ in plan.readers:
        old = writer.nodes[name]
        inputs: list[ir.Value | None] = [old.inputs[0], codes, scales, zero]
        if old.op_type == "Gemm" and len(old.inputs) > 2 and old.inputs[2] is not None:
            inputs += [None, old.inputs[2]]
        while inputs[-1] is None:
            inputs.pop()
        node = ir.node(
            "MatMulNBits",
            inputs,
            attributes={"K": packed.k, "N": packed.n, "bits": packed.bits, "block_size": packed.block_size},
            domain=_DOMAIN,
            name=name,
        )
        node.outputs[0].name = old.outputs[0].name
        ir.convenience.replace_nodes_and_values(
            writer.model.graph, old, [old], [node], list(old.outputs), list(node.outputs)
        )
        writer.nodes[name] = node
        writer.values[str(node.outputs[0].name)] = node.outputs[0]


def _is_plain(node: ir.Node) -> bool:
    if node.op_type == "MatMul":
        return True
    if node.op_type != "Gemm":
        return False
    ones = all(node.attributes[a].as_float() == 1 for a in ("alpha", "beta") if a in node.attributes)
    straight = "transA" not in node.attributes or node.attributes["transA"].as_int() == 0
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    # It adds a bias of one value an output channel; Gemm broadcasts others too.
    weight = node.inputs[1]
    if bias is None:
        return ones and straight
    if bias.shape is None or weight is None or weight.shape is None:
        return False
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int() != 0
    return ones and straight and tuple(bias.shape) == (weight.shape[0 if transposed else 1],)

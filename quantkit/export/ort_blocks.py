"""Weights in blocks of few bits as ONNX Runtime's own operators, on its CPU and CUDA providers.

com.microsoft MatMulNBits for linear layers, GatherBlockQuantized for embeddings.
"""

from functools import partial

import numpy as np
import onnx_ir as ir

from quantkit.export.writer import Writer
from quantkit.formats.matmul_nbits import matmul_nbits_scales, to_matmul_nbits
from quantkit.formats.packing import code_bits, pack_bits
from quantkit.graph import Graph
from quantkit.graph.sites import is_plain_product
from quantkit.planning.plan import WeightPlan
from quantkit.planning.presets import is_packed_block

_DOMAIN = "com.microsoft"
# 3 bits, and 8 bits with float zero points, fail (1.31).
_BITS = (2, 4, 8)


def holds_matmul_nbits(plan: WeightPlan, readers: list[ir.Node]) -> bool:
    """Whether every reader of this weight can be MatMulNBits: y = x @ W, or a plain Gemm, with W a matrix in blocks."""
    return (
        _in_blocks(plan)
        and all(index == 1 for _, index in plan.readers)
        and all(is_plain_product(node) for node in readers)
    )


def holds_gather(plan: WeightPlan, readers: list[ir.Node]) -> bool:
    """Whether every reader of this weight can be GatherBlockQuantized: rows of a matrix in blocks along the row."""
    return _in_blocks(plan) and plan.spec.axis == 1 and all(node.op_type == "Gather" for node in readers)


def _in_blocks(plan: WeightPlan) -> bool:
    spec, size = plan.spec, plan.spec.block_size
    return (
        spec.format.kind == "integer"
        and spec.format.bits in _BITS
        and plan.qparams.scale.ndim == 2
        and size is not None
        and is_packed_block(size)
    )


def write_matmul_nbits(writer: Writer, graph: Graph, plan: WeightPlan, accuracy_level: int) -> None:
    """Replace the readers of a weight by MatMulNBits; their outputs keep their names."""
    spec = plan.spec
    assert spec.block_size is not None and spec.axis is not None
    shape = graph.shape(plan.name)
    k, n = (shape[0], shape[1]) if spec.axis % 2 == 0 else (shape[1], shape[0])
    packed_scales, zero_points = matmul_nbits_scales(plan.qparams, spec)
    dtype = writer.values[plan.name].dtype or ir.DataType.FLOAT
    blob = (n, packed_scales.shape[1], spec.block_size * spec.format.bits // 8)
    codes = writer.lazy_constant(
        f"{plan.name}_quantized", partial(_matmul_codes, graph, plan), ir.DataType.UINT8, blob
    )
    scales = writer.constant(f"{plan.name}_scale", packed_scales, dtype)
    zero = None
    if zero_points is not None:
        zero = writer.constant(f"{plan.name}_zero_point", zero_points, ir.DataType.UINT8)
    attributes = {"K": k, "N": n, "bits": spec.format.bits, "block_size": spec.block_size}
    if accuracy_level:
        attributes["accuracy_level"] = accuracy_level
    for name, _ in plan.readers:
        old = writer.nodes[name]
        inputs: list[ir.Value | None] = [old.inputs[0], codes, scales, zero]
        if old.op_type == "Gemm" and len(old.inputs) > 2 and old.inputs[2] is not None:
            inputs += [None, old.inputs[2]]
        _replace(writer, old, "MatMulNBits", inputs, attributes)


def write_gather(writer: Writer, graph: Graph, plan: WeightPlan) -> None:
    """Replace the Gathers that read a weight by GatherBlockQuantized; their outputs keep their names.

    Codes and zero points are unsigned bytes that hold 8 / bits codes each.
    """
    spec = plan.spec
    assert spec.block_size is not None and plan.qparams.zero_point is not None
    bits = spec.format.bits
    rows, columns = graph.shape(plan.name)
    packed_scales, zero_points = matmul_nbits_scales(plan.qparams, spec)
    dtype = writer.values[plan.name].dtype or ir.DataType.FLOAT
    codes = writer.lazy_constant(
        f"{plan.name}_quantized",
        partial(_gather_codes, graph, plan),
        ir.DataType.UINT8,
        (rows, -(-columns * bits // 8)),
    )
    scales = writer.constant(f"{plan.name}_scale", packed_scales, dtype)
    zero = None
    if zero_points is not None:
        zero = writer.constant(f"{plan.name}_zero_point", zero_points, ir.DataType.UINT8)
    attributes = {"bits": bits, "block_size": spec.block_size, "gather_axis": 0, "quantize_axis": 1}
    for name, _ in plan.readers:
        old = writer.nodes[name]
        _replace(writer, old, "GatherBlockQuantized", [codes, old.inputs[1], scales, zero], attributes)


def _replace(
    writer: Writer, old: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, int]
) -> None:
    while inputs[-1] is None:
        inputs.pop()
    writer.model.graph.opset_imports[_DOMAIN] = 1
    node = ir.node(op_type, inputs, attributes=attributes, domain=_DOMAIN, name=old.name)
    node.outputs[0].name = old.outputs[0].name
    ir.convenience.replace_nodes_and_values(
        writer.model.graph, old, [old], [node], list(old.outputs), list(node.outputs)
    )
    writer.nodes[str(old.name)] = node
    writer.values[str(node.outputs[0].name)] = node.outputs[0]


def _matmul_codes(graph: Graph, plan: WeightPlan) -> np.ndarray:
    return to_matmul_nbits(plan.quantize(graph.array(plan.name))).b


def _gather_codes(graph: Graph, plan: WeightPlan) -> np.ndarray:
    codes, fmt = plan.quantize(graph.array(plan.name)).qvalue, plan.spec.format
    flip = np.uint8(2 ** (fmt.bits - 1) if fmt.min < 0 else 0)
    return pack_bits(code_bits(codes, fmt) ^ flip, fmt.bits)

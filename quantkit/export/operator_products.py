"""Products of codes whose sums become floats: what MatMul, Gemm and Conv with a float output turn into."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from quantkit.export.integer_operators import (
    CONTRIB,
    Codes,
    Operator,
    activation,
    array,
    codes_of,
    factor,
    gemm_attributes,
    integer_bias,
    weight_of,
)
from quantkit.export.writer import Writer

_FLOAT = ir.DataType.FLOAT


class ProductWriter(Writer):
    """Replaces nodes by operators on codes, which keep their names."""

    def multiply(self, node: ir.Node) -> None:
        """Let a product with a float output multiply codes, where it can."""
        made: list[ir.Node] | None = None
        if node.op_type == "MatMul":
            made = self._matmul(node)
        elif node.op_type == "Gemm":
            made = self._gemm(node)
        else:
            made = self._convolution(node)
        if made is None:
            return
        for step in made[:-1]:
            if not step.outputs[0].name:
                step.outputs[0].name = self._free_name(f"{node.outputs[0].name}_{step.op_type}_Output")
        last = made[-1].outputs[0]
        last.name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(
            self.model.graph, node, [node], made, list(node.outputs), [last]
        )

    def _matmul(self, node: ir.Node) -> list[ir.Node] | None:
        a, b = activation(node.inputs[0]), weight_of(node)
        if a is not None and b is not None:
            inputs = [
                a.value,
                b.value,
                a.scale,
                b.scale,
                a.zero_point,
                None if b.axis is not None else b.zero_point,
            ]
            operator = Operator(op_type="MatMulIntegerToFloat", domain=CONTRIB, inputs=inputs, attributes={})
            return [self.make(operator, node, _FLOAT)]
        left, right = codes_of(node.inputs[0]), activation(node.inputs[1])
        rank = 0 if left is None or left.value.shape is None else len(left.value.shape)
        a = factor(node.inputs[0], (rank - 2,)) if rank >= 2 else None
        if a is None or right is None:
            return None
        inputs = [a.value, right.value, None, right.zero_point]
        if a.axis is None:
            inputs[2] = a.zero_point
        operator = Operator(op_type="MatMulInteger", domain="", inputs=inputs, attributes={})
        return self._scaled(self.make(operator, node, ir.DataType.INT32), node, right, a, (-1, 1))

    def _gemm(self, node: ir.Node) -> list[ir.Node] | None:
        a, b = activation(node.inputs[0]), weight_of(node)
        given = node.inputs[2] if len(node.inputs) > 2 else None
        if a is None or b is None:
            return None
        fits, bias = integer_bias(given, a, b)
        beta = node.attributes.get("beta")
        if not fits and beta is not None and beta.as_float() != 1:
            return None
        inputs = [*a.inputs, *b.inputs, *([] if bias is None else [bias])]
        operator = Operator(op_type="QGemm", domain=CONTRIB, inputs=inputs, attributes=gemm_attributes(node))
        product = self.make(operator, node, _FLOAT)
        return [product] if fits else [product, self._step("Add", node, [product.outputs[0], given])]

    def _convolution(self, node: ir.Node) -> list[ir.Node] | None:
        x, w = activation(node.inputs[0]), weight_of(node)
        if x is None or w is None or w.value.shape is None or np.any(array(w.zero_point)):
            return None
        given = node.inputs[2] if len(node.inputs) > 2 else None
        fits, bias = integer_bias(given, x, w)
        operator = Operator(
            op_type="ConvInteger",
            domain="",
            inputs=[x.value, w.value, x.zero_point],
            attributes=node.attributes,
        )
        made = [self.make(operator, node, ir.DataType.INT32)]
        along = (-1, *(1 for _ in range(len(w.value.shape) - 2)))
        stored = bias if fits else given
        if stored is not None and stored.const_value is None:
            return None
        spread = (
            None
            if stored is None or stored.dtype is None
            else self.constant(f"{stored.name}_spread", array(stored).reshape(along), stored.dtype)
        )
        if spread is not None and fits:
            made.append(self._step("Add", node, [made[-1].outputs[0], spread], ir.DataType.INT32))
        made = [*made[:-1], *self._scaled(made[-1], node, x, w, along)]
        if spread is not None and not fits:
            made.append(self._step("Add", node, [made[-1].outputs[0], spread]))
        return made

    def _scaled(
        self, sums: ir.Node, node: ir.Node, x: Codes, w: Codes, along: tuple[int, ...]
    ) -> list[ir.Node]:
        """Sums of products of codes as floats: times both scales, those of the weight in the shape `along`."""
        scale = w.scale
        if w.axis is not None:
            scale = self.constant(f"{w.scale.name}_spread", array(w.scale).reshape(along), _FLOAT)
        cast = self._step("Cast", node, [sums.outputs[0]], attributes={"to": int(_FLOAT)})
        both = self._step("Mul", node, [x.scale, scale])
        return [sums, cast, both, self._step("Mul", node, [cast.outputs[0], both.outputs[0]])]

    def make(self, operator: Operator, node: ir.Node, dtype: ir.DataType) -> ir.Node:
        """The node of an operator, under the old one's name; its output is of the old one's shape and has no name."""
        if operator.domain:
            self.model.graph.opset_imports.setdefault(operator.domain, 1)
        inputs = list(operator.inputs)
        while inputs[-1] is None:
            inputs.pop()
        made = ir.node(
            operator.op_type,
            inputs,
            attributes=dict(operator.attributes),
            domain=operator.domain,
            name=node.name,
        )
        made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, ir.TensorType(dtype)
        return made

    def _step(
        self,
        op_type: str,
        node: ir.Node,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType = _FLOAT,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Node:
        """One of several nodes that stand for one; named after that one's output."""
        return self.node(op_type, str(node.outputs[0].name), inputs, attributes or {}, dtype)

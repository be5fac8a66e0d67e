"""Models for ONNX Runtime that are right on its CUDA and CPU providers, at every optimization level.

As for TensorRT, but for float8. There, an explicit zero point of 0 makes ONNX Runtime's `ReluQuantRewrite` drop the
Relu before it (1.31 and 1.32, CPU), so QuantizeLinear names its type in `output_dtype`, which needs opset 21. And a
DequantizeLinear on both sides of a Conv or MatMul makes it look for integer kernels of float8 that do not exist (1.31:
the model does not load), so codes are turned back by Cast and Mul, which mean the same.

Matrices in blocks of few bits become MatMulNBits, and embeddings GatherBlockQuantized, which both providers have
kernels for.

Biases of int8 models are int32: where they are float, the pass `WeightBiasQuantization` makes its own at every level
(1.31: mobilenetv2 then differs from the plan by as much as the plan from float, 29 dB). Beside activations of 16 bits
a bias in s_x · s_w does not fit int32, and in float16 models that scale does not fit float16 (1.31: 0 dB are left);
neither has integer kernels, so their weights are written as Cast and Mul too, of which that pass makes nothing.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from quantkit.errors import SpecError
from quantkit.export.ort_blocks import holds_gather, holds_matmul_nbits, write_gather, write_matmul_nbits
from quantkit.export.rewrite import QdqStyle, QdqWriter, can_be_cast, insert_qdq, least_opset
from quantkit.formats import INT8, QuantSpec
from quantkit.graph import Graph
from quantkit.planning.plan import Plan, WeightPlan
from quantkit.planning.presets import Target

# What its kernels take: no float4, and no scales that are powers of two.
_BLOCKS = frozenset({"int4 block", "uint4 block+zero", "int2 block", "uint2 block+zero", "int8 block"})
_PER_CHANNEL = frozenset({"int8", "fp8", "int4", "uint4+zero", "int16"})

TARGET = Target(
    name="ort",
    int8_activations=QuantSpec(format=INT8),
    outputs=False,
    integer_bias=True,
    matrices=_BLOCKS | _PER_CHANNEL | {"fp8 tile", "fp8 block"},
    plain_products=frozenset({"int2 block", "uint2 block+zero"}),
    convolutions=_PER_CHANNEL,
    embeddings=_BLOCKS - {"int2 block", "uint2 block+zero"},
    activations=frozenset({"int8", "uint8+zero", "fp8", "uint16+zero", "int16"}),
)

# QLinearMatMul and MatMulIntegerToFloat want the scales and zero points of batched weights in another shape than
# DequantizeLinear has them, and fail as they run (1.31, CPU): no pair stands there for them to be made of.
STYLE = QdqStyle(float_zero_points=False, cast=True, batched_cast=True)
_ACCURACY_LEVELS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class OrtEmitter:
    """The emitter of `--target ort`.

    accuracy_level: of MatMulNBits: 1 to 4 let it compute in float32, float16, bfloat16 or int8; 0 leaves it to ONNX
    Runtime, which takes float32 then.

    Raises:
        SpecError: no such level.
    """

    target: Target = TARGET
    accuracy_level: int = 0

    def __post_init__(self) -> None:
        if self.accuracy_level not in _ACCURACY_LEVELS:
            raise SpecError(
                f"accuracy level {self.accuracy_level}: MatMulNBits has 0 to 4; choose 4 for int8, 0 for float."
            )

    def emit(self, graph: Graph, plan: Plan) -> ir.Model:
        """Return the quantized model."""
        writer = partial(OrtWriter, style=STYLE, accuracy_level=self.accuracy_level, plan=plan)
        return insert_qdq(graph, plan, writer, least_opset(plan, STYLE))


class OrtWriter(QdqWriter):
    """Q/DQ, and ONNX Runtime's own operators for blocks."""

    def __init__(
        self, model: ir.Model, graph: Graph, style: QdqStyle, accuracy_level: int, plan: Plan
    ) -> None:
        super().__init__(model, graph, style)
        self.accuracy_level = accuracy_level
        self._in_float = _read_by_no_kernel(graph, plan)

    def is_cast(self, plan: WeightPlan) -> bool:
        """As it says there; and where no integer kernel reads the weight anyway."""
        return super().is_cast(plan) or (
            can_be_cast(plan) and any(node in self._in_float for node, _ in plan.readers)
        )

    def weight(self, plan: WeightPlan) -> None:
        """Store a weight as codes."""
        readers = [self.reader(n, plan.name, i) for n, i in plan.readers]
        if holds_matmul_nbits(plan, readers):
            write_matmul_nbits(self, self.graph, plan, self.accuracy_level)
        elif holds_gather(plan, readers):
            write_gather(self, self.graph, plan)
        else:
            super().weight(plan)


def _read_by_no_kernel(graph: Graph, plan: Plan) -> set[str]:
    """The nodes whose quantized input no integer kernel reads: of 16 bits, or of float16."""
    found: set[str] = set()
    for activation in plan.activations.values():
        value = graph.values.get(activation.name)
        if value is None or activation.spec.format.kind != "integer":
            continue
        if activation.spec.format.bits > 8 or value.dtype == ir.DataType.FLOAT16:
            readers = {node for node, _ in activation.readers}
            found |= readers or {str(node.name) for node, _ in value.uses()}
    return found


def cast_weights(model: ir.Model) -> None:
    """Write the weights of a finished model as Cast and Mul, once it is of float16 and has no integer kernels."""
    for node in list(model.graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" and not node.domain else None
        if codes is None or not codes.is_initializer() or codes.dtype not in _CODES or _is_blocked(node):
            continue
        scale, out = node.inputs[1], node.outputs[0]
        assert (
            scale is not None
            and scale.shape is not None
            and codes.shape is not None
            and out.dtype is not None
        )
        nodes = [ir.node("Cast", [codes], attributes={"to": int(out.dtype)}, name=f"{node.name}_Cast")]
        if len(scale.shape) == 1:
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            rest = len(codes.shape) - 1 - axis % len(codes.shape)
            array = _numpy(scale).reshape(-1, *[1] * rest)
            spread = ir.Value(
                name=f"{scale.name}_spread",
                shape=ir.Shape(array.shape),
                type=ir.TensorType(out.dtype),
                const_value=ir.tensor(array, dtype=out.dtype, name=f"{scale.name}_spread"),
            )
            model.graph.register_initializer(spread)
            scale = spread
        nodes.append(ir.node("Mul", [nodes[0].outputs[0], scale], name=f"{node.name}_Mul"))
        nodes[0].outputs[0].name, nodes[1].outputs[0].name = f"{out.name}_codes", out.name
        for made in nodes:
            made.outputs[0].type, made.outputs[0].shape = out.type, out.shape
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], nodes, [out], [nodes[1].outputs[0]]
        )
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


_CODES = frozenset({ir.DataType.INT8, ir.DataType.INT16})


def _is_blocked(node: ir.Node) -> bool:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    size = node.attributes.get("block_size")
    return (size is not None and size.as_int() != 0) or (zero is not None and bool(_numpy(zero).any()))


def _numpy(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()

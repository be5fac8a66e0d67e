"""Models for ONNX Runtime that are right on its CUDA and CPU providers, at every optimization level.

As for TensorRT, but for float8. There, an explicit zero point of 0 makes ONNX Runtime's `ReluQuantRewrite` drop the
Relu before it (1.31 and 1.32, CPU), so QuantizeLinear names its type in `output_dtype`, which needs opset 21. And a
DequantizeLinear on both sides of a Conv or MatMul makes it look for integer kernels of float8 that do not exist (1.31:
the model does not load), so codes are turned back by Cast and Mul, which mean the same.

Matrices in blocks of 4 bits become MatMulNBits, which both providers have kernels for.

Biases of int8 models are int32: where they are float, the pass `WeightBiasQuantization` makes its own at every level
(1.31: mobilenetv2 then differs from the plan by as much as the plan from float, 29 dB).
"""

from dataclasses import dataclass

import onnx_ir as ir

from quantkit.export.rewrite import QdqStyle, insert_qdq
from quantkit.formats import INT8, QuantSpec
from quantkit.graph import Graph
from quantkit.plan import Plan
from quantkit.presets import Target

TARGET = Target(
    name="ort",
    int8_activations=QuantSpec(format=INT8),
    outputs=False,
    integer_bias=True,
)


@dataclass(frozen=True)
class OrtEmitter:
    """The emitter of `--target ort`."""

    target: Target = TARGET

    def emit(self, graph: Graph, plan: Plan) -> ir.Model:
        """Return the quantized model."""
        return insert_qdq(graph, plan, ort_style(plan))


def ort_style(plan: Plan) -> QdqStyle:
    """Integer Q/DQ with their zero points; float8 without, and cast back; weights in blocks as MatMulNBits."""
    if any(weight.qtensor.spec.block_size is not None for weight in plan.weights):
        return QdqStyle(opset=21, zero_points=False, matmul_nbits=True)
    if all(a.spec.format.kind == "integer" for a in plan.activations.values()):
        # MatMulIntegerToFloat wants the zero points of batched weights in another shape than DequantizeLinear has them.
        return QdqStyle(opset=19, zero_points=True, batched_zero_points=False)
    return QdqStyle(opset=21, zero_points=False, cast=True)

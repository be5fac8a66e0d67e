"""Models for TensorRT 10 and 11: Q/DQ on the inputs of Conv, MatMul and Gemm, written as NVIDIA's own exporter does.

Opset 19, a typed zero point that is 0 everywhere (without one and without `output_dtype`, ONNX means uint8 where
TensorRT means int8), activations symmetric per tensor, weights per channel, biases in float (TensorRT's
DequantizeLinear takes no int32). At a residual Add only the skip branch is quantized, so that Conv and Add fuse.

INT4 weights: opset 21, DequantizeLinear with `block_size` along the contracted axis, no zero point.
"""

from dataclasses import dataclass

import onnx_ir as ir

from quantkit.export.rewrite import QdqStyle, insert_qdq
from quantkit.formats import INT8, QuantSpec
from quantkit.graph import Graph
from quantkit.plan import Plan
from quantkit.presets import Target

TARGET = Target(
    name="tensorrt",
    int8_activations=QuantSpec(format=INT8),
    outputs=False,
    integer_bias=False,
    whole_blocks=True,
)


@dataclass(frozen=True)
class TensorRTEmitter:
    """The emitter of `--target tensorrt`."""

    target: Target = TARGET

    def emit(self, graph: Graph, plan: Plan) -> ir.Model:
        """Return the quantized model."""
        if any(weight.qtensor.spec.block_size is not None for weight in plan.weights):
            return insert_qdq(graph, plan, QdqStyle(opset=21, zero_points=False))
        return insert_qdq(graph, plan, QdqStyle(opset=19, zero_points=True))

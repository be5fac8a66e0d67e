"""Models for ONNX Runtime that are right on its CUDA and CPU providers, at every optimization level.

As for TensorRT, but float8 Q/DQ carry no zero point: an explicit zero there makes ONNX Runtime's `ReluQuantRewrite`
drop the Relu before it (1.31 and 1.32, CPU). `output_dtype`, which then names the type, needs opset 21. Biases stay
float: the CUDA provider has no DequantizeLinear of int32 and would fall back to the CPU.
"""

from dataclasses import dataclass

import onnx_ir as ir

from quantkit.export.rewrite import QdqStyle, insert_qdq
from quantkit.formats import INT8, QuantSpec
from quantkit.graph import Graph
from quantkit.plan import Plan
from quantkit.presets import Target


@dataclass(frozen=True)
class OrtEmitter:
    """The emitter of `--target ort`."""

    target: Target = Target(
        name="ort",
        int8_activations=QuantSpec(format=INT8),
        outputs=False,
        integer_bias=False,
    )

    def emit(self, graph: Graph, plan: Plan) -> ir.Model:
        """Return the quantized model."""
        return insert_qdq(graph, plan, ort_style(plan))


def ort_style(plan: Plan) -> QdqStyle:
    """Integer Q/DQ with their zero points; float8 without."""
    integer = all(a.spec.format.kind == "integer" for a in plan.activations.values())
    return QdqStyle(opset=19, zero_points=True) if integer else QdqStyle(opset=21, zero_points=False)

"""Models for ONNX Runtime's CPU provider: uint8 activations and int8 weights, so placed that its integer kernels fuse.

A convolution fuses to QLinearConv only when its output is quantized too, and fastest from uint8 activations and
int8 weights; the Q stands behind the Relu or Clip, which it then absorbs. Adds between convolutions become
QLinearAdd. MatMul and Gemm fuse with a float output, which keeps more of the accuracy. Biases are int32.
"""

from dataclasses import dataclass

import onnx_ir as ir

from quantkit.export.ort import ort_style
from quantkit.export.rewrite import insert_qdq
from quantkit.formats import UINT8, QuantSpec
from quantkit.graph import Graph
from quantkit.plan import Plan
from quantkit.presets import Target

TARGET = Target(
    name="ort-cpu",
    int8_activations=QuantSpec(format=UINT8, symmetric=False),
    outputs=True,
    integer_bias=True,
)


@dataclass(frozen=True)
class OrtCpuEmitter:
    """The emitter of `--target ort-cpu`."""

    target: Target = TARGET

    def emit(self, graph: Graph, plan: Plan) -> ir.Model:
        """Return the quantized model."""
        return insert_qdq(graph, plan, ort_style(plan))

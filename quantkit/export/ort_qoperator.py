"""Models for ONNX Runtime's CPU provider in operator form: operators that work on codes, instead of Q/DQ pairs.

The plan is `ort-cpu`'s: uint8 activations, int8 weights per channel, int32 biases, outputs of convolutions quantized.
There, ONNX Runtime looks for Q/DQ patterns when it opens the file, at its higher optimization levels only; here the
file says itself which kernels run, at every level, and other tools see them. QuantizeLinear stands where floats enter,
DequantizeLinear where something reads floats:

| in the plan | in the file |
|---|---|
| Conv, MatMul, Gemm, Add, Concat, pooling … with a quantized output | QLinearConv, QLinearMatMul, QGemm, QLinearAdd … |
| MatMul, Gemm with a float output | MatMulIntegerToFloat, QGemm without an output scale |
| MatMul whose weight stands left, Conv with a float output | MatMulInteger, ConvInteger, times both scales |
| Relu, Clip behind those | nothing, where the range of codes limits already; else a Clip of codes |
| MaxPool, Reshape, Transpose … and Concat of tensors under one scale | the same operator on codes |
| anything else | in float, between DequantizeLinear and QuantizeLinear |

The kernels round to the nearest code, ties to even, from sums in int32: a code differs from the plan's only where the
plan's value lies on a boundary between two, within the last digits of float32. On x86 processors without VNNI, products
of uint8 and int8 saturate in int16 (as those of `ort-cpu` do at higher optimization levels): what such a machine
computes may differ by more, and the check of the written file tells.
"""

from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir

from quantkit.export.operator_form import to_operator_form
from quantkit.export.ort_cpu import TARGET as ORT_CPU
from quantkit.export.rewrite import QdqStyle, QdqWriter, insert_qdq, least_opset
from quantkit.graph import Graph
from quantkit.planning.plan import Plan
from quantkit.planning.presets import Target

TARGET = replace(
    ORT_CPU,
    name="ort-qoperator",
    matrices=frozenset({"int8"}),
    convolutions=frozenset({"int8"}),
    embeddings=frozenset(),
    activations=frozenset({"uint8+zero"}),
)
_STYLE = QdqStyle()


@dataclass(frozen=True)
class OrtQOperatorEmitter:
    """The emitter of `--target ort-qoperator`: the model with Q/DQ pairs, turned into operators on codes."""

    target: Target = TARGET

    def emit(self, graph: Graph, plan: Plan) -> ir.Model:
        """Return the quantized model.

        What quantizes itself in the model already keeps its Q/DQ pairs.
        """
        model = insert_qdq(graph, plan, partial(QdqWriter, style=_STYLE), least_opset(plan, _STYLE))
        there = {str(node.name) for node in graph.model.graph}
        to_operator_form(
            model,
            [
                str(n.name)
                for n in model.graph
                if n.op_type == "QuantizeLinear" and n.domain == "" and n.name not in there
            ],
        )
        return model

"""Models for TensorRT 10 and 11: Q/DQ on the inputs of Conv, MatMul and Gemm, written as NVIDIA's own exporter does.

Opset 19, a typed zero point that is 0 everywhere (without one and without `output_dtype`, ONNX means uint8 where
TensorRT means int8), activations symmetric per tensor, weights per channel, biases in float (TensorRT's
DequantizeLinear takes no int32). At a residual Add only the skip branch is quantized, so that Conv and Add fuse.

INT4 weights: opset 21, DequantizeLinear with `block_size` along the contracted axis, no zero point.

NVFP4: opset 23; the scales, float8 under one float32, pass a DequantizeLinear of their own, whose result scales the
codes along the last axis in blocks of 16; weights [K, N] are stored transposed for it. Activations: TensorRT's own
TRT_FP4DynamicQuantize, then two DequantizeLinear.

MXFP8: TensorRT's own TRT_MXFP8DynamicQuantize and TRT_MXFP8DequantizeLinear, scales as the bytes of E8M0. MXFP4 has no
operators of TensorRT's: the standard's DequantizeLinear of opset 24, which takes E8M0 scales.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from quantkit.errors import SpecError
from quantkit.export.rewrite import QdqStyle, QdqWriter, insert_qdq, least_opset
from quantkit.formats import E8M0, INT8, QuantSpec
from quantkit.graph import Graph
from quantkit.planning.plan import ActivationPlan, Plan, WeightPlan
from quantkit.planning.presets import Target, kind_of

TARGET = Target(
    name="tensorrt",
    int8_activations=QuantSpec(format=INT8),
    outputs=False,
    integer_bias=False,
    whole_blocks=True,
    matrices=frozenset(
        {"int8", "fp8", "fp8 tile", "fp8 block", "int4 block", "int4", "nvfp4", "mxfp4", "mxfp8"}
    ),
    convolutions=frozenset({"int8", "fp8"}),
    activations=frozenset({"int8", "fp8", "nvfp4", "mxfp8"}),
    documented_int4_blocks=frozenset({64, 128}),
)

_STYLE = QdqStyle()
_DOMAIN = "trt"
_FP8 = int(ir.DataType.FLOAT8E4M3FN)
_VERSIONS = (10, 11)
# TensorRT 10's parser stops at this operator set.
_NEWEST_OPSET_10 = 23


@dataclass(frozen=True)
class TensorRTEmitter:
    """The emitter of `--target tensorrt`.

    trt: the major version that is to read the file, 10 or 11.

    Raises:
        SpecError: another version.
    """

    target: Target = TARGET
    trt: int = 11

    def __post_init__(self) -> None:
        if self.trt not in _VERSIONS:
            raise SpecError(
                f"TensorRT {self.trt}: files are written for TensorRT 10 and 11; choose one of them."
            )

    def emit(self, graph: Graph, plan: Plan) -> ir.Model:
        """Return the quantized model.

        Raises:
            SpecError: TensorRT 10 does not have one of the plan's formats.
        """
        opset = least_opset(plan, _STYLE)
        if any(kind_of(w.spec) == "mxfp4" for w in plan.weights):
            opset = max(opset, 24)
        if self.trt == 10 and opset > _NEWEST_OPSET_10:
            raise SpecError(
                f"mxfp4: needs opset {opset}, and TensorRT 10 reads {_NEWEST_OPSET_10} at most; choose --trt 11 or "
                "nvfp4."
            )
        return insert_qdq(graph, plan, partial(_TensorRTWriter, style=_STYLE), opset)


class _TensorRTWriter(QdqWriter):
    """Q/DQ, and what TensorRT wants for blocks of float4 and MX formats."""

    def weight(self, plan: WeightPlan) -> None:
        """Store a weight as codes."""
        write: Mapping[str, Callable[[WeightPlan, ir.Value, ir.Value, np.ndarray], list[ir.Node]]] = {
            "nvfp4": self._nvfp4,
            "mxfp4": self._mxfp4,
            "mxfp8": self._mxfp8,
        }
        kind = kind_of(plan.spec)
        if kind not in write:
            super().weight(plan)
            return
        value = self.value(plan.name)
        rank = len(self.graph.shape(plan.name))
        assert plan.spec.axis is not None
        axis = plan.spec.axis % rank
        order = [i for i in range(rank) if i != axis] + [axis]
        last = order == sorted(order)
        codes = self.codes(plan, partial(np.transpose, axes=order))
        scale = np.transpose(plan.qparams.scale, order)
        nodes = write[kind](plan, codes, value, scale)
        if not last:
            back = ir.AttrInt64s("perm", [order.index(i) for i in range(rank)])
            turned = self.node(
                "Transpose", plan.name, [nodes[-1].outputs[0]], {}, value.dtype or ir.DataType.FLOAT
            )
            turned.attributes["perm"] = back
            turned.outputs[0].shape = value.shape
            nodes.append(turned)
        self.read_instead(plan.name, nodes, plan.readers)

    def _nvfp4(self, plan: WeightPlan, codes: ir.Value, value: ir.Value, scale: np.ndarray) -> list[ir.Node]:
        assert plan.qparams.global_scale is not None and plan.spec.block_size is not None
        dtype = value.dtype or ir.DataType.FLOAT
        packed = self.constant(f"{plan.name}_scale", scale, ir.DataType.FLOAT8E4M3FN)
        shared = self.constant(f"{plan.name}_global_scale", plan.qparams.global_scale, ir.DataType.FLOAT)
        scales = self.node("DequantizeLinear", f"{plan.name}_scale", [packed, shared], {}, ir.DataType.FLOAT)
        blocks = {"axis": -1, "block_size": plan.spec.block_size}
        values = self.node(
            "DequantizeLinear", plan.name, [codes, scales.outputs[0]], blocks, ir.DataType.FLOAT
        )
        cast = self.node("Cast", plan.name, [values.outputs[0]], {"to": int(dtype)}, dtype)
        return [scales, values, cast]

    def _mxfp4(self, plan: WeightPlan, codes: ir.Value, value: ir.Value, scale: np.ndarray) -> list[ir.Node]:
        assert plan.spec.block_size is not None
        dtype = value.dtype or ir.DataType.FLOAT
        scales = self.constant(f"{plan.name}_scale", scale, ir.DataType.FLOAT8E8M0)
        blocks = {"axis": -1, "block_size": plan.spec.block_size, "output_dtype": int(dtype)}
        return [self.node("DequantizeLinear", plan.name, [codes, scales], blocks, dtype)]

    def _mxfp8(self, plan: WeightPlan, codes: ir.Value, value: ir.Value, scale: np.ndarray) -> list[ir.Node]:
        exponents = scale.astype(E8M0.dtype).view(np.uint8)
        scales = self.constant(f"{plan.name}_scale", exponents, ir.DataType.UINT8)
        return [self._mxfp8_dequantize(plan.name, plan.spec, codes, scales, value)]

    def _mxfp8_dequantize(
        self, name: str, spec: QuantSpec, codes: ir.Value, scales: ir.Value, value: ir.Value
    ) -> ir.Node:
        assert spec.block_size is not None
        dtype = value.dtype or ir.DataType.FLOAT
        attributes = {"axis": -1, "block_size": spec.block_size, "output_dtype": int(dtype)}
        return self.node(
            "TRT_MXFP8DequantizeLinear", name, [codes, scales], attributes, dtype, domain=_DOMAIN
        )

    def dynamic_activation(self, plan: ActivationPlan, value: ir.Value) -> list[ir.Node]:
        """Return the nodes that quantize blocks of a tensor along its last axis by scales of their own."""
        kind = kind_of(plan.spec)
        if kind == "nvfp4":
            nodes = self._dynamic_nvfp4(plan, value)
        elif kind == "mxfp8":
            nodes = self._dynamic_mxfp8(plan, value)
        else:
            nodes = super().dynamic_activation(plan, value)
        nodes[-1].outputs[0].shape = value.shape
        return nodes

    def _dynamic_nvfp4(self, plan: ActivationPlan, value: ir.Value) -> list[ir.Node]:
        assert plan.global_scale is not None and plan.spec.block_size is not None
        name, dtype = plan.name, value.dtype or ir.DataType.FLOAT
        shared = self.constant(f"{name}_global_scale", plan.global_scale, ir.DataType.FLOAT)
        blocks = {"axis": -1, "block_size": plan.spec.block_size}
        quantize = self.node(
            "TRT_FP4DynamicQuantize",
            name,
            [value, shared],
            {**blocks, "scale_type": _FP8},
            ir.DataType.FLOAT4E2M1,
            domain=_DOMAIN,
            outputs=2,
        )
        codes, packed = quantize.outputs
        codes.shape, packed.type = value.shape, ir.TensorType(ir.DataType.FLOAT8E4M3FN)
        scales = self.node("DequantizeLinear", f"{name}_scale", [packed, shared], {}, ir.DataType.FLOAT)
        values = self.node("DequantizeLinear", name, [codes, scales.outputs[0]], blocks, ir.DataType.FLOAT)
        if dtype == ir.DataType.FLOAT:
            return [quantize, scales, values]
        cast = self.node("Cast", name, [values.outputs[0]], {"to": int(dtype)}, dtype)
        return [quantize, scales, values, cast]

    def _dynamic_mxfp8(self, plan: ActivationPlan, value: ir.Value) -> list[ir.Node]:
        assert plan.spec.block_size is not None
        attributes = {"axis": -1, "block_size": plan.spec.block_size, "output_dtype": _FP8}
        quantize = self.node(
            "TRT_MXFP8DynamicQuantize",
            plan.name,
            [value],
            attributes,
            ir.DataType.FLOAT8E4M3FN,
            domain=_DOMAIN,
            outputs=2,
        )
        codes, scales = quantize.outputs
        codes.shape, scales.type = value.shape, ir.TensorType(ir.DataType.UINT8)
        return [quantize, self._mxfp8_dequantize(plan.name, plan.spec, codes, scales, value)]

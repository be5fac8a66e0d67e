"""Putting a plan's QuantizeLinear and DequantizeLinear nodes into a graph, as each target wants them written."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from onnxscript import version_converter

from quantkit import __version__
from quantkit.errors import PlanError
from quantkit.export.writer import Writer
from quantkit.formats import QuantSpec, scale_shape
from quantkit.graph import Graph, detached
from quantkit.graph.kept_scales import same_scale
from quantkit.graph.qdq_parameters import same_parameters, stored_parameters
from quantkit.planning.plan import ActivationPlan, BiasPlan, Plan, Reader, WeightPlan

# The IR version that came with each operator set (onnx/docs/Versioning.md): what newer readers ask for is never less.
IR_VERSIONS = {19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12}


@dataclass(frozen=True, kw_only=True)
class QdqStyle:
    """How a target wants its Q/DQ pairs written. Integers of 8 and 16 bits always have their zero points.

    Attributes:
        opset: the least operator set; a model of an older one is raised to it, and further where a format needs it.
        float_zero_points: write the zero points of float8 too. Without one, QuantizeLinear says its type in
            `output_dtype`, which exists from opset 21.
        cast: write the DequantizeLinear of float8 as Cast and Mul, which no optimizer takes for a pattern of its own.
        batched_cast: write the DequantizeLinear of stacks of int8 matrices as Cast and Mul too.
    """

    opset: int = 19
    float_zero_points: bool = True
    cast: bool = False
    batched_cast: bool = False


def least_opset(plan: Plan, style: QdqStyle) -> int:
    """Return the operator set that a plan needs: 21 for blocks, 4 and 16 bits, 23 for float4."""
    specs = [w.spec for w in plan.weights] + [a.spec for a in plan.activations.values()]
    needed = [style.opset, *(_opset_of(spec, style) for spec in specs)]
    return max(needed)


def _opset_of(spec: QuantSpec, style: QdqStyle) -> int:
    if spec.format.kind == "float":
        if spec.format.bits == 4:
            return 23
        return 19 if style.float_zero_points and spec.block_size is None and spec.block_shape is None else 21
    return 19 if spec.format.bits == 8 and spec.block_size is None else 21


def insert_qdq(
    graph: Graph, plan: Plan, writer: Callable[[ir.Model, Graph], "QdqWriter"], opset: int
) -> ir.Model:
    """Return a copy of the model in which the plan's tensors pass through Q/DQ and its weights are stored as codes.

    Codes are made when the model is saved, a weight at a time.

    Args:
        graph: the cleaned model.
        plan: what becomes of it.
        writer: makes what writes the nodes as the target wants them.
        opset: the least operator set.

    Raises:
        PlanError: the plan is of another model, or names what the graph does not have.
    """
    if plan.fingerprint != graph.fingerprint:
        raise PlanError(
            f"plan: solved for model {plan.model} (fingerprint {plan.fingerprint[:12]}), "
            f"but {graph.name} has {graph.fingerprint[:12]}; solve it again from this model's cache."
        )
    _check_weights(graph, plan)
    _check_biases(plan)
    model = graph.model.clone()
    if graph.opset < opset:
        # The converter knows opsets up to 23; 24 changed none of the operators that it has to rewrite.
        version_converter.convert_version(model, min(opset, 23))
        model.graph.opset_imports[""] = opset
    model.ir_version = IR_VERSIONS[model.graph.opset_imports[""]]
    model.producer_name, model.producer_version = "quantkit", __version__
    writing = writer(model, graph)
    for activation in plan.activations.values():
        writing.activation(activation)
    for weight in plan.weights:
        writing.weight(weight)
    for bias in plan.biases:
        writing.bias(bias)
    writing.drop_unused_initializers()
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = detached(value.const_value)
    return model


def _check_weights(graph: Graph, plan: Plan) -> None:
    """Refuse what somebody changed in a plan so that it does not fit its weight."""
    for weight in plan.weights:
        value = graph.values.get(weight.name)
        if value is None or not value.is_initializer():
            raise PlanError(f"plan: the graph has no weight {weight.name}; solve it again for this model.")
        shape = graph.shape(weight.name)
        wanted, found = scale_shape(shape, weight.spec), weight.qparams.scale.shape
        if found != wanted:
            raise PlanError(
                f"plan: weight {weight.name} of {shape} as {weight.spec} needs scales of shape {wanted}, and has "
                f"{found}; mend it, or solve the plan again."
            )
        if weight.codes is not None and weight.codes.shape != shape:
            raise PlanError(
                f"plan: weight {weight.name} has the shape {shape}, and its codes {weight.codes.shape}; mend it, or "
                "solve the plan again."
            )


def _check_biases(plan: Plan) -> None:
    """As `_check_weights`, of biases."""
    for bias in plan.biases:
        if bias.qvalue.ndim != 1 or bias.scale.shape not in ((), bias.qvalue.shape):
            raise PlanError(
                f"plan: bias {bias.name} has codes of shape {bias.qvalue.shape} and scales of {bias.scale.shape}; "
                "mend it, or solve the plan again."
            )


class QdqWriter(Writer):
    """Writes a plan's parts into a model, in the standard's operators.

    Targets with operators of their own override `weight` and `dynamic_activation`.
    """

    def __init__(self, model: ir.Model, graph: Graph, style: QdqStyle) -> None:
        super().__init__(model)
        self.graph = graph
        self.style = style

    def activation(self, plan: ActivationPlan) -> None:
        """Put Q and DQ behind a tensor, and let its readers read that."""
        value = self.value(plan.name)
        users = [(self.reader(n, plan.name, i), i) for n, i in plan.readers]
        if any(node.inputs[index] is not value for node, index in users):
            raise PlanError(
                f"plan: {plan.name} is not read by {sorted(plan.readers)}; solve it again for this model."
            )
        own = self._dequantized_already(plan, value)
        if not users:
            users = [
                (node, index)
                for node, index in value.uses()
                if own is None or node.op_type != "QuantizeLinear"
            ]
        if own is not None:
            for node, index in users:
                node.replace_input_with(index, own)
            return
        nodes = self.dynamic_activation(plan, value) if plan.qparams is None else self._static(plan, value)
        producer = value.producer()
        if producer is not None:
            self.model.graph.insert_after(producer, nodes)
        else:
            self.model.graph.insert_before(self.model.graph[0], nodes)
        for node, index in users:
            node.replace_input_with(index, nodes[-1].outputs[0])

    def _dequantized_already(self, plan: ActivationPlan, value: ir.Value) -> ir.Value | None:
        """The tensor behind a Q/DQ pair of the model's own that quantizes as the plan does."""
        for user, _ in value.uses():
            if user.op_type != "QuantizeLinear" or user.domain or not _quantizes_so(user, plan):
                continue
            for other, _ in user.outputs[0].uses():
                if other.op_type == "DequantizeLinear" and same_parameters(user, other):
                    return other.outputs[0]
        return None

    def dynamic_activation(self, plan: ActivationPlan, value: ir.Value) -> list[ir.Node]:
        """Return the nodes that quantize and dequantize a tensor by scales that they compute.

        Raises:
            PlanError: the target has none.
        """
        raise PlanError(f"plan: {plan.name}: this target has no {plan.spec} activations; choose another one.")

    def _static(self, plan: ActivationPlan, value: ir.Value) -> list[ir.Node]:
        dtype = ir.DataType.from_numpy(plan.spec.format.dtype)
        qparams = plan.static
        parameters = self._parameters(
            plan.name, qparams.scale, qparams.zero_point, plan.spec, value.dtype or ir.DataType.FLOAT
        )
        attributes = {} if len(parameters) == 2 else {"output_dtype": int(dtype)}
        quantize = self.node("QuantizeLinear", plan.name, [value, *parameters], attributes, dtype)
        quantize.outputs[0].shape = value.shape
        codes = quantize.outputs[0]
        return [quantize, *self._dequantize(plan.name, [codes, *parameters], {}, value, plan.spec)]

    def weight(self, plan: WeightPlan) -> None:
        """Store a weight as codes, dequantized where it is read."""
        value = self.value(plan.name)
        spec = plan.spec
        dtype = value.dtype or ir.DataType.FLOAT
        codes = self.codes(plan)
        if spec.block_shape is not None:
            nodes = self._tiles(plan, codes, value)
            self.read_instead(plan.name, nodes, plan.readers)
            return
        cast = self.is_cast(plan)
        parameters = self._parameters(
            plan.name, plan.qparams.scale, plan.qparams.zero_point, spec, dtype, written=not cast
        )
        attributes = {} if spec.axis is None else {"axis": spec.axis}
        if spec.block_size is not None:
            attributes["block_size"] = spec.block_size
        nodes = self._dequantize(plan.name, [codes, *parameters], attributes, value, spec, cast=cast)
        self.read_instead(plan.name, nodes, plan.readers)

    def is_cast(self, plan: WeightPlan) -> bool:
        """Whether the codes of a weight of integers go through Cast and Mul, as those of float8 do by the style."""
        rank = len(self.graph.shape(plan.name))
        columns = rank > 2 and plan.spec.axis in (rank - 1, -1)
        return self.style.batched_cast and columns and can_be_cast(plan)

    def codes(self, plan: WeightPlan, arrange: Callable[[np.ndarray], np.ndarray] = np.asarray) -> ir.Value:
        """Add the codes of a weight, made when they are written; `arrange` moves their axes."""
        shape = arrange(np.broadcast_to(np.int8(0), self.graph.shape(plan.name))).shape
        return self.lazy_constant(
            f"{plan.name}_quantized",
            partial(_codes, self.graph, plan, arrange),
            ir.DataType.from_numpy(plan.spec.format.dtype),
            shape,
        )

    def _tiles(self, plan: WeightPlan, codes: ir.Value, value: ir.Value) -> list[ir.Node]:
        """Tiles of two axes as blocks along the first of them: the scales are repeated along the other as it runs."""
        assert plan.spec.block_shape is not None
        dtype = value.dtype or ir.DataType.FLOAT
        height, width = plan.spec.block_shape
        scale = self.constant(f"{plan.name}_scale", plan.qparams.scale[..., None], dtype)
        shape = (*plan.qparams.scale.shape, width)
        columns = self.graph.shape(plan.name)[-1]
        to = self.constant(f"{plan.name}_scale_tiles", np.array(shape), ir.DataType.INT64)
        flat = self.constant(f"{plan.name}_scale_rows", np.array([shape[0], -1]), ir.DataType.INT64)
        nodes = [self.node("Expand", f"{plan.name}_scale", [scale, to], {}, dtype)]
        nodes.append(self.node("Reshape", f"{plan.name}_scale", [nodes[-1].outputs[0], flat], {}, dtype))
        if shape[1] * width != columns:
            ends = [
                self.constant(f"{plan.name}_{n}", np.array([i]), ir.DataType.INT64) for n, i in _ends(columns)
            ]
            nodes.append(self.node("Slice", f"{plan.name}_scale", [nodes[-1].outputs[0], *ends], {}, dtype))
        repeated = nodes[-1].outputs[0]
        repeated.shape = ir.Shape([shape[0], columns])
        attributes = {"axis": 0, "block_size": height}
        last = self.node("DequantizeLinear", plan.name, [codes, repeated], attributes, dtype)
        last.outputs[0].shape = value.shape
        return [*nodes, last]

    def bias(self, plan: BiasPlan) -> None:
        """Store a bias as int32."""
        value = self.value(plan.name)
        dtype = value.dtype or ir.DataType.FLOAT
        codes = self.constant(f"{plan.name}_quantized", plan.qvalue, ir.DataType.INT32)
        scale = self.constant(f"{plan.name}_scale", plan.scale, dtype)
        axis = {} if plan.scale.ndim == 0 else {"axis": 0}
        node = self.node("DequantizeLinear", plan.name, [codes, scale], axis, dtype)
        node.outputs[0].shape = value.shape
        self.read_instead(plan.name, [node], (plan.reader,))

    def read_instead(self, name: str, nodes: list[ir.Node], readers: tuple[Reader, ...]) -> None:
        """Put nodes before the first of the readers of a constant, and let the readers read the last one's output."""
        users = [(self.reader(n, name, i), i) for n, i in readers]
        order = {id(n): position for position, n in enumerate(self.model.graph)}
        first = min((user for user, _ in users), key=lambda n: order[id(n)])
        self.model.graph.insert_before(first, nodes)
        for user, index in users:
            user.replace_input_with(index, nodes[-1].outputs[0])

    def _dequantize(
        self,
        name: str,
        inputs: list[ir.Value],
        attributes: dict[str, int],
        value: ir.Value,
        spec: QuantSpec,
        *,
        cast: bool = False,
    ) -> list[ir.Node]:
        """The nodes that turn inputs = [codes, scale, zero point or nothing] into the floats of `value`."""
        dtype = value.dtype or ir.DataType.FLOAT
        if cast or (self.style.cast and spec.format.kind == "float" and "block_size" not in attributes):
            codes, scale = inputs[:2]
            if "axis" in attributes:
                rank = len(value.shape) if value.shape is not None else 0
                axis = attributes["axis"] % max(rank, 1)
                if axis != rank - 1:
                    spread = _array(scale).reshape([-1 if i == axis else 1 for i in range(rank)])
                    scale = self.constant(f"{scale.name}_spread", spread, dtype)
            floats = self.node("Cast", name, [codes], {"to": int(dtype)}, dtype)
            nodes = [floats, self.node("Mul", name, [floats.outputs[0], scale], {}, dtype)]
        else:
            nodes = [self.node("DequantizeLinear", name, inputs, attributes, dtype)]
        for node in nodes:
            node.outputs[0].shape = value.shape
        return nodes

    def _parameters(
        self,
        name: str,
        scale: np.ndarray,
        zero_point: np.ndarray | None,
        spec: QuantSpec,
        scale_dtype: ir.DataType,
        *,
        written: bool = True,
    ) -> list[ir.Value]:
        """The scale and, where it is to be written, the zero point."""
        inputs = [self.constant(f"{name}_scale", scale, scale_dtype)]
        whole = spec.block_size is None and spec.format.bits >= 8
        wanted = whole and (spec.format.kind == "integer" or self.style.float_zero_points)
        if (wanted and written) or (zero_point is not None and np.any(zero_point != 0)):
            dtype = ir.DataType.from_numpy(spec.format.dtype)
            zero = np.zeros(scale.shape, dtype.numpy()) if zero_point is None else zero_point
            inputs.append(self.constant(f"{name}_zero_point", zero, dtype))
        return inputs


def can_be_cast(plan: WeightPlan) -> bool:
    """Whether Cast and Mul mean what DequantizeLinear does: integers of whole bytes without zero points."""
    zero_point = plan.qparams.zero_point
    return (
        plan.spec.format.kind == "integer"
        and plan.spec.format.bits >= 8
        and plan.spec.block_size is None
        and (zero_point is None or not zero_point.any())
    )


def _quantizes_so(node: ir.Node, plan: ActivationPlan) -> bool:
    found = stored_parameters(node)
    if plan.qparams is None or isinstance(found, str):
        return False
    return found[0].axis is None and same_scale(found, (plan.spec, plan.qparams))


def _codes(graph: Graph, plan: WeightPlan, arrange: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return arrange(plan.quantize(graph.array(plan.name)).qvalue)


def _ends(columns: int) -> list[tuple[str, int]]:
    return [("scale_starts", 0), ("scale_ends", columns), ("scale_axes", 1)]


def _array(value: ir.Value) -> np.ndarray:
    tensor = value.const_value
    assert tensor is not None
    return tensor.numpy()

"""Putting a plan's QuantizeLinear and DequantizeLinear nodes into a graph, as each target wants them written."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import version_converter

from quantkit import __version__
from quantkit.errors import PlanError
from quantkit.export.matmul_nbits import holds_matmul_nbits, write_matmul_nbits
from quantkit.export.writer import Writer
from quantkit.graph import Graph
from quantkit.plan import ActivationPlan, BiasPlan, Plan, WeightPlan

# The IR version that came with each operator set (onnx/docs/Versioning.md): what newer readers ask for is never less.
IR_VERSIONS = {19: 9, 20: 9, 21: 10, 22: 10, 23: 11}


@dataclass(frozen=True, kw_only=True)
class QdqStyle:
    """How a target wants its Q/DQ pairs written.

    Attributes:
        opset: the least operator set; a model of an older one is raised to it.
        zero_points: write zero points that are 0 too. Without one, QuantizeLinear says its type in `output_dtype`,
            which exists from opset 21.
        matmul_nbits: a matrix of 4-bit blocks becomes ONNX Runtime's MatMulNBits; what that operator cannot hold is
            dequantized like all else.
        cast: write DequantizeLinear as Cast and Mul, which no optimizer takes for a pattern of its own. For formats
            without zero points.
    """

    opset: int
    zero_points: bool
    cast: bool = False
    batched_zero_points: bool = True
    matmul_nbits: bool = False


def insert_qdq(graph: Graph, plan: Plan, style: QdqStyle) -> ir.Model:
    """Return a copy of the model in which the plan's tensors pass through Q/DQ and its weights are stored as codes.

    Raises:
        PlanError: the plan is of another model, or names what the graph does not have.
    """
    if plan.fingerprint != graph.fingerprint:
        raise PlanError(
            f"plan: solved for model {plan.model} (fingerprint {plan.fingerprint[:12]}), "
            f"but {graph.name} has {graph.fingerprint[:12]}; solve it again from this model's cache."
        )
    model = graph.model.clone()
    if graph.opset < style.opset:
        version_converter.convert_version(model, style.opset)
    model.ir_version = IR_VERSIONS[model.graph.opset_imports[""]]
    model.producer_name, model.producer_version = "quantkit", __version__
    writer = _QdqWriter(model, style)
    for activation in plan.activations.values():
        writer.activation(activation)
    for weight in plan.weights:
        writer.weight(weight)
    for bias in plan.biases:
        writer.bias(bias)
    writer.drop_unused_initializers()
    _take_along(model)
    return model


def _take_along(model: ir.Model) -> None:
    """Let the model hold the weights that lie in another's external data; they are mapped, not read."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


class _QdqWriter(Writer):
    def __init__(self, model: ir.Model, style: QdqStyle) -> None:
        super().__init__(model)
        self.style = style

    def activation(self, plan: ActivationPlan) -> None:
        """Put Q and DQ behind a tensor, and let its readers read that."""
        value = self.value(plan.name)
        uses = [(n, i) for n, i in value.uses()]
        if plan.readers:
            wanted = set(plan.readers)
            uses = [(n, i) for n, i in uses if (str(n.name), i) in wanted]
            if len(uses) != len(wanted):
                raise PlanError(
                    f"plan: {plan.name} is not read by {sorted(wanted)}; solve it again for this model."
                )
        dtype = ir.DataType.from_numpy(plan.spec.format.dtype)
        parameters = self._parameters(
            plan.name,
            plan.qparams.scale,
            plan.qparams.zero_point,
            dtype,
            value.dtype or ir.DataType.FLOAT,
            zero_points=self.style.zero_points,
        )
        attributes = {} if len(parameters) == 2 else {"output_dtype": int(dtype)}
        quantize = self.node("QuantizeLinear", plan.name, [value, *parameters], attributes, dtype)
        quantize.outputs[0].shape = value.shape
        nodes = [quantize, *self._dequantize(plan.name, [quantize.outputs[0], *parameters], {}, value)]
        producer = value.producer()
        if producer is not None:
            self.model.graph.insert_after(producer, nodes)
        else:
            self.model.graph.insert_before(self.model.graph[0], nodes)
        for node, index in uses:
            node.replace_input_with(index, nodes[-1].outputs[0])

    def weight(self, plan: WeightPlan) -> None:
        """Store a weight as codes."""
        if self.style.matmul_nbits and holds_matmul_nbits(plan, [self.nodes[n] for n, _ in plan.readers]):
            write_matmul_nbits(self, plan)
        else:
            self._dequantized_weight(plan)

    def _dequantized_weight(self, plan: WeightPlan) -> None:
        value = self.value(plan.name)
        qtensor = plan.qtensor
        dtype = ir.DataType.from_numpy(qtensor.spec.format.dtype)
        codes = self.constant(f"{plan.name}_quantized", qtensor.qvalue, dtype)
        axis, rank = qtensor.spec.axis, qtensor.qvalue.ndim
        batched = rank > 2 and axis == rank - 1
        parameters = self._parameters(
            plan.name,
            qtensor.qparams.scale,
            qtensor.qparams.zero_point,
            dtype,
            value.dtype or ir.DataType.FLOAT,
            zero_points=self.style.zero_points and (self.style.batched_zero_points or not batched),
        )
        attributes = {} if axis is None else {"axis": axis}
        if qtensor.spec.block_size is not None:
            attributes["block_size"] = qtensor.spec.block_size
        self._read_dequantized(plan.name, [codes, *parameters], attributes, value, plan.readers)

    def bias(self, plan: BiasPlan) -> None:
        """Store a bias as int32."""
        value = self.value(plan.name)
        codes = self.constant(f"{plan.name}_quantized", plan.qvalue, ir.DataType.INT32)
        scale = self.constant(f"{plan.name}_scale", plan.scale, value.dtype or ir.DataType.FLOAT)
        self._read_dequantized(plan.name, [codes, scale], {"axis": 0}, value, (plan.reader,))

    def _read_dequantized(
        self,
        name: str,
        inputs: list[ir.Value],
        attributes: dict[str, int],
        value: ir.Value,
        readers: tuple[tuple[str, int], ...],
    ) -> None:
        """Dequantize a constant before the first of its readers, and let them read that."""
        nodes = self._dequantize(name, inputs, attributes, value)
        users = [(self.reader(n, name, i), i) for n, i in readers]
        order = {id(n): position for position, n in enumerate(self.model.graph)}
        first = min((user for user, _ in users), key=lambda n: order[id(n)])
        self.model.graph.insert_before(first, nodes)
        for user, index in users:
            user.replace_input_with(index, nodes[-1].outputs[0])

    def _dequantize(
        self, name: str, inputs: list[ir.Value], attributes: dict[str, int], value: ir.Value
    ) -> list[ir.Node]:
        """The nodes that turn inputs = [codes, scale, zero point or nothing] into the floats of `value`."""
        dtype = value.dtype or ir.DataType.FLOAT
        if self.style.cast and len(inputs) == 2:
            codes, scale = inputs
            if "axis" in attributes:
                rank = len(value.shape) if value.shape is not None else 0
                axis = attributes["axis"] % max(rank, 1)
                spread = _array(scale).reshape([-1 if i == axis else 1 for i in range(rank)])
                scale = self.constant(f"{scale.name}_spread", spread, dtype)
            cast = self.node("Cast", name, [codes], {"to": int(dtype)}, dtype)
            nodes = [cast, self.node("Mul", name, [cast.outputs[0], scale], {}, dtype)]
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
        dtype: ir.DataType,
        scale_dtype: ir.DataType,
        *,
        zero_points: bool,
    ) -> list[ir.Value]:
        inputs = [self.constant(f"{name}_scale", scale, scale_dtype)]
        if zero_points or (zero_point is not None and np.any(zero_point != 0)):
            zero = np.zeros(scale.shape, dtype.numpy()) if zero_point is None else zero_point
            inputs.append(self.constant(f"{name}_zero_point", zero, dtype))
        return inputs


def _array(value: ir.Value) -> np.ndarray:
    tensor = value.const_value
    assert tensor is not None
    return tensor.numpy()

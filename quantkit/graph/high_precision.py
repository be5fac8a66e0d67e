"""What is not quantized, in float16 or bfloat16: TensorRT 11 runs a graph in the types that it is written in."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from quantkit.errors import ModelError
from quantkit.graph.float32_nodes import FLOAT, Slots, float32_nodes, narrowed
from quantkit.graph.sites import LeftAlone

# Conv, pooling and most activations have bfloat16 from this operator set on.
_BFLOAT16_OPSET, _BFLOAT16_IR = 22, 10
HIGH_PRECISION = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def cast_floats(
    model: ir.Model, dtype: ir.DataType, *, keep_io: bool = True, norms: bool = False
) -> tuple[ir.Model, list[LeftAlone]]:
    """Return a model whose float32 tensors are of `dtype`, and the nodes that stay in float32 with the reason.

    Weights, computed tensors, targets of Cast and scales of Q/DQ are cast; scales that are codes themselves (E4M3,
    E8M0), and the float32 scale above those, stay. A Cast stands where a node in float32 meets one that is not.
    Which nodes stay is told in `quantkit.graph.float32_nodes`. Weights are cast when they are read.

    Args:
        model: quantized or not; it is not changed. Tensors of other types than float32 stay as they are.
        dtype: FLOAT16 or BFLOAT16. A model below operator set 22 is raised to it for BFLOAT16.
        keep_io: leave inputs and outputs in float32, with a Cast behind and before them.
        norms: cast the sums and powers of spelled-out norms too.

    Raises:
        ModelError: a computed tensor has no known type, so nobody can tell whether it is float32.
    """
    assert dtype in HIGH_PRECISION.values()
    copy = model.clone()
    if copy.functions:
        passes.InlinePass()(copy)
    if dtype == ir.DataType.BFLOAT16 and copy.graph.opset_imports.get("", 1) < _BFLOAT16_OPSET:
        from onnxscript import version_converter

        version_converter.convert_version(copy, _BFLOAT16_OPSET)
        copy.ir_version = max(copy.ir_version, _BFLOAT16_IR)
    # IR version 3 wants every initializer among the inputs.
    copy.ir_version = max(copy.ir_version, 4)
    _lift_constants(copy)
    _complete_types(copy)
    kept, slots = float32_nodes(copy.graph, dtype, copy.graph.opset_imports[""], norms=norms)
    caster = _Caster(copy, dtype)
    outputs = [v.dtype == FLOAT for v in copy.graph.outputs]
    if not keep_io:
        for value in copy.graph.inputs:
            caster.retype(value)
    for node in list(copy.graph):
        if node in kept:
            caster.keep(node)
        else:
            caster.cast(node, slots[node])
    for index, was_float in enumerate(outputs):
        if was_float and keep_io:
            caster.restore_output(index)
    for name, value in list(copy.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del copy.graph.initializers[name]
    left = [LeftAlone(node=str(n.name), op_type=n.op_type, reason=reason) for n, reason in kept.items()]
    order = {str(node.name): place for place, node in enumerate(copy.graph)}
    return copy, sorted(left, key=lambda item: order[item.node])


class _Caster:
    """Changes types of tensors in topological order, and puts a Cast where two types meet, one a tensor and type."""

    def __init__(self, model: ir.Model, dtype: ir.DataType) -> None:
        self.graph, self.dtype = model.graph, dtype
        # Tensors that were float32; others of that type were so before.
        self._changed: set[ir.Value] = set()
        self._twins: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        values = [*self.graph.inputs, *self.graph.initializers.values()]
        self._taken = {str(v.name) for v in [*values, *(v for n in self.graph for v in n.outputs)]}
        self._taken |= {str(node.name) for node in self.graph}

    def retype(self, value: ir.Value) -> None:
        """Let a float32 tensor be of the narrower type."""
        if value.dtype == FLOAT and not value.is_initializer():
            # A new type: clones of a model share theirs.
            value.type = ir.TensorType(self.dtype)
            self._changed.add(value)

    def keep(self, node: ir.Node) -> None:
        """Let a node, and the graphs inside it, read float32."""
        for user in _with_inner(node):
            for index, value in enumerate(user.inputs):
                if value in self._changed:
                    user.replace_input_with(index, self._as(value, FLOAT))

    def cast(self, node: ir.Node, slots: Slots) -> None:
        """Let a node read and write the narrower type, where it is to."""
        for index, value in enumerate(node.inputs):
            if value is None or node.op_type == "Cast":
                # A Cast reads any type.
                continue
            if index in slots.inputs:
                node.replace_input_with(index, self._as(value, self.dtype))
            elif value in self._changed:
                node.replace_input_with(index, self._as(value, FLOAT))
        for index in slots.outputs:
            self.retype(node.outputs[index])
        if slots.outputs:
            _retype_attributes(node, self.dtype)

    def restore_output(self, index: int) -> None:
        """Give an output that was float32 its type back, under its own name."""
        value = self.graph.outputs[index]
        if value not in self._changed:
            return
        name = str(value.name)
        value.name = self._free_name(f"{name}_{self.dtype.name.lower()}")
        node = self._cast_node(value, FLOAT, name)
        self.graph.append(node)
        self.graph.outputs[index] = node.outputs[0]

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._twins:
            made = self._initializer if value.is_initializer() else self._cast_value
            self._twins[value, dtype] = made(value, dtype)
        return self._twins[value, dtype]

    def _initializer(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None
        name = self._free_name(f"{value.name}_{dtype.name.lower()}")
        shape = ir.Shape(tensor.shape.numpy())
        lazy = ir.LazyTensor(partial(_narrowed, tensor, dtype), dtype, shape, name=name)
        made = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=lazy)
        self.graph.register_initializer(made)
        return made

    def _cast_value(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = self._cast_node(value, dtype, self._free_name(f"{value.name}_{dtype.name.lower()}"))
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return node.outputs[0]

    def _cast_node(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
        node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=self._free_name(f"{name}_Cast"))
        made = node.outputs[0]
        made.name, made.shape, made.type = name, value.shape, ir.TensorType(dtype)
        return node

    def _free_name(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _narrowed(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(narrowed(tensor.numpy(), dtype), dtype=dtype)


def _retype_attributes(node: ir.Node, dtype: ir.DataType) -> None:
    """Let a node say that it puts out the narrower type, where it says so itself."""
    for name in ("to", "output_dtype", "dtype"):
        if name in node.attributes and node.attributes[name].as_int() == FLOAT:
            node.attributes[name] = ir.AttrInt64(name, int(dtype))
    if node.op_type == "ConstantOfShape":
        # Without a value it is 0 in float32.
        filled = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(narrowed(filled, dtype), dtype=dtype))


def _lift_constants(model: ir.Model) -> None:
    """Turn Constant nodes of floats into initializers, on which all that is said of weights holds."""
    for node in list(model.graph):
        tensor = ir.convenience.get_const_tensor(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is None or tensor.dtype != FLOAT or node.outputs[0].is_graph_output():
            continue
        old, name = node.outputs[0], node.outputs[0].name
        own = ir.Tensor(tensor.numpy(), dtype=FLOAT, name=name)
        made = ir.Value(
            name=name, shape=ir.Shape(own.shape.numpy()), type=ir.TensorType(FLOAT), const_value=own
        )
        old.name = None
        ir.convenience.replace_all_uses_with(old, made)
        model.graph.remove(node, safe=True)
        model.graph.register_initializer(made)


def _complete_types(model: ir.Model) -> None:
    """Tell the element type of every computed tensor."""
    values = [(v, node) for node in model.graph for v in node.outputs if v.name]
    if any(v.dtype is None for v, _ in values):
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    for value, node in values:
        if value.dtype is not None:
            continue
        if node.domain == "trt":
            # What they quantize to is no float32; what they dequantize to, they say.
            if node.op_type.endswith("DequantizeLinear") and "output_dtype" in node.attributes:
                value.type = ir.TensorType(ir.DataType(node.attributes["output_dtype"].as_int()))
            continue
        # ONNX does not know the operator. Those that are known here put out what their data or scales are.
        types = {v.dtype for v in node.inputs if v is not None and v.dtype is not None}
        if FLOAT not in types:
            raise ModelError(
                f"{value.name}: the type of what {node.op_type} {node.name} computes is not known, so it cannot be "
                "cast; leave the model in float32, or export it with that type."
            )
        value.type = ir.TensorType(FLOAT)


def _with_inner(node: ir.Node) -> Iterator[ir.Node]:
    """A node, and those of its branches and loop bodies."""
    yield node
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            for inner in graph:
                yield from _with_inner(inner)

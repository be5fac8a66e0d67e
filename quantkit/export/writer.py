"""A model being rewritten: new nodes and constants under names that are free, old ones found by name."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from quantkit.errors import PlanError


class Writer:
    """A model being rewritten.

    Attributes:
        model: the model; it is changed.
        nodes: by name.
        values: tensors by name.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        graph = model.graph
        self.nodes = {str(node.name): node for node in graph}
        self.values = {str(v.name): v for v in graph.inputs} | dict(graph.initializers)
        for node in graph:
            self.values.update({str(v.name): v for v in node.outputs if v.name})
        self.node_names = set(self.nodes)

    def drop_unused_initializers(self) -> None:
        """Remove the float weights that nobody reads any more."""
        graph = self.model.graph
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]

    def constant(self, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
        """Add an initializer under this name, or one like it that is free."""
        name = self._free_name(name)
        tensor = ir.tensor(
            np.ascontiguousarray(array.astype(dtype.numpy())).reshape(array.shape), dtype=dtype, name=name
        )
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor
        )
        self.model.graph.register_initializer(value)
        self.values[name] = value
        return value

    def lazy_constant(
        self, name: str, make: Callable[[], np.ndarray], dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        """Add an initializer whose contents are made when they are written, and each time anew."""
        name = self._free_name(name)

        def evaluate() -> ir.TensorProtocol:
            array = make()
            return ir.tensor(np.ascontiguousarray(array).reshape(array.shape), dtype=dtype, name=name)

        tensor = ir.LazyTensor(evaluate, dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        self.values[name] = value
        return value

    def node(
        self,
        op_type: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, int],
        dtype: ir.DataType | None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Node:
        """Return a node, named with its first output after the tensor `name`; it is not in the graph yet."""
        output = self._free_name(f"{name}_{op_type}_Output")
        node_name = f"{name}_{op_type}"
        while node_name in self.node_names:
            node_name += "_"
        self.node_names.add(node_name)
        node = ir.node(
            op_type, inputs, attributes=dict(attributes), name=node_name, domain=domain, num_outputs=outputs
        )
        if domain:
            self.model.graph.opset_imports.setdefault(domain, 1)
        for number, other in enumerate(node.outputs[1:], 1):
            other.name = self._free_name(f"{name}_{op_type}_Output{number}")
            self.values[str(other.name)] = other
        value = node.outputs[0]
        value.name = output
        if dtype is not None:
            value.type = ir.TensorType(dtype)
        self.values[output] = value
        return node

    def _free_name(self, name: str) -> str:
        while name in self.values:
            name += "_"
        return name

    def value(self, name: str) -> ir.Value:
        """Return the tensor of that name.

        Raises:
            PlanError: there is none.
        """
        if name not in self.values:
            raise PlanError(f"plan: the graph has no tensor {name}; solve it again for this model.")
        return self.values[name]

    def reader(self, node: str, tensor: str, index: int) -> ir.Node:
        """Return the node that reads `tensor` as its input `index`.

        Raises:
            PlanError: there is none.
        """
        found = self.nodes.get(node)
        if found is None or index >= len(found.inputs) or found.inputs[index] is None:
            raise PlanError(
                f"plan: {tensor} is not input {index} of node {node}; solve it again for this model."
            )
        return found

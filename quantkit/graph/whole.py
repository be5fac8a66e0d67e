"""Refusing models that are not whole: what the optimizer would trip over, or mend in a way that nobody wants."""

from collections.abc import Mapping

import onnx_ir as ir

from quantkit.errors import ModelError
from quantkit.graph.tensors import stored_tensors

_NO_TENSORS: Mapping[type, str] = {
    ir.SequenceType: "a sequence",
    ir.OptionalType: "optional",
    ir.SparseTensorType: "a sparse tensor",
}


def check_whole(model: ir.Model, what: str) -> None:
    """Refuse a model with no nodes, unconnected or unreadable tensors, or inputs and outputs that are no tensors.

    Raises:
        ModelError: so it is.
    """
    if len(list(model.graph)) == 0:
        raise ModelError(f"{what}: it has no nodes; give a trained ONNX model.")
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is None or value.producer() is not None or value.is_graph_input():
                continue
            if not value.is_initializer():
                reader = f"{node.op_type} {node.name or 'without a name'}"
                raise ModelError(
                    f"{what}: {reader} reads {value.name}, which nothing computes; "
                    "export or download the model again (a sparse weight: as a dense one)."
                )
    for value in model.graph.outputs:
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
            raise ModelError(f"{what}: nothing computes its output {value.name}; export the model again.")
    for role, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            kind = _NO_TENSORS.get(type(value.type))
            if kind is not None:
                raise ModelError(
                    f"{what}: {role} {value.name} is {kind}, and quantkit feeds and compares tensors only; "
                    f"export the model without that {role}."
                )
    for name, tensor in stored_tensors(model):
        try:
            tensor.numpy()
        except Exception as error:
            # Wrong sizes and unknown types surface as whatever NumPy makes of them.
            raise ModelError(
                f"{what}: weight {name} cannot be read ({first_line(error)}); export or download the model again."
            ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's innermost cause, shortened."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text[:160]

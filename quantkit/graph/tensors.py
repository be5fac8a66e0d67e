"""Stored tensors: weights in the model's own file or in external data beside it."""

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir


def read_tensor(tensor: ir.TensorProtocol) -> np.ndarray:
    """Return the contents of a tensor. Those of external data are read, where onnx-ir would map and keep them."""
    if not isinstance(tensor, ir.ExternalTensor) or tensor.nbytes == 0:
        return tensor.numpy()
    if tensor.dtype.bitwidth < 8:
        # Its copy unpacks the codes and maps the file, and goes with both.
        copy = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name,
            base_dir=tensor.base_dir,
        )
        return copy.numpy()
    shape = tuple(tensor.shape.numpy())
    array = np.fromfile(
        tensor.path, np.dtype(tensor.dtype.numpy()), math.prod(shape), offset=tensor.offset or 0
    )
    return array.reshape(shape)


def detached(tensor: ir.ExternalTensor) -> ir.LazyTensor:
    """Return a tensor that any file can hold, read from the other one's external data when it is written."""
    return ir.LazyTensor(
        lambda: ir.tensor(read_tensor(tensor), dtype=tensor.dtype, name=tensor.name),
        tensor.dtype,
        ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def stored_tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Yield every stored tensor, those of Constant nodes included, with the name it is known by."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield str(node.outputs[0].name if node.outputs else node.name), attribute.as_tensor()

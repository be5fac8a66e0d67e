"""Reading an ONNX model."""

import os
import re
from pathlib import Path

import onnx
import onnx_ir as ir

from quantkit.errors import ModelError
from quantkit.graph.clean import clean, quiet
from quantkit.graph.model import Graph
from quantkit.graph.tensors import stored_tensors
from quantkit.graph.whole import first_line

ModelLike = str | os.PathLike[str] | onnx.ModelProto | ir.Model | Graph


def load_graph(model: ModelLike) -> Graph:
    """Read a model and clean it.

    Older operator sets are raised to 19 by ONNX's converter; constants are folded, BatchNormalization is merged into
    the convolution before it, identities and dead nodes go, functions are inlined, and what has no name gets one.

    Args:
        model: a path to an .onnx file (external data is found beside it), or a model in memory, which is not changed.

    Raises:
        ModelError: no such file, not an ONNX model, damaged, weights missing, an unsupported operator set, or an
            input or output that is no tensor.
    """
    if isinstance(model, Graph):
        return model
    if isinstance(model, ir.Model):
        name = _stem(model.graph.name)
        return Graph(clean(_copy(model), name), name)
    if isinstance(model, onnx.ModelProto):
        name = _stem(model.graph.name)
        # Cleaning renames tensors, and onnx-ir's are views of the message.
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        try:
            with quiet():
                read = ir.serde.deserialize_model(copy)
        except Exception as error:
            raise ModelError(
                f"{name}: not a valid ONNX model ({first_line(error)}); export it again."
            ) from error
        return Graph(clean(read, name), name)
    path = Path(model)
    return Graph(clean(_read(path), str(path)), path.stem, path)


def _stem(name: str | None) -> str:
    """A graph's name as it may stand in a file's."""
    return re.sub(r"[^\w.-]+", "_", name or "") or "model"


def _copy(model: ir.Model) -> ir.Model:
    """A clone whose constants may be renamed: a clone shares tensors, and lifting a constant names its tensor."""
    copy = model.clone()
    for node in copy.graph.all_nodes():
        value = node.attributes.get("value")
        if node.op_type == "Constant" and value is not None and value.type == ir.AttributeType.TENSOR:
            tensor = value.as_tensor()
            if tensor.dtype != ir.DataType.STRING:
                own = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
                node.attributes["value"] = ir.AttrTensor("value", own)
    return copy


def _read(path: Path) -> ir.Model:
    if not path.exists():
        raise ModelError(f"{path}: no such file; give the path of an .onnx model.")
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; give the path of the .onnx file in it.")
    try:
        with quiet():
            model = ir.load(path)
    except Exception as error:
        # onnx-ir passes on whatever protobuf or its own readers raise; none of it is one type.
        raise ModelError(
            f"{path}: not a readable ONNX model ({path.stat().st_size} bytes; {first_line(error)}); "
            "export or download it again."
        ) from error
    for name, tensor in stored_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(path, name, tensor)
    return model


def _check_external(path: Path, name: str, tensor: ir.ExternalTensor) -> None:
    file = Path(tensor.path)
    if not file.exists():
        raise ModelError(f"{path}: its weights file {file} is missing; put it beside the model.")
    wanted = (tensor.offset or 0) + tensor.nbytes
    if file.stat().st_size < wanted:
        raise ModelError(
            f"{path}: weight {name} ends at byte {wanted} of {file}, which has {file.stat().st_size}; "
            "copy the weights file again."
        )

"""Reading an ONNX model and bringing it to the one shape that everything after works on."""

import contextlib
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from quantkit.data import InputSpec
from quantkit.errors import ModelError

# Q/DQ of int8 and float8 as TensorRT 10 reads them begin with opset 19; onnxscript's converter covers 18 and above.
WORKING_OPSET = 19
NEWEST_OPSET = 23

# Folding these never makes a tensor larger, so a weight behind them becomes a plain weight whatever its size.
_LAYOUT_OPS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_NO_TENSORS: Mapping[type, str] = {
    ir.SequenceType: "a sequence",
    ir.OptionalType: "optional",
    ir.SparseTensorType: "a sparse tensor",
}


@dataclass
class Graph:
    """A cleaned model: constants folded, BatchNormalization merged, every node and tensor named.

    Attributes:
        model: the onnx-ir model. Weights of external data stay on disk until read.
        name: the model file's stem, for messages and output files.
        path: where it was read from; None for a model given in memory.
    """

    model: ir.Model
    name: str
    path: Path | None = None
    _nodes: dict[str, ir.Node] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._nodes = {str(node.name): node for node in self.model.graph}

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return self.model.graph.opset_imports[""]

    @property
    def inputs(self) -> list[InputSpec]:
        """What the model wants to be fed, initializers listed as inputs left out."""
        return [
            InputSpec(name=str(v.name), dtype=_numpy_dtype(v), shape=_free_shape(v), masks=_masks(v))
            for v in self.model.graph.inputs
            if str(v.name) not in self.model.graph.initializers
        ]

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs, in order."""
        return [str(v.name) for v in self.model.graph.outputs]

    @property
    def weight_bytes(self) -> int:
        """Bytes that the initializers take."""
        return sum(
            v.const_value.nbytes for v in self.model.graph.initializers.values() if v.const_value is not None
        )

    def node(self, name: str) -> ir.Node:
        """Return the node of that name."""
        return self._nodes[name]

    @cached_property
    def values(self) -> dict[str, ir.Value]:
        """Every tensor of the main graph by name: inputs, initializers, node outputs."""
        found = {str(v.name): v for v in self.model.graph.inputs}
        found.update(self.model.graph.initializers)
        for node in self.model.graph:
            found.update({str(v.name): v for v in node.outputs if v.name})
        return found

    def array(self, name: str) -> np.ndarray:
        """Return the contents of an initializer."""
        tensor = self.model.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the structure, names and weights: 64 hexadecimal digits, the same on every machine."""
        digest = hashlib.sha256()
        for line in _describe(self.model):
            digest.update(line.encode())
            digest.update(b"\n")
        return digest.hexdigest()


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
        return _clean(_copy(model), _stem(model.graph.name), None)
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
                f"{name}: not a valid ONNX model ({_first_line(error)}); export it again."
            ) from error
        return _clean(read, name, None)
    path = Path(model)
    return _clean(_read(path), path.stem, path)


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
            f"{path}: not a readable ONNX model ({path.stat().st_size} bytes; {_first_line(error)}); "
            "export or download it again."
        ) from error
    for name, tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(path, name, tensor)
    return model


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every stored tensor, those of Constant nodes included, with the name it is known by."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield str(node.outputs[0].name if node.outputs else node.name), attribute.as_tensor()


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


def _clean(model: ir.Model, name: str, path: Path | None) -> Graph:
    from onnxscript import optimizer

    what = str(path or name)
    if len(list(model.graph)) == 0:
        raise ModelError(f"{what}: it has no nodes; give a trained ONNX model.")
    _check_whole(model, what)
    fed = [v.name for v in model.graph.inputs]
    with quiet():
        _name_nodes(model)
        passes.NameFixPass()(model)
        model = _at_working_opset(model, what)
        try:
            _drop_initializer_inputs(model)
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            optimizer.optimize_ir(model, should_fold=_fold_layout)
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            passes.TopologicalSortPass()(model)
            passes.ShapeInferencePass()(model)
            _complete_types(model)
            _restore_inputs(model, {str(n) for n in fed})
            _name_nodes(model)
            passes.NameFixPass()(model)
        except Exception as error:
            raise ModelError(
                f"{what}: not a valid ONNX graph ({_first_line(error)}); check it with onnx.checker."
            ) from error
    return Graph(model, name, path)


def _check_whole(model: ir.Model, what: str) -> None:
    """Refuse what the optimizer would trip over, or mend in a way that nobody wants."""
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is None or value.producer() is not None or value.is_graph_input():
                continue
            if not value.is_initializer():
                reader = f"{node.op_type} {node.name or 'without a name'}"
                raise ModelError(
                    f"{what}: {reader} reads {value.name}, which nothing computes; "
                    "export or download the model again."
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
    for name, tensor in _tensors(model):
        try:
            tensor.numpy()
        except Exception as error:
            # Wrong sizes and unknown types surface as whatever NumPy makes of them.
            raise ModelError(
                f"{what}: weight {name} cannot be read ({_first_line(error)}); export or download the model again."
            ) from error


def _drop_initializer_inputs(model: ir.Model) -> None:
    """IR version 3 listed every initializer as an input too; the optimizer folds nothing that an input can override."""
    kept = [v for v in model.graph.inputs if str(v.name) not in model.graph.initializers]
    if len(kept) != len(model.graph.inputs):
        model.graph.inputs[:] = kept


def _complete_types(model: ir.Model) -> None:
    """Behind an operator that shape inference does not know, a linear operator's weight tells what its input is."""
    for node in model.graph:
        if node.domain == "" and node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            pair = [v for v in node.inputs[:2] if v is not None]
            known = next((v.dtype for v in pair if v.dtype is not None), None)
            for value in [*pair, node.outputs[0]]:
                if value.dtype is None and known is not None:
                    value.dtype = known


def _restore_inputs(model: ir.Model, names: set[str]) -> None:
    """The optimizer renames an input that is an output as well and puts an Identity between the two; undo that."""
    graph = model.graph
    for node in list(graph):
        value, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Identity" or value is None or not value.is_graph_input():
            continue
        name = output.name
        if name in names and value.name not in names:
            graph.outputs[:] = [value if v is output else v for v in graph.outputs]
            graph.remove(node, safe=True)
            value.name = name


def _name_nodes(model: ir.Model) -> None:
    """Give every node a name that no other has, those of branches and loop bodies included."""
    nodes = list(model.graph.all_nodes())
    taken = {str(node.name) for node in nodes if node.name}
    seen: set[str] = set()
    numbers: Counter[str] = Counter()
    for node in nodes:
        base = name = node.name or node.op_type
        while name in seen or (name in taken and name != node.name):
            numbers[base] += 1
            name = f"{base}_{numbers[base]}"
        seen.add(name)
        node.name = name


def _fold_layout(node: ir.Node) -> bool | None:
    return True if node.domain == "" and node.op_type in _LAYOUT_OPS else None


def _at_working_opset(model: ir.Model, what: str) -> ir.Model:
    from onnxscript import version_converter

    opset = model.graph.opset_imports.get("")
    if opset is None:
        raise ModelError(
            f"{what}: names no version of ONNX's operators, so it is cut short or has only others; "
            "export or download it again."
        )
    if opset > NEWEST_OPSET:
        raise ModelError(
            f"{what}: operator set {opset}; TensorRT and ONNX Runtime read quantized models up to {NEWEST_OPSET}: "
            f"export it with opset {NEWEST_OPSET} or lower."
        )
    if opset < WORKING_OPSET:
        try:
            version_converter.convert_version(model, WORKING_OPSET, fallback=True)
        except Exception as error:
            raise ModelError(
                f"{what}: operator set {opset} cannot be raised to {WORKING_OPSET} ({_first_line(error)}); "
                f"export it with opset {WORKING_OPSET} or higher."
            ) from error
        if model.graph.opset_imports.get("") != WORKING_OPSET:
            raise ModelError(
                f"{what}: operator set {opset} could not be raised to {WORKING_OPSET}; "
                f"export it with opset {WORKING_OPSET} or higher."
            )
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the optimizer's remarks about nodes it leaves alone from the user's screen."""
    loggers = [logging.getLogger(n) for n in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _describe(model: ir.Model) -> Iterator[str]:
    """The structure as lines of text that do not depend on how the file was written."""
    graph = model.graph
    yield repr(sorted(graph.opset_imports.items()))
    yield repr(
        [(v.name, str(v.dtype), str(v.shape)) for v in graph.inputs if v.name not in graph.initializers]
    )
    yield repr([v.name for v in graph.outputs])
    yield from _describe_weights(graph)
    for node in graph:
        yield from _describe_node(node)


def _describe_weights(graph: ir.Graph) -> Iterator[str]:
    for name, value in sorted(graph.initializers.items()):
        assert value.const_value is not None
        yield f"{name} {_digest(value.const_value)}"


def _digest(tensor: ir.TensorProtocol) -> str:
    """Type, shape and contents in one line."""
    if tensor.dtype == ir.DataType.STRING:
        return f"{tuple(tensor.shape)} {tensor.numpy().tolist()!r}"
    array = np.ascontiguousarray(tensor.numpy())
    contents = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {contents}"


def _describe_node(node: ir.Node) -> Iterator[str]:
    names = [v.name if v is not None else "" for v in node.inputs], [v.name for v in node.outputs]
    yield f"{node.domain}::{node.op_type} {names}"
    for key, attribute in sorted(node.attributes.items()):
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            one = attribute.type == ir.AttributeType.GRAPH
            for graph in (attribute.as_graph(),) if one else attribute.as_graphs():
                yield f"{key} {[v.name for v in graph.inputs]} {[v.name for v in graph.outputs]}"
                yield from _describe_weights(graph)
                for inner in graph:
                    yield from _describe_node(inner)
        elif attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            yield f"{key} {_digest(tensor)}"
        else:
            yield f"{key} {attribute.value!r}"


def _numpy_dtype(value: ir.Value) -> np.dtype:
    if value.dtype is None:
        raise ModelError(f"{value.name}: the input has no element type; export the model again.")
    return np.dtype(value.dtype.numpy())


def _masks(value: ir.Value) -> bool:
    """Whether an input is only ever added to computed tensors: an additive attention mask, whose −inf is meant."""
    for node, _ in value.uses():
        if node.op_type in ("Unsqueeze", "Cast", "Expand", "Slice"):
            if not _masks(node.outputs[0]):
                return False
        elif node.op_type != "Add" or any(v is not None and v.const_value is not None for v in node.inputs):
            return False
    return bool(value.uses())


def _free_shape(value: ir.Value) -> tuple[int | str | None, ...]:
    if value.shape is None:
        raise ModelError(
            f"{value.name}: the input's rank is not given; export the model with the rank of every input."
        )
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def _first_line(error: BaseException) -> str:
    """The first line of an error's innermost cause, shortened."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text[:160]

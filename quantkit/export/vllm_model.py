"""A folder for vLLM as an ONNX model again: the float model with the folder's parameters, to judge what they cost.

Weights become the floats that their codes stand for; the inputs of layers are quantized by float operators that round
as the formats say, with the scales of the folder or, where those are dynamic, with scales computed as the model runs.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantkit.decode import rounding
from quantkit.decode.arithmetic import Arithmetic, in_blocks
from quantkit.errors import ModelError, QuantkitError
from quantkit.export.linear_layers import Layer, find_parameters
from quantkit.export.module_names import load_name_map
from quantkit.export.safetensors_file import ReadTensor, read_safetensors
from quantkit.export.vllm import CONFIG, NAMES
from quantkit.export.vllm_schemes import Scheme, read_schemes
from quantkit.formats import E8M0, QTensor, QuantSpec, dequantize
from quantkit.formats.compressed_tensors import code_layout, unpack_codes, unpack_qparams
from quantkit.formats.scales import SMALLEST_SCALE
from quantkit.graph import Graph

_FLOAT = ir.DataType.FLOAT


def read_folder(folder: Path, graph: Graph) -> Graph:
    """Return the float model `graph` with the parameters of a folder that this package wrote from it.

    Weights are read when they are needed, and not kept.

    Raises:
        ModelError: the folder is not of this package's making, or of another model.
    """
    try:
        tensors = read_safetensors(folder)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["quantization_config"]
        parameters = find_parameters(graph, name_map=load_name_map(folder / NAMES))
        schemes = read_schemes(config, [layer.path for layer in parameters.layers if layer.linear])
    except (OSError, ValueError, KeyError, TypeError, QuantkitError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{folder}: not written from {graph.name} by `quantkit export --target vllm` ({why}); export it again."
        ) from error
    model = graph.model.clone()
    reader = _Reader(folder, model, tensors)
    for layer in parameters.layers:
        scheme = schemes.get(layer.path)
        if scheme is not None:
            reader.quantized(layer, scheme)
        elif not layer.tied:
            reader.weight(layer, reader.floats(f"{layer.path}.weight", layer.transposed))
        reader.bias(layer)
    for source, name in parameters.others.items():
        value = model.graph.initializers[source]
        value.const_value = reader.floats(name, False, of=value)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return Graph(model, graph.name)


class _Reader:
    """Puts the tensors of a folder into a copy of the float model."""

    def __init__(self, folder: Path, model: ir.Model, tensors: Mapping[str, ReadTensor]) -> None:
        self._folder, self._model, self._tensors = folder, model, tensors
        self._nodes = {str(node.name): node for node in model.graph}
        values = [*model.graph.inputs, *model.graph.initializers.values()]
        values += [v for node in model.graph for v in node.outputs]
        self._taken = {str(v.name) for v in values} | set(self._nodes)

    def quantized(self, layer: Layer, scheme: Scheme) -> None:
        """Give a layer its weight, as floats, and quantize its inputs."""
        held = {
            name.removeprefix(f"{layer.path}."): tensor
            for name, tensor in self._tensors.items()
            if name.rpartition(".")[0] == layer.path
        }
        rows, columns = self._shape(layer)
        codes, _, stored = code_layout((rows, columns), scheme.weights, packed=scheme.packed)
        if not {codes, "weight_scale"} <= held.keys() or held[codes].shape != stored:
            raise self._other(f"{layer.path} has no codes and scales for [{rows}, {columns}]")
        tensor = ir.LazyTensor(
            partial(_decoded, held, scheme, (rows, columns), layer.transposed),
            _FLOAT,
            ir.Shape((columns, rows) if layer.transposed else (rows, columns)),
            name=f"{layer.path}.weight",
        )
        self.weight(layer, tensor)
        if scheme.inputs is None:
            return
        scale = next((held[n].array() for n in ("input_scale", "input_global_scale") if n in held), None)
        if scale is not None and scheme.inputs.has_global_scale:
            scale = np.reciprocal(scale)
        for name in layer.nodes:
            self._quantize_input(self._nodes[name], layer, scheme.inputs, scale)

    def weight(self, layer: Layer, tensor: ir.TensorProtocol) -> None:
        """Let the nodes of a layer multiply by a tensor."""
        value = self._stored(tensor, layer.weight)
        for name in layer.nodes:
            node = self._nodes[name]
            index = _weight_index(node, layer)
            old = node.inputs[index]
            assert old is not None
            node.replace_input_with(index, self._cast(node, value, old.dtype))

    def bias(self, layer: Layer) -> None:
        """Give a layer the bias of the folder, one of its own where the model has none."""
        name = layer.bias_name or f"{layer.path}.bias"
        if layer.bias:
            value = self._model.graph.initializers[layer.bias]
            value.const_value = self.floats(name, False, of=value)
        elif name in self._tensors and layer.linear:
            for node in layer.nodes:
                self._add_behind(self._nodes[node], name)

    def _add_behind(self, node: ir.Node, name: str) -> None:
        """Put an Add of a vector of the folder behind a node."""
        output = node.outputs[0]
        vector = self._stored(self.floats(name, False, dtype=output.dtype), name)
        added = ir.node("Add", [output, vector])
        added.outputs[0].type, added.outputs[0].shape = output.type, output.shape
        ir.convenience.replace_all_uses_with(output, added.outputs[0], replace_graph_outputs=True)
        # The Add reads what it replaces.
        added.replace_input_with(0, output)
        self._model.graph.insert_after(node, added)
        added.outputs[0].name, output.name = output.name, self._free(f"{output.name}::product")

    def floats(
        self, name: str, transposed: bool, *, of: ir.Value | None = None, dtype: ir.DataType | None = None
    ) -> ir.LazyTensor:
        """Return a float tensor of the folder, in the type of the value whose place it takes, or as `dtype` says."""
        if name not in self._tensors:
            raise self._other(f"{name} is missing")
        held = self._tensors[name]
        wanted = (dtype if of is None else of.dtype) or _FLOAT
        shape = held.shape[::-1] if transposed else held.shape
        if of is not None and of.shape is not None and tuple(of.shape) != shape:
            raise self._other(f"{name} has shape {list(shape)}")

        def read() -> ir.TensorProtocol:
            array = held.array().astype(wanted.numpy())
            return ir.tensor(np.ascontiguousarray(array.T if transposed else array), dtype=wanted, name=name)

        return ir.LazyTensor(read, wanted, ir.Shape(shape), name=name)

    def _quantize_input(
        self, node: ir.Node, layer: Layer, spec: QuantSpec, scale: NDArray[np.float32] | None
    ) -> None:
        a = Arithmetic(node, self._taken)
        index = 1 - _weight_index(node, layer)
        value = node.inputs[index]
        assert value is not None
        x = a.cast(value, _FLOAT)
        if spec.dynamic is None:
            assert scale is not None
            found = _rounded(a, x, a.constant(scale.reshape(())), spec)
        elif spec.block_size is None:
            found = _rounded(a, x, _token_scale(a, x, spec), spec)
        else:
            blocks, undo = in_blocks(a, x, -1, spec.block_size)
            found = undo(_rounded(a, blocks, _block_scale(a, blocks, spec, scale), spec))
        found = a.typed(found, _FLOAT)
        found.shape = value.shape
        node.replace_input_with(index, a.cast(found, value.dtype or _FLOAT))

    def _cast(self, node: ir.Node, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        return value if dtype is None else Arithmetic(node, self._taken).cast(value, dtype)

    def _stored(self, tensor: ir.TensorProtocol, wanted: str) -> ir.Value:
        name = self._free(wanted)
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._model.graph.register_initializer(value)
        return value

    def _free(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def _shape(self, layer: Layer) -> tuple[int, int]:
        """The weight's shape [out, in], in the float model."""
        value = self._model.graph.initializers[layer.weight]
        assert value.const_value is not None
        rows, columns = value.const_value.shape.numpy()
        return (columns, rows) if layer.transposed else (rows, columns)

    def _other(self, what: str) -> ModelError:
        return ModelError(
            f"{self._folder}: {what}, so it is of another model; give the float model it was made from."
        )


def _decoded(
    held: Mapping[str, ReadTensor], scheme: Scheme, shape: tuple[int, int], transposed: bool
) -> ir.TensorProtocol:
    arrays: dict[str, NDArray[Any]] = {name: tensor.array() for name, tensor in held.items()}
    stored = arrays["weight_packed" if "weight_packed" in arrays else "weight"]
    codes = unpack_codes(stored, scheme.weights, shape[1], packed=scheme.packed)
    qparams = unpack_qparams(arrays, scheme.weights, shape, packed=scheme.packed)
    values = dequantize(QTensor(codes, qparams, scheme.weights))
    return ir.tensor(np.ascontiguousarray(values.T if transposed else values))


def _weight_index(node: ir.Node, layer: Layer) -> int:
    """Which input of a node its layer's weight is: the second, unless that of a MatMul is its data."""
    return 1 if layer.transposed or not layer.linear or node.op_type == "Gemm" else 0


def _rounded(a: Arithmetic, x: ir.Value, scale: ir.Value, spec: QuantSpec) -> ir.Value:
    """`x` quantized and dequantized."""
    ratio = a.op("Div", x, scale)
    if spec.format.kind == "float":
        codes = rounding.round_to(a, ratio, spec.format)
    else:
        codes = a.op("Clip", a.op("Round", ratio), a.floats(spec.format.min), a.floats(spec.format.max))
    return a.op("Mul", codes, scale)


def _token_scale(a: Arithmetic, x: ir.Value, spec: QuantSpec) -> ir.Value:
    """amax / max of every row, in float32; 1 where a row is zero."""
    amax = rounding.block_amax(a, x, -1)
    ratio = a.op("Max", a.op("Div", amax, a.doubles(spec.format.symmetric_max)), a.doubles(SMALLEST_SCALE))
    found = a.op("Where", a.op("Equal", amax, a.doubles(0)), a.doubles(1), ratio)
    return a.op("Cast", found, to=int(_FLOAT))


def _block_scale(
    a: Arithmetic, blocks: ir.Value, spec: QuantSpec, shared: NDArray[np.float32] | None
) -> ir.Value:
    if spec.scale_format == E8M0:
        return rounding.e8m0_scale(a, rounding.block_amax(a, blocks, -1), spec.format)
    if shared is None:
        return _token_scale(a, blocks, spec)
    whole = a.constant(shared.reshape(()))
    amax = rounding.block_amax(a, blocks, -1)
    return a.op("Mul", rounding.e4m3_scale(a, amax, whole, spec.format), whole)

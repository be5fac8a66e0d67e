"""The tensors of a quantized layer as a folder for vLLM has them: codes [out, in] and what stands beside them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantkit.export.linear_layers import Layer, Parameters
from quantkit.export.safetensors_file import StoredTensor, stored
from quantkit.export.vllm_schemes import Scheme, scheme_of
from quantkit.formats import QParams, QuantSpec
from quantkit.formats.compressed_tensors import code_layout, pack_codes, pack_qparams
from quantkit.graph import Graph
from quantkit.planning.plan import ActivationPlan, Plan

# Elements that are transposed and packed at a time.
_SLAB = 1 << 22


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """A layer whose weight is quantized, and how its inputs are.

    Attributes:
        layer: which one.
        scheme: how it is written down; the axis of its weights is that of [out, in].
        inputs: how each of its nodes' inputs are quantized; () where they stay in float.
    """

    layer: Layer
    scheme: Scheme
    inputs: tuple[ActivationPlan, ...]

    def codes(self, graph: Graph) -> NDArray[np.generic]:
        """Return the codes [out, in]: a view of those of the plan."""
        assert self.layer.plan is not None
        codes = self.layer.plan.quantize(graph.array(self.layer.weight)).qvalue
        return codes.T if self.layer.transposed else codes

    @property
    def qparams(self) -> QParams:
        """Scales and zero points of the weight [out, in]."""
        assert self.layer.plan is not None
        found = self.layer.plan.qparams
        if not self.layer.transposed:
            return found
        zero = found.zero_point
        # Scales in blocks have the weight's axes; all others keep their order.
        return QParams(found.scale.T, None if zero is None else zero.T, found.global_scale)

    def input_scales(self) -> dict[str, NDArray[np.generic]]:
        """Return what is stored of the inputs: `input_scale`, or `input_global_scale` for NVFP4's dynamic blocks.

        Both are float32 of shape (1,); the global scale is the reciprocal of this package's, as the weights'. A layer
        that is called on several tensors has the largest scale.
        """
        if not self.inputs:
            return {}
        shared = [a.global_scale for a in self.inputs if a.global_scale is not None]
        if shared:
            return {"input_global_scale": np.reciprocal(np.max(shared)).astype(np.float32).reshape(1)}
        static = [a.qparams.scale for a in self.inputs if a.qparams is not None]
        return {"input_scale": np.max(static).astype(np.float32).reshape(1)} if static else {}


def quantized_layers(graph: Graph, plan: Plan, parameters: Parameters) -> list[QuantizedLayer]:
    """Return the quantized layers of a plan with their schemes.

    Raises:
        SpecError: vLLM has none for one.
    """
    by_reader = {reader: a for a in plan.activations.values() for reader in a.readers}
    everywhere = {a.name: a for a in plan.activations.values() if not a.readers}
    found = []
    for layer in parameters.layers:
        if layer.plan is None:
            continue
        inputs = [_input(graph, node, layer.weight, by_reader, everywhere) for node in layer.nodes]
        known = tuple(a for a in inputs if a is not None)
        # A layer called twice, once on a tensor that stays in float, cannot be told to quantize the other one.
        known = known if len(known) == len(inputs) else ()
        spec = _turned(layer.plan.spec, transposed=layer.transposed)
        scheme = scheme_of(layer.nodes[0], spec, known[0].spec if known else None)
        found.append(QuantizedLayer(layer=layer, scheme=scheme, inputs=known))
    return found


def tensors_of(quantized: QuantizedLayer, graph: Graph) -> Iterator[StoredTensor]:
    """Yield what is stored of a quantized layer; its weight is read and quantized when its codes are written."""
    path, scheme = quantized.layer.path, quantized.scheme
    rows, columns = graph.shape(quantized.layer.weight)
    shape = (columns, rows) if quantized.layer.transposed else (rows, columns)
    suffix, dtype, stored_shape = code_layout(shape, scheme.weights, packed=scheme.packed)

    def parts() -> Iterator[NDArray[np.generic]]:
        codes = quantized.codes(graph)
        for piece in slabs(codes.shape):
            yield pack_codes(np.ascontiguousarray(codes[piece]), scheme.weights, packed=scheme.packed)

    yield StoredTensor(name=f"{path}.{suffix}", dtype=dtype, shape=stored_shape, parts=parts)
    beside = pack_qparams(quantized.qparams, scheme.weights, shape, packed=scheme.packed)
    for name, array in (beside | quantized.input_scales()).items():
        yield stored(f"{path}.{name}", array)


def float_tensors(
    graph: Graph, parameters: Parameters, floats: ir.DataType | None = None
) -> Iterator[StoredTensor]:
    """Yield what stays in float: other layers' weights, linear ones as [out, in], biases, and all other tensors.

    What is float32 becomes `floats` where that is given.
    """
    for layer in parameters.layers:
        if layer.plan is None and not layer.tied:
            yield _float(graph, layer.weight, f"{layer.path}.weight", floats, transposed=layer.transposed)
        if layer.bias_name:
            yield _float(graph, layer.bias, layer.bias_name, floats)
    for source, name in parameters.others.items():
        yield _float(graph, source, name, floats)


def slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of the first axis, of a few million elements each."""
    height = max(_SLAB // max(int(np.prod(shape[1:])), 1), 1)
    for start in range(0, shape[0], height):
        yield slice(start, start + height)


def _float(
    graph: Graph, source: str, name: str, floats: ir.DataType | None, *, transposed: bool = False
) -> StoredTensor:
    tensor = graph.model.graph.initializers[source].const_value
    assert tensor is not None
    cast = tensor.dtype == ir.DataType.FLOAT and floats is not None
    dtype = np.dtype((floats if cast and floats is not None else tensor.dtype).numpy())
    shape = graph.shape(source)

    def parts() -> Iterator[NDArray[np.generic]]:
        array = graph.array(source)
        for part in (array.T[piece] for piece in slabs(shape[::-1])) if transposed else (array,):
            yield _within(part, dtype) if cast else part

    return StoredTensor(name=name, dtype=dtype, shape=shape[::-1] if transposed else shape, parts=parts)


def _within(x: NDArray[np.generic], dtype: np.dtype) -> NDArray[np.generic]:
    """Cast to a narrower float type; a mask's most negative float32 stays finite, as what is infinite stays that."""
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    limit = float(info.max)
    return np.where(np.isinf(x), x, np.clip(x, -limit, limit)).astype(dtype)


def _turned(spec: QuantSpec, *, transposed: bool) -> QuantSpec:
    """The format of a weight once it is [out, in]."""
    if spec.block_shape is not None:
        return replace(spec, block_shape=spec.block_shape[::-1]) if transposed else spec
    if spec.axis is None:
        return spec
    axis = spec.axis % 2
    return replace(spec, axis=1 - axis if transposed else axis)


def _input(
    graph: Graph,
    node: str,
    weight: str,
    by_reader: Mapping[tuple[str, int], ActivationPlan],
    everywhere: Mapping[str, ActivationPlan],
) -> ActivationPlan | None:
    """How the data that a node multiplies its weight by is quantized."""
    for index, value in enumerate(graph.node(node).inputs[:2]):
        if value is not None and str(value.name) != weight:
            return by_reader.get((node, index)) or everywhere.get(str(value.name))
    return None

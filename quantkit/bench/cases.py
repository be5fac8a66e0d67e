"""From a model, or from shapes, to the distinct products to run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from quantkit.bench.feeding import Captured, capture
from quantkit.bench.find_layers import find_layers
from quantkit.bench.layers import Layer
from quantkit.bench.operands import operands_of, random_operands
from quantkit.cache import CalibrationCache
from quantkit.data import SampleSource
from quantkit.errors import SpecError
from quantkit.graph import Graph, LeftAlone
from quantkit.graph.clean import NEWEST_OPSET, quiet
from quantkit.kernels.family import Operands
from quantkit.kernels.gemm_checks import LARGEST_SIDE
from quantkit.kernels.work import FORMATS, Work, get_gemm_format

_QUANTIZED = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulNBits"}
    | {"QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "TRT_MXFP8DequantizeLinear"}
    | {"QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
)
# What a float model's layers are run in where nobody asks for others.
AS_STORED = "as stored"
DEFAULT_FORMATS = ("int8", "fp8")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A product to run: once, whatever number of layers have it.

    asked: the format that was asked for, which a product may not have; "as stored" for a quantized file's own.
    operands: makes what it multiplies, when its turn has come.
    """

    work: Work
    layers: tuple[str, ...]
    op_type: str
    batch: int | None
    calls: int
    asked: str
    operands: Callable[[], Operands]


@dataclass(frozen=True, kw_only=True)
class Products:
    """The cases of a model, what is none, and what to know of them."""

    cases: tuple[Case, ...]
    left: tuple[LeftAlone, ...] = ()
    notes: tuple[str, ...] = ()


def cases_of_shapes(shapes: Sequence[tuple[int, int, int]], formats: Sequence[str]) -> Products:
    """Return a case for every distinct shape (m, n, k) in every format, on random numbers.

    Raises:
        SpecError: a size below 1, or more than kernels count to. UnknownNameError: no such format.
    """
    names = _distinct(formats)
    for shape in shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise SpecError(
                f"shape {'x'.join(map(str, shape))}: three sizes from 1 up, M x N x K, are wanted."
            )
        if max(shape) > LARGEST_SIDE:
            raise SpecError(
                f"shape {'x'.join(map(str, shape))}: kernels count up to {LARGEST_SIDE:,}; give smaller sizes."
            )
    works = [Work(m=m, n=n, k=k, format=name) for m, n, k in dict.fromkeys(shapes) for name in names]
    found = tuple(
        Case(
            work=work,
            layers=(),
            op_type="",
            batch=None,
            calls=1,
            asked=work.format,
            operands=partial(random_operands, work),
        )
        for work in works
    )
    return Products(cases=found)


def cases_of_model(
    graph: Graph,
    *,
    formats: Sequence[str] | None,
    batches: Sequence[int],
    cache: CalibrationCache | None,
    source: SampleSource | None,
    dims: Mapping[str, int],
) -> Products:
    """Return a case for every distinct product of a model, batch size and format.

    formats: None for what a quantized file stores, and int8 and fp8 for a float model. The products of attention,
    whose operands are both computed, run in bf16 where a format is of weights alone.

    Raises:
        ModelError: nothing to run in it, or its shapes cannot be found. DataError: see `feeding.capture`.
        SpecError: a batch so large that kernels cannot count its rows.
    """
    names: list[str | None] = [*_distinct(formats or ())]
    graph, quantized = stored(graph)
    layers, left = find_layers(graph.model, graph.name)
    captured = capture(graph, [_read(layer) for layer in layers], cache=cache, source=source, dims=dims)
    # Products that differ in what happens to their sums alone are run once, as the first of them.
    grouped: dict[tuple[int, str, Work], list[tuple[Layer, int]]] = {}
    empty = [layer for layer in layers if _is_empty(layer, captured)]
    left += [LeftAlone(node=x.node, op_type=x.op_type, reason="it computes nothing") for x in empty]
    layers = [layer for layer in layers if layer not in empty]
    # What is named twice is run once: its calls are those of one run of the model.
    for batch in dict.fromkeys(batches):
        for form in names or ([None] if quantized else DEFAULT_FORMATS):
            for layer in layers:
                gemm = layer.gemm(captured.shapes).at(batch, captured.samples)
                if gemm.rows > LARGEST_SIDE:
                    raise SpecError(
                        f"batch {batch}: {layer.node} has {gemm.rows:,} rows then, and kernels count up to "
                        f"{LARGEST_SIDE:,}; give a smaller batch."
                    )
                work = Work(
                    m=gemm.rows,
                    n=gemm.n,
                    k=gemm.k,
                    format=_format(layer, form),
                    group=_group(layer, form),
                )
                grouped.setdefault((batch, form or AS_STORED, work), []).append((layer, gemm.count))
    cases = tuple(
        Case(
            work=_with_epilogue(work, found[0][0]),
            layers=tuple(layer.node for layer, _ in found),
            op_type=found[0][0].op_type,
            batch=batch,
            calls=sum(count for _, count in found),
            asked=asked,
            operands=partial(operands_of, _with_epilogue(work, found[0][0]), found[0][0], captured),
        )
        for (batch, asked, work), found in grouped.items()
    )
    notes = _notes(captured)
    if any(gemm.grows == "count" and gemm.count > 1 for gemm in (x.gemm(captured.shapes) for x in layers)):
        notes += (
            "calls of attention's products: one for each head of each sample, a launch of its own here",
        )
    return Products(cases=cases, left=tuple(left), notes=notes)


def _distinct(formats: Sequence[str]) -> list[str]:
    """The formats of these names, each once: some have two."""
    return list(dict.fromkeys(get_gemm_format(name).name for name in formats))


def _read(layer: Layer) -> list[str]:
    """The computed tensors that a layer reads."""
    return [tensor for tensor in (layer.activations.tensor, layer.weights.tensor) if tensor]


def _is_empty(layer: Layer, captured: Captured) -> bool:
    return any(0 in captured.shapes[t] for t in _read(layer)) or layer.gemm(captured.shapes).rows < 1


def stored(graph: Graph) -> tuple[Graph, bool]:
    """Return the graph as its file stores it if it is a quantized one, and whether it is.

    Cleaning folds constants, and with them codes that a Cast turns to floats.
    """
    if not any(node.op_type in _QUANTIZED for node in graph.model.graph):
        return graph, False
    if graph.path is None:
        return graph, True
    with quiet():
        model = ir.load(graph.path)
    model.graph.opset_imports[""] = min(model.graph.opset_imports.get("", NEWEST_OPSET), NEWEST_OPSET)
    for number, node in enumerate(model.graph):
        node.name = (
            node.name or (node.outputs[0].name if node.outputs else None) or f"{node.op_type}_{number}"
        )
    return Graph(model, graph.name, Path(graph.path)), True


def _with_epilogue(work: Work, layer: Layer) -> Work:
    return replace(work, bias=layer.bias is not None, relu=layer.relu)


def _format(layer: Layer, name: str | None) -> str:
    if name is None:
        return layer.format
    fmt = FORMATS[name]
    return name if layer.is_constant or fmt.activations == fmt.weights else "bf16"


def _group(layer: Layer, name: str | None) -> int | None:
    """The group size of a file's weights, where it is not the format's own."""
    size = layer.weights.block_size
    kept = name is None or name == layer.format
    return size if kept and size is not None and size != FORMATS[layer.format].group else None


def _notes(captured: Captured) -> tuple[str, ...]:
    if captured.tensors:
        return (
            f"activations: captured from {captured.origin} ({_samples(captured.samples)}), repeated as needed",
        )
    if captured.histograms:
        why = f" ({captured.failure.rstrip('.')})" if captured.failure else ""
        return (
            f"activations: drawn from the histograms of the calibration cache, for the model was not run on data{why}",
        )
    return ("activations: random numbers; a calibration cache in this folder, or --data, brings real ones",)


def _samples(count: int) -> str:
    return f"{count} sample{'' if count == 1 else 's'}"

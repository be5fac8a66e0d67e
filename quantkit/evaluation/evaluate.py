"""Running a float and a quantized model side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quantkit.data import Sample, SampleSource, batch_axes, batch_length, batches, fixed_batch_size, peek
from quantkit.data.labels import IGNORED_LABEL
from quantkit.decode import beyond_onnxruntime, decode
from quantkit.errors import DataError, ModelError
from quantkit.evaluation.evaluation import Evaluation, LayerMetrics
from quantkit.export.vllm_model import read_folder
from quantkit.graph import Graph
from quantkit.graph.sites import LINEAR_OPS
from quantkit.memory import DEFAULT_MAX_MEMORY, fitting_batch, tensor_bytes
from quantkit.metrics.outputs import OutputComparison, SignalToNoise
from quantkit.runtime import Session, reason


def evaluate(
    graph: Graph,
    quantized: Graph | Path,
    source: SampleSource,
    *,
    labels: np.ndarray | None = None,
    next_token: bool = False,
    per_layer: bool = False,
    optimize: bool = False,
    batch_size: int | None = None,
    on_samples: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Compare the outputs of both models over the samples, and with `per_layer` what each linear operator puts out.

    A quantized model that holds what ONNX Runtime has no kernels for (FP4, MX scales, TensorRT's operators, bfloat16)
    is decoded first, which a note says: weights to floats, quantization of activations to float operators.

    Args:
        graph: the float model.
        quantized: the quantized model's file or folder, or a model that is run in its place.
        source: the samples.
        labels: one integer a sample, −100 where it is not known, or a row of them where the output has rank 3.
        next_token: the labels are the model's own integer input, shifted by one.
        per_layer: also compare the outputs of Conv, ConvTranspose, MatMul and Gemm.
        optimize: judge the quantized model with all of ONNX Runtime's optimizations, as users will run it.
        batch_size: samples at a time; None for what fits into 96 MiB, at most 32.
        on_samples: called with the number of samples done since its last call.

    Raises:
        DataError: the labels do not fit the samples, or are all −100.
        ModelError: a model does not run, or not with all optimizations, or the two are not of one network.
    """
    what = str(quantized) if isinstance(quantized, Path) else quantized.name
    if isinstance(quantized, Path) and quantized.is_dir():
        quantized = read_folder(quantized, graph)
    written = _open(quantized)
    _same_interface(graph, written, what)
    # Without extra outputs the file itself is run, as it lies there.
    runnable: ir.Model | Path = quantized if isinstance(quantized, Path) else written
    notes: list[str] = []
    beyond = beyond_onnxruntime(written)
    if beyond:
        written = runnable = decode(written)
        notes.append(
            f"{what}: run as floats with its quantization kept, for ONNX Runtime has no kernels for "
            f"{', '.join(beyond)}."
        )
    layers = _layers(graph, written) if per_layer else {}
    names = [*graph.outputs, *(name for name in layers if name not in graph.outputs)]
    first, samples = peek(source)
    size = (
        fixed_batch_size(graph.inputs)
        or batch_size
        or fitting_batch(2 * sum(tensor_bytes(graph, first, names).values()), DEFAULT_MAX_MEMORY)
    )
    reference = Session(graph.model, outputs=names)
    judged = (
        _session(written, what, names, optimize=optimize)
        if layers
        else _session(runnable, what, optimize=optimize)
    )
    outputs = {name: OutputComparison(name) for name in graph.outputs}
    noise = {name: SignalToNoise() for name in layers}
    axes, done, labelled = batch_axes(graph.inputs), 0, 0
    for batch in batches(samples, graph.inputs, size):
        count = batch_length(batch, axes)
        exact, found = reference.run(batch), judged.run(batch)
        part = _labels(graph, batch, labels, done, count, next_token)
        for name, comparison in outputs.items():
            fits = part is not None and part.shape == exact[name].shape[:-1]
            comparison.update(exact[name], found[name], part if fits or len(outputs) == 1 else None)
        for name, signal in noise.items():
            signal.update(exact[name], found[name])
        done += count
        labelled += 0 if part is None else int(np.count_nonzero(part != IGNORED_LABEL))
        on_samples(count)
    if (next_token or labels is not None) and not labelled:
        raise DataError(
            f"labels: all of these {done} samples are {IGNORED_LABEL}, which is left out; give the right classes."
            if labels is not None
            else f"labels next-token: no sample has a second token; give longer sequences to {graph.name}."
        )
    return Evaluation(
        model=str(graph.path or graph.name),
        quantized=what,
        samples=done,
        outputs={name: comparison.result() for name, comparison in outputs.items()},
        layers=[
            LayerMetrics(name=node, op_type=op_type, sqnr_db=noise[name].sqnr_db)
            for name, (node, op_type) in layers.items()
        ],
        notes=notes,
    )


def _open(quantized: Graph | Path) -> ir.Model:
    if isinstance(quantized, Graph):
        return quantized.model
    if not quantized.is_file():
        raise ModelError(f"{quantized}: no such file; give the quantized .onnx file.")
    try:
        return ir.load(quantized)
    except Exception as error:
        # onnx-ir passes on whatever protobuf or its own readers raise.
        raise ModelError(f"{quantized}: not a readable ONNX model ({error}); export it again.") from error


def _session(
    model: ir.Model | Path, what: str, outputs: Sequence[str] | None = None, *, optimize: bool
) -> Session:
    try:
        return Session(model, outputs=outputs, optimize=optimize)
    except ModelError as error:
        if not optimize:
            raise
        # What is wrong at every level is said as it is.
        Session(model, outputs=outputs, optimize=False)
        why = reason(error.__cause__ or error)
        raise ModelError(
            f"{what}: ONNX Runtime's own optimizations break it ({why}), as they do many FP8 files for tensorrt; "
            "export it with --target ort, which runs at every level, or leave --ort-level at basic."
        ) from error


def _same_interface(graph: Graph, written: ir.Model, what: str) -> None:
    theirs = [str(v.name) for v in written.graph.outputs]
    if sorted(theirs) != sorted(graph.outputs):
        raise ModelError(
            f"{what}: its outputs are {', '.join(theirs)}, those of the float model {', '.join(graph.outputs)}; "
            "give the two files of one network, the float one first."
        )
    wanted = {spec.name for spec in graph.inputs}
    fed = {str(v.name) for v in written.graph.inputs} - set(written.graph.initializers)
    if wanted != fed:
        raise ModelError(
            f"{what}: its inputs are {', '.join(sorted(fed))}, those of the float model {', '.join(sorted(wanted))}; "
            "give the two files of one network, the float one first."
        )


def _layers(graph: Graph, written: ir.Model) -> dict[str, tuple[str, str]]:
    """Output tensor → (node, operator) of the linear operators that both models have under one tensor name."""
    theirs = {str(v.name) for node in written.graph for v in node.outputs}
    return {
        str(node.outputs[0].name): (str(node.name), node.op_type)
        for node in graph.model.graph
        if node.domain == "" and node.op_type in LINEAR_OPS and str(node.outputs[0].name) in theirs
    }


def _labels(
    graph: Graph, batch: Sample, labels: np.ndarray | None, done: int, count: int, next_token: bool
) -> np.ndarray | None:
    if next_token:
        integers = [
            s.name for s in graph.inputs if np.issubdtype(s.dtype, np.integer) and batch[s.name].ndim == 2
        ]
        if len(integers) != 1:
            raise DataError(
                f"labels next-token: {graph.name} has {len(integers)} integer inputs [batch, sequence]; "
                "give the labels as a file."
            )
        shifted = np.full_like(batch[integers[0]], IGNORED_LABEL, dtype=np.int64)
        shifted[:, :-1] = batch[integers[0]][:, 1:]
        return shifted
    if labels is None:
        return None
    if done + count > len(labels):
        raise DataError(
            f"labels: {len(labels)} for more samples than that; give one a sample, in their order."
        )
    return labels[done : done + count]

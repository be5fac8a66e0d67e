"""Bringing a graph to the one shape that everything after works on."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir
import onnx_ir.passes.common as passes

from quantkit.errors import ModelError
from quantkit.graph.whole import check_whole, first_line

# Q/DQ of int8 and float8 as TensorRT 10 reads them begin with opset 19; onnxscript's converter covers 18 and above.
WORKING_OPSET = 19
NEWEST_OPSET = 23

# Folding these never makes a tensor larger, so a weight behind them becomes a plain weight whatever its size.
_LAYOUT_OPS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def clean(model: ir.Model, what: str) -> ir.Model:
    """Return a model with constants folded, BatchNormalization merged, functions inlined and everything named.

    Args:
        model: it is changed.
        what: what error messages call it.

    Raises:
        ModelError: it is not whole, not valid, or of an operator set that is not supported.
    """
    from onnxscript import optimizer

    check_whole(model, what)
    fed = [v.name for v in model.graph.inputs]
    with quiet():
        _name_nodes(model)
        passes.NameFixPass()(model)
        model = _at_working_opset(model, what)
        try:
            _drop_initializer_inputs(model)
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            with _almost_neutral_held(model):
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
                f"{what}: not a valid ONNX graph ({first_line(error)}); check it with onnx.checker."
            ) from error
    return model


@contextlib.contextmanager
def _almost_neutral_held(model: ir.Model) -> Iterator[None]:
    """Keep the optimizer from constants that it takes for 0 or 1: without its ε a norm divides zero by zero.

    onnxscript drops x + c where |c| ≤ 1e-8, and x · c where c is within 1e-5 of 1; 1e-12 is the ε of many layer norms.
    While it works such a constant is an input, of which it knows nothing.
    """
    graph = model.graph
    held = {v: v.const_value for v in graph.initializers.values() if _is_almost_neutral(v)}
    for value in held:
        del graph.initializers[str(value.name)]
        value.const_value = None
    graph.inputs.extend(held)
    yield
    graph.inputs[:] = [v for v in graph.inputs if v not in held]
    for value, tensor in held.items():
        value.const_value = tensor
        if value.uses() or value.is_graph_output():
            graph.register_initializer(value)


def _is_almost_neutral(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point():
        return False
    number = float(tensor.numpy().item())
    return number not in (0, 1) and (abs(number) <= 2e-8 or abs(number - 1) <= 2e-5)


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
                f"{what}: operator set {opset} cannot be raised to {WORKING_OPSET} ({first_line(error)}); "
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

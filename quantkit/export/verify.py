"""Opening a written model again and holding it against its plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from quantkit.decode import beyond_onnxruntime, decode
from quantkit.errors import ExportError, ModelError
from quantkit.export.verify_codes import CODES_DB, as_floats, coded_tensors, rounding_sqnr_db
from quantkit.export.verify_weights import verify_weights
from quantkit.graph import Graph
from quantkit.metrics.outputs import SignalToNoise
from quantkit.planning.plan import Plan
from quantkit.planning.simulate import simulate, simulate_steps
from quantkit.runtime import Session, reason

# From one quantized tensor to the next, file and plan differ in the order of float sums alone, which leaves 120 dB
# of float32, 60 of float16 and 40 of bfloat16. One more rounding to 8 bits would leave 50, to 4 bits 20.
_STEP_DB = {ir.DataType.FLOAT: 70.0, ir.DataType.FLOAT16: 45.0, ir.DataType.BFLOAT16: 28.0}
# Through the whole network that difference may grow to that of quantization itself, since it moves values across
# rounding boundaries now and then; what is wrong in a file costs more.
_WHOLE_DB = -10.0
_WHOLE_LIMIT_DB = 45.0
# Scales of channels change the last bits of floats and nothing else: 1e-5 of float32.
_SAME_DB = {ir.DataType.FLOAT: 100.0, ir.DataType.FLOAT16: 45.0, ir.DataType.BFLOAT16: 28.0}
# Running a larger model, and NumPy's reading of it, would hold its weights several times over.
_RUN_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What holding a written file against its plan showed.

    Attributes:
        tensor: the quantized tensor, output or weight at which file and plan agree least.
        plan_sqnr_db: the file's value there against NumPy's reading of the plan, from the file's own tensors before it.
        output: the first output; "" where the model was not run, but its weights were read back one by one.
        float_sqnr_db: there, the plan followed from end to end against the float model; None where it was not run.
        decoded: what ONNX Runtime has no kernels for, so that the file ran with it turned into float operators.
    """

    tensor: str
    plan_sqnr_db: float
    output: str = ""
    float_sqnr_db: float | None = None
    decoded: tuple[str, ...] = ()


def check(path: Path) -> None:
    """Run onnx.checker over a written file, with shape inference.

    Raises:
        ExportError: the file is not valid.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        # The checker raises its own errors, and shape inference another family.
        raise ExportError(
            f"{path.name}: the written model is not valid ONNX ({reason(error)}); report this."
        ) from error


def can_run(graph: Graph) -> bool:
    """Whether a model is small enough to be run for its verification."""
    return graph.weight_bytes <= _RUN_BYTES


def check_same_function(before: Graph, after: Graph, feeds: Mapping[str, np.ndarray]) -> None:
    """Run a float model and what rescaling made of it: their outputs must agree to the last bits of their floats.

    Raises:
        ExportError: they do not.
    """
    if not can_run(before):
        return
    names = [name for name in before.outputs if _is_compared(before, name)]
    exact = Session(before.model, outputs=names, optimize=False).run(feeds)
    found = Session(after.model, outputs=names, optimize=False).run(feeds)
    limit = _SAME_DB[_precision(before.model)]
    for name in names:
        agreement = _sqnr(exact[name], found[name])
        if agreement < limit:
            raise ExportError(
                f"{before.name}: rescaled, its float output {name} is another one ({agreement:.1f} dB); nothing was "
                "written; report this, and use --folds norms meanwhile."
            )


def verify(
    path: Path,
    graph: Graph,
    plan: Plan,
    feeds: Mapping[str, np.ndarray],
    *,
    reference: Graph | None = None,
) -> Verification:
    """Hold the file at `path` against its plan: by running it once, or, a large one or without feeds, by its weights.

    Every quantized tensor and every output is compared with what the plan makes of the file's own tensors before it;
    then the first output, as the untouched file computes it, with the plan followed from end to end. Outputs of
    integers, or whose shape depends on the data, are not compared: a float's last bit can change them (TopK, ArgMax).
    Of a tensor that the file holds as codes alone, every code must be the one that the plan's value rounds to.

    Raises:
        ExportError: the file is not valid, does not run, or does not do what the plan says.
    """
    check(path)
    if not feeds or not can_run(graph):
        worst, agreement_db = verify_weights(path, graph, plan)
        return Verification(tensor=worst, plan_sqnr_db=agreement_db)
    outputs = [name for name in graph.outputs if _is_compared(graph, name)]
    names = list(dict.fromkeys([*outputs, *(a.name for a in plan.activations.values())]))
    model = ir.load(path)
    precision = _precision(model)
    beyond = beyond_onnxruntime(model)
    runnable = decode(model) if beyond else model
    _compute_in_float(runnable)
    coded = coded_tensors(runnable, plan, path.name)
    held = {name: coded[name][0] if name in coded else name for name in names}
    try:
        written = Session(runnable, optimize=False).run(feeds)
        found = Session(runnable, outputs=list(held.values()), optimize=False).run(feeds)
    except ModelError as error:
        raise ExportError(f"{path.name}: the written model does not run ({error})") from error
    observed = {name: found[held[name]] for name in names}
    floats = observed | {name: as_floats(observed[name], a) for name, (_, a) in coded.items()}
    steps = simulate_steps(graph, plan, feeds, floats)
    agreement = {name: _sqnr(steps[name], observed[name]) for name in names if name not in coded}
    agreement |= {name: rounding_sqnr_db(steps[name], observed[name], a) for name, (_, a) in coded.items()}
    least = {name: (CODES_DB if name in coded else _STEP_DB)[precision] for name in names}
    worst = min(names, key=lambda n: agreement[n] - least[n])
    output = (outputs or graph.outputs)[0]
    planned = simulate(graph, plan, feeds)[output]
    exact = Session((reference or graph).model, outputs=[output], optimize=False).run(feeds)[output]
    lost, whole = _sqnr(exact, planned), _sqnr(planned, written[output])
    if agreement[worst] < least[worst]:
        raise ExportError(
            f"{path.name}: its tensor {worst} differs from the plan's ({agreement[worst]:.1f} dB); "
            "the file was not kept; report this."
        )
    if whole < min(lost, _WHOLE_LIMIT_DB, _STEP_DB[precision]) + _WHOLE_DB:
        raise ExportError(
            f"{path.name}: its output {output} differs from the plan's ({whole:.1f} dB, where the plan itself is "
            f"{lost:.1f} dB from float); the file was not kept; report this."
        )
    return Verification(
        tensor=worst,
        plan_sqnr_db=agreement[worst],
        output=output,
        float_sqnr_db=lost,
        decoded=tuple(beyond),
    )


def _compute_in_float(model: ir.Model) -> None:
    """Let MatMulNBits compute in float32: what it does in less by choice is no error of the file."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.pop("accuracy_level", None)


def _is_compared(graph: Graph, output: str) -> bool:
    value = graph.values[output]
    return value.dtype is not None and value.dtype.is_floating_point() and not value.is_initializer()


def _precision(model: ir.Model) -> ir.DataType:
    """The least precise of the float types that the model computes in."""
    types = {v.dtype for node in model.graph for v in (*node.inputs, *node.outputs) if v is not None}
    types |= {v.dtype for v in model.graph.inputs}
    return next((t for t in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16) if t in types), ir.DataType.FLOAT)


def _sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    if reference.shape != other.shape or not np.issubdtype(reference.dtype, np.floating):
        return float("inf")
    comparison = SignalToNoise()
    comparison.update(reference, other)
    return float("inf") if comparison.sqnr_db is None else comparison.sqnr_db

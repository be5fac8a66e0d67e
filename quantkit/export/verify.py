"""Opening a written model again and holding it against its plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from quantkit.errors import ExportError, ModelError
from quantkit.graph import Graph
from quantkit.metrics import SignalToNoise
from quantkit.plan import Plan
from quantkit.runtime import Session, reason
from quantkit.simulate import simulate, simulate_steps

# From one quantized tensor to the next, file and plan differ in the order of float sums alone, which leaves 120 dB
# of float32 and 60 of float16. One more rounding to 8 bits would leave 50.
_STEP_DB = 70.0
_HALF_STEP_DB = 45.0
# Through the whole network that difference may grow to that of quantization itself, since it moves values across
# rounding boundaries now and then; what is wrong in a file costs more.
_WHOLE_DB = -10.0


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What running a written file once showed.

    Attributes:
        tensor: the quantized tensor or output at which file and plan agree least.
        plan_sqnr_db: the file's value there against NumPy's reading of the plan, from the file's own tensors before it.
        output: the first output.
        float_sqnr_db: there, the plan followed from end to end against the float model.
    """

    tensor: str
    plan_sqnr_db: float
    output: str
    float_sqnr_db: float


def verify(path: Path, graph: Graph, plan: Plan, feeds: Mapping[str, np.ndarray]) -> Verification:
    """Check the file at `path` with onnx.checker, run it once, and compare it with the plan.

    Every quantized tensor and every output is compared with what the plan makes of the file's own tensors before it;
    then the first output, as the untouched file computes it, with the plan followed from end to end. Outputs of
    integers, or whose shape depends on the data, are not compared: a float's last bit can change them (TopK, ArgMax).

    Raises:
        ExportError: the file is not valid, does not run, or does not do what the plan says.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        # The checker raises its own errors, and shape inference another family.
        raise ExportError(
            f"{path.name}: the written model is not valid ONNX ({reason(error)}); report this."
        ) from error
    outputs = [name for name in graph.outputs if _is_compared(graph, name)]
    names = [*outputs, *(name for name in plan.activations if name not in outputs)]
    try:
        written = Session(path, optimize=False).run(feeds)
        observed = Session(ir.load(path), outputs=names, optimize=False).run(feeds)
    except ModelError as error:
        raise ExportError(f"{path.name}: the written model does not run ({error})") from error
    steps = simulate_steps(graph, plan, feeds, observed)
    agreement = {name: _sqnr(steps[name], observed[name]) for name in names}
    worst = min(names, key=lambda n: agreement[n])
    output = (outputs or graph.outputs)[0]
    planned = simulate(graph, plan, feeds)[output]
    exact = Session(graph.model, outputs=[output], optimize=False).run(feeds)[output]
    lost, whole = _sqnr(exact, planned), _sqnr(planned, written[output])
    if agreement[worst] < (_HALF_STEP_DB if _has_half(graph) else _STEP_DB):
        raise ExportError(
            f"{path.name}: its tensor {worst} differs from the plan's ({agreement[worst]:.1f} dB); "
            "the file was not kept; report this."
        )
    if whole < min(lost, _HALF_STEP_DB) + _WHOLE_DB:
        raise ExportError(
            f"{path.name}: its output {output} differs from the plan's ({whole:.1f} dB, where the plan itself is "
            f"{lost:.1f} dB from float); the file was not kept; report this."
        )
    return Verification(tensor=worst, plan_sqnr_db=agreement[worst], output=output, float_sqnr_db=lost)


def _is_compared(graph: Graph, output: str) -> bool:
    value = graph.values[output]
    return value.dtype is not None and value.dtype.is_floating_point() and not value.is_initializer()


def _has_half(graph: Graph) -> bool:
    """Whether any tensor has fewer bits than float32."""
    return any(v.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) for v in graph.values.values())


def _sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    if reference.shape != other.shape or not np.issubdtype(reference.dtype, np.floating):
        return float("inf")
    comparison = SignalToNoise()
    comparison.update(reference, other)
    return float("inf") if comparison.sqnr_db is None else comparison.sqnr_db

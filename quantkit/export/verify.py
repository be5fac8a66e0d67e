"""Opening a written model again and holding it against its plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from quantkit.errors import ExportError, ModelError
from quantkit.graph import Graph
from quantkit.metrics import SignalToNoise
from quantkit.plan import Plan
from quantkit.runtime import Session, reason
from quantkit.simulate import simulate

# The file and the plan may differ in the order of float sums, which now and then moves a value across a rounding
# boundary; what is wrong in the file costs as much as quantization itself. 10 dB lie between the two.
_MARGIN_DB = 10.0
# float16 sums carry 11 bits, so they leave about 1e-3 of the signal, however little the plan itself loses.
_FLOOR_DB = 50.0


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What running a written file once showed, on its first output.

    Attributes:
        output: that output's name.
        plan_sqnr_db: the file against NumPy's reading of the plan.
        float_sqnr_db: the plan against the float model, on the same input.
    """

    output: str
    plan_sqnr_db: float
    float_sqnr_db: float


def verify(path: Path, graph: Graph, plan: Plan, feeds: Mapping[str, np.ndarray]) -> Verification:
    """Check the file at `path` with onnx.checker, run it once, and compare its first output with the plan's.

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
    try:
        written = Session(path, optimize=False).run(feeds)
    except ModelError as error:
        raise ExportError(f"{path.name}: the written model does not run ({error})") from error
    output = graph.outputs[0]
    planned = simulate(graph, plan, feeds)[output]
    exact = Session(graph.model, outputs=[output]).run(feeds)[output]
    found = Verification(
        output=output,
        plan_sqnr_db=_sqnr(planned, written[output]),
        float_sqnr_db=_sqnr(exact, planned),
    )
    if found.plan_sqnr_db < min(found.float_sqnr_db + _MARGIN_DB, _FLOOR_DB):
        raise ExportError(
            f"{path.name}: its output {output} differs from the plan's ({found.plan_sqnr_db:.1f} dB, where the plan "
            f"itself is {found.float_sqnr_db:.1f} dB from float); the file was not kept; report this."
        )
    return found


def _sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    comparison = SignalToNoise()
    comparison.update(reference, other)
    return float("inf") if comparison.sqnr_db is None else comparison.sqnr_db

"""Tensors that a file in operator form holds as codes alone, held against the floats that the plan rounds."""

import numpy as np
import onnx_ir as ir

from quantkit.errors import ExportError
from quantkit.export.operator_form import codes_name
from quantkit.formats import QTensor, dequantize
from quantkit.metrics.outputs import SignalToNoise
from quantkit.planning.plan import ActivationPlan, Plan

# What rounds to the file's code is the plan's value, so only float sums on a boundary are left: 120 dB and more in a
# right file of float32. An error of 1.5 hundredths of a code shows, as it does in floats. In float16 and bfloat16 a
# value on a boundary lies as far beyond it as those types round (60 and 46 dB were seen): the limits of their floats.
CODES_DB = {ir.DataType.FLOAT: 90.0, ir.DataType.FLOAT16: 45.0, ir.DataType.BFLOAT16: 28.0}


def coded_tensors(model: ir.Model, plan: Plan, what: str) -> dict[str, tuple[str, ActivationPlan]]:
    """Return {tensor: (what its codes are called, its plan)} of those whose floats the model does not compute.

    Raises:
        ExportError: the model has neither a tensor of the plan nor its codes.
    """
    computed = {str(v.name) for node in model.graph for v in node.outputs}
    there = computed | {str(v.name) for v in model.graph.inputs}
    found: dict[str, tuple[str, ActivationPlan]] = {}
    for activation in plan.activations.values():
        if activation.name in there:
            continue
        codes = next((n for n in sorted(computed) if _is_codes_name(n, activation.name)), None)
        if codes is None or activation.qparams is None:
            raise ExportError(f"{what}: it has neither tensor {activation.name} nor its codes; report this.")
        found[activation.name] = codes, activation
    return found


def _is_codes_name(name: str, tensor: str) -> bool:
    """Whether the codes of a tensor may be called so: a name that was taken has "_" behind it."""
    plain = codes_name(tensor)
    return name.startswith(plain) and set(name[len(plain) :]) <= {"_"}


def as_floats(codes: np.ndarray, plan: ActivationPlan) -> np.ndarray:
    """Return what codes stand for by the plan."""
    return dequantize(QTensor(codes, plan.static, plan.spec))


def rounding_sqnr_db(planned: np.ndarray, codes: np.ndarray, plan: ActivationPlan) -> float:
    """Return in dB how far `planned` lies outside of what rounds to `codes`.

    10·log10(Σ x² / Σ d²), d the distance of x = `planned` from the interval [(q − z − ½)·s, (q − z + ½)·s] of its code
    q; the intervals of the least and the greatest code have no end. ∞ where all is inside.
    """
    if planned.shape != codes.shape or codes.dtype != plan.spec.format.dtype:
        return -float("inf")
    scale, zero = float(plan.static.scale), 0.0
    if plan.static.zero_point is not None:
        zero = float(plan.static.zero_point)
    ends = plan.spec.format
    q = codes.astype(np.float64)
    low = np.where(q <= ends.min, -np.inf, (q - zero - 0.5) * scale)
    high = np.where(q >= ends.max, np.inf, (q - zero + 0.5) * scale)
    x = planned.astype(np.float64)
    comparison = SignalToNoise()
    comparison.update(x, np.clip(x, low, high))
    return float("inf") if comparison.sqnr_db is None else comparison.sqnr_db

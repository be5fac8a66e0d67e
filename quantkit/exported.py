"""What an export gives back: the file, its plan, and what became of every operator."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.export.verify import Verification
from quantkit.graph.quantized import QuantizedTensor
from quantkit.planning.plan import ActivationPlan, Plan
from quantkit.tables import Cell, Table


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written model.

    Attributes:
        path: the file, or the folder for targets that read one.
        plan: what was quantized, how, and what was not.
        size_bytes: of all that was written.
        float_size_bytes: of the float model's weights.
        verification: what holding the file against its plan showed; None where nothing could be compared.
        warnings: what the user should know before trusting it.
        kept: the tensors that the model quantized itself, whose scales are as they were.
    """

    path: Path
    plan: Plan
    size_bytes: int
    float_size_bytes: int
    verification: Verification | None
    warnings: tuple[str, ...] = ()
    kept: tuple[QuantizedTensor, ...] = ()

    def table(self) -> Table:
        """Return what was quantized, by operator and format, and what was left, by reason."""
        plan = self.plan
        formats = {plan.formats.get(node, "") for node in plan.nodes}
        done = Counter(
            # Where all are quantized alike, the preset says it.
            (op_type, plan.formats.get(node, "") if len(formats) > 1 else "")
            for node, op_type in plan.nodes.items()
        )
        kept = Counter((left.op_type, left.reason) for left in plan.left)
        rows: list[tuple[Cell, ...]] = [
            (op_type, count, None, how) for (op_type, how), count in sorted(done.items())
        ]
        rows += [(op_type, None, count, reason) for (op_type, reason), count in sorted(kept.items())]
        return Table(("operator", "quantized", "float", "how" if len(formats) > 1 else "why"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON would hold it."""
        plan = self.plan
        return {
            "path": str(self.path),
            "model": plan.model,
            "preset": plan.preset,
            "target": plan.target,
            "method": plan.method,
            "quantized": dict(plan.nodes),
            "formats": dict(plan.formats),
            "left_in_float": [
                {"node": left.node, "op_type": left.op_type, "reason": left.reason} for left in plan.left
            ],
            "activations": {name: _activation(a) for name, a in plan.activations.items()},
            "already_quantized": _already_quantized(self.kept),
            "size_bytes": self.size_bytes,
            "float_size_bytes": self.float_size_bytes,
            "warnings": list(self.warnings),
            "verified_sqnr_db": None
            if self.verification is None
            else _finite(self.verification.plan_sqnr_db),
        }

    def __str__(self) -> str:
        return self.table().text()

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"Exported(path={str(self.path)!r}, preset={plan.preset!r}, target={plan.target!r}, "
            f"method={plan.method!r}, quantized={len(plan.nodes)}, left_in_float={len(plan.left)})"
        )

    def _repr_html_(self) -> str:
        return self.table().html()


def _activation(plan: ActivationPlan) -> dict[str, Any]:
    found: dict[str, Any] = {"format": str(plan.spec)}
    if plan.qparams is not None:
        zero_point = plan.qparams.zero_point
        found["scale"] = float(plan.qparams.scale)
        found["zero_point"] = None if zero_point is None else int(zero_point)
    if plan.global_scale is not None:
        found["global_scale"] = float(plan.global_scale)
    if plan.range is not None:
        found["range"] = [float(plan.range.lo), float(plan.range.hi)]
    return found


def _already_quantized(kept: tuple[QuantizedTensor, ...]) -> dict[str, Any]:
    """Tensor → how the model quantizes it; one that it quantizes twice has the name of the node behind its own."""
    found: dict[str, Any] = {}
    for tensor in kept:
        name = tensor.name if tensor.name not in found else f"{tensor.name}, {tensor.nodes[0]}"
        scale, zero_point = tensor.qparams.scale, tensor.qparams.zero_point
        found[name] = {
            "role": tensor.role,
            "format": "int32" if tensor.spec is None else str(tensor.spec),
            "readers": [list(reader) for reader in tensor.readers],
        }
        if scale.ndim > 1:
            # One a block: as many as a small model has weights.
            found[name]["scale_shape"] = list(scale.shape)
            continue
        found[name]["scale"] = scale.tolist()
        found[name]["zero_point"] = None if zero_point is None else zero_point.tolist()
    return found


def _finite(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)

"""Models that quantize some tensors themselves, as quantization-aware training leaves them: their scales are kept."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from quantkit.formats import QuantSpec, Range
from quantkit.graph.kept_scales import Scale
from quantkit.planning.plan import ActivationPlan


def with_kept_scales(
    activations: Mapping[str, ActivationPlan], kept: Mapping[str, Scale], *, but: Collection[str] = ()
) -> dict[str, ActivationPlan]:
    """Return the plans with the scales that the model itself gives those tensors.

    A tensor that the model quantizes for one reader is quantized alike for the others, and what a MaxPool passes on
    is not rounded to another grid. A scale of a format of other bits, or of another kind, says nothing: a tensor that
    the model has in int8 may be wanted in float8.

    Args:
        activations: by tensor, or by tensor and format.
        kept: the model's own scales, by tensor.
        but: tensors that hold something else by now, since channels of theirs were scaled.
    """
    found = {}
    for key, plan in activations.items():
        own = kept.get(plan.name)
        if own is None or plan.qparams is None or plan.name in but or not _alike(plan.spec, own[0]):
            found[key] = plan
            continue
        spec, qparams = own
        zero = 0.0 if qparams.zero_point is None else float(qparams.zero_point)
        ends = [np.float32((end - zero) * float(qparams.scale)) for end in (spec.format.min, spec.format.max)]
        found[key] = replace(plan, spec=spec, qparams=qparams, range=Range(ends[0], ends[1]))
    return found


def _alike(wanted: QuantSpec, own: QuantSpec) -> bool:
    """Whether codes of the one serve where the other's are wanted."""
    return (wanted.format.kind, wanted.format.bits) == (own.format.kind, own.format.bits) and (
        wanted.format == own.format or wanted.format.kind == "integer"
    )

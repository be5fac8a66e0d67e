"""The last step of every method for weights: from a layer to its codes, and what its bias takes up."""

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantkit.blas import threads_for
from quantkit.calibrators.bias_correction import bias_correction
from quantkit.calibrators.gptq import GptqOptions, gptq
from quantkit.calibrators.layer import Layer
from quantkit.calibrators.output_error import check_gram, output_error
from quantkit.calibrators.scale_search import search_scales
from quantkit.calibrators.weight_scales import weight_qparams
from quantkit.errors import SpecError, UnknownNameError
from quantkit.formats import QTensor, dequantize, quantize

# "amax" and "mse" look at the weight alone; "weighted" at E[x²] too; "output" and "gptq" at all of the Gram matrix.
Rounding = Literal["amax", "mse", "weighted", "output", "gptq"]


@dataclass(frozen=True, kw_only=True)
class RoundedWeight:
    """A weight's codes and what they cost.

    Attributes:
        qtensor: the codes.
        bias: to be added to the layer's bias, float64 of (output channels,); None where it was not corrected.
        output_error: E ‖ΔW x‖² over the calibration data, beside its mean where the bias takes that up; None without
            a Gram matrix.
    """

    qtensor: QTensor
    bias: NDArray[np.float64] | None
    output_error: float | None


def round_weight(
    layer: Layer,
    rounding: Rounding,
    *,
    correct_bias: bool = False,
    options: GptqOptions | None = None,
    signed_scales: bool = False,
    scale_dtype: np.dtype | None = None,
    xp: ModuleType = np,
) -> RoundedWeight:
    """Round a layer's weight.

    Args:
        layer: with its Gram matrix, unless `rounding` is "amax" or "mse" and the bias stays.
        rounding: "amax" and "mse" as in `weight_qparams`; "weighted" the same as "mse" with every error weighted by
            E[x²]; "output" with scales of `search_scales`; "gptq".
        correct_bias: also return what the bias must take up, and spare the rounding that part of the error.
        options: of GPTQ.
        signed_scales, scale_dtype: as for `weight_qparams`.
        xp: NumPy, or CuPy to work on a GPU.

    Raises:
        SpecError: the Gram matrix is missing or another layer's, or something is not finite.
        UnknownNameError: there is no such rounding.
    """
    with threads_for(layer.layout.size(layer.w.shape)):
        return _rounded(layer, rounding, correct_bias, options, signed_scales, scale_dtype, xp)


def _rounded(
    layer: Layer,
    rounding: Rounding,
    correct_bias: bool,
    options: GptqOptions | None,
    signed_scales: bool,
    scale_dtype: np.dtype | None,
    xp: ModuleType,
) -> RoundedWeight:
    gram, spec, name = layer.gram, layer.spec, layer.name
    if gram is None:
        if correct_bias or rounding not in ("amax", "mse"):
            wanted = "bias correction" if rounding in ("amax", "mse") else rounding
            raise SpecError(f"{name}: {wanted} needs its Gram matrix; collect it with the calibration.")
    else:
        check_gram(layer.w, gram, layer.layout, name)
    if rounding == "gptq":
        assert gram is not None
        found = gptq(
            layer.w,
            gram,
            spec,
            layer.layout,
            options=options,
            centred=correct_bias,
            signed_scales=signed_scales,
            scale_dtype=scale_dtype,
            name=name,
            xp=xp,
        )
    elif rounding == "output":
        assert gram is not None
        qparams = search_scales(
            layer.w,
            gram,
            spec,
            layer.layout,
            centred=correct_bias,
            signed_scales=signed_scales,
            scale_dtype=scale_dtype,
            name=name,
            xp=xp,
        )
        found = quantize(layer.w, qparams, spec)
    elif rounding in ("amax", "mse", "weighted"):
        weighted = gram is not None and rounding == "weighted"
        qparams = weight_qparams(
            layer.w,
            spec,
            method="amax" if rounding == "amax" else "mse",
            importance=layer.layout.importance(gram.importance, layer.w.shape) if weighted and gram else None,
            signed_scales=signed_scales,
            scale_dtype=scale_dtype,
            name=name,
        )
        found = quantize(layer.w, qparams, spec)
    else:
        raise UnknownNameError(f"rounding {rounding}: choose one of amax, mse, weighted, output, gptq.")
    if gram is None:
        return RoundedWeight(qtensor=found, bias=None, output_error=None)
    values = dequantize(found)
    change = layer.layout.columns(values).astype(np.float64) - layer.columns
    moment = gram.covariance if correct_bias else gram.second_moment
    return RoundedWeight(
        qtensor=found,
        bias=bias_correction(layer.w, values, gram.mean, layer.layout, name=name) if correct_bias else None,
        output_error=float(output_error(change, moment).sum()),
    )

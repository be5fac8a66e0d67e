"""Calibrators: from what was observed of a tensor to the range that its quantization must hold.

A calibrator is a pure function of a `FloatHistogram` and a `QuantSpec`; weights, which are known whole, have
`weight_range` and, for blocks and few bits, `weight_qparams`.
"""

from quantkit.calibrators.base import Calibrator, get_calibrator, list_calibrators, solve_range
from quantkit.calibrators.weight_scales import weight_qparams
from quantkit.calibrators.weights import WeightMethod, weight_range

__all__ = [
    "Calibrator",
    "WeightMethod",
    "get_calibrator",
    "list_calibrators",
    "solve_range",
    "weight_qparams",
    "weight_range",
]

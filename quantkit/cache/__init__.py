"""Calibration caches: what was counted of a model's tensors, in one file that knows its model."""

from quantkit.cache.cache import (
    IMPORTED,
    SUFFIX,
    CalibrationCache,
    ModelIdentity,
    TensorStatistics,
    find_cache,
)

__all__ = ["IMPORTED", "SUFFIX", "CalibrationCache", "ModelIdentity", "TensorStatistics", "find_cache"]

"""quantkit: post-training quantization and calibration for ONNX models on NVIDIA GPUs.

    import quantkit

    cache = quantkit.calibrate_model("model.onnx", "calib/", method="entropy")
    exported = quantkit.export_model("model.onnx", cache, preset="int8")
    quantkit.evaluate_model("model.onnx", exported.path, "eval/")

Names are imported when they are first used, so that `import quantkit` is quick and needs no runtime.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quantkit.bench import Benchmark, bench_model
    from quantkit.cache import CalibrationCache
    from quantkit.data import ImagePreprocessing
    from quantkit.errors import QuantkitError
    from quantkit.evaluation.evaluation import Evaluation
    from quantkit.exported import Exported
    from quantkit.exporting import export_model
    from quantkit.mixed_precision.budget import BudgetResult, meet_budget
    from quantkit.mixed_precision.sensitivity import Sensitivity, measure_sensitivity
    from quantkit.pipeline import calibrate_model, collect_grams, evaluate_model
    from quantkit.planning.planning import Request

_HOMES = {
    "Benchmark": "quantkit.bench.result",
    "BudgetResult": "quantkit.mixed_precision.budget",
    "CalibrationCache": "quantkit.cache",
    "Evaluation": "quantkit.evaluation.evaluation",
    "Exported": "quantkit.exported",
    "ImagePreprocessing": "quantkit.data",
    "QuantkitError": "quantkit.errors",
    "Request": "quantkit.planning.planning",
    "Sensitivity": "quantkit.mixed_precision.sensitivity",
    "bench_model": "quantkit.bench.run",
    "calibrate_model": "quantkit.pipeline",
    "collect_grams": "quantkit.pipeline",
    "evaluate_model": "quantkit.pipeline",
    "export_model": "quantkit.exporting",
    "measure_sensitivity": "quantkit.mixed_precision.sensitivity",
    "meet_budget": "quantkit.mixed_precision.budget",
}

__all__ = [
    "Benchmark",
    "BudgetResult",
    "CalibrationCache",
    "Evaluation",
    "Exported",
    "ImagePreprocessing",
    "QuantkitError",
    "Request",
    "Sensitivity",
    "__version__",
    "bench_model",
    "calibrate_model",
    "collect_grams",
    "evaluate_model",
    "export_model",
    "measure_sensitivity",
    "meet_budget",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

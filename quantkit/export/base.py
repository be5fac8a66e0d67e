"""What an emitter is, and how one is found by its target's name."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import onnx_ir as ir

from quantkit.graph import Graph
from quantkit.plan import Plan
from quantkit.plugins import Registry
from quantkit.presets import Target


@runtime_checkable
class Emitter(Protocol):
    """Writes a plan into a model for one target. It knows nothing of how the numbers were found."""

    @property
    def target(self) -> Target:
        """What the runtime can execute: it bears on placing and solving, so it is known before a plan exists."""

    def emit(self, graph: Graph, plan: Plan) -> ir.Model:
        """Return the quantized model; `graph` is not changed.

        Raises:
            PlanError: the plan does not fit the graph.
        """


_REGISTRY: Registry[Callable[[], Emitter]] = Registry(
    group="quantkit.emitters",
    noun="target",
    builtin={
        "ort": "quantkit.export.ort:OrtEmitter",
        "ort-cpu": "quantkit.export.ort_cpu:OrtCpuEmitter",
        "tensorrt": "quantkit.export.tensorrt:TensorRTEmitter",
    },
)


def get_emitter(target: str) -> Emitter:
    """Return the emitter for a target.

    Raises:
        UnknownNameError: no emitter is registered for it; the message gives the nearest ones.
    """
    return _REGISTRY.get(target)()


def list_emitters() -> dict[str, str]:
    """Return every registered target, with "" or the error that keeps its plug-in from loading."""
    return _REGISTRY.status()

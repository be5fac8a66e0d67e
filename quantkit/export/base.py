"""What an emitter is, and how one is found by its target's name."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import onnx_ir as ir

from quantkit.errors import UnknownNameError
from quantkit.graph import Graph
from quantkit.plan import Plan
from quantkit.plugins import Registry, in_one_line
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


def _is_no_emitter(loaded: object) -> str:
    if not callable(loaded):
        return f"is of type {type(loaded).__name__}, no Emitter class"
    if isinstance(loaded, type) and not callable(getattr(loaded, "emit", None)):
        return "is no Emitter class: it has no emit(graph, plan)"
    return ""


_REGISTRY: Registry[Callable[[], Emitter]] = Registry(
    group="quantkit.emitters",
    noun="target",
    builtin={
        "ort": "quantkit.export.ort:OrtEmitter",
        "ort-cpu": "quantkit.export.ort_cpu:OrtCpuEmitter",
        "tensorrt": "quantkit.export.tensorrt:TensorRTEmitter",
    },
    check=_is_no_emitter,
)


def get_emitter(target: str) -> Emitter:
    """Return the emitter for a target.

    Raises:
        UnknownNameError: no emitter is registered for it, and the message gives the nearest ones; or its plug-in
            makes none.
    """
    try:
        made = _REGISTRY.get(target)()
    except UnknownNameError:
        raise
    except Exception as error:
        # A plug-in may raise whatever it likes.
        raise UnknownNameError(
            f"target {target}: its plug-in cannot be made ({in_one_line(error)}); mend or uninstall that package."
        ) from error
    if not isinstance(made, Emitter):
        raise UnknownNameError(
            f"target {target}: its plug-in makes {type(made).__name__}, no Emitter with a target and "
            "emit(graph, plan); mend or uninstall that package."
        )
    return made


def list_emitters() -> dict[str, str]:
    """Return every registered target, with "" or the error that keeps its plug-in from loading."""
    return _REGISTRY.status()

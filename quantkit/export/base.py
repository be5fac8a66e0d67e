"""What an emitter is, and how one is found by its target's name."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import onnx_ir as ir

from quantkit.errors import SpecError, UnknownNameError
from quantkit.export.verify import Verification
from quantkit.graph import Graph
from quantkit.planning.plan import Plan
from quantkit.planning.presets import Target
from quantkit.plugins import Registry, in_one_line


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


@runtime_checkable
class FolderEmitter(Protocol):
    """Writes a plan as a folder of files that are no ONNX model, and reads it back to judge it."""

    @property
    def target(self) -> Target:
        """As an emitter's."""

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of the names that its files can have: a folder that holds nothing else may be written anew."""

    def write(self, graph: Graph, plan: Plan, folder: Path, *, floats: ir.DataType | None = None) -> None:
        """Write the files into an empty folder; `graph` is not changed.

        Args:
            graph, plan: the model and what becomes of it.
            folder: where to write.
            floats: the type of what is float32 and not quantized; None for float32.

        Raises:
            PlanError: the plan does not fit the graph, or holds what this target has no place for.
        """

    def verify(
        self, folder: Path, graph: Graph, plan: Plan, *, floats: ir.DataType | None = None
    ) -> Verification:
        """Read the written files back and hold them against the plan.

        Raises:
            ExportError: they are not what the plan says.
        """


def _is_no_emitter(loaded: object) -> str:
    if not callable(loaded):
        return f"is of type {type(loaded).__name__}, no Emitter class"
    if isinstance(loaded, type) and not any(
        callable(getattr(loaded, name, None)) for name in ("emit", "write")
    ):
        return "is no Emitter class: it has no emit(graph, plan)"
    return ""


_REGISTRY: Registry[Callable[..., Emitter | FolderEmitter]] = Registry(
    group="quantkit.emitters",
    noun="target",
    builtin={
        "ort": "quantkit.export.ort:OrtEmitter",
        "ort-cpu": "quantkit.export.ort_cpu:OrtCpuEmitter",
        "ort-qoperator": "quantkit.export.ort_qoperator:OrtQOperatorEmitter",
        "tensorrt": "quantkit.export.tensorrt:TensorRTEmitter",
        "vllm": "quantkit.export.vllm:VllmEmitter",
    },
    check=_is_no_emitter,
)


def get_emitter(target: str, **options: object) -> Emitter | FolderEmitter:
    """Return the emitter for a target.

    Args:
        target: its name.
        options: what it may be told: trt=10 for tensorrt, accuracy_level=4 for ort and ort-cpu.

    Raises:
        UnknownNameError: no emitter is registered for it, and the message gives the nearest ones; or its plug-in
            makes none.
        SpecError: it has no such option.
    """
    found = _REGISTRY.get(target)
    unknown = sorted(options.keys() - _options(found))
    if unknown:
        raise SpecError(f"target {target}: has no {' and no '.join(unknown)}; leave it out.")
    try:
        made = found(**options)
    except SpecError:
        raise
    except Exception as error:
        # A plug-in may raise whatever it likes.
        raise UnknownNameError(
            f"target {target}: its plug-in cannot be made ({in_one_line(error)}); mend or uninstall that package."
        ) from error
    if not isinstance(made, Emitter | FolderEmitter):
        raise UnknownNameError(
            f"target {target}: its plug-in makes {type(made).__name__}, no Emitter with a target and "
            "emit(graph, plan); mend or uninstall that package."
        )
    return made


def _options(factory: Callable[..., object]) -> set[str]:
    """The options that a factory of emitters takes; a plug-in's may have no signature to read."""
    try:
        return set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return set()


def list_emitters() -> dict[str, str]:
    """Return every registered target, with "" or the error that keeps its plug-in from loading."""
    return _REGISTRY.status()

"""What each quantized node costs on its own: the model with that node quantized and everything else in float."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from quantkit.cache import CalibrationCache
from quantkit.data import ImagePreprocessing, SampleSource, open_data
from quantkit.errors import SpecError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.evaluation import Evaluation
from quantkit.export import Emitter, get_emitter
from quantkit.graph import Graph, ModelLike, load_graph
from quantkit.graph.biases import add_to_biases
from quantkit.metrics.outputs import OutputMetrics
from quantkit.planning.planning import Planned, Request, plan_model
from quantkit.planning.protecting import edited
from quantkit.statistics import GramMatrix
from quantkit.tables import Table

# So many samples rank nodes well, and a model may have hundreds of nodes.
DEFAULT_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class NodeLoss:
    """What quantizing one node alone costs.

    Attributes:
        node, op_type: the node.
        format: how its weight and its activations are quantized, in words.
        weights: elements of its weights.
        sqnr_db: 10·log10(Σ ref² / Σ (q − ref)²) of the model's first output; infinite where nothing changed.
        agreement_loss: share of rows whose largest element is at another place than in float; None where the output
            has no classes.
        kl_mnat: mean KL to float in milli-nats; None likewise.
    """

    node: str
    op_type: str
    format: str
    weights: int
    sqnr_db: float
    agreement_loss: float | None
    kl_mnat: float | None

    @property
    def noise(self) -> float:
        """Σ (q − ref)² / Σ ref²: nearly adds up over nodes."""
        return float(10 ** (-self.sqnr_db / 10))


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What every quantized node costs on its own.

    Attributes:
        model: the model's name.
        preset, target, method: how it was quantized.
        samples: how many it was run on.
        nodes: the worst first.
    """

    model: str
    preset: str
    target: str
    method: str
    samples: int
    nodes: list[NodeLoss]

    def table(self) -> Table:
        """Return one row a node, the worst first."""
        rows = [
            (
                n.node,
                n.op_type,
                n.format,
                "identical" if n.sqnr_db == float("inf") else f"{n.sqnr_db:.1f}",
                None if n.agreement_loss is None else f"{n.agreement_loss:.2%}",
                None if n.kl_mnat is None else f"{n.kl_mnat:.3f}",
            )
            for n in self.nodes
        ]
        return Table(("node", "operator", "how", "SQNR dB", "other top-1", "KL mnat"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON would hold it; infinity is the text "inf"."""
        found = asdict(self)
        for node in found["nodes"]:
            node["sqnr_db"] = "inf" if node["sqnr_db"] == float("inf") else node["sqnr_db"]
        return found

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def measure_sensitivity(
    model: ModelLike,
    cache: CalibrationCache | str | os.PathLike[str] | None,
    data: object,
    *,
    request: Request | None = None,
    target: str = "tensorrt",
    target_options: Mapping[str, Any] | None = None,
    grams: Mapping[str, GramMatrix] | str | os.PathLike[str] | None = None,
    samples: int | None = DEFAULT_SAMPLES,
    batch_size: int | None = None,
    image: ImagePreprocessing | None = None,
    mapping: Mapping[str, str] | None = None,
    on_node: Callable[[int, int], object] = lambda done, count: None,
) -> Sensitivity:
    """Solve one plan for the whole model, and run the model once for every node with that node's part of it alone.

    Args:
        model: the float model.
        cache: its calibration cache, or the path of it; None where no statistics are needed.
        data: as for `evaluate_model`.
        request: how it is quantized; None for INT8.
        target, target_options, grams: as for `export_model`; a target that writes no ONNX file cannot be run.
        samples: how many of the data.
        batch_size, image, mapping: as for `evaluate_model`.
        on_node: called with the nodes done and their number.

    Raises:
        SpecError: the target cannot be run.
        CacheError: the cache is of another model.
        QuantkitError: as `export_model` and `evaluate_model`.
    """
    graph = load_graph(model)
    held = CalibrationCache.load(cache) if isinstance(cache, str | os.PathLike) else cache
    if held is not None:
        held.check_model(graph.fingerprint, str(graph.path or graph.name))
    emitter = runnable_emitter(target, target_options)
    planned = plan_model(graph, held, request or Request(), emitter.target, grams=grams)
    source = open_data(data, graph.inputs, image=image, samples=samples, mapping=mapping)
    return losses(planned, emitter, source, batch_size=batch_size, on_node=on_node)


def losses(
    planned: Planned,
    emitter: Emitter,
    source: SampleSource,
    *,
    batch_size: int | None = None,
    on_node: Callable[[int, int], object] = lambda done, count: None,
) -> Sensitivity:
    """Measure every node of a plan on its own; see `measure_sensitivity`."""
    plan, found, evaluation = planned.plan, [], None
    nodes = _nodes(planned)
    unbiased = _without_corrections(planned)
    for done, (node, op_type) in enumerate(nodes.items()):
        on_node(done, len(nodes))
        alone = _alone(planned, unbiased, node)
        part = alone.plan
        evaluation = run_plan(alone, emitter, source, batch_size=batch_size)
        output = first_output(evaluation)
        found.append(
            NodeLoss(
                node=node,
                op_type=op_type,
                format=plan.formats.get(node, "skip branch"),
                weights=sum(int(np.prod(planned.graph.shape(w.name))) for w in part.weights),
                sqnr_db=float("inf") if output.sqnr_db is None else output.sqnr_db,
                agreement_loss=None if output.top1_agreement is None else 1 - output.top1_agreement,
                kl_mnat=output.kl_mnat,
            )
        )
    on_node(len(nodes), len(nodes))
    return Sensitivity(
        model=plan.model,
        preset=plan.preset,
        target=plan.target,
        method=plan.method,
        samples=0 if evaluation is None else evaluation.samples,
        nodes=sorted(found, key=lambda n: (n.sqnr_db, n.node)),
    )


def run_plan(
    planned: Planned,
    emitter: Emitter,
    source: SampleSource,
    *,
    labels: np.ndarray | None = None,
    next_token: bool = False,
    batch_size: int | None = None,
) -> Evaluation:
    """Run what a plan makes of a model, without writing it, beside the model that was given."""
    written = Graph(emitter.emit(planned.graph, planned.plan), planned.graph.name)
    return evaluate(
        planned.original, written, source, labels=labels, next_token=next_token, batch_size=batch_size
    )


def first_output(evaluation: Evaluation) -> OutputMetrics:
    """Return the metrics of the first output that says something; of the first where none does."""
    found = list(evaluation.outputs.values())
    return next((output for output in found if output.sqnr_db is not None), found[0])


def runnable_emitter(target: str, options: Mapping[str, Any] | None = None) -> Emitter:
    """Return the emitter of a target that writes ONNX models.

    Raises:
        SpecError: it writes something else.
    """
    emitter = get_emitter(target, **(options or {}))
    if not isinstance(emitter, Emitter):
        raise SpecError(
            f"target {target}: it writes no ONNX model that could be run; measure with --target ort."
        )
    return emitter


def _nodes(planned: Planned) -> dict[str, str]:
    """The nodes that run quantized, and those beside them that read a quantized tensor, with their operators."""
    readers = {node for a in planned.plan.activations.values() for node, _ in a.readers}
    beside = {node: planned.graph.node(node).op_type for node in sorted(readers - planned.plan.nodes.keys())}
    return {**planned.plan.nodes, **beside}


def _without_corrections(planned: Planned) -> Graph:
    """The graph of a plan before biases took up the mean of its errors."""
    edits = planned.plan.edits
    if edits is None or not edits.biases:
        return planned.graph
    return edited(planned.original, edits, biases=False)


def _alone(planned: Planned, unbiased: Graph, node: str) -> Planned:
    """The part of a plan that is about one node.

    Of what was added to biases too: the others' errors, which it makes up for, are not there.
    """
    plan, edits, graph = planned.plan, planned.plan.edits, planned.graph
    if edits is not None and edits.biases:
        edits = replace(edits, biases={name: bias for name, bias in edits.biases.items() if name == node})
        graph = add_to_biases(unbiased, edits.biases)
    activations = {}
    for key, activation in plan.activations.items():
        readers = activation.readers or tuple(
            (str(user.name), index) for user, index in graph.values[activation.name].uses()
        )
        mine = tuple(reader for reader in readers if reader[0] == node)
        if mine:
            activations[key] = replace(activation, readers=mine)
    weights = []
    for weight in plan.weights:
        mine = tuple(reader for reader in weight.readers if reader[0] == node)
        if mine:
            weights.append(replace(weight, readers=mine))
    part = replace(
        plan,
        fingerprint=graph.fingerprint,
        activations=activations,
        weights=weights,
        biases=[bias for bias in plan.biases if bias.reader[0] == node],
        nodes={name: op_type for name, op_type in plan.nodes.items() if name == node},
        edits=edits,
    )
    return replace(planned, graph=graph, plan=part)

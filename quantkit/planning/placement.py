"""Which of a graph's sites are quantized for a target: the step between finding sites and solving them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from quantkit.calibrators import Calibrator
from quantkit.formats import QuantSpec
from quantkit.graph import Graph, LeftAlone, Site, find_sites
from quantkit.graph.dequantized import is_stored
from quantkit.graph.sites import is_depthwise_or_narrow, is_plain_product
from quantkit.planning.presets import Preset, Target, is_packed_block, kind_of
from quantkit.planning.settings import NodeSettings, node_settings

Reader = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class PlacedActivation:
    """A tensor to quantize.

    Attributes:
        name: the tensor.
        spec: its format.
        calibrator: the method for its range; None where ranges are fixed.
        readers: the (node, input index) pairs that read it quantized; () where every reader does.
    """

    name: str
    spec: QuantSpec
    calibrator: Calibrator | None
    readers: tuple[Reader, ...]


@dataclass(frozen=True, kw_only=True)
class PlacedWeight:
    """A weight as one node reads it, and how it is quantized: the axis of `spec` is set."""

    site: Site
    spec: QuantSpec
    settings: NodeSettings


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where quantization goes.

    Attributes:
        activations: the tensors to quantize, by name; one that is wanted in two formats is there twice.
        weights: the weights to quantize.
        nodes: the nodes that run quantized → their operator.
        left: linear nodes that do not, with the reason.
        settings: node → what it was to become.
    """

    activations: list[PlacedActivation]
    weights: list[PlacedWeight]
    nodes: dict[str, str]
    left: list[LeftAlone]
    settings: Mapping[str, NodeSettings]

    def readers(self) -> dict[str, tuple[Reader, ...]]:
        """Return {tensor: who reads it quantized}."""
        return {a.name: a.readers for a in self.activations}


@dataclass
class _Choice:
    """Tensors that some read quantized, with those readers, and tensors that everything reads so."""

    readers: dict[tuple[str, QuantSpec], set[Reader]] = field(default_factory=dict)
    everywhere: set[tuple[str, QuantSpec]] = field(default_factory=set)
    calibrators: dict[tuple[str, QuantSpec], Calibrator | None] = field(default_factory=dict)

    def read(self, name: str, settings: NodeSettings, reader: Reader) -> None:
        """Let `reader` read the tensor as `settings` say."""
        assert settings.activations is not None
        key = name, settings.activations
        self.readers.setdefault(key, set()).add(reader)
        self.calibrators.setdefault(key, settings.calibrator)

    def written(self, name: str, settings: NodeSettings) -> None:
        """Let everything read the tensor as `settings` say."""
        assert settings.activations is not None
        self.everywhere.add((name, settings.activations))
        self.calibrators.setdefault((name, settings.activations), settings.calibrator)

    def is_quantized(self, name: str) -> bool:
        return any(name == other for other, _ in (*self.readers, *self.everywhere))


def place(
    graph: Graph,
    preset: Preset,
    target: Target,
    *,
    everything: bool = False,
    unfit: Mapping[str, str] | None = None,
) -> Placement:
    """Choose the sites that a preset quantizes; see `place_nodes`."""
    sites, _ = find_sites(graph)
    settings = node_settings(preset, target)
    nodes = {s.node: settings for s in sites if s.role in ("input", "weight")}
    return place_nodes(graph, nodes, target, everything=everything, unfit=unfit)


def place_nodes(
    graph: Graph,
    settings: Mapping[str, NodeSettings],
    target: Target,
    *,
    kept: Mapping[str, str] | None = None,
    everything: bool = False,
    unfit: Mapping[str, str] | None = None,
) -> Placement:
    """Choose the sites to quantize.

    Args:
        graph: the cleaned model.
        settings: node → what it is to become; a node without stays in float, for the reason in `kept`.
        target: what will run it.
        kept: node → why it stays in float.
        everything: also what a preset would leave in float (`--all`).
        unfit: tensors that cannot be quantized, with the reason (never observed, not finite); the nodes that read
            them stay in float.
    """
    sites, left = find_sites(graph)
    unfit = unfit or {}
    reasons = dict(kept or {}) | _float_nodes(graph, sites, settings, target, everything, unfit)
    operators = {s.node: s.op_type for s in sites if s.role in ("weight", "input", "embedding")}
    nodes = {name: op for name, op in operators.items() if name in settings and name not in reasons}
    left = left + [
        LeftAlone(node=node, op_type=graph.node(node).op_type, reason=reason)
        for node, reason in reasons.items()
        if node in operators
    ]
    choice = _Choice()
    for site in sites:
        if site.role == "input" and site.node in nodes and settings[site.node].activations is not None:
            choice.read(site.name, settings[site.node], (site.node, site.index))
    if target.outputs:
        _choose_outputs(graph, sites, settings, nodes, unfit, choice)
    else:
        for site in sites:
            if site.role == "skip" and site.name not in unfit:
                summed = _summed(graph, site, nodes)
                if summed and settings[summed].preset.skips and settings[summed].integer_activations:
                    choice.read(site.name, settings[summed], (site.node, site.index))
    return Placement(
        activations=_settle(graph, choice),
        weights=[
            PlacedWeight(site=s, spec=_on_axis(settings[s.node].preset, s), settings=settings[s.node])
            for s in sites
            if s.role in ("weight", "embedding") and s.node in nodes
        ],
        nodes=nodes,
        left=left,
        settings={node: settings[node] for node in nodes},
    )


def _on_axis(preset: Preset, site: Site) -> QuantSpec:
    """The preset's weight format, along the axis of this weight."""
    spec = preset.weights
    if spec.block_shape is not None or spec.axis is None:
        return spec
    return replace(spec, axis=site.contraction if spec.block_size is not None else site.axis)


def _settle(graph: Graph, choice: _Choice) -> list[PlacedActivation]:
    """The tensors and their readers; where everything reads one format and some another, who reads which is said."""
    found = []
    for key in sorted({*choice.readers, *choice.everywhere}, key=lambda k: (k[0], str(k[1]))):
        name, spec = key
        others = {r for k, readers in choice.readers.items() if k[0] == name and k != key for r in readers}
        readers = choice.readers.get(key, set())
        if key in choice.everywhere:
            readers = _all_readers(graph.values[name]) - others if others else set()
        found.append(
            PlacedActivation(
                name=name, spec=spec, calibrator=choice.calibrators[key], readers=tuple(sorted(readers))
            )
        )
    return found


def _all_readers(value: ir.Value) -> set[Reader]:
    return {(str(node.name), index) for node, index in value.uses()}


def _float_nodes(
    graph: Graph,
    sites: Iterable[Site],
    settings: Mapping[str, NodeSettings],
    target: Target,
    everything: bool,
    unfit: Mapping[str, str],
) -> dict[str, str]:
    """Linear nodes that stay in float, with the reason."""
    reasons: dict[str, str] = {}
    for site in sites:
        if site.role not in ("input", "weight", "embedding") or site.node not in settings:
            continue
        wanted, node = settings[site.node], graph.node(site.node)
        preset = wanted.preset
        broken = [str(v.name) for v in node.inputs if v is not None and str(v.name) in unfit]
        weighted = any(v is not None and v.is_initializer() for v in node.inputs[:2])
        if broken:
            reasons.setdefault(site.node, unfit[broken[0]])
        elif target.layers_only and (why := _no_layer(node)):
            reasons.setdefault(site.node, f"{target.name} quantizes linear layers alone, and this is {why}")
        elif wanted.activations is None and not weighted:
            reasons.setdefault(site.node, f"no weight, and {preset.name} quantizes weights alone")
        elif wanted.activations is not None and not target.can_activate(wanted.activations):
            reasons.setdefault(site.node, f"{target.name} has no {kind_of(wanted.activations)} activations")
        elif preset.in_blocks and site.op_type in ("Conv", "ConvTranspose"):
            reasons.setdefault(site.node, _no_blocks(preset, target))
        elif weighted and (
            why := target.why_not(preset.weights, site.op_type) or _no_matrix(node, preset, target)
        ):
            reasons.setdefault(site.node, why)
        elif everything or wanted.asked:
            continue
        elif not preset.gemm and site.op_type == "Gemm":
            reasons.setdefault(
                site.node, f"{preset.name} leaves Gemm in float by default (--all quantizes it)"
            )
        elif not preset.narrow_convolutions and is_depthwise_or_narrow(node):
            reasons.setdefault(
                site.node,
                "depthwise or ≤ 16 channels: no faster "
                f"{preset.name} kernel in TensorRT (--all quantizes it)",
            )
    return reasons


def _no_layer(node: ir.Node) -> str:
    """What a MatMul is that multiplies by no constant matrix; "" for everything else."""
    if node.op_type != "MatMul":
        return ""
    constants = [v for v in node.inputs[:2] if v is not None and is_stored(v)]
    if not constants:
        return "a product of two activations"
    shape = constants[0].shape
    return "" if shape is None or len(shape) == 2 else "a stack of matrices"


def _no_blocks(preset: Preset, target: Target) -> str:
    """Why a convolution stays in float where weights lie in blocks."""
    free = preset.weights.block_size is not None and preset.weights.scale_format is None
    channels = replace(preset.weights, block_size=None) if free else preset.weights
    hint = "; --group channel quantizes it" if free and not target.why_not(channels, "Conv") else ""
    return f"{preset.name} weights lie in blocks, which no target has for it{hint}"


def _no_matrix(node: ir.Node, preset: Preset, target: Target) -> str:
    """Why a MatMul or Gemm stays in float whose weight does not lie as its format needs it; "" for everything else."""
    spec = preset.weights
    if node.op_type not in ("MatMul", "Gemm"):
        return ""
    index, weight = next(
        (i, v) for i, v in enumerate(node.inputs[:2]) if v is not None and v.is_initializer()
    )
    stack = weight.shape is not None and len(weight.shape) != 2
    if spec.block_shape is not None and stack:
        return f"{preset.name} has tiles of a matrix, and this is a stack of them"
    if kind_of(spec) not in target.plain_products:
        return ""
    if spec.block_size is not None and not is_packed_block(spec.block_size):
        return f"{target.name} has {preset.name} weights in groups of 16, 32, 64 … alone"
    plain = index == 1 and not stack and is_plain_product(node)
    return "" if plain else f"{target.name} has {preset.name} weights in plain products x @ W alone"


def _choose_outputs(
    graph: Graph,
    sites: list[Site],
    settings: Mapping[str, NodeSettings],
    nodes: Mapping[str, str],
    unfit: Mapping[str, str],
    choice: _Choice,
) -> None:
    """Quantize what convolutions write, and the Adds between them, so that they run on integers from end to end."""
    outputs = set(graph.outputs)
    by_output: dict[str, NodeSettings] = {}
    for site in sites:
        if site.name in unfit or site.name in outputs:
            continue
        if site.role == "output" and site.node in nodes and settings[site.node].integer_activations:
            choice.written(site.name, settings[site.node])
            by_output[site.name] = settings[site.node]
    readers = {
        site.name: settings[site.node] for site in sites if site.role == "input" and site.node in nodes
    }
    adds: dict[str, list[Site]] = {}
    for site in sites:
        if site.op_type == "Add":
            adds.setdefault(site.node, []).append(site)
    for parts in adds.values():
        operands = [s for s in parts if s.role == "operand"]
        output = next(s for s in parts if s.role == "output")
        names = {s.name for s in operands} | {output.name}
        if names & unfit.keys() or output.name in outputs:
            continue
        known = [s.name for s in operands if choice.is_quantized(s.name)]
        of = next((by_output.get(n) or readers.get(n) for n in known), None)
        if of is None or not of.integer_activations:
            continue
        for site in operands:
            choice.read(site.name, by_output.get(site.name, of), (site.node, site.index))
        choice.written(output.name, of)
        by_output[output.name] = of


def _summed(graph: Graph, site: Site, nodes: Mapping[str, str]) -> str:
    """The convolution that runs quantized and computes the Add's other operand; "" where none does."""
    other = graph.node(site.node).inputs[1 - site.index]
    producer = other.producer() if other is not None else None
    return str(producer.name) if producer is not None and str(producer.name) in nodes else ""

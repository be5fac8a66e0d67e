"""Which of a graph's sites a preset quantizes for a target: the step between finding sites and solving them."""

from dataclasses import dataclass, field

from quantkit.formats import QuantSpec
from quantkit.graph import Graph, LeftAlone, Site, find_sites
from quantkit.graph.sites import is_depthwise_or_narrow
from quantkit.presets import Preset, Target

Reader = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where quantization goes.

    Attributes:
        activations: tensor → the (node, input index) pairs that read it quantized; () where every reader does.
        weights: the weight sites to quantize.
        nodes: the linear nodes that run quantized.
        left: linear nodes that do not, with the reason.
        spec: how activations are quantized; None where they stay in float.
    """

    activations: dict[str, tuple[Reader, ...]]
    weights: list[Site]
    nodes: dict[str, str]
    left: list[LeftAlone]
    spec: QuantSpec | None


@dataclass
class _Choice:
    """Tensors that some read quantized, with those readers, and tensors that everything reads so."""

    readers: dict[str, set[Reader]] = field(default_factory=dict)
    everywhere: set[str] = field(default_factory=set)


def place(
    graph: Graph,
    preset: Preset,
    target: Target,
    *,
    everything: bool = False,
    unfit: dict[str, str] | None = None,
) -> Placement:
    """Choose the sites to quantize.

    Args:
        graph: the cleaned model.
        preset: what the user asked for.
        target: what will run it.
        everything: also what the preset would leave in float (`--all`).
        unfit: tensors that cannot be quantized, with the reason (never observed, not finite); the nodes that read
            them stay in float.
    """
    sites, left = find_sites(graph)
    unfit = unfit or {}
    reasons = _float_nodes(graph, sites, preset, everything, unfit)
    left = left + [
        LeftAlone(node=node, op_type=graph.node(node).op_type, reason=reason)
        for node, reason in reasons.items()
    ]
    spec = target.int8_activations if preset.integer_activations else preset.activations
    linear = {s.node: s.op_type for s in sites if s.role == "weight" or s.role == "input"}
    nodes = {name: op_type for name, op_type in linear.items() if name not in reasons}
    choice = _Choice()
    for site in sites:
        if site.role == "input" and site.node in nodes and spec is not None:
            choice.readers.setdefault(site.name, set()).add((site.node, site.index))
    if target.outputs and preset.integer_activations:
        _choose_outputs(graph, sites, nodes, unfit, choice)
    elif preset.skips:
        for site in sites:
            if site.role == "skip" and site.name not in unfit and _sums_quantized(graph, site, nodes):
                choice.readers.setdefault(site.name, set()).add((site.node, site.index))
    for name in choice.everywhere:
        choice.readers[name] = set()
    return Placement(
        activations={name: tuple(sorted(readers)) for name, readers in sorted(choice.readers.items())},
        weights=[s for s in sites if s.role == "weight" and s.node in nodes],
        nodes=nodes,
        left=left,
        spec=spec,
    )


def _float_nodes(
    graph: Graph, sites: list[Site], preset: Preset, everything: bool, unfit: dict[str, str]
) -> dict[str, str]:
    """Linear nodes that stay in float, with the reason."""
    reasons: dict[str, str] = {}
    for site in sites:
        if site.role not in ("input", "weight"):
            continue
        read = [str(v.name) for v in graph.node(site.node).inputs if v is not None]
        broken = [name for name in read if name in unfit]
        if broken:
            reasons.setdefault(site.node, unfit[broken[0]])
        elif preset.activations is None and not any(
            v is not None and v.is_initializer() for v in graph.node(site.node).inputs[:2]
        ):
            reasons.setdefault(site.node, f"no weight, and {preset.name} quantizes weights alone")
        elif preset.in_blocks and site.op_type in ("Conv", "ConvTranspose"):
            reasons.setdefault(site.node, f"{preset.name} weights lie in blocks, which no target has for it")
        elif everything:
            continue
        elif not preset.gemm and site.op_type == "Gemm":
            reasons.setdefault(
                site.node, f"{preset.name} leaves Gemm in float by default (--all quantizes it)"
            )
        elif not preset.narrow_convolutions and is_depthwise_or_narrow(graph.node(site.node)):
            reasons.setdefault(
                site.node,
                "depthwise or ≤ 16 channels: no faster "
                f"{preset.name} kernel in TensorRT (--all quantizes it)",
            )
    return reasons


def _choose_outputs(
    graph: Graph, sites: list[Site], nodes: dict[str, str], unfit: dict[str, str], choice: _Choice
) -> None:
    """Quantize what convolutions write, and the Adds between them, so that they run on integers from end to end."""
    outputs = set(graph.outputs)
    for site in sites:
        if site.name in unfit or site.name in outputs:
            continue
        if site.role == "output" and site.node in nodes:
            choice.everywhere.add(site.name)
    adds: dict[str, list[Site]] = {}
    for site in sites:
        if site.op_type == "Add":
            adds.setdefault(site.node, []).append(site)
    for parts in adds.values():
        operands = [s for s in parts if s.role == "operand"]
        output = next(s for s in parts if s.role == "output")
        names = {s.name for s in operands} | {output.name}
        if (
            names & unfit.keys()
            or output.name in outputs
            or not any(s.name in choice.everywhere or s.name in choice.readers for s in operands)
        ):
            continue
        for site in operands:
            choice.readers.setdefault(site.name, set()).add((site.node, site.index))
        choice.everywhere.add(output.name)


def _sums_quantized(graph: Graph, site: Site, nodes: dict[str, str]) -> bool:
    """Whether the Add's other operand is computed by a convolution that runs quantized."""
    other = graph.node(site.node).inputs[1 - site.index]
    producer = other.producer() if other is not None else None
    return producer is not None and str(producer.name) in nodes

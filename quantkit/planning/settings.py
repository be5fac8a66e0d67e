"""What every node of a model is to become: the preset and the command line say it for all, a recipe for some."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from quantkit.calibrators import Calibrator, get_calibrator
from quantkit.calibrators.weight_rounding import Rounding
from quantkit.errors import RecipeError, SpecError
from quantkit.formats import QuantSpec
from quantkit.graph import Graph, find_sites
from quantkit.planning.methods import FROM_GRAM, Methods, Scaling, parse_methods
from quantkit.planning.presets import Preset, Target, get_preset
from quantkit.planning.recipe import AS_PRESET, FLOAT, Group, Recipe, Settings

# Of weights in few bits and blocks the scale of least squared error; of the others the largest magnitude, which keeps
# as much and is what TensorRT does.
_WEIGHT_METHOD: Mapping[bool, Rounding] = {True: "mse", False: "amax"}


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """How one node is to be quantized.

    Attributes:
        preset: whose weights it gets, and what that preset leaves in float unless it is asked for.
        activations: how its inputs are quantized; None where they stay in float.
        calibrator: the method for them; None where their ranges are fixed.
        weight_method: how its weight is rounded.
        equalize: its channels and those of its neighbours are made equally large first.
        scaling: what the channels of its input are scaled by.
        correct_bias: its bias takes up the mean of the error.
        asked: it or its operator was named, by a rule or a pattern, so nothing of it is left in float for speed.
    """

    preset: Preset
    activations: QuantSpec | None
    calibrator: Calibrator | None = None
    weight_method: Rounding = "amax"
    equalize: bool = False
    scaling: Scaling | None = None
    correct_bias: bool = False
    asked: bool = False

    @property
    def looks_at_outputs(self) -> bool:
        """Whether Gram matrices bear on it."""
        return self.scaling == "awq" or self.weight_method in FROM_GRAM or self.correct_bias

    @property
    def integer_activations(self) -> bool:
        """Whether its inputs become integers."""
        return self.activations is not None and self.activations.format.kind == "integer"


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The settings of every node.

    Attributes:
        nodes: node → its settings.
        kept: node → why it stays in float.
        unmatched: rules and patterns that are for no node.
    """

    nodes: Mapping[str, NodeSettings]
    kept: Mapping[str, str]
    unmatched: tuple[str, ...] = ()


def node_settings(
    preset: Preset,
    target: Target,
    *,
    calibrator: Calibrator | None = None,
    weight_method: Rounding | None = None,
) -> NodeSettings:
    """Return the settings of a node that a preset alone is for."""
    return NodeSettings(
        preset=preset,
        activations=target.activation_spec(preset),
        calibrator=calibrator,
        weight_method=weight_method or default_weight_method(preset),
    )


def default_weight_method(preset: Preset) -> Rounding:
    """Return how a preset's weights are rounded unless something else is asked for."""
    return _WEIGHT_METHOD[preset.in_blocks or preset.weights.format.bits < 8]


def with_methods(
    settings: NodeSettings, methods: Methods, options: Mapping[str, Any] | None = None
) -> NodeSettings:
    """Return `settings` with these methods; the calibrator stays where none is named.

    AWQ alone rounds with the scales of least output error.

    Args:
        settings: of a node.
        methods: what was asked for.
        options: of the calibrator.

    Raises:
        UnknownNameError, SpecError: no such calibrator, or options without one.
    """
    if options and methods.ranges is None:
        raise SpecError(
            f"method {methods}: no option {', '.join(options)}; options are those of a method for the ranges of "
            "activations, such as percentile: name it too, or leave them out."
        )
    own: Rounding = "output" if methods.scaling == "awq" else default_weight_method(settings.preset)
    return replace(
        settings,
        weight_method=methods.rounding or own,
        equalize=methods.equalize,
        scaling=methods.scaling,
        correct_bias=methods.bias,
        calibrator=settings.calibrator
        if methods.ranges is None
        else get_calibrator(methods.ranges, **(options or {})),
    )


def assign(
    graph: Graph,
    target: Target,
    default: NodeSettings | None,
    recipe: Recipe,
    *,
    calibrator: Calibrator | None = None,
    methods: Methods | None = None,
    embeddings: bool = False,
    head: bool = True,
) -> Assignment:
    """Return the settings of every node that a preset or a recipe could be for.

    Args:
        graph: the cleaned model.
        target: what will run it.
        default: what holds where no rule says otherwise; None keeps what no rule names in float.
        recipe: ordered rules over it.
        calibrator: the method for activations of nodes whose rules name none; None where ranges are fixed.
        methods: what else is done to nodes whose rules name a preset and no method.
        embeddings: quantize embeddings too, where no rule names them.
        head: quantize the last linear node before an output too, where no rule names it.

    Raises:
        RecipeError: a rule names weights without activations' needs, or what does not go together; or no rule is for
            a node, and some are for none.
        UnknownNameError, SpecError: an unknown preset or method, or an option that it does not have.
    """
    sites, left = find_sites(graph)
    candidates = {s.node: s.op_type for s in sites if s.role in ("input", "weight", "embedding")}
    known = list({**candidates, **{x.node: x.op_type for x in left}}.items())
    settled = recipe.settle(known, Settings())
    last = set() if head else _heads(graph, candidates)
    nodes: dict[str, NodeSettings] = {}
    kept: dict[str, str] = {}
    for node, op_type in candidates.items():
        said = settled[node]
        if op_type == "Gather" and not embeddings and (said.keep_float or not said.asked):
            # Embeddings are left out of the table, too: nobody expects them in it.
            continue
        if said.keep_float:
            kept[node] = said.why
        elif said == Settings() and default is None:
            kept[node] = "no rule of the recipe is for it"
        elif said.asked != "name" and node in last:
            kept[node] = "the last layer, left out as asked"
        else:
            nodes[node] = _resolve(node, said, default, target, calibrator, methods or Methods())
    unmatched = tuple(str(r) for r in recipe.unmatched(known))
    if unmatched and not nodes:
        raise RecipeError(f"{unmatched_warning(unmatched)[0]}; so nothing is quantized.")
    return Assignment(nodes=nodes, kept=kept, unmatched=unmatched)


def _resolve(
    node: str,
    said: Settings,
    default: NodeSettings | None,
    target: Target,
    calibrator: Calibrator | None,
    methods: Methods,
) -> NodeSettings:
    """What the rules say of a node, over the default."""
    if said.weights == FLOAT or (said.weights is None and default is None and said.activations == FLOAT):
        raise RecipeError(
            f'recipe: {node}: weights in float beside quantized activations run nowhere; write keep = "float".'
        )
    weights = said.weights
    if weights is None and default is None:
        weights = said.activations
    if weights is None:
        assert default is not None
        settings = default if said.group is None else _regrouped(default, said.group)
    else:
        # What was said of groups before is for those that have some.
        group = None if said.group_before and not _has_groups(weights) else said.group
        settings = node_settings(_preset(weights, group), target, calibrator=calibrator)
        settings = with_methods(settings, replace(methods, ranges=None))
        if default is not None and said.activations is None:
            settings = replace(settings, activations=default.activations)
    if said.activations == FLOAT:
        settings = replace(settings, activations=None)
    elif said.activations not in (None, AS_PRESET):
        found = get_preset(said.activations, activations=True) if said.activations else None
        assert found is not None
        settings = replace(settings, activations=target.activation_spec(found))
    if said.method is not None:
        methods = parse_methods(said.method, weights_alone=settings.activations is None)
        settings = with_methods(settings, methods, said.method_options)
    return replace(settings, asked=said.asked is not None)


def _regrouped(settings: NodeSettings, group: Group) -> NodeSettings:
    weights = settings.preset.weights
    if not _has_groups(settings.preset.name):
        raise RecipeError(
            f"recipe: group = {group}: the weights of {settings.preset.name} have no groups to choose; leave it out."
        )
    size = None if group == "channel" else group
    return replace(settings, preset=replace(settings.preset, weights=replace(weights, block_size=size)))


def _has_groups(preset: str) -> bool:
    """Whether the weights of a preset are in groups whose size can be chosen."""
    own = get_preset(preset).weights
    return own.block_size is not None and own.block_shape is None and own.scale_format is None


@cache
def _preset(name: str, group: Group | None) -> Preset:
    return get_preset(name, block_size=group)


def _heads(graph: Graph, candidates: Mapping[str, str]) -> set[str]:
    """The linear nodes whose result reaches an output with nothing but reshaping, adding or casting between."""
    found = set()
    for name in candidates:
        value = graph.node(name).outputs[0]
        while not value.is_graph_output():
            users = [user for user, _ in value.uses()]
            if len(users) != 1 or users[0].op_type not in _BEFORE_OUTPUTS:
                break
            value = users[0].outputs[0]
        else:
            found.add(name)
    return found


_BEFORE_OUTPUTS = frozenset(
    {"Add", "Cast", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "Softmax"}
)


def unmatched_warning(unmatched: tuple[str, ...]) -> list[str]:
    """Return the line that says which rules were for nothing."""
    if not unmatched:
        return []
    return [
        f"no node matches {', '.join(unmatched)}: a misspelt name? (`quantkit export --json` lists the nodes)"
    ]

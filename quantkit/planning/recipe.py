"""Recipes: which layers are quantized how, as ordered rules in a TOML file.

    [[rule]]
    op_types = ["MatMul"]
    preset = "int8"

    [[rule]]
    match = "head.*"          # a glob over node names, or a regular expression between slashes: "/^blocks\\.[0-3]\\./"
    keep = "float"

    [[rule]]
    match = "blocks.3.*"
    weights = "int4"          # weights and activations may have presets of their own
    activations = "fp8"
    group = 32                # weights that share a scale, or "channel"
    method = "percentile"
    percentile = 99.99        # what is left are the method's options

Rules are read in order and each may overrule part of what those before it said: later rules win.
"""

import fnmatch
import glob
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import RecipeError

Group = int | Literal["channel"]
# How closely a rule named the nodes that it wants quantized.
Asked = Literal["operator", "name"]

FLOAT = "float"
# What `preset` says of activations: what it has for them, if anything.
AS_PRESET = "preset"

_OWN_KEYS = frozenset({"match", "op_types", "preset", "weights", "activations", "group", "method", "keep"})
_TEXTS = ("match", "preset", "weights", "activations", "method", "keep")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one node is to be quantized; None where nothing was said.

    Attributes:
        weights: the preset of its weights.
        activations: the preset of its activations; "float" where they stay so, "preset" where they are as `weights`.
        group: weights that share a scale, or "channel".
        group_before: an earlier rule said the group than the one that said the weights.
        method: the method: of its activations, or of its weights where they alone are quantized.
        method_options: the method's options.
        keep_float: it stays in float.
        why: who said so.
        asked: a rule wants these nodes in particular quantized, or all of this operator; None where none does.
    """

    weights: str | None = None
    activations: str | None = None
    group: Group | None = None
    group_before: bool = False
    method: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    keep_float: bool = False
    why: str = ""
    asked: Asked | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule; it says nothing of what is None.

    Attributes:
        match: a glob over node names, or a regular expression between slashes (searched, not anchored); None for all.
        op_types: the operators it is for; empty for all.
        weights, activations, group, method, method_options: as in `Settings`.
        keep_float: True keeps the matching nodes in float, False quantizes what an earlier rule kept.
        why: who keeps them in float, for the table of what is left.

    Raises:
        RecipeError: the regular expression cannot be read.
    """

    match: str | None = None
    op_types: frozenset[str] = frozenset()
    weights: str | None = None
    activations: str | None = None
    group: Group | None = None
    method: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    keep_float: bool | None = None
    why: str = "the recipe keeps it in float"

    def __post_init__(self) -> None:
        if self._is_expression():
            try:
                re.compile(self._expression())
            except re.error as error:
                raise RecipeError(
                    f"recipe: match {self.match}: not a regular expression ({error}); mend it, or write a glob."
                ) from error

    def __str__(self) -> str:
        words = [self.match or "*"]
        if self.op_types:
            words.append(f"({', '.join(sorted(self.op_types))})")
        return " ".join(words)

    def matches(self, node: str, op_type: str) -> bool:
        """Tell whether the rule is for this node."""
        if self.op_types and op_type not in self.op_types:
            return False
        if self.match is None:
            return True
        if self._is_expression():
            return re.search(self._expression(), node) is not None
        return fnmatch.fnmatchcase(node, self.match)

    def apply(self, settings: Settings) -> Settings:
        """Return `settings` with what this rule says of them."""
        changes: dict[str, Any] = {
            name: value
            for name in ("weights", "activations", "group")
            if (value := getattr(self, name)) is not None
        }
        if self.group is not None or self.weights is not None:
            changes["group_before"] = self.group is None
        if self.method is not None:
            changes |= {"method": self.method, "method_options": dict(self.method_options)}
        if self.keep_float is not None:
            changes |= {"keep_float": self.keep_float, "why": self.why if self.keep_float else ""}
        elif changes:
            # A rule that says how a layer is quantized wants it quantized.
            changes |= {"keep_float": False, "why": ""}
        if changes.get("keep_float") is False:
            if self.match not in (None, "*"):
                changes["asked"] = "name"
            elif self.op_types and (self.weights or self.activations):
                changes["asked"] = settings.asked or "operator"
        return replace(settings, **changes)

    def _is_expression(self) -> bool:
        return self.match is not None and len(self.match) > 2 and self.match[0] == self.match[-1] == "/"

    def _expression(self) -> str:
        return (self.match or "")[1:-1]


@dataclass(frozen=True)
class Recipe:
    """Ordered rules."""

    rules: tuple[Rule, ...] = ()

    def settle(self, nodes: Iterable[tuple[str, str]], default: Settings) -> dict[str, Settings]:
        """Return the settings of every (node name, operator), starting from `default`."""
        settled = {}
        for name, op_type in nodes:
            settings = default
            for rule in self.rules:
                if rule.matches(name, op_type):
                    settings = rule.apply(settings)
            settled[name] = settings
        return settled

    def unmatched(self, nodes: Iterable[tuple[str, str]]) -> list[Rule]:
        """Return the rules that are for none of these nodes: a misspelt name, most likely."""
        known = list(nodes)
        return [rule for rule in self.rules if not any(rule.matches(*node) for node in known)]

    def with_patterns(self, *, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> "Recipe":
        """Return this recipe with the patterns of the command line after it.

        With `include`, only nodes that match one of its patterns are quantized; `exclude` keeps nodes in float. What
        a pattern says holds over what the rules say.
        """
        wanted = list(include)
        others = [Rule(keep_float=True, why="not among what --include names")] if wanted else []
        return Recipe(
            (
                *self.rules,
                *others,
                *(Rule(match=p, keep_float=False) for p in wanted),
                *(Rule(match=p, keep_float=True, why=f"--exclude {p}") for p in exclude),
            )
        )


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: there is no such file, it is not TOML, or a rule says something unknown.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML ({error}); write [[rule]] tables.") from error
    tables = found.pop("rule", [])
    if found or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        extra = ", ".join(found) or "rule"
        raise RecipeError(f"{path}: {extra}: a recipe is a list of [[rule]] tables; write each rule as one.")
    return Recipe(tuple(_rule(f"{path}: rule {number}", table) for number, table in enumerate(tables, 1)))


def _rule(where: str, table: dict[str, Any]) -> Rule:
    for key in _TEXTS:
        if key in table and not isinstance(table[key], str):
            raise RecipeError(f"{where}: {key} = {table[key]!r}: not a text; put it in quotes.")
    group = table.get("group")
    number = isinstance(group, int) and not isinstance(group, bool) and group >= 1
    if group not in (None, "channel") and not number:
        raise RecipeError(
            f'{where}: group = {group!r}: not a number of weights; write one, such as 32, or "channel".'
        )
    if table.get("match") == "":
        raise RecipeError(f'{where}: match = "": no node has no name; leave match out for all of them.')
    op_types = table.get("op_types", [])
    if not isinstance(op_types, list) or not all(isinstance(o, str) for o in op_types):
        raise RecipeError(
            f'{where}: op_types = {op_types!r}: not a list of operators; write ["Conv", "Gemm"].'
        )
    keep = table.get("keep")
    if keep not in (None, "float"):
        raise RecipeError(f'{where}: keep = "{keep}": only "float" can be kept.')
    options = {key: value for key, value in table.items() if key not in _OWN_KEYS}
    if options and "method" not in table:
        raise RecipeError(
            f"{where}: {', '.join(options)}: no such key, and no method whose option it could be; the keys are "
            f"{', '.join(sorted(_OWN_KEYS))}."
        )
    preset = table.get("preset")
    said = [key for key in ("preset", "weights", "activations", "group", "method") if key in table]
    if keep is not None and said:
        raise RecipeError(
            f'{where}: keep = "float" and {said[0]}: what stays in float has none; leave one of them out.'
        )
    if preset is not None and "weights" in table:
        raise RecipeError(
            f"{where}: preset and weights: both say how weights are quantized; write weights and activations."
        )
    if keep is None and not said:
        raise RecipeError(
            f"{where}: it says nothing to do; give preset, weights, activations, group, method or keep."
        )
    return Rule(
        match=table.get("match"),
        op_types=frozenset(op_types),
        weights=table.get("weights", preset),
        activations=table.get("activations", None if preset is None else AS_PRESET),
        group=group,
        method=table.get("method"),
        method_options=options,
        keep_float=True if keep else None,
    )


def literal(node: str) -> str:
    """Return the pattern that matches a node of this name, and no other."""
    found = glob.escape(node)
    # Between slashes it would be a regular expression.
    return f"[/]{found[1:]}" if found.startswith("/") else found


def recipe_text(recipe: Recipe, *, about: str = "") -> str:
    """Return a recipe as `load_recipe` reads it, with what it is about in a comment."""
    lines = [f"# {about}"] if about else []
    for rule in recipe.rules:
        lines += ["", "[[rule]]"]
        if rule.match is not None:
            lines.append(f"match = {_quoted(rule.match)}")
        if rule.op_types:
            lines.append(f"op_types = [{', '.join(map(_quoted, sorted(rule.op_types)))}]")
        for key in ("weights", "activations"):
            value = getattr(rule, key)
            if value == AS_PRESET:
                # Said together with the weights' preset.
                lines[-1] = lines[-1].replace("weights = ", "preset = ", 1)
            elif value is not None:
                lines.append(f"{key} = {_quoted(value)}")
        if rule.group is not None:
            lines.append(f"group = {json.dumps(rule.group)}")
        if rule.method is not None:
            lines.append(f"method = {_quoted(rule.method)}")
        lines += [f"{key} = {json.dumps(value)}" for key, value in rule.method_options.items()]
        if rule.keep_float:
            lines.append('keep = "float"')
    return "\n".join(lines).strip() + "\n"


def _quoted(text: str) -> str:
    # JSON's strings are TOML's basic strings, but for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

"""What the parameters of an ONNX graph are called in the model that it was exported from: dotted module paths.

Exporters keep them where they can: in the name of an initializer (`layers.0.norm.weight`), in the name of a node
(`/layers.0/q_proj/MatMul`, TorchScript), or in its metadata (`pkg.torch.onnx.name_scopes`, torch.export). A name map
says the rest, and what a runtime wants to have called otherwise.
"""

import ast
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from quantkit.errors import SpecError

NameMap = Mapping[str, str | None]

_SCOPES = "pkg.torch.onnx.name_scopes"
# Some exporters name a weight after its operator too: model.layers.0.mlp.up_proj.MatMul.weight.
_OPERATORS = (".MatMul", ".Gemm", ".Conv")
_SHOWN = 5


def load_name_map(path: str | os.PathLike[str]) -> dict[str, str | None]:
    """Return the name map in a JSON file: {"a name in the model": "its name in the folder"}.

    A key is a linear node's name or its weight's, whose value is a module path; the name of any other initializer,
    whose value is that tensor's new name, or null to leave it out; or a module path, which moves all that is below.

    Raises:
        SpecError: there is no such file, or something else is in it.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        why = (error.strerror or type(error).__name__).lower()
        raise SpecError(
            f"{path}: the name map cannot be read ({why}); give the path of a JSON file."
        ) from error
    except ValueError as error:
        raise SpecError(f"{path}: the name map is not JSON ({error}); mend it.") from error
    try:
        return check_name_map(found)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def check_name_map(found: object) -> dict[str, str | None]:
    """Return a name map as it was given.

    Raises:
        SpecError: it is none.
    """
    wanted = 'write {"name in the model": "module.path"}, or null to leave a tensor out'
    if not isinstance(found, Mapping):
        raise SpecError(f"name map: is of type {type(found).__name__}, no object; {wanted}.")
    for key, value in found.items():
        if not isinstance(key, str) or not (value is None or isinstance(value, str)):
            raise SpecError(f"name map: {key!r}: {value!r} is no name; {wanted}.")
        if value is not None and (not all(value.split(".")) or any(c.isspace() or c == "/" for c in value)):
            raise SpecError(f"name map: {key!r}: {value!r} is no dotted path; {wanted}.")
    return dict(found)


class Names:
    """A name map at work: it remembers which of its keys were of use."""

    def __init__(self, name_map: NameMap | None) -> None:
        self._map = dict(name_map or {})
        self._used: set[str] = set()

    def layer(self, keys: Iterable[str], derived: str) -> str:
        """Return the module path of a linear layer.

        Args:
            keys: the names of its nodes and its weight.
            derived: what it is called without a map.

        Raises:
            SpecError: the map leaves it out, or gives the name of its weight.
        """
        keys = list(keys)
        key = next((k for k in keys if k in self._map), None)
        found = self._map[key] if key is not None else self.tensor(derived)
        if key is not None:
            # A weight may be named beside its node; both are then of use.
            self._used |= {k for k in keys if k in self._map}
        if found is None:
            raise SpecError(
                f"name map: {keys[0]} is a linear layer, which cannot be left out; give its module path."
            )
        if found.endswith(".weight"):
            raise SpecError(
                f"name map: {keys[0]}: {found} is a weight's name; give its module, {found.removesuffix('.weight')}."
            )
        return found

    def tensor(self, name: str) -> str | None:
        """Return what a tensor, or a module path, is called in the folder; None where it is left out."""
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            key = ".".join(parts[:count])
            if key in self._map:
                self._used.add(key)
                moved = self._map[key]
                return None if moved is None else ".".join([moved, *parts[count:]])
        return name

    def __contains__(self, name: str) -> bool:
        return name in self._map

    def check_used(self) -> None:
        """Raise `SpecError` where a key of the map is for nothing in the model."""
        unused = [key for key in self._map if key not in self._used]
        if unused:
            more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
            raise SpecError(
                f"name map: the model has no linear layer, tensor or module called {', '.join(unused[:_SHOWN])}{more}; "
                "correct those names, or leave them out."
            )


def module_path(node: ir.Node, weight: str, *, named_by_weight: bool) -> str:
    """Return the dotted path of the module that a node with a weight stands for, from what the exporter kept.

    Args:
        node: a MatMul, Gemm or convolution.
        weight: the name of its weight.
        named_by_weight: whether that name can be the layer's: not where an embedding has the weight too.
    """
    if named_by_weight and weight.endswith(".weight") and "/" not in weight:
        path = weight.removesuffix(".weight")
        for operator in _OPERATORS:
            path = path.removesuffix(operator)
        return path
    scope = _scope(node)
    if scope:
        return scope
    parts: list[str] = []
    for part in filter(None, str(node.name).split("/")):
        # TorchScript repeats what holds a module: /layer1/layer1.0/conv1.
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts[:-1] if len(parts) > 1 else parts)


def _scope(node: ir.Node) -> str:
    """The innermost module of a node's metadata; the last scope there is the operator itself."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ""
    if not isinstance(scopes, list) or not all(isinstance(s, str) for s in scopes):
        return ""
    return next((s for s in reversed(scopes[:-1]) if s), "")

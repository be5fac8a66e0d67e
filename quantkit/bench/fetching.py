"""Tensors of one run of a model: their shapes at once, their contents a part at a time, as they are asked for.

A transformer's tensors can be larger than memory together; of most of them nothing but the shape is needed.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantkit.data import Sample
from quantkit.runtime import Session

# What the tensors of one part take of memory, as float32; a larger one is a part of its own.
PART_BYTES = 256 << 20


def shapes_of(model: ir.Model, names: Sequence[str], batch: Sample) -> dict[str, tuple[int, ...]]:
    """Return the shapes that these computed tensors have in a run on `batch`; none of them is fetched.

    Raises:
        ModelError: ONNX Runtime cannot run it.
    """
    if not names:
        return {}
    copy = model.clone()
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    asked = {}
    for number, name in enumerate(names):
        node = ir.Node("", "Shape", [values[name]], name=f"quantkit_shape_{number}")
        node.outputs[0].name = asked[name] = f"quantkit_shape_{number}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        copy.graph.append(node)
    found = Session(copy, outputs=list(asked.values()), optimize=False).run(batch)
    return {name: tuple(found[shape].tolist()) for name, shape in asked.items()}


class Fetched(Mapping[str, NDArray[Any]]):
    """The contents of computed tensors by name, fetched by runs of the model and not all held at a time.

    together: names that are read together, what the model is fed among them. shapes: of each.
    """

    def __init__(
        self,
        model: ir.Model,
        batch: Sample,
        together: Sequence[Sequence[str]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._model, self._batch = model, batch
        self._parts = _parts(
            [[n for n in dict.fromkeys(names) if n not in batch] for names in together], shapes
        )
        self._part_of = {name: index for index, part in enumerate(self._parts) for name in part}
        self._names = dict.fromkeys(name for names in together for name in names)
        # Two of them: what is read together may have come to lie in two parts.
        self._held: dict[int, dict[str, NDArray[Any]]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        if name in self._batch:
            return np.asarray(self._batch[name])
        index = self._part_of[name]
        if index not in self._held:
            while len(self._held) > 1:
                del self._held[next(iter(self._held))]
            found = Session(self._model, outputs=self._parts[index], optimize=False).run(self._batch)
            self._held[index] = dict(found)
        return self._held[index][name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parts(together: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Names in their order, each once, in parts of at most `PART_BYTES`."""
    parts: list[list[str]] = [[]]
    filled, seen = 0, set()
    for names in together:
        new = [name for name in names if name not in seen]
        seen.update(new)
        size = sum(4 * prod(shapes[name]) for name in new)
        if parts[-1] and filled + size > PART_BYTES:
            parts.append([])
            filled = 0
        parts[-1] += new
        filled += size
    return [part for part in parts if part]

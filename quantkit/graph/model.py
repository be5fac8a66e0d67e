"""A cleaned model, as everything after loading works on it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quantkit.data import InputSpec
from quantkit.errors import ModelError
from quantkit.graph.fingerprint import fingerprint_of
from quantkit.graph.tensors import read_tensor


@dataclass
class Graph:
    """A cleaned model: constants folded, BatchNormalization merged, every node and tensor named.

    Attributes:
        model: the onnx-ir model. Weights of external data stay on disk until read.
        name: the model file's stem, for messages and output files.
        path: where it was read from; None for a model given in memory.
    """

    model: ir.Model
    name: str
    path: Path | None = None
    _nodes: dict[str, ir.Node] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._nodes = {str(node.name): node for node in self.model.graph}

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return self.model.graph.opset_imports[""]

    @property
    def inputs(self) -> list[InputSpec]:
        """What the model wants to be fed, initializers listed as inputs left out."""
        return [
            InputSpec(name=str(v.name), dtype=_numpy_dtype(v), shape=_free_shape(v), masks=_masks(v))
            for v in self.model.graph.inputs
            if str(v.name) not in self.model.graph.initializers
        ]

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs, in order."""
        return [str(v.name) for v in self.model.graph.outputs]

    @property
    def weight_bytes(self) -> int:
        """Bytes that the initializers take."""
        return sum(
            v.const_value.nbytes for v in self.model.graph.initializers.values() if v.const_value is not None
        )

    def node(self, name: str) -> ir.Node:
        """Return the node of that name."""
        return self._nodes[name]

    @cached_property
    def values(self) -> dict[str, ir.Value]:
        """Every tensor of the main graph by name: inputs, initializers, node outputs."""
        found = {str(v.name): v for v in self.model.graph.inputs}
        found.update(self.model.graph.initializers)
        for node in self.model.graph:
            found.update({str(v.name): v for v in node.outputs if v.name})
        return found

    def array(self, name: str) -> np.ndarray:
        """Return the contents of an initializer; external data are read anew each time, and not kept."""
        tensor = self.model.graph.initializers[name].const_value
        assert tensor is not None
        return read_tensor(tensor)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an initializer."""
        tensor = self.model.graph.initializers[name].const_value
        assert tensor is not None
        return tuple(tensor.shape.numpy())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the structure, names and weights: 64 hexadecimal digits, the same on every machine."""
        return fingerprint_of(self.model)


def _numpy_dtype(value: ir.Value) -> np.dtype:
    if value.dtype is None:
        raise ModelError(f"{value.name}: the input has no element type; export the model again.")
    return np.dtype(value.dtype.numpy())


def _masks(value: ir.Value) -> bool:
    """Whether an input is only ever added to computed tensors: an additive attention mask, whose −inf is meant."""
    for node, _ in value.uses():
        if node.op_type in ("Unsqueeze", "Cast", "Expand", "Slice"):
            if not _masks(node.outputs[0]):
                return False
        elif node.op_type != "Add" or any(v is not None and v.const_value is not None for v in node.inputs):
            return False
    return bool(value.uses())


def _free_shape(value: ir.Value) -> tuple[int | str | None, ...]:
    if value.shape is None:
        raise ModelError(
            f"{value.name}: the input's rank is not given; export the model with the rank of every input."
        )
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)

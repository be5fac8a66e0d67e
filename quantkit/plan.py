"""A plan: for every tensor that is quantized, how. The verdict of the calibrators, and all that an emitter reads."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quantkit.formats import QParams, QTensor, QuantSpec, Range
from quantkit.graph import LeftAlone

# (node name, input index)
Reader = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class ActivationPlan:
    """How one activation is quantized.

    Attributes:
        name: the tensor.
        spec: its format.
        range: the real values it is to hold.
        qparams: scale and zero point, of shape ().
        readers: which node inputs read it quantized; () where all do.
    """

    name: str
    spec: QuantSpec
    range: Range
    qparams: QParams
    readers: tuple[Reader, ...]


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """A weight's codes, and the node inputs that read them. A weight read along two axes has two plans."""

    name: str
    qtensor: QTensor
    readers: tuple[Reader, ...]


@dataclass(frozen=True, kw_only=True)
class BiasPlan:
    """A bias as int32 codes with one scale per output channel: scale = s_x · s_w, so integer kernels just add it."""

    name: str
    qvalue: NDArray[np.int32]
    scale: NDArray[np.float32]
    reader: Reader


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it, for one model and one target.

    Attributes:
        model: the name of the model it is for.
        fingerprint: the cleaned graph's.
        preset, target, method: what was asked for.
        activations: by tensor name.
        weights: in the graph's order.
        biases: in the graph's order; empty where the target adds biases in float.
        nodes: the linear nodes that run quantized → their operator.
        left: the linear nodes that do not, with the reason.
    """

    model: str
    fingerprint: str
    preset: str
    target: str
    method: str
    activations: dict[str, ActivationPlan]
    weights: list[WeightPlan]
    biases: list[BiasPlan] = field(default_factory=list)
    nodes: dict[str, str]
    left: list[LeftAlone]

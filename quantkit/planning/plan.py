"""A plan: for every tensor that is quantized, how. The verdict of the calibrators, and all that an emitter reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quantkit.formats import QParams, QTensor, QuantSpec, Range, dynamic_qparams, fake_quantize, quantize
from quantkit.graph import LeftAlone

# (node name, input index)
Reader = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class ActivationPlan:
    """How one activation is quantized.

    Attributes:
        name: the tensor.
        spec: its format.
        range: the real values it is to hold; of a dynamic one, those that were observed, None where nothing was.
        qparams: scale and zero point, of shape (); None where `spec` is dynamic.
        global_scale: float32, of shape (): that of the scales of dynamic blocks, where they are in few bits.
        readers: which node inputs read it quantized; () where all do.
    """

    name: str
    spec: QuantSpec
    range: Range | None
    qparams: QParams | None
    readers: tuple[Reader, ...]
    global_scale: NDArray[np.float32] | None = None

    def apply(self, x: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return `x` as its readers see it: quantized and dequantized."""
        found = x.astype(np.float32)
        qparams = self.qparams
        if qparams is None:
            qparams = dynamic_qparams(found, self.spec, global_scale=self.global_scale)
        return fake_quantize(found, qparams, self.spec)

    @property
    def static(self) -> QParams:
        """Scale and zero point of an activation that is not dynamic."""
        assert self.qparams is not None
        return self.qparams


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """How one weight is quantized, and the node inputs that read it so. A weight read along two axes has two plans.

    Attributes:
        name: the initializer.
        spec: its format.
        qparams: its scales and zero points.
        readers: the node inputs.
        codes: of the weight's shape, where a method chose them; None where every value goes to its nearest code.
    """

    name: str
    spec: QuantSpec
    qparams: QParams
    readers: tuple[Reader, ...]
    codes: NDArray[np.generic] | None = None

    def quantize(self, w: NDArray[np.floating]) -> QTensor:
        """Return the codes of the weight `w`; a plan holds none that can be had from the model."""
        if self.codes is not None:
            return QTensor(self.codes, self.qparams, self.spec)
        return quantize(w, self.qparams, self.spec)


@dataclass(frozen=True, kw_only=True)
class BiasPlan:
    """A bias as int32 codes with one scale per output channel: scale = s_x · s_w, so integer kernels just add it."""

    name: str
    qvalue: NDArray[np.int32]
    scale: NDArray[np.float32]
    reader: Reader


@dataclass(frozen=True, kw_only=True)
class ModelEdits:
    """What was made of the float model before it was quantized: names and one number a channel.

    Attributes:
        fingerprint: of the model before.
        scales: by tensor, what its channels were divided by, float64; the weights that read them were multiplied.
        inserted: those of these tensors that are divided by a Mul of their own.
        unclipped: outputs of Clips that were taken for Relus, because they never reached their upper limit.
        biases: by node, what was added to its bias, float64.
    """

    fingerprint: str
    scales: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    inserted: tuple[str, ...] = ()
    unclipped: tuple[str, ...] = ()
    biases: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it, for one model and one target.

    Attributes:
        model: the name of the model it is for.
        fingerprint: the cleaned graph's, after `edits`.
        preset, target, method: what was asked for; the preset is "recipe" where rules alone said so.
        activations: by tensor name. Where readers want a tensor in several formats, the others have entries too, under
            the name and the format.
        weights: in the graph's order.
        biases: in the graph's order; empty where the target adds biases in float.
        nodes: the nodes that run quantized → their operator.
        left: the linear nodes that do not, with the reason.
        formats: node → how its weight and its activations are quantized, in words.
        edits: of the float model, before anything was quantized; None where it stays as it was.
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
    formats: Mapping[str, str] = field(default_factory=dict)
    edits: ModelEdits | None = None

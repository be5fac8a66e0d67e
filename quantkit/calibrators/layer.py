"""A linear layer as the methods that look across tensors see it: arrays, and no graph."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.errors import SpecError
from quantkit.formats import QuantSpec
from quantkit.statistics import GramMatrix


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear operator with a constant weight.

    Attributes:
        w: the weight, any float type.
        layout: where its output channels lie.
        spec: how it will be quantized.
        gram: that of its inputs; None where it was not collected.
        name: what errors call the weight.
    """

    w: NDArray[np.floating]
    layout: WeightLayout
    spec: QuantSpec
    gram: GramMatrix | None = None
    name: str = "weight"

    @property
    def columns(self) -> NDArray[np.float32]:
        """The weight as (groups, K, N), float32."""
        return np.ascontiguousarray(self.layout.columns(self.w), np.float32)

    def along_inputs(self, scale: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return a scale of the input's channels so that it broadcasts against `columns`: (groups, K, 1).

        Args:
            scale: shape (channels,): of all groups, each kernel element of a channel having the same.
        """
        size = self.layout.size(self.w.shape)
        per_group = scale.size // self.layout.groups
        if per_group * self.layout.groups != scale.size or size % max(per_group, 1):
            raise SpecError(
                f"{self.name}: {scale.size} channels for a weight of shape {self.w.shape} in {self.layout.groups} "
                "groups; give one scale for every input channel."
            )
        spread = np.repeat(scale.reshape(self.layout.groups, per_group), size // per_group, axis=1)
        found: NDArray[np.float32] = spread[:, :, None].astype(np.float32)
        return found

    def input_channels(self, values: NDArray[np.floating], channels: int) -> NDArray[np.floating]:
        """Return (groups, K) values brought together by input channel: (channels, kernel size)."""
        return values.reshape(channels, -1)


def weight_amax(layers: Sequence[Layer], channels: int) -> NDArray[np.float32]:
    """Return max |W| of every input channel over all layers, shape (channels,)."""
    found = [
        layer.input_channels(np.abs(layer.columns).max(axis=2), channels).max(axis=1) for layer in layers
    ]
    most: NDArray[np.float32] = np.max(found, axis=0).astype(np.float32)
    return most


def tied(values: NDArray[np.floating], ties: Sequence[int] | None) -> NDArray[np.float64]:
    """Return the largest of the values that are tied together, in place of each; see `Traced.ties`."""
    whole = np.asarray(values, np.float64)
    if ties is None:
        return whole
    index = np.asarray(ties)
    most = np.zeros_like(whole)
    np.maximum.at(most, index, whole)
    together: NDArray[np.float64] = most[index]
    return together

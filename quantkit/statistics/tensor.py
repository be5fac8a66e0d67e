"""Everything that is remembered of one activation tensor."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import CacheError, DataError
from quantkit.statistics.channels import ChannelStats
from quantkit.statistics.counting import Counts
from quantkit.statistics.histogram import FloatHistogram
from quantkit.statistics.reduction import as_float32, reduce_cube


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """What is remembered of one activation tensor.

    Attributes:
        histogram: counts of its values.
        channels: per-channel statistics; None where no linear operator reads the tensor.
        dtype: its element type in the model, by NumPy's name ("float32", "float16").
        shape: its dimensions in the model: an int, the name of a dynamic axis, or None where not known.
    """

    histogram: FloatHistogram
    channels: ChannelStats | None
    dtype: str
    shape: tuple[int | str | None, ...]

    def merge(self, other: "TensorStatistics") -> "TensorStatistics":
        """Return the statistics of both together; a dimension in which they differ becomes None.

        Raises:
            CacheError: they are not of the same tensor, or only one of them has channels.
        """
        if (self.dtype, len(self.shape)) != (other.dtype, len(other.shape)):
            raise CacheError(
                f"{self.dtype} of rank {len(self.shape)} and {other.dtype} of rank {len(other.shape)}; "
                "calibrate both from the same model."
            )
        if (self.channels is None) != (other.channels is None):
            raise CacheError(
                "only one of them has per-channel statistics; calibrate both with the same options."
            )
        try:
            channels = (
                None
                if self.channels is None or other.channels is None
                else self.channels.merge(other.channels)
            )
        except DataError as error:
            raise CacheError(str(error)) from error
        return TensorStatistics(
            histogram=self.histogram.merge(other.histogram),
            channels=channels,
            dtype=self.dtype,
            shape=tuple(a if a == b else None for a, b in zip(self.shape, other.shape, strict=True)),
        )


def observe_tensor(x: NDArray[np.generic], channels: ChannelStats | None, *, exponent: int) -> Counts | None:
    """Take a tensor into `channels` and return its counts, which `FloatHistogram.include` takes; None if empty.

    One pass serves both. Nothing of the histogram is needed, so several threads may do this for one.

    Args:
        x: any shape; float32, or a float type that is cast to it.
        channels: where its channels are reduced, if at all.
        exponent: the histogram's, as it is or was.

    Raises:
        DataError: it does not fit `channels`.
    """
    values = as_float32(x)
    cube = values.reshape(1, 1, -1) if channels is None else channels.cube_of(values)
    if cube.size == 0:
        return None
    sums, counts = reduce_cube(cube, channels=channels is not None, exponent=exponent)
    if channels is not None and sums is not None:
        channels.include(sums)
    return counts

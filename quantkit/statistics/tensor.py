"""Everything that is remembered of one activation tensor."""

from dataclasses import dataclass

from quantkit.errors import CacheError, DataError
from quantkit.statistics.channels import ChannelStats
from quantkit.statistics.histogram import FloatHistogram


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

"""Sufficient statistics: what is remembered of a tensor so that any range can be solved without its data.

They merge by addition, over batches, shards and machines. Counts, minima and maxima come out equal bit for
bit in any order and grouping; sums of floats to 1e-12.
"""

from quantkit.statistics.channels import ChannelStats
from quantkit.statistics.gram import GramMatrix, gram_bytes
from quantkit.statistics.histogram import Bins, FloatHistogram
from quantkit.statistics.reduction import NATIVE

__all__ = ["NATIVE", "Bins", "ChannelStats", "FloatHistogram", "GramMatrix", "gram_bytes"]

"""An input for a model of which nobody kept a sample: to run a written file once, never to calibrate on."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.data.inputs import InputSpec, batch_axes
from quantkit.errors import ModelError
from quantkit.formats import Range
from quantkit.graph import Graph
from quantkit.runtime import Session

# What free dimensions may be: pictures and sequences want some length, a few models exactly one.
_LENGTHS = (16, 64, 224, 1)
# An attention mask of nothing but zeros gives NaN.
_INTEGERS = (0, 1)


def made_up_probe(graph: Graph, ranges: Mapping[str, Range]) -> dict[str, NDArray[Any]]:
    """Return an input on which the float model runs and puts out finite values; {} where none was found.

    Floats are spread evenly over their fixed range ([−1, 1] where there is none), integers and booleans are all 0,
    or all 1. The same graph and ranges give the same input on every machine.
    """
    session = Session(graph.model)
    for integer, length in product(_INTEGERS, _LENGTHS):
        feeds = _draw(graph.inputs, ranges, length, integer)
        try:
            outputs = session.run(feeds).values()
        except ModelError:
            # This length does not suit the model; the next one may.
            continue
        if all(np.all(np.isfinite(o)) for o in outputs if np.issubdtype(o.dtype, np.floating)):
            return feeds
    return {}


def _draw(
    inputs: list[InputSpec], ranges: Mapping[str, Range], length: int, integer: int
) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    axes = batch_axes(inputs)
    feeds: dict[str, NDArray[Any]] = {}
    for spec in inputs:
        shape = [
            size if isinstance(size, int) else 1 if axis == axes[spec.name] else length
            for axis, size in enumerate(spec.shape)
        ]
        if spec.dtype.kind in "iub":
            feeds[spec.name] = np.full(shape, integer, spec.dtype)
        else:
            range_ = ranges.get(spec.name, Range(-1.0, 1.0))
            feeds[spec.name] = rng.uniform(range_.lo, range_.hi, shape).astype(spec.dtype)
    return feeds

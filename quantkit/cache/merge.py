"""The parts of merging calibration caches: what may differ between shards, and how it is joined."""

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import CacheError
from quantkit.statistics.tensor import TensorStatistics

# What must be equal in the descriptions of the data, because it decides what the model was fed.
_PREPARATION = ("preprocessing", "mapping")


def merge_statistics(parts: Sequence[Mapping[str, TensorStatistics]]) -> dict[str, TensorStatistics]:
    """Return the statistics of all parts together, tensor by tensor.

    Raises:
        CacheError: the parts are not of the same tensors.
    """
    first = parts[0]
    for part in parts[1:]:
        apart = sorted(first.keys() ^ part.keys())
        if apart:
            raise CacheError(
                f"caches to merge: {len(apart)} tensors are in one of them only ({_some(apart)}); "
                "calibrate all shards with the same options."
            )
    return {name: _merge_tensor(name, [part[name] for part in parts]) for name in first}


def _merge_tensor(name: str, parts: Sequence[TensorStatistics]) -> TensorStatistics:
    try:
        return reduce(TensorStatistics.merge, parts)
    except CacheError as error:
        raise CacheError(f"caches to merge: tensor {name}: {error}") from error


def merge_data(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one description of all data, see `SampleSource.description`.

    Numbers of files add, and so does a limit on samples where all have one. Whatever else differs (paths
    above all) becomes the sorted list of all that was found.

    Raises:
        CacheError: the samples were not prepared in the same way.
    """
    for key in _PREPARATION:
        ways = _distinct([part.get(key) for part in parts])
        if len(ways) > 1:
            raise CacheError(
                f"caches to merge: their samples were prepared in different ways ({key} "
                f"{json.dumps(ways[0])} and {json.dumps(ways[1])}); calibrate all shards in the same way."
            )
    merged = {}
    for key in sorted(set().union(*parts)):
        values = [part[key] for part in parts if key in part]
        if key == "files":
            merged[key] = sum(values)
        elif key != "samples":
            merged[key] = _join(values)
        elif len(values) == len(parts):
            # Where one shard had no limit, neither has the whole.
            merged[key] = sum(values)
    return merged


def merge_versions(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return package → every version of it, sorted and joined by a comma."""
    keys = sorted(set().union(*parts))
    found = {key: {v for part in parts if key in part for v in part[key].split(", ")} for key in keys}
    return {key: ", ".join(sorted(versions)) for key, versions in found.items()}


def merge_method(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, Mapping[str, Any]]:
    """Return the method and options that all parts record.

    Raises:
        CacheError: they record different ones.
    """
    found = _distinct(parts)
    if len(found) > 1:
        said = " and ".join(
            f"{method} {json.dumps(options)}" if options else method for method, options in found
        )
        raise CacheError(
            f"caches to merge: they record the methods {said}; say which to record with --method "
            "(their statistics serve every method)."
        )
    return parts[0]


def check_overlap(parts: Sequence[NDArray[np.uint64]]) -> None:
    """Do nothing if no sample is in two parts.

    Raises:
        CacheError: some are; says how many.
    """
    seen, times = np.unique(np.concatenate([np.unique(part) for part in parts]), return_counts=True)
    shared = int(np.count_nonzero(times > 1))
    if shared:
        raise CacheError(
            f"caches to merge: {shared:,} of {seen.size:,} samples are in more than one of them; "
            "merge caches of different samples, or count them again with --allow-overlap."
        )


def _join(values: Sequence[Any]) -> Any:
    if len(_distinct(values)) == 1:
        return values[0]
    return _distinct([v for value in values for v in (value if isinstance(value, list) else [value])])


def _distinct(values: Sequence[Any]) -> list[Any]:
    """The different ones among JSON values, in the order of their JSON text."""
    found = {json.dumps(value, sort_keys=True): value for value in values}
    return [found[key] for key in sorted(found)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")

"""The calibration cache: all that solving needs, without the data and without the runtime."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quantkit.cache.file import damaged, decode, encode
from quantkit.cache.identity import SUFFIX, ModelIdentity, find_cache
from quantkit.cache.merge import check_overlap, merge_data, merge_method, merge_statistics, merge_versions
from quantkit.errors import CacheError, SpecError
from quantkit.files import atomic_write, check_output
from quantkit.formats import Range
from quantkit.model_files import model_files
from quantkit.statistics import ChannelStats, FloatHistogram
from quantkit.statistics.tensor import TensorStatistics
from quantkit.tables import Table

__all__ = ["IMPORTED", "SUFFIX", "CalibrationCache", "ModelIdentity", "TensorStatistics", "find_cache"]

# What a cache of fixed ranges records as its method: another tool found them, and no method can change them.
IMPORTED = "imported"

_KINDS: dict[str, type] = {
    "model": dict,
    "tensors": list,
    "data": dict,
    "method": str,
    "method_options": dict,
    "probe": list,
    "versions": dict,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationCache:
    """The statistics of one model over one set of samples.

    Two caches are equal when a saved file of the one would be a saved file of the other.

    Attributes:
        model: which model was observed.
        statistics: tensor name → its statistics; sorted by name.
        sample_fingerprints: uint64, sorted, one for every sample (a sample seen twice is there twice).
        data: where the samples came from and how they were prepared, see `SampleSource.description`.
        method: the calibration method that an export takes unless told otherwise.
        method_options: the options of that method.
        probe: one real sample, input name → array, that of the smallest fingerprint; an exported file is run
            on it.
        versions: package → version of what observed.
        ranges: tensor name → its fixed range, of shape (), where another tool found it; sorted by name. Empty for a
            cache that was measured; one that was imported has these alone, no statistics and no samples.
        path: the file it was loaded from, None where it was not; no part of what it holds.
    """

    model: ModelIdentity
    statistics: Mapping[str, TensorStatistics]
    sample_fingerprints: NDArray[np.uint64]
    data: Mapping[str, Any]
    method: str
    method_options: Mapping[str, Any]
    probe: Mapping[str, NDArray[Any]]
    versions: Mapping[str, str]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        fixed = {
            "statistics": dict(sorted(self.statistics.items())),
            "sample_fingerprints": np.sort(np.asarray(self.sample_fingerprints, np.uint64)),
            # Through JSON once, so that a tuple is a list before and after a file.
            "data": json.loads(json.dumps(self.data, sort_keys=True, allow_nan=False)),
            "method_options": json.loads(json.dumps(self.method_options, sort_keys=True, allow_nan=False)),
            "probe": {name: np.asarray(array) for name, array in sorted(self.probe.items())},
            "versions": dict(sorted(self.versions.items())),
            "ranges": dict(sorted(self.ranges.items())),
        }
        for name, value in fixed.items():
            object.__setattr__(self, name, value)

    @property
    def sample_count(self) -> int:
        """How many samples were observed."""
        return int(self.sample_fingerprints.size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CalibrationCache):
            return NotImplemented
        return self._encode(model_path="") == other._encode(model_path="")

    __hash__ = None  # type: ignore[assignment]

    # --- files ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to `path`, whole or not at all.

        The model's path is written relative to the folder of `path`, so that the two can be moved together.
        An absolute path stays absolute unless the model lies in that folder or below.

        Raises:
            FileError: the file cannot be written there, or it is the model's.
        """
        check_output(path, inputs=model_files(self.model.path) if self.model.path else ())
        encoded = self._encode(model_path=self.model.path_from(Path(path).parent))
        with atomic_write(path) as temporary:
            temporary.write_bytes(encoded)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the cache that `save` wrote to `path`.

        Raises:
            CacheError: there is no such file, or it is no cache, is damaged, or is of a newer quantkit.
        """
        text, arrays = decode(path)
        try:
            for key, kind in _KINDS.items():
                if not isinstance(text[key], kind):
                    raise TypeError(f"{key} is no {kind.__name__}")
            model = ModelIdentity(**text["model"])
            if model.path:
                model = replace(model, path=os.path.normpath(Path(path).parent / model.path))
            return cls(
                model=model,
                statistics=_read_statistics(text["tensors"], arrays, path),
                sample_fingerprints=arrays["samples"],
                data=text["data"],
                method=text["method"],
                method_options=text["method_options"],
                probe={name: arrays[f"probe.{i}"] for i, name in enumerate(text["probe"])},
                versions=text["versions"],
                ranges=_read_ranges(text.get("ranges", []), arrays),
                path=Path(path),
            )
        except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
            raise damaged(path, f"{type(error).__name__}: {error}") from error

    def _encode(self, *, model_path: str) -> bytes:
        # Arrays go by number: a tensor may have any name at all, even one that looks like another's key.
        arrays: dict[str, NDArray[Any]] = {"samples": self.sample_fingerprints}
        arrays |= {f"probe.{i}": array for i, array in enumerate(self.probe.values())}
        for i, tensor in enumerate(self.statistics.values()):
            arrays |= {f"{i:05d}.histogram.{k}": v for k, v in tensor.histogram.to_arrays().items()}
            if tensor.channels is not None:
                arrays |= {f"{i:05d}.channels.{k}": v for k, v in tensor.channels.to_arrays().items()}
        text: dict[str, Any] = {
            "model": {"path": model_path, "name": self.model.name, "fingerprint": self.model.fingerprint},
            "tensors": [
                {"name": n, "dtype": t.dtype, "shape": t.shape, "channels": t.channels is not None}
                for n, t in self.statistics.items()
            ],
            "data": self.data,
            "method": self.method,
            "method_options": self.method_options,
            "probe": list(self.probe),
            "versions": self.versions,
        }
        if self.ranges:
            text["ranges"] = list(self.ranges)
            arrays["ranges"] = np.array([(r.lo, r.hi) for r in self.ranges.values()], np.float64)
        return encode(text, arrays)

    # --- belonging ---

    def find_model(self, what: str | os.PathLike[str] = "cache") -> Path:
        """Return the path of the model that the cache was made from.

        Args:
            what: how to name the cache in the error, its path as a rule.

        Raises:
            CacheError: it was a model in memory, or is no longer there.
        """
        if not self.model.path:
            raise CacheError(f"{what}: made from {self.model.name}, a model in memory; give the model too.")
        path = Path(self.model.path)
        if not path.exists():
            raise CacheError(
                f"{what}: its model {path} is not there; put it back, or say where {path.name} lies now."
            )
        return path

    def check_model(self, fingerprint: str, what: str) -> None:
        """Do nothing if the cache was made for the model of this fingerprint.

        Args:
            fingerprint: of the cleaned graph and its weights.
            what: how to name that model in the error, its path as a rule.

        Raises:
            CacheError: it was made for another model.
        """
        if fingerprint != self.model.fingerprint:
            raise CacheError(
                f"{what}: the calibration cache belongs to another model: {self.model.in_words()}, "
                f"while this one's fingerprint is {fingerprint[:12]}; "
                f"run `quantkit calibrate {what}`, or name the cache of this model with --cache."
            )

    def merge(
        self,
        *others: "CalibrationCache",
        allow_overlap: bool = False,
        method: str | None = None,
        method_options: Mapping[str, Any] | None = None,
    ) -> "CalibrationCache":
        """Return the cache of all their samples together, in whatever order; the operands do not change.

        Args:
            others: caches of the same model and the same preprocessing, over other samples.
            allow_overlap: count a sample that is in several of them several times, instead of refusing.
            method: the method to record, with `method_options`; needed only where the caches record different
                ones.
            method_options: the options of `method`.

        Raises:
            CacheError: the caches do not belong together; the message says in what they differ.
        """
        for cache in (self, *others):
            if cache.ranges:
                raise CacheError(
                    f"caches to merge: one of {cache.model.in_words()} holds fixed ranges, which do not add up; "
                    "merge caches that `quantkit calibrate` measured."
                )
        # A fixed order: sums of floats, and which path and probe are kept, must not depend on the operands'
        # order.
        caches = sorted(
            (self, *others), key=lambda c: (c.sample_fingerprints.tolist(), c._encode(model_path=""))
        )
        first = caches[0]
        for cache in caches[1:]:
            if cache.model.fingerprint != first.model.fingerprint:
                raise CacheError(
                    f"caches to merge: they belong to different models ({first.model.in_words()} and "
                    f"{cache.model.in_words()}); merge caches of one model."
                )
        if not allow_overlap:
            check_overlap([cache.sample_fingerprints for cache in caches])
        if method is None:
            method, method_options = merge_method([(c.method, c.method_options) for c in caches])
        return CalibrationCache(
            model=min((cache.model for cache in caches), key=lambda model: (model.path, model.name)),
            statistics=merge_statistics([cache.statistics for cache in caches]),
            sample_fingerprints=np.concatenate([cache.sample_fingerprints for cache in caches]),
            data=merge_data([cache.data for cache in caches]),
            method=method,
            method_options=method_options or {},
            # Of the smallest fingerprint: that is how they are sorted.
            probe=next((cache.probe for cache in caches if cache.sample_count), first.probe),
            versions=merge_versions([cache.versions for cache in caches]),
        )

    # --- showing ---

    def header(self) -> dict[str, str]:
        """Return what the cache is, in words: model, samples, data, method, versions."""
        options = ", ".join(f"{k}={v}" for k, v in self.method_options.items())
        return {
            "model": self.model.in_words(),
            "samples": "none, the ranges are fixed" if self.ranges else f"{self.sample_count:,}",
            "data": ", ".join(f"{k} {_plain(v)}" for k, v in self.data.items()),
            "method": f"{self.method} ({options})" if options else self.method,
            "versions": ", ".join(f"{k} {v}" for k, v in self.versions.items()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all but the statistics themselves as JSON would hold it; `tensors` are the rows of `summary`."""
        return {
            "model": asdict(self.model),
            "samples": self.sample_count,
            "fixed_ranges": bool(self.ranges),
            "data": self.data,
            "method": self.method,
            "method_options": self.method_options,
            "versions": self.versions,
            "tensors": self.summary(),
        }

    def summary(self) -> list[dict[str, Any]]:
        """Return one row a tensor, as JSON would hold it: name, dtype, count, min, max, zeros_percent, …

        `min` and `max` are of the finite values, None where there are none; `not_finite` counts NaN and
        infinities; `channels` is the number of channels observed, None where no linear operator reads the
        tensor. A fixed range has `min` and `max` alone.
        """
        rows: list[dict[str, Any]] = []
        for name, tensor in self.statistics.items():
            seen = tensor.histogram
            rows.append(
                {
                    "tensor": name,
                    "dtype": tensor.dtype,
                    "count": seen.count,
                    "min": seen.min if math.isfinite(seen.min) else None,
                    "max": seen.max if math.isfinite(seen.max) else None,
                    "zeros_percent": 100 * seen.zero_count / seen.count if seen.count else None,
                    "not_finite": seen.nan_count + seen.inf_count,
                    "channels": tensor.channels.amax.size if tensor.channels is not None else None,
                }
            )
        unknown = dict.fromkeys(("dtype", "count", "min", "max", "zeros_percent", "not_finite", "channels"))
        for name, fixed in self.ranges.items():
            rows.append({"tensor": name, **unknown, "min": float(fixed.lo), "max": float(fixed.hi)})
        return rows

    def table(self) -> Table:
        """Return the rows of `summary` as a table."""
        headers = ("tensor", "dtype", "count", "min", "max", "zeros %", "NaN, inf", "channels")
        return Table(headers, [tuple(row.values()) for row in self.summary()])

    def __str__(self) -> str:
        return f"{self._heading().text()}\n\n{self.table().text()}"

    def __repr__(self) -> str:
        return (
            f"CalibrationCache(model={self.model.name!r}, tensors={len(self.statistics)}, "
            f"samples={self.sample_count}, method={self.method!r})"
        )

    def _repr_html_(self) -> str:
        return self._heading().html() + self.table().html()

    def _heading(self) -> Table:
        return Table(("", ""), list(self.header().items()))


def _read_statistics(
    tensors: Sequence[Mapping[str, Any]], arrays: Mapping[str, NDArray[Any]], path: str | os.PathLike[str]
) -> dict[str, TensorStatistics]:
    parts: defaultdict[str, dict[str, NDArray[Any]]] = defaultdict(dict)
    for key, array in arrays.items():
        part, _, name = key.rpartition(".")
        parts[part][name] = array
    found = {}
    for i, tensor in enumerate(tensors):
        try:
            found[tensor["name"]] = TensorStatistics(
                histogram=FloatHistogram.from_arrays(parts[f"{i:05d}.histogram"]),
                channels=ChannelStats.from_arrays(parts[f"{i:05d}.channels"]) if tensor["channels"] else None,
                dtype=tensor["dtype"],
                shape=tuple(tensor["shape"]),
            )
        except CacheError as error:
            raise CacheError(f"{path}: tensor {tensor['name']}: {error}") from error
    return found


def _read_ranges(names: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> dict[str, Range]:
    if not names:
        return {}
    ends = arrays["ranges"].astype(np.float64).reshape(len(names), 2)
    return {name: Range(lo, hi) for name, (lo, hi) in zip(names, ends, strict=True)}


def _plain(value: object) -> str:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return " and ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""Samples that can be gone through, one in memory at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from quantkit.data.files import Record
from quantkit.data.images import ImageTransform
from quantkit.data.inputs import Sample
from quantkit.data.slicing import Slicer
from quantkit.errors import DataError


class SampleSource(ABC):
    """Samples that can be gone through again and again, in the same order, one in memory at a time.

    Attributes:
        description: where they come from and how they are prepared, as JSON holds it. "kind" is images, npy,
            npz, safetensors or python; files have "path" and their number, "files"; "preprocessing",
            "mapping", "samples" and "ignored" (keys that feed no input) stand there where there are any.
    """

    def __init__(self, *, name: str, description: dict[str, Any], limit: int | None) -> None:
        self.description = description
        self._name = name
        self._limit = limit

    def __len__(self) -> int:
        """Return the number of samples.

        Raises:
            TypeError: it is not known before they have been gone through.
        """
        count = self._count()
        return count if self._limit is None else min(count, self._limit)

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples.

        Raises:
            DataError: a sample cannot be read or does not fit the model, or there is none at all.
        """
        count = 0
        for sample in islice(self._samples(), self._limit):
            count += 1
            yield sample
        if count == 0:
            raise no_samples(self._name)

    @abstractmethod
    def _samples(self) -> Iterator[Sample]: ...

    @abstractmethod
    def _count(self) -> int: ...


class RecordSource(SampleSource):
    """Samples cut from records: array files, or Python items."""

    def __init__(
        self,
        records: Callable[[], Iterator[Record]],
        slicer: Slicer,
        *,
        countable: bool,
        name: str,
        description: dict[str, Any],
        limit: int | None,
    ) -> None:
        super().__init__(name=name, description=description, limit=limit)
        self._records = records
        self._slicer = slicer
        self._countable = countable

    def _samples(self) -> Iterator[Sample]:
        for record in self._records():
            yield from self._slicer.samples(record)

    def _count(self) -> int:
        if not self._countable:
            raise TypeError(
                f"{self._name}: the number of samples is known only once they have been gone through"
            )
        count = 0
        for record in self._records():
            count += self._slicer.count(record)
            if self._limit is not None and count >= self._limit:
                break
        return count


class ImageSource(SampleSource):
    """One sample a picture."""

    def __init__(
        self,
        paths: Sequence[Path],
        transform: ImageTransform,
        *,
        name: str,
        description: dict[str, Any],
        limit: int | None,
    ) -> None:
        super().__init__(name=name, description=description, limit=limit)
        self._paths = paths
        self._transform = transform

    def _samples(self) -> Iterator[Sample]:
        for path in self._paths:
            yield {self._transform.spec.name: self._transform.read(path)}

    def _count(self) -> int:
        return len(self._paths)


def no_samples(name: str) -> DataError:
    """Return the error that there is nothing in `name`."""
    return DataError(f"{name}: no samples; give real inputs of the model, at least one, better some hundred.")

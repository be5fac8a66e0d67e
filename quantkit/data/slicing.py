"""Arrays cut into samples."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from quantkit.data.casting import Misfit, cast, check_castable, kind
from quantkit.data.files import Header, Record
from quantkit.data.images import ImageTransform
from quantkit.data.inputs import Array, Dim, InputSpec, Sample, array_type, batch_axes, fixed_batch_size
from quantkit.data.matching import match_names
from quantkit.data.preprocessing import ImagePreprocessing
from quantkit.errors import DataError

_MAPPED_BYTES = 16 * 2**20


class InputSlicer:
    """Cuts the arrays of one input into samples.

    With the rank r of the input and a batch axis, an array of

        rank r        holds one sample per index of the batch axis,
        rank r − 1    is one sample,
        rank r + 1    holds batches: of the fixed number that the model takes at a time, or of one sample
                      where the batch axis is not the first.

    Without a batch axis, rank r is one value that all samples of the record share, and rank r + 1 holds one
    value per sample.
    """

    def __init__(
        self, spec: InputSpec, axis: int | None, batch_size: int | None, transform: ImageTransform | None
    ) -> None:
        self.spec = spec
        self._axis = axis
        self._per_block = batch_size if batch_size is not None else 1 if axis else None
        self._transform = transform
        self._row = tuple(1 if a == axis else d for a, d in enumerate(spec.shape))

    def takes_pixels(self, header: Header) -> bool:
        """Whether these are pixels that an image preprocessing applies to."""
        return self._transform is not None and header.dtype == np.uint8

    def count(self, header: Header) -> int | None:
        """Return how many samples an array holds; None: one value that they all share.

        Raises:
            Misfit: its shape or type is not this input's.
        """
        shape, rank = header.shape, len(self.spec.shape)
        if self._transform is not None and self.takes_pixels(header):
            if not self._transform.accepts(shape):
                raise Misfit(
                    array_type(header.dtype, shape), f"store {self._transform.channels}-channel pictures"
                )
            return shape[0] if len(shape) == rank else 1
        check_castable(header.dtype, self.spec.dtype)
        if self._axis is None:
            if _fits(shape, self.spec.shape):
                return None
            if shape and _fits(shape[1:], self.spec.shape):
                return shape[0]
            raise Misfit(array_type(header.dtype, shape), "give that shape, or several along a first axis")
        if len(shape) == rank and _fits(_without(shape, self._axis), _without(self._row, self._axis)):
            return shape[self._axis]
        if _fits(shape, _without(self._row, self._axis)):
            return 1
        if self._per_block is not None and shape and _fits(shape[1:], self._block()):
            return shape[0] * self._per_block
        raise Misfit(array_type(header.dtype, shape), self._mend(shape))

    def take(self, array: Array, index: int) -> Array:
        """Return sample `index` of an array that `count` accepted.

        Raises:
            Misfit: its values do not fit the input's type, or are not finite.
        """
        rank = len(self.spec.shape)
        if self._transform is not None and array.dtype == np.uint8:
            return self._transform.apply(array[index] if array.ndim == rank else array)
        if self._axis is None:
            row = array if array.ndim == rank else array[index]
        else:
            if array.ndim == rank + 1 and self._per_block is not None:
                array, index = array[index // self._per_block], index % self._per_block
            elif array.ndim == rank - 1:
                array = np.expand_dims(array, self._axis)
            row = array[(slice(None),) * self._axis + (slice(index, index + 1),)]
        return cast(np.asarray(row), self.spec.dtype, masks=self.spec.masks)

    def _block(self) -> tuple[Dim, ...]:
        return tuple(self._per_block if a == self._axis else d for a, d in enumerate(self.spec.shape))

    def _mend(self, shape: tuple[int, ...]) -> str:
        if len(shape) == len(self._row) == 4:
            for layout, order in (("NHWC", (0, 3, 1, 2)), ("NCHW", (0, 2, 3, 1))):
                if _fits(tuple(shape[a] for a in order)[1:], self._row[1:]):
                    return f"this looks like {layout}, so transpose it by {order}"
        assert self._axis is not None
        one = array_type(self.spec.dtype, _without(self.spec.shape, self._axis))
        return f"store samples along axis {self._axis}, or one sample as {one}"


class Slicer:
    """Cuts records into samples of one model.

    Raises:
        DataError: the preprocessing fits none of the model's inputs.
    """

    def __init__(
        self, inputs: Sequence[InputSpec], image: ImagePreprocessing | None, mapping: Mapping[str, str]
    ) -> None:
        self._inputs = tuple(inputs)
        self._image = image
        self._mapping = dict(mapping)
        axes, batch_size = batch_axes(inputs), fixed_batch_size(inputs)
        transforms = _transforms(inputs, image)
        self._slicers = {
            s.name: InputSlicer(s, axes[s.name], batch_size, transforms.get(s.name)) for s in self._inputs
        }

    def count(self, record: Record) -> int:
        """Return how many samples `record` holds, by its headers.

        Raises:
            DataError: it does not fit the model.
        """
        return self._settle(record)[1]

    def ignored(self, record: Record) -> list[str]:
        """Return the keys of `record` that feed no input."""
        return sorted(set(record.headers()) - set(self._settle(record)[0].values()))

    def samples(self, record: Record) -> Iterator[Sample]:
        """Yield the samples of `record`.

        Raises:
            DataError: it does not fit the model, cannot be read, or holds NaN or Inf.
        """
        keys, count = self._settle(record)
        arrays = {name: record.read(key) for name, key in keys.items()}
        mapped = {name for name, array in arrays.items() if isinstance(array, np.memmap)}
        stride = 1 + _MAPPED_BYTES * count // (1 + sum(arrays[name].nbytes for name in mapped))
        for index in range(count):
            if index and index % stride == 0:
                # What was touched of a mapped file counts as the process's memory until it is unmapped.
                arrays |= {name: record.read(keys[name]) for name in mapped}
            sample = {}
            for name, array in arrays.items():
                try:
                    sample[name] = self._slicers[name].take(array, index)
                except Misfit as misfit:
                    where = f"{record.where}: sample {index}" if count > 1 else record.where
                    raise self._error(where, name, misfit) from None
            yield sample

    def _settle(self, record: Record) -> tuple[dict[str, str], int]:
        headers = record.headers()
        keys = match_names(record.where, headers, self._inputs, self._mapping, self._is_fit)
        counts: dict[str, int] = {}
        for name, key in keys.items():
            try:
                count = self._slicers[name].count(headers[key])
            except Misfit as misfit:
                raise self._error(record.where, name, misfit) from None
            if count is not None:
                counts[name] = count
        if len(set(counts.values())) > 1:
            raise DataError(
                f"{record.where}: {', '.join(f'{n} samples of {name}' for name, n in counts.items())}; "
                "store as many of each."
            )
        if self._image is not None and not any(
            self._slicers[name].takes_pixels(headers[key]) for name, key in keys.items()
        ):
            found = ", ".join(array_type(headers[key].dtype, headers[key].shape) for key in keys.values())
            raise DataError(
                f"{record.where}: found {found}, no uint8 pixels for an image preprocessing; other "
                "arrays are taken as they are, so leave --mean, --std, --size and --layout out."
            )
        return keys, next(iter(counts.values()), 1)

    def _is_fit(self, spec: InputSpec, header: Header) -> bool:
        try:
            self._slicers[spec.name].count(header)
        except Misfit:
            return False
        return True

    def _error(self, where: str, name: str, misfit: Misfit) -> DataError:
        return DataError(
            f"{where}: found {misfit.found}; the model wants {self._slicers[name].spec}; {misfit.mend}."
        )


def _transforms(inputs: Sequence[InputSpec], image: ImagePreprocessing | None) -> dict[str, ImageTransform]:
    """Return a transform for every input that can take pictures."""
    if image is None:
        return {}
    candidates = [
        s for s in inputs if len(s.shape) == 4 and (kind(s.dtype) == "float" or s.dtype == np.uint8)
    ]
    # With one input to choose from, what is wrong with it is the error to show.
    if len(candidates) <= 1:
        return {s.name: ImageTransform(image, s) for s in candidates or inputs[:1]}
    found = {}
    for spec in candidates:
        try:
            found[spec.name] = ImageTransform(image, spec)
        except DataError:
            continue
    if not found:
        return {candidates[0].name: ImageTransform(image, candidates[0])}
    return found


def _without(shape: tuple[Dim, ...], axis: int) -> tuple[Dim, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _fits(shape: tuple[Dim, ...], wanted: tuple[Dim, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        w == s for s, w in zip(shape, wanted, strict=True) if isinstance(w, int)
    )

"""`open_data`: from what a user points at to samples, read as they are asked for."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.data import python_data
from quantkit.data.files import ARRAY_FILES, Record
from quantkit.data.folder import list_files, one_kind
from quantkit.data.images import ImageTransform
from quantkit.data.inputs import InputSpec
from quantkit.data.preprocessing import ImagePreprocessing
from quantkit.data.slicing import Slicer
from quantkit.data.source import ImageSource, RecordSource, SampleSource, no_samples
from quantkit.errors import DataError


def open_data(
    data: object,
    inputs: Sequence[InputSpec],
    *,
    image: ImagePreprocessing | None = None,
    samples: int | None = None,
    mapping: Mapping[str, str] | None = None,
) -> SampleSource:
    """Return the samples that `data` holds for a model with these inputs.

    Args:
        data: a file or folder of images, .npy, .npz or .safetensors (folders are searched with their
            subfolders, in the order of the paths), a list of such files, or from Python an array, a dict of
            arrays, or an iterable, data set or reader of either. See `InputSlicer` for how arrays are cut
            into samples.
        inputs: what the model wants.
        image: how pixels become input values; without it images are scaled to 0…1.
        samples: at most this many, from the start.
        mapping: {input: key} where the arrays are not named as the inputs.

    Raises:
        DataError: nothing is there, or it does not fit the model. What only the contents show is raised by
            iterating.
    """
    if not inputs:
        raise DataError("the model has no inputs, so there is nothing to feed; give a model that takes data.")
    if samples is not None and samples < 1:
        raise DataError(
            f"samples {samples}: at least one sample is needed; give a number ≥ 1, or none for all."
        )
    description: dict[str, Any] = {}
    if image is not None:
        description["preprocessing"] = image.to_json()
    if mapping:
        description["mapping"] = dict(mapping)
    if samples is not None:
        description["samples"] = samples
    if isinstance(data, str | os.PathLike):
        root = Path(data).expanduser()
        description = {"path": str(root.resolve()), **description}
        return _open_files(str(root), list_files(root), inputs, image, mapping or {}, samples, description)
    if isinstance(data, list | tuple) and data and all(isinstance(d, str | os.PathLike) for d in data):
        paths = [file for d in data for file in list_files(Path(d).expanduser())]
        return _open_files("data", paths, inputs, image, mapping or {}, samples, description)
    return _open_python(data, inputs, image, mapping or {}, samples, description)


def reopen_data(
    description: Mapping[str, Any], inputs: Sequence[InputSpec], *, samples: int | None = None
) -> SampleSource:
    """Open again what a `SampleSource.description` describes.

    Raises:
        DataError: it was no file or folder, or is no longer there.
    """
    if "path" not in description:
        raise DataError("the data came from Python and cannot be opened again; give it with --data.")
    fields = description.get("preprocessing")
    return open_data(
        description["path"],
        inputs,
        image=None if fields is None else ImagePreprocessing.from_json(fields),
        samples=samples if samples is not None else description.get("samples"),
        mapping=description.get("mapping"),
    )


def _open_files(
    name: str,
    paths: Sequence[Path],
    inputs: Sequence[InputSpec],
    image: ImagePreprocessing | None,
    mapping: Mapping[str, str],
    samples: int | None,
    description: dict[str, Any],
) -> SampleSource:
    kind = one_kind(name, paths)
    description = {"kind": kind, "files": len(paths), **description}
    if kind == "images":
        if len(inputs) > 1 or mapping:
            raise DataError(
                f"{name}: pictures have no names and feed one input; the model wants "
                f"{', '.join(map(str, inputs))}; store its inputs in .npz files, keyed by name."
            )
        image = image or ImagePreprocessing.preset("0-1")
        description["preprocessing"] = image.to_json()
        _warn_of_folders_left_out(name, paths, samples)
        transform = ImageTransform(image, inputs[0])
        return ImageSource(paths, transform, name=name, description=description, limit=samples)
    if kind == "npy" and len(inputs) > 1:
        raise DataError(
            f"{name}: .npy files have no names and feed one input; the model wants "
            f"{', '.join(map(str, inputs))}; store .npz files, keyed by name."
        )
    slicer = Slicer(inputs, image, mapping)
    # What is wrong with all of them is wrong with the first.
    description |= _examine(name, ARRAY_FILES["." + kind](paths[0]), slicer, only=len(paths) == 1)

    def records() -> Iterator[Record]:
        return (ARRAY_FILES["." + kind](path) for path in paths)

    return RecordSource(records, slicer, countable=True, name=name, description=description, limit=samples)


def _open_python(
    data: object,
    inputs: Sequence[InputSpec],
    image: ImagePreprocessing | None,
    mapping: Mapping[str, str],
    samples: int | None,
    description: dict[str, Any],
) -> SampleSource:
    slicer = Slicer(inputs, image, mapping)
    description = {"kind": "python", **description}
    if python_data.is_record(data):
        one: Record = python_data.record("data", data, inputs)
        description |= _examine("data", one, slicer, only=True)

        def single() -> Iterator[Record]:
            return iter((one,))

        return RecordSource(
            single, slicer, countable=True, name="data", description=description, limit=samples
        )
    start = python_data.items(data)

    def records() -> Iterator[Record]:
        for index, item in enumerate(start()):
            yield python_data.record(f"data, item {index}", item, inputs)

    # Only what is in memory already is gone through to count it.
    countable = isinstance(data, list | tuple)
    if countable and not data:
        raise no_samples("data")
    return RecordSource(
        records, slicer, countable=countable, name="data", description=description, limit=samples
    )


def _examine(name: str, record: Record, slicer: Slicer, *, only: bool) -> dict[str, Any]:
    """Check a record by its headers, and return what the description says of it."""
    if slicer.count(record) == 0 and only:
        raise no_samples(name)
    ignored = slicer.ignored(record)
    return {"ignored": ignored} if ignored else {}


def _warn_of_folders_left_out(name: str, paths: Sequence[Path], samples: int | None) -> None:
    taken, folders = {p.parent for p in paths[:samples]}, {p.parent for p in paths}
    if len(taken) < len(folders):
        warnings.warn(
            f"{name}: the first {samples} images lie in {len(taken)} of {len(folders)} folders; where they "
            "are classes, copy some images of each into one folder.",
            stacklevel=4,
        )

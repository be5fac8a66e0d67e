"""Which files of a folder are data."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from quantkit.data.files import ARRAY_FILES
from quantkit.data.matching import LABEL_NAMES
from quantkit.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_READ = "images (png, jpg, bmp, webp, gif, tif), .npy, .npz or .safetensors"


def list_files(root: Path) -> list[Path]:
    """Return `root`, or the data files under it sorted by path; hidden files and labels are left out.

    Raises:
        DataError: nothing is there.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"{root}: no such file or folder; give one of {_READ}.")
    found, others, seen = [], Counter[str](), set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        for name in names:
            path = Path(folder, name)
            suffix = path.suffix.lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES or (suffix in ARRAY_FILES and path.stem.lower() not in LABEL_NAMES):
                found.append(path)
            else:
                others[suffix or name] += 1
    if not found:
        what = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(4)) or "nothing"
        raise DataError(f"{root}: no calibration data in this folder, found {what}; put there {_READ}.")
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def data_files(root: Path) -> Iterator[Path]:
    """Yield the files that `list_files` lists, none where nothing can be listed."""
    try:
        yield from list_files(root.expanduser())
    except DataError:
        # Opening the data says it, when their turn has come.
        return


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot be listed ({error.strerror}); check its permissions."
    ) from error


def one_kind(name: str, paths: Sequence[Path]) -> str:
    """Return "images", "npy", "npz" or "safetensors", which all of `paths` are.

    Raises:
        DataError: they are of several kinds, or of none that is read.
    """
    kinds = Counter("images" if p.suffix.lower() in IMAGE_SUFFIXES else p.suffix.lower()[1:] for p in paths)
    for path in paths:
        if path.suffix.lower() not in (*IMAGE_SUFFIXES, *ARRAY_FILES):
            raise DataError(f"{path}: a file of this kind is not read; give {_READ}.")
    if len(kinds) > 1:
        what = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        raise DataError(f"{name}: found {what} together; keep each kind in a folder of its own.")
    return next(iter(kinds))

"""Which model a calibration cache belongs to, and where caches lie."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.errors import CacheError

SUFFIX = ".calib"


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model was observed.

    Attributes:
        path: where it lay, absolute or relative to the current folder; "" for a model that was never a file.
            Not compared: a model that was moved is the same model.
        name: the stem of its file, after which exported files are named.
        fingerprint: of the cleaned graph and its weights.
    """

    path: str = field(compare=False)
    name: str
    fingerprint: str

    def in_words(self) -> str:
        """Return how to name the model to a user."""
        return f"{self.path or self.name} ({self.fingerprint[:12]})"

    def path_from(self, folder: str | os.PathLike[str]) -> str:
        """Return the path relative to `folder`, in forward slashes, so that the two can be moved together.

        An absolute path stays absolute, unless the model lies in `folder` or below.
        """
        if not self.path:
            return ""
        try:
            relative = Path(os.path.relpath(self.path, folder))
        except ValueError:
            # Another drive of Windows.
            return os.path.abspath(self.path)
        return self.path if os.path.isabs(self.path) and ".." in relative.parts else relative.as_posix()


def find_cache(folder: str | os.PathLike[str]) -> Path:
    """Return the one calibration cache in `folder`.

    Raises:
        CacheError: there is none, or more than one.
    """
    found = sorted(p for p in Path(folder).glob(f"*{SUFFIX}") if p.is_file())
    if not found:
        where = "the current folder" if os.path.abspath(folder) == os.getcwd() else str(folder)
        raise CacheError(
            f"{where}: holds no calibration cache (*{SUFFIX}); "
            "make one with `quantkit calibrate MODEL --data DATA`, or name one with --cache."
        )
    if len(found) > 1:
        names = ", ".join(p.name for p in found[:5]) + (
            f" and {len(found) - 5} more" if len(found) > 5 else ""
        )
        raise CacheError(
            f"{folder}: holds {len(found)} calibration caches ({names}); choose one with --cache."
        )
    return found[0]

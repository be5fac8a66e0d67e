"""Where kernels keep what can be made again: cubins, kernels built for the emulator, timings."""

from pathlib import Path

from quantkit.errors import FileError

ROOT = Path.home() / ".cache" / "quantkit"


def make_cache(folder: Path) -> None:
    """Make the folder of a cache and its parents, where they are not there yet.

    Raises:
        FileError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise FileError(
            f"{folder}: cannot be made ({reason}); choose a folder that you may write to."
        ) from error

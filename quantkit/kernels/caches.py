"""Where kernels keep what can be made again: cubins, kernels built for the emulator, timings."""

import struct
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
        mend = "set HOME to" if folder.is_relative_to(ROOT) else "choose"
        raise FileError(
            f"{folder}: cannot be made ({reason}); {mend} a folder that you may write to."
        ) from error


def is_whole(path: Path) -> bool:
    """Return whether a file is there and is an ELF of 64 bits, as cubins and libraries are, that was not cut short."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    if len(data) < 64 or data[:5] != b"\x7fELF\x02":
        return False
    # Where the tables of segments and of sections begin, how large an entry of each is, how many there are.
    segments, sections = struct.unpack_from("<QQ", data, 0x20)
    sizes = struct.unpack_from("<HHHH", data, 0x36)
    ends: tuple[int, int] = segments + sizes[0] * sizes[1], sections + sizes[2] * sizes[3]
    return max(ends) <= len(data)

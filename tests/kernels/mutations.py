"""Damaged copies of kernels, and what the emulator says of them.

A mutation is one textual change of a kernel that is exact as it stands: what stood there, what stands there now, and
whether it is caught in 'every' mode of the emulator or shows in 'some' only.
"""

import zlib
from collections.abc import Callable
from pathlib import Path

from quantkit.kernels.compile import INCLUDE
from quantkit.kernels.emulator import EmulatorError, Mode

from .backends import EmulatorBackend

TILES = INCLUDE / "tiles.h"


def mutated(source: Path, change: tuple[str, str], folder: Path) -> Path:
    """A copy of a kernel with the change in it, or in the header of tiles beside it, which its compiler finds first."""
    before, after = change
    texts = {path: path.read_text() for path in (source, TILES)}
    file = next((path for path, text in texts.items() if before in text), None)
    assert file is not None, f"{source.name} no longer has {before!r}"
    texts[file] = texts[file].replace(before, after, 1)
    for path, text in texts.items():
        # Builds are kept by what the source says: a word of its own keeps this one from an undamaged one's place.
        (folder / path.name).write_text(f"// change {zlib.crc32((before + after).encode()):08x}\n{text}")
    return folder / source.name


def outcomes(check: Callable[[EmulatorBackend], None]) -> dict[Mode, str]:
    """What each mode says: 'exact', or what is wrong."""
    said = {}
    for mode in Mode:
        try:
            check(EmulatorBackend(mode))
            said[mode] = "exact"
        except (EmulatorError, AssertionError) as error:
            said[mode] = str(error)
    return said


def assert_caught(said: dict[Mode, str], where: str) -> None:
    passed = [mode.name for mode, text in said.items() if text == "exact"]
    assert len(passed) <= (0 if where == "every" else len(Mode) - 1), f"passed in {passed}"

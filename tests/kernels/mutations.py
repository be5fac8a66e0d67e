"""Damaged copies of kernels, and what the emulator says of them.

A mutation is one textual change of a kernel that is exact as it stands: what stood there, what stands there now, and
whether it is caught in 'every' mode of the emulator or shows in 'some' only.
"""

from collections.abc import Callable
from pathlib import Path

from quantkit.kernels.emulator import EmulatorError, Mode

from .backends import EmulatorBackend


def mutated(source: Path, change: tuple[str, str], folder: Path) -> Path:
    text = source.read_text()
    assert text.count(change[0]) >= 1, f"{source.name} no longer has {change[0]!r}"
    path = folder / source.name
    path.write_text(text.replace(change[0], change[1], 1))
    return path


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

"""Commands as users type them, what they leave, and processes that are interrupted."""

import hashlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Of the pictures that the digits come with.
SAMPLES = 40


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def script(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the installed script `quantkit` with these words; it must succeed."""
    return subprocess.run(command(words), check=True, cwd=cwd, capture_output=True, text=True)


def command(words: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-c", "from quantkit.cli import main; main()", *map(str, words)]


def files(folder: Path) -> dict[str, tuple[str, int]]:
    """What lies in a folder: path → contents and time of change."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def new_files(folder: Path) -> list[str]:
    return sorted(set(files(folder)) - {"model.onnx", *(f"calib/{p.name}" for p in Path("calib").glob("*"))})


def next_commands(result: Result) -> list[list[str]]:
    """The commands that the closing lines name, split into words, without the leading `quantkit`."""
    (line,) = [line for line in result.out.splitlines() if line.startswith("next: ")]
    found = [shlex.split(part) for part in line.removeprefix("next: ").split("   or   ")]
    assert all(words[0] == "quantkit" for words in found)
    return [words[1:] for words in found]


def interrupted(*words: object, at: str) -> Result:
    """Run `quantkit` in a process of its own, where calling the function named `at` is Ctrl-C."""
    program = (
        "import importlib, os, signal\n"
        f"module, _, name = {at!r}.rpartition('.')\n"
        "def interrupt(*_, **__):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "setattr(importlib.import_module(module), name, interrupt)\n"
        "from quantkit.cli import main\n"
        "main()"
    )
    found = subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True)
    return Result(found.returncode, found.stdout, found.stderr)

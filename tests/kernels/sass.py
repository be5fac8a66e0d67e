"""What a cubin's machine code consists of, through NVIDIA's disassembler."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path


@cache
def tools() -> Path | None:
    """The folder that holds cuobjdump and nvdisasm (it calls the other), from the packages or from PATH."""
    spec = importlib.util.find_spec("nvidia")
    folders = [
        folder
        for root in (spec.submodule_search_locations if spec else [])
        for folder in Path(root).glob("*/bin")
    ]
    found = shutil.which("cuobjdump")
    folders += [Path(found).parent] if found else []
    suffix = ".exe" if os.name == "nt" else ""
    names = [f"{name}{suffix}" for name in ("cuobjdump", "nvdisasm")]
    return next((folder for folder in folders if all((folder / name).exists() for name in names)), None)


@cache
def listing(cubin: Path) -> tuple[str, ...]:
    """The cubin's instructions, one a line, in their order."""
    folder = tools()
    assert folder is not None
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [folder / "cuobjdump", "-sass", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return tuple(line for line in text.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line))


def opcodes(cubin: Path) -> Counter[str]:
    """How often each opcode, without its modifiers, occurs in the cubin."""
    pattern = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
    return Counter(found[1] for line in listing(cubin) if (found := pattern.search(line)))

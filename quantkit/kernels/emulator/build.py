"""Build the emulator's library, and kernels against it, with the system's C++ compiler.

Both are kept in a cache folder under the hash of everything that went into them, and appear there by one atomic
rename, so several processes may build at once. The library takes some seconds, once; a kernel about one.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantkit.errors import KernelError
from quantkit.files import atomic_write

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parent / "cuda" / "include"
DEFAULT_CACHE = Path.home() / ".cache" / "quantkit" / "emulator"

# -ffp-contract=off: a * b + c rounds twice, as in the kernels NVRTC builds (--fmad=false).
_FLAGS = ("-std=c++20", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared")


def find_compiler() -> str | None:
    """Return the path of a C++20 compiler, g++ before clang++, or None: also where the emulator cannot run.

    Its fibers and guard pages are Linux's, on x86-64 and aarch64.
    """
    if sys.platform != "linux":
        return None
    return next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


@functools.cache
def _compiler_fingerprint(compiler: str) -> str:
    """Return what the compiler says of itself and of this processor: its version and every predefined macro."""
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"{compiler}: does not run ({done.stderr.strip()[:200]}); install g++ 12 or later.")
    return hashlib.sha256(done.stdout.encode()).hexdigest()


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def _headers() -> list[bytes]:
    return [path.read_bytes() for folder in (INCLUDE, HERE) for path in sorted(folder.glob("*.h"))]


def _compile(compiler: str, arguments: Sequence[str | Path], target: Path, what: str) -> None:
    """Run the compiler and publish what it makes as `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        command = [compiler, *map(str, arguments), "-o", str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [
                line for line in done.stderr.splitlines() if "error" in line
            ] or done.stderr.splitlines()
            raise KernelError(f"{what}: the emulator's build failed: {' | '.join(errors[:3])}")


def _require_compiler() -> str:
    compiler = find_compiler()
    if compiler is None:
        raise KernelError("no C++ compiler on PATH; the emulator needs Linux and g++ 12 or later.")
    return compiler


def build_library(cache: Path = DEFAULT_CACHE) -> Path:
    """Return the emulator's shared library, built if the cache lacks it.

    KernelError: no compiler, or the build fails. FileError: the cache cannot be written.
    """
    compiler = _require_compiler()
    sources = sorted(HERE.glob("*.cpp"))
    flags = ("-O3", *_FLAGS)
    key = _hash(
        _compiler_fingerprint(compiler), *flags, *_headers(), *(path.read_bytes() for path in sources)
    )
    target = cache / f"library-{key}.so"
    if not target.exists():
        _compile(
            compiler, [*flags, f"-I{INCLUDE}", f"-I{HERE}", *sources], target, "quantkit.kernels.emulator"
        )
    return target


def build_kernel(
    source: Path,
    defines: Mapping[str, str | int] | None = None,
    cache: Path = DEFAULT_CACHE,
    include: Path | None = None,
) -> Path:
    """Return the shared library of one kernel source with its configuration macros, built if the cache lacks it.

    `include` is a further folder of headers that the source uses.
    KernelError: no compiler, or the source does not compile.
    """
    compiler = _require_compiler()
    library = build_library(cache)
    macros = [f"-D{name}={value}" for name, value in sorted((defines or {}).items())]
    folders = [INCLUDE, HERE, *([include] if include else [])]
    # -w: kernels carry pragmas and attributes that only CUDA knows.
    flags = ["-O1", *_FLAGS, "-w", *macros]
    extra = [path.read_bytes() for path in sorted(include.glob("*.h"))] if include else []
    key = _hash(
        _compiler_fingerprint(compiler), str(library), *flags, source.read_bytes(), *_headers(), *extra
    )
    target = cache / f"{source.stem}-{key}.so"
    if not target.exists():
        # The library is named by its full path, so the kernel finds this very build of it.
        search = [f"-I{folder}" for folder in folders]
        arguments: list[str | Path] = [*flags, *search, "-x", "c++", source, "-x", "none", library]
        _compile(compiler, arguments, target, source.name)
    return target

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from quantkit.errors import KernelError
from quantkit.files import atomic_write
from quantkit.kernels.caches import ROOT, is_whole, make_cache

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parent / "cuda" / "include"
DEFAULT_CACHE = ROOT / "emulator"

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


class _EditedError(Exception):
    """A source changed while it was compiled."""


def _built(
    compiler: str, arguments: Sequence[str | Path], cache: Path, stem: str, key: Callable[[], str], what: str
) -> Path:
    """Return the library that `key` names, compiled and published if the cache lacks it.

    The compiler reads the sources after they were hashed: what was edited in between is hashed and compiled again.
    """
    while True:
        name = key()
        target = cache / f"{stem}-{name}.so"
        if is_whole(target):
            return target
        make_cache(cache)
        with suppress(_EditedError), atomic_write(target) as temporary:
            command = [compiler, *map(str, arguments), "-o", str(temporary)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.splitlines()
                errors = [line for line in said if "error" in line] or said
                raise KernelError(f"{what}: the emulator's build failed: {' | '.join(errors[:3])}")
            if key() != name:
                raise _EditedError


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
    flags = ("-O3", *_FLAGS)
    sources = sorted(HERE.glob("*.cpp"))

    def key() -> str:
        texts = (path.read_bytes() for path in sources)
        return _hash(_compiler_fingerprint(compiler), *flags, *_headers(), *texts)

    arguments: list[str | Path] = [*flags, f"-I{INCLUDE}", f"-I{HERE}", *sources]
    return _built(compiler, arguments, cache, "library", key, "quantkit.kernels.emulator")


def build_kernel(
    source: Path,
    defines: Mapping[str, str | int] | None = None,
    cache: Path = DEFAULT_CACHE,
    include: Path | None = None,
    *,
    library: Path | None = None,
) -> Path:
    """Return the shared library of one kernel source with its configuration macros, built if the cache lacks it.

    `include` is a further folder of headers that the source uses; `library` the build of the emulator that the kernel
    is linked with, build_library's by default.
    KernelError: no compiler, or the source does not compile. FileError: the cache cannot be written.
    """
    compiler = _require_compiler()
    linked = library or build_library(cache)
    macros = [f"-D{name}={value}" for name, value in sorted((defines or {}).items())]
    folders = [INCLUDE, HERE, *([include] if include else [])]
    # -w: kernels carry pragmas and attributes that only CUDA knows.
    flags = ["-O1", *_FLAGS, "-w", *macros]

    def key() -> str:
        extra = [path.read_bytes() for path in sorted(include.glob("*.h"))] if include else []
        return _hash(
            _compiler_fingerprint(compiler), str(linked), *flags, source.read_bytes(), *_headers(), *extra
        )

    # The library is named by its full path, so the kernel finds this very build of it.
    search = [f"-I{folder}" for folder in folders]
    arguments: list[str | Path] = [*flags, *search, "-x", "c++", source, "-x", "none", linked]
    return _built(compiler, arguments, cache, source.stem, key, source.name)

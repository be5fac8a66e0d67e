"""CUDA C++ to cubin with NVRTC, for any architecture, on any machine: no GPU and no CUDA toolkit are needed.

Cubins are kept on disk under the hash of everything that shaped them: source, headers, options, NVRTC's version.
Several processes may compile at once: a cubin appears by one rename, whole.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import KernelError
from quantkit.files import atomic_write
from quantkit.kernels.caches import ROOT, is_whole, make_cache

INCLUDE = Path(__file__).resolve().parent / "cuda" / "include"
DEFAULT_CACHE = ROOT / "cubin"

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")

# No contraction: a * b + c rounds twice in every build, so results can be held to an oracle bit for bit.
# Subnormals are kept: scales may be as small as 2^-127.
# What is not annotated is device code: NVRTC 13.0 takes a generic lambda for a function of the host otherwise.
_OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--device-as-default-execution-space",
    "--ptxas-options=-v",
)


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """One source compiled for one architecture.

    cubin: the file; `cupy.RawModule(path=...)` loads it. log: what the compiler said. registers, spill_bytes,
    stack_bytes: the most that any kernel in it uses, a thread. shared_bytes: static shared memory.
    """

    cubin: Path
    arch: str
    log: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """The compiler's lines that warn: serialized wgmma, ignored setmaxnreg, unused variables."""
        found = (line.strip() for line in self.log.splitlines())
        return tuple(line for line in found if re.search(r"\bwarning\b|\(C7\d+\)", line))


def is_available() -> bool:
    """Return whether NVRTC can be loaded here."""
    try:
        _nvrtc()
    except KernelError:
        return False
    return True


def nvrtc_version() -> tuple[int, int]:
    """Return NVRTC's version, (13, 0) say."""
    nvrtc = _nvrtc()
    _, major, minor = _call(nvrtc, nvrtc.nvrtcVersion())
    return int(major), int(minor)


def compile_kernel(
    source: Path,
    *,
    arch: str,
    defines: Mapping[str, str | int] | None = None,
    cache: Path = DEFAULT_CACHE,
    include: Path | None = None,
) -> CompiledKernel:
    """Return the cubin of a kernel source for `arch` ("sm_90a"), compiled if the cache lacks it.

    defines: the configuration, as macros. include: one more folder of headers besides the instruction layer's.

    Raises:
        KernelError: NVRTC is not installed, does not know `arch`, or refuses the source.
        FileError: the cache cannot be written.
    """
    cubin, text, headers, options = _inputs(source, arch, defines, cache, include)
    message = _said(cubin.with_suffix(".log")) if is_whole(cubin) else None
    if message is None:
        data, message = _compile(source.name, text, headers, options)
        make_cache(cache)
        with atomic_write(cubin) as temporary:
            temporary.with_suffix(".log").write_text(message)
            temporary.write_bytes(data)
    return _describe(cubin, arch, message)


def is_compiled(
    source: Path, *, arch: str, defines: Mapping[str, str | int] | None = None, cache: Path = DEFAULT_CACHE
) -> bool:
    """Return whether `compile_kernel` would find it in the cache.

    Raises:
        KernelError: as `compile_kernel`, but for what the source itself is refused for.
    """
    cubin, *_ = _inputs(source, arch, defines, cache, None)
    return is_whole(cubin) and _said(cubin.with_suffix(".log")) is not None


def _inputs(
    source: Path, arch: str, defines: Mapping[str, str | int] | None, cache: Path, include: Path | None
) -> tuple[Path, bytes, dict[str, bytes], list[str]]:
    """Return a cubin's place in the cache, and what shapes it: the source's text, headers, options."""
    if not re.fullmatch(r"sm_\d+[af]?", arch):
        raise KernelError(f"{arch!r} names no GPU architecture; one looks like sm_80 or sm_90a.")
    options = [f"--gpu-architecture={arch}", *_OPTIONS]
    options += [f"--define-macro={name}={value}" for name, value in sorted((defines or {}).items())]
    headers = {path.name: path.read_bytes() for folder in (INCLUDE, include) for path in _headers(folder)}
    text = source.read_bytes()
    return cache / f"{source.stem}-{arch}-{_key(text, headers, options)}.cubin", text, headers, options


def _said(log: Path) -> str | None:
    """What the compiler said of a cubin that is there; None where that was lost."""
    try:
        return log.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _headers(folder: Path | None) -> list[Path]:
    return sorted(folder.glob("*.h")) if folder else []


def _key(source: bytes, headers: Mapping[str, bytes], options: list[str]) -> str:
    """Return the hash that names a cubin; each part is measured, so that no two lists of parts look alike."""
    digest = hashlib.sha256(json.dumps([nvrtc_version(), options, sorted(headers)]).encode())
    for data in (source, *(headers[name] for name in sorted(headers))):
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def _compile(name: str, source: bytes, headers: Mapping[str, bytes], options: list[str]) -> tuple[bytes, str]:
    """Return the cubin and the compiler's log. Headers are handed over in memory: nothing is looked up on disk."""
    nvrtc = _nvrtc()
    names, texts = [n.encode() for n in headers], list(headers.values())
    (_, program) = _call(nvrtc, nvrtc.nvrtcCreateProgram(source, name.encode(), len(names), texts, names))
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
        _, size = _call(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
        buffer = bytes(size)
        _call(nvrtc, nvrtc.nvrtcGetProgramLog(program, buffer))
        log = buffer.rstrip(b"\0").decode(errors="replace")
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            errors = [line for line in log.splitlines() if "error" in line] or [str(result)]
            arch = options[0].partition("=")[2]
            raise KernelError(f"{name}: does not compile for {arch}: {' | '.join(errors[:3])}")
        _, size = _call(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        cubin = bytes(size)
        _call(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin, log


def _describe(cubin: Path, arch: str, log: str) -> CompiledKernel:
    def most(pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, log)), default=0)

    return CompiledKernel(
        cubin=cubin,
        arch=arch,
        log=log,
        registers=most(r"Used (\d+) registers"),
        spill_bytes=most(r"(\d+) bytes spill stores") + most(r"(\d+) bytes spill loads"),
        stack_bytes=most(r"(\d+) bytes stack frame"),
        shared_bytes=most(r"(\d+) bytes smem"),
    )


def _nvrtc() -> Any:
    """Return cuda.bindings.nvrtc with its library loaded."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise KernelError(f"NVRTC cannot be loaded ({error}); pip install 'quantkit[gpu]'.") from error
    return nvrtc


def _call(nvrtc: Any, returned: tuple[Any, ...]) -> tuple[Any, ...]:
    if returned[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC failed: {returned[0]}; report this with the kernel's configuration.")
    return returned

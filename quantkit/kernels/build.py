"""Compiling many kernels ahead of time, one a processor, into the cubin cache."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from quantkit.errors import KernelError
from quantkit.kernels.compile import DEFAULT_CACHE, CompiledKernel, compile_kernel, is_compiled
from quantkit.kernels.families import FAMILIES, architectures, best_family
from quantkit.kernels.family import Family
from quantkit.kernels.gpus import GPUS, Gpu
from quantkit.kernels.work import Work, get_gemm_format

# What a build without a model covers: from one token to a large batch, the layers of well-known networks.
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
LAYERS = ((4096, 4096), (8192, 8192), (28672, 8192), (8192, 28672), (768, 768), (3072, 768), (1024, 4096))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One source in one configuration for one architecture."""

    source: Path
    arch: str
    defines: tuple[tuple[str, str | int], ...]


def build_all(
    jobs: Iterable[Job],
    *,
    cache: Path = DEFAULT_CACHE,
    on_built: Callable[[int, int], object] = lambda done, count: None,
) -> list[CompiledKernel]:
    """Return every distinct job's kernel, compiled where the cache lacks it.

    Raises:
        KernelError: a source does not compile. FileError: the cache cannot be written.
    """
    unique = list(dict.fromkeys(jobs))
    missing = [
        job
        for job in unique
        if not is_compiled(job.source, arch=job.arch, defines=dict(job.defines), cache=cache)
    ]
    workers = min(len(missing), os.cpu_count() or 1)
    if workers > 1:
        size = max(1, len(missing) // (3 * workers))
        batches = [missing[i : i + size] for i in range(0, len(missing), size)]
        done = len(unique) - len(missing)
        with ThreadPoolExecutor(workers) as pool:
            for batch, _ in zip(batches, pool.map(_build_elsewhere, batches, repeat(cache)), strict=True):
                done += len(batch)
                on_built(done, len(unique))
    found = []
    for job in unique:
        # What another process could not compile fails here once more, and says why.
        found.append(compile_kernel(job.source, arch=job.arch, defines=dict(job.defines), cache=cache))
        on_built(len(unique) if workers > 1 else len(found), len(unique))
    return found


def _build_elsewhere(jobs: Sequence[Job], cache: Path) -> None:
    """Fill the cache from a process of its own: NVRTC compiles one source at a time in each.

    Not by multiprocessing, which starts by importing the caller's main module once more.
    """
    told = [(str(job.source), job.arch, dict(job.defines)) for job in jobs]
    subprocess.run(
        [sys.executable, "-c", _WORKER, str(cache)],
        input=json.dumps(told),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )


_WORKER = """
import json, sys
from pathlib import Path
from quantkit.kernels.compile import compile_kernel
for source, arch, defines in json.load(sys.stdin):
    compile_kernel(Path(source), arch=arch, defines=defines, cache=Path(sys.argv[1]))
"""


def jobs_of(works: Sequence[Work], archs: Sequence[str]) -> list[Job]:
    """Return what must be compiled to run the works on GPUs of these architectures.

    Raises:
        KernelError: an architecture that no kernel supports.
    """
    known = architectures()
    for arch in archs:
        if arch not in known:
            raise KernelError(f"{arch}: no kernel is written for it; choose of {', '.join(known)}.")
    jobs = []
    for arch in archs:
        for gpu in _gpus_of(arch):
            for work in works:
                for family, configuration in _chosen(work, gpu):
                    source, defines = family.source(work, configuration, gpu)
                    jobs.append(Job(source=source, arch=arch, defines=tuple(sorted(defines.items()))))
    return list(dict.fromkeys(jobs))


def untaken(works: Sequence[Work], archs: Sequence[str]) -> list[tuple[str, str]]:
    """Return the formats of works that no kernel multiplies on these architectures: (format, architecture)."""
    one_of_each = {work.format: work for work in works}.values()
    return [
        (work.format, arch)
        for arch in dict.fromkeys(archs)
        for work in one_of_each
        if not any(_chosen(work, gpu) for gpu in _gpus_of(arch))
    ]


def usual_works(formats: Sequence[str] | None = None) -> list[Work]:
    """Return the works that a build without a model covers: in the formats named, else in each that has a kernel.

    Raises:
        UnknownNameError: no such format. KernelError: no kernel multiplies it.
    """
    known = {name for family in FAMILIES for name in family.formats}
    names = [get_gemm_format(name).name for name in formats or sorted(known)]
    for name in names:
        if name not in known:
            raise KernelError(f"{name}: no kernel multiplies it; choose of {', '.join(sorted(known))}.")
    return [Work(m=m, n=n, k=k, format=name) for name in names for n, k in LAYERS for m in ROWS]


def _gpus_of(arch: str) -> list[Gpu]:
    return [gpu for gpu in GPUS.values() if gpu.architecture == arch]


def _chosen(work: Work, gpu: Gpu) -> list[tuple[Family, object]]:
    found = best_family(work, gpu)
    return [] if found is None else [(found[0], found[1].configuration)]

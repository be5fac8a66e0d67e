"""Compiling many kernels ahead of time, one a processor, into the cubin cache."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from quantkit.errors import KernelError
from quantkit.kernels.compile import DEFAULT_CACHE, CompiledKernel, compile_kernel
from quantkit.kernels.families import FAMILIES, architectures
from quantkit.kernels.family import Family
from quantkit.kernels.gpus import GPUS, Gpu
from quantkit.kernels.work import Work

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
    workers = min(len(unique), os.cpu_count() or 1)
    found: list[CompiledKernel] = []
    if workers < 2:
        for job in unique:
            found.append(_build(job, cache))
            on_built(len(found), len(unique))
        return found
    # Not forked: a process that holds a GPU, or runs threads, is no good parent.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for built in pool.map(_build, unique, [cache] * len(unique)):
            found.append(built)
            on_built(len(found), len(unique))
    return found


def _build(job: Job, cache: Path) -> CompiledKernel:
    return compile_kernel(job.source, arch=job.arch, defines=dict(job.defines), cache=cache)


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


def usual_works(formats: Sequence[str] | None = None) -> list[Work]:
    """Return the works that a build without a model covers, in every format that has a kernel."""
    names = formats or sorted({name for family in FAMILIES for name in family.formats})
    return [Work(m=m, n=n, k=k, format=name) for name in names for n, k in LAYERS for m in ROWS]


def _gpus_of(arch: str) -> list[Gpu]:
    return [gpu for gpu in GPUS.values() if gpu.architecture == arch]


def _chosen(work: Work, gpu: Gpu) -> list[tuple[Family, object]]:
    return [
        (family, family.predict(work, gpu).configuration) for family in FAMILIES if family.takes(work, gpu)
    ]

"""Which configuration a product gets: the one timed fastest on this very GPU, else the one modelled fastest."""

from dataclasses import asdict
from functools import lru_cache
from typing import Any, TypeAlias

from quantkit.kernels import device as hardware
from quantkit.kernels import tuning
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.heuristics import Device
from quantkit.kernels.mma_heuristics import mma_device
from quantkit.kernels.timing_table import Entry, key_of
from quantkit.kernels.w4.heuristics import w4_candidates, w4_choose
from quantkit.kernels.w4.launch import FEW_KERNEL, KERNEL
from quantkit.kernels.w4.mma_heuristics import W4MmaTile, w4_mma_candidates, w4_mma_choose
from quantkit.kernels.w4.mma_launch import KERNEL as MMA_KERNEL
from quantkit.kernels.w4.problem import W4Problem
from quantkit.kernels.w4.tiles import W4Few, W4Tile

Configuration: TypeAlias = W4Tile | W4Few | W4MmaTile


def kernel_of(configuration: Configuration) -> str:
    """Return the kernel that a configuration is of."""
    if isinstance(configuration, W4MmaTile):
        return MMA_KERNEL
    return FEW_KERNEL if isinstance(configuration, W4Few) else KERNEL


def timed(
    problem: W4Problem, kind: EpilogueKind, candidates: list[Any], find: Any
) -> tuple[Configuration, Entry] | None:
    """Return the candidate that was timed fastest, and its entry, or None where none was.

    find: from a key of the timing cache to its entry or None.
    """
    for kernel in dict.fromkeys(map(kernel_of, candidates)):
        entry = find(key_of(kernel, problem.known_as, kind))
        for candidate in candidates if entry is not None else ():
            if asdict(candidate) == dict(entry.configuration):
                return candidate, entry
    return None


@lru_cache(maxsize=4096)
def configuration_of(problem: W4Problem, kind: EpilogueKind, arch: str, device: int) -> Configuration:
    """Return what GPU `device` runs."""
    multiprocessors = hardware.multiprocessors(device)
    candidates: list[Any]
    if arch == "sm_90a":
        hopper = Device(multiprocessors=multiprocessors)
        candidates = w4_candidates(problem, hopper)
    else:
        other = mma_device(arch, multiprocessors)
        candidates = list(w4_mma_candidates(problem, other))
    found = timed(problem, kind, candidates, lambda key: tuning.best_entry(key, device))
    if found is not None:
        return found[0]
    return w4_choose(problem, hopper) if arch == "sm_90a" else w4_mma_choose(problem, other)

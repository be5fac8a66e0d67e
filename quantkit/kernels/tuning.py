"""The timing cache: which configuration was seen fastest, for which problem, on which GPU.

Two layers are asked, in this order:

    ~/.cache/quantkit/timings/<gpu>-<driver and compiler>.json   what this user timed; only for the very same kernel
    quantkit/kernels/tuned/<gpu>.json                            what ships; an order of configurations outlives small
                                                                 changes of a kernel, driver or compiler

Neither is needed: without an entry the model of time chooses. An entry answers for its N, K, format, output and
epilogue, and for a bucket of M: powers of two up to 128, above that four to an octave.
"""

import contextlib
import hashlib
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantkit.errors import FileError
from quantkit.files import atomic_write
from quantkit.kernels import device as hardware
from quantkit.kernels.caches import ROOT, make_cache
from quantkit.kernels.compile import INCLUDE, is_available, nvrtc_version
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.gemm_launch import KERNEL as SM90
from quantkit.kernels.heuristics import Problem, Tile, candidates
from quantkit.kernels.mma_heuristics import MmaDevice, MmaTile, mma_candidates, mma_device
from quantkit.kernels.mma_launch import KERNEL as MMA
from quantkit.kernels.present import present_gpu
from quantkit.kernels.timing import Timing
from quantkit.kernels.timing_table import Entry, Key, TimingTable, key_of

DEFAULT_CACHE = ROOT / "timings"
SHIPPED = Path(__file__).parent / "tuned"


def tile_of(entry: Entry, problem: Problem) -> Tile | None:
    """Return the tile of an entry; None where this kernel no longer has it."""
    try:
        tile = Tile(**entry.configuration)
    except TypeError:
        return None
    # Orders of tiles are tuned beyond what the heuristics enumerate.
    known = {_without_order(candidate) for candidate in candidates(problem)}
    return tile if tile.group > 0 and _without_order(tile) in known else None


def _without_order(tile: Tile) -> tuple[Any, ...]:
    return tuple(sorted((name, value) for name, value in asdict(tile).items() if name != "group"))


def mma_tile_of(entry: Entry, problem: Problem, device: MmaDevice) -> MmaTile | None:
    """Return the tile of gemm_mma.cu of an entry; None where this kernel no longer has it."""
    try:
        tile = MmaTile(**entry.configuration)
    except TypeError:
        return None
    return tile if tile in set(mma_candidates(problem, device)) else None


def best_tile(problem: Problem, kind: EpilogueKind, device: int) -> Tile | None:
    """Return the tile of gemm_sm90.cu timed fastest for a problem on GPU `device`; None where none was timed."""
    entry = best_entry(key_of(SM90, problem, kind), device)
    return None if entry is None else tile_of(entry, problem)


def best_mma_tile(problem: Problem, kind: EpilogueKind, device: int) -> MmaTile | None:
    """Return the tile of gemm_mma.cu timed fastest for a problem on GPU `device`; None where none was timed."""
    entry = best_entry(key_of(MMA, problem, kind), device)
    if entry is None:
        return None
    gpu = present_gpu(device)
    return mma_tile_of(entry, problem, mma_device(gpu.architecture, gpu.multiprocessors))


def best_entry(key: Key, device: int) -> Entry | None:
    """Return what is known of a key on GPU `device`, whatever kernel it is of; None where nothing is."""
    return table(present_gpu(device).name, local=environment()).find(key)


@lru_cache(maxsize=1)
def environment() -> str | None:
    """Return the driver and the compiler that timings of this machine depend on; None without a driver."""
    if not is_available():
        return None
    try:
        driver = int(hardware.cupy().cuda.runtime.driverGetVersion())
    except Exception:
        # Without a driver each version of CUDA fails in its own way.
        return None
    return f"driver-{driver}-nvrtc-{'.'.join(map(str, nvrtc_version()))}" if driver else None


@lru_cache(maxsize=64)
def table(gpu: str, *, local: str | None, cache: Path = DEFAULT_CACHE) -> TimingTable:
    """Return what is known of a GPU: what ships, under what was timed here.

    gpu: its name in `gpus.py`. local: the environment whose timings count too; None for what ships alone.
    """
    known = _read(SHIPPED / f"{_slug(gpu)}.json")
    if local is None:
        return known
    found = {
        key: entry
        for key, entry in _read(_file(gpu, local, cache)).entries.items()
        if entry.source == source_hash(key.kernel)
    }
    return known.merged(TimingTable(found))


def remember(
    gpu: str,
    kernel: str,
    problem: Problem,
    kind: EpilogueKind,
    timed: Mapping[Any, Timing],
    *,
    local: str | None = None,
    cache: Path = DEFAULT_CACHE,
) -> Path:
    """Write the fastest of the timed tiles into this user's cache, and return the file.

    Several processes may do so at once: each adds its entries to what the others wrote.

    Raises:
        FileError: the cache cannot be written.
    """
    tile, timing = min(timed.items(), key=lambda pair: pair[1].median_us)
    entry = Entry(
        configuration=asdict(tile),
        time_us=round(timing.median_us, 3),
        q1_us=round(timing.q1_us, 3),
        q3_us=round(timing.q3_us, 3),
        m=problem.m,
        source=source_hash(kernel),
    )
    local = local or environment() or "unknown"
    path = _file(gpu, local, cache)
    add_entries(path, TimingTable({key_of(kernel, problem, kind): entry}), {"gpu": gpu, "environment": local})
    forget()
    return path


def add_entries(path: Path, new: TimingTable, facts: Mapping[str, Any]) -> None:
    """Add entries to a file, under a lock, whole or not at all.

    Raises:
        FileError: it cannot be written.
    """
    make_cache(path.parent)
    with _locked(path.with_suffix(".lock")):
        merged = _read(path).merged(new)
        with atomic_write(path) as temporary:
            temporary.write_text(merged.to_json(facts))


def forget() -> None:
    """Read the files again when they are next asked."""
    table.cache_clear()


@lru_cache(maxsize=64)
def source_hash(kernel: str) -> str:
    """Return the hash of a kernel's source and headers: timings of another kernel are no timings of this one."""
    digest = hashlib.sha256()
    source = INCLUDE.parent / f"{kernel}.cu"
    for path in (*([source] if source.exists() else []), *sorted(INCLUDE.glob("*.h"))):
        data = path.read_bytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _file(gpu: str, local: str, cache: Path) -> Path:
    return cache / f"{_slug(gpu)}-{_slug(local)}.json"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _read(path: Path) -> TimingTable:
    try:
        return TimingTable.from_json(path.read_text())
    except FileNotFoundError:
        return TimingTable()
    except (OSError, ValueError) as error:
        # Products must not fail for want of a timing.
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"{path}: no timing table can be read there ({reason}); delete it, and tune again.", stacklevel=2
        )
        return TimingTable()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, where the system has such locks: without them the last writer's entries stay."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    try:
        lock = path.open("a")
    except OSError as error:
        raise FileError(
            f"{path}: cannot be written ({(error.strerror or str(error)).lower()}); check its permissions."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

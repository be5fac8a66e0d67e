"""How cuda/statistics.cu is launched for a tensor, and how what it counted is read.

Pure functions, without CuPy: what the tests run is what a GPU runs.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import KernelError
from quantkit.statistics.counting import Counts, count_weighted
from quantkit.statistics.summing import ChannelSums

SOURCE = Path(__file__).parent / "cuda" / "statistics.cu"
KERNEL, FOLD_KERNEL = "statistics", "fold_channels"

INPUTS = {"float32": "INPUT_F32", "float16": "INPUT_F16", "bfloat16": "INPUT_BF16"}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Bits of a float32 that a type's fine keys leave out.
_FINE_SHIFT = {"float32": 12, "float16": 13, "bfloat16": 16}
# As in the kernel.
_COARSE = 20 * 128
_WORDS = 8
_BELOW = 1 << 16
ABOVE = 1 << 20  # counters of what lies above the keys, by the top 20 bits

# Threads of a block, of which a multiprocessor runs two: as many as have registers. By the bytes of an element.
_FEW_REGISTERS = 512
_RUNS_THREADS = {4: 448, 2: 384}
_COLUMNS_THREADS = {4: 384, 2: 320}
# Runs shorter than this many bytes are read an element a lane.
_SHORT_BYTES = 512
# Elements that a warp takes at a time: few enough for all warps to have some, enough to be worth its sums. Items of
# columns, which blocks take as they come, of a block.
_LEAST, _MOST = 1024, 16384
_ROUNDS = 6
_FOLD_WARPS = 8


@dataclass(frozen=True, kw_only=True)
class StatisticsLaunch:
    """One launch of `statistics`, and of `fold_channels` after it.

    Attributes:
        defines: the macros.
        grid, block, shared_bytes: blocks, threads of a block and its shared memory.
        items, pieces, piece, rows, width: the kernel's parameters.
        channels: 0 where no channels are reduced.
        groups: parts of a channel, in `pieces` each.
        out_words: uint32 that the counts take, zeros before the launch.
    """

    defines: dict[str, str | int]
    grid: int
    block: int
    shared_bytes: int
    items: int
    pieces: int
    piece: int
    rows: int
    width: int
    channels: int
    groups: int
    out_words: int

    @property
    def parts(self) -> int:
        """Parts of channels: two float64 and two int32 each."""
        return self.groups * self.pieces * self.channels

    @property
    def fold_grid(self) -> int:
        """Blocks of `fold_channels`, of 256 threads each."""
        return -(-self.channels // _FOLD_WARPS)


def launch_of(
    cube: tuple[int, int, int],
    dtype: str,
    *,
    channels: bool,
    aligned: bool = True,
    multiprocessors: int = 132,
    threads: int | None = None,
) -> StatisticsLaunch:
    """Return the launch that reduces a tensor of shape (before, channels, behind), not empty.

    The arguments of `statistics` are the buffer, the tensor's place in it (elements, int64), counts (uint32 of
    `out_words`), what lies above them (int32 of ABOVE), both zeros; sums (float64 of 2 · `parts`), limits (int32 of
    2 · `parts`); the exponent to begin with (int32); before (int64), channels (int32), behind (int64); items, pieces
    (int32), piece, rows (int64), width (int32). Those of `fold_channels` are sums, limits, found (float64 of
    3 · channels), channels, groups, pieces (int32).

    Args:
        cube: its shape.
        dtype: float32, float16 or bfloat16.
        channels: whether the middle axis is reduced.
        aligned: the tensor starts at a multiple of 16 bytes.
        multiprocessors: of the GPU; two blocks run on each.
        threads: of a block; None for what is fastest.

    Raises:
        KernelError: another type, or more elements than the counters hold.
    """
    if dtype not in INPUTS:
        raise KernelError(f"statistics: {dtype} has no kernel; use {', '.join(INPUTS)}.")
    before, count, behind = cube
    size = before * count * behind
    if size >= 1 << 32:
        raise KernelError(f"statistics: {size} elements are more than 32 bits count; use a smaller batch.")
    if not channels or count == 1:
        before, behind = 1, size
        count = 1
    if behind == 1 and channels and count > 1:
        return _columns(before, count, dtype, aligned, 2 * multiprocessors, threads)
    return _runs((before, count, behind), dtype, channels, 2 * multiprocessors, threads)


def cube_of(cube: tuple[int, int, int], launch: StatisticsLaunch) -> tuple[int, int, int]:
    """Return the shape that the launch's arguments tell: that of one run where there is one channel."""
    before, count, behind = cube
    if launch.channels <= 1 and not (launch.channels and count > 1):
        return 1, 1, before * count * behind
    return cube


def _runs(
    cube: tuple[int, int, int], dtype: str, channels: bool, blocks: int, threads: int | None
) -> StatisticsLaunch:
    before, count, behind = cube
    short = before * count > 1 and behind * _BYTES[dtype] < _SHORT_BYTES
    threads = threads or (_FEW_REGISTERS if short else _RUNS_THREADS[_BYTES[dtype]])
    warps = threads // 32
    wanted = min(max(before * count * behind // (4 * warps * blocks), _LEAST), _MOST)
    pieces = 1
    if behind > wanted:
        pieces = -(-behind // wanted)
        # Whole rounds of a warp.
        step = 64 * 16 // _BYTES[dtype]
        piece = -(-behind // (pieces * step)) * step
        pieces, rows = -(-behind // piece), 1
    else:
        piece, rows = behind, min(max(wanted // behind, 1), before)
    groups = -(-before // rows)
    items = groups * count * pieces
    return _launch(
        dtype,
        mode="SHORT_RUNS" if short else "RUNS",
        channels=count if channels else 0,
        vector=1,
        threads=threads,
        grid=min(blocks, -(-items // warps)),
        items=items,
        pieces=pieces,
        piece=piece,
        rows=rows,
        width=1,
        groups=groups,
    )


def _columns(
    before: int, count: int, dtype: str, aligned: bool, blocks: int, threads: int | None
) -> StatisticsLaunch:
    vector = aligned and count % 4 == 0
    threads = threads or (_COLUMNS_THREADS[_BYTES[dtype]] if vector else _FEW_REGISTERS)
    across = count // 4 if vector else count
    stripes = -(-across // 32)
    width = -(-across // stripes)
    slots = threads // width
    most = max(1, min(-(-before // (4 * slots)), _ROUNDS * blocks // stripes))
    # Of the groups of rows that keep all blocks busy, the fewest: each has a part of every channel. But many enough
    # for blocks to end together, who take them as they come.
    groups = min(range(-(-most // 2), most + 1), key=lambda g: (_waste(stripes * g, blocks), g))
    rows = -(-before // groups)
    groups = -(-before // rows)
    return _launch(
        dtype,
        mode="COLUMNS",
        channels=count,
        vector=int(vector),
        threads=threads,
        grid=min(blocks, stripes * groups),
        items=stripes * groups,
        pieces=1,
        piece=1,
        rows=rows,
        width=width,
        groups=groups,
    )


def _waste(items: int, blocks: int) -> float:
    """The share of time that blocks wait for the last, in steps of a twentieth."""
    return round(20 * (1 - items / (-(-items // blocks) * blocks)))


def _launch(
    dtype: str,
    *,
    mode: str,
    channels: int,
    vector: int,
    threads: int,
    grid: int,
    items: int,
    pieces: int,
    piece: int,
    rows: int,
    width: int,
    groups: int,
) -> StatisticsLaunch:
    row = _keys(dtype) + 4
    return StatisticsLaunch(
        defines={
            "INPUT": INPUTS[dtype],
            "MODE": mode,
            "CHANNELS": int(channels > 0),
            "VECTOR": vector,
            "THREADS": threads,
        },
        grid=grid,
        block=threads,
        shared_bytes=2 * row * 4 + (24 * threads if mode == "COLUMNS" else 0) + threads // 32 * 8 + 20,
        items=items,
        pieces=pieces,
        piece=piece,
        rows=rows,
        width=width,
        channels=channels,
        groups=groups,
        out_words=_WORDS + 2 * row + _BELOW,
    )


# ---- reading -----------------------------------------------------------------------------------------------------


def _keys(dtype: str) -> int:
    return _COARSE + (4 << (23 - _FINE_SHIFT[dtype]))


def table_words(dtype: str) -> int:
    """Return how many words of the counts must be read; the rest only if `needs_below`."""
    return _WORDS + 2 * (_keys(dtype) + 4)


def needs_below(out: NDArray[np.uint32]) -> bool:
    """Whether values lie below the keys."""
    return bool(out[2])


def needs_above(out: NDArray[np.uint32]) -> bool:
    """Whether values lie above the keys: `above` must be read, and made zeros again."""
    return bool(out[3])


def counts_of(
    out: NDArray[np.uint32],
    below: NDArray[np.uint32] | None,
    above: NDArray[np.int32] | None,
    *,
    size: int,
    dtype: str,
) -> Counts:
    """Return the counts that a launch left.

    Args:
        out: its first words, `table_words` of them.
        below: the words after them, where `needs_below`.
        above: the counters of what lies above, where `needs_above`.
        size: elements of the tensor.
        dtype: their type.
    """
    nans, infinities = int(out[0]), int(out[1])
    exponent = int(out[6:7].view(np.int32)[0])
    table = out[_WORDS:].astype(np.int64).reshape(2, -1)
    codes, weights = [], []
    starts = _starts(exponent, dtype)
    for sign in (0, 1):
        used = np.flatnonzero(table[sign, : starts.size])
        codes.append(starts[used] | np.uint32(sign << 31))
        weights.append(table[sign, used])
    # The last slots hold what has no key: zeros, and what is counted elsewhere.
    zeros = int(table[:, starts.size].sum()) - int(out[:4].sum())
    for rare, shift in ((below, 16), (above, 12)):
        if rare is not None:
            used = np.flatnonzero(rare)
            codes.append((used << shift).astype(np.uint32))
            weights.append(rare[used].astype(np.int64))
    return count_weighted(
        np.concatenate(codes),
        np.concatenate(weights),
        size=size,
        zeros=zeros,
        nans=nans,
        infinities=infinities,
        limits=_limits(out),
        exponent=exponent,
    )


def _starts(exponent: int, dtype: str) -> NDArray[np.uint32]:
    """The bits at which every key begins."""
    shift = _FINE_SHIFT[dtype]
    base = (exponent - 3 + 127) << 23
    coarse = (np.arange(-_COARSE, 0) + (base >> 16)) << 16
    fine = (np.arange(4 << (23 - shift)) + (base >> shift)) << shift
    return np.concatenate([coarse, fine]).astype(np.uint32)


def _limits(out: NDArray[np.uint32]) -> tuple[float, float]:
    """The least and the largest finite value."""
    if out[4] == 0:
        return np.inf, -np.inf
    places = np.array([~out[5], out[4]], np.uint32) ^ np.uint32(1 << 31)
    values = places.view(np.int32)
    bits = values ^ ((values >> 31) & 0x7FFFFFFF)
    lo, hi = bits.view(np.float32).tolist()
    return lo, hi


def sums_of(found: NDArray[np.float64], launch: StatisticsLaunch, size: int) -> ChannelSums:
    """Return the sums of channels that `fold_channels` left."""
    n = launch.channels
    limits = found[2 * n :].view(np.float32).reshape(n, 2)
    return ChannelSums(
        min=limits[:, 0].copy(),
        max=limits[:, 1].copy(),
        sum=found[:n].copy(),
        abs_sum=found[n : 2 * n].copy(),
        count=size // n,
    )

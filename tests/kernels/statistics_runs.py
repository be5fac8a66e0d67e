"""One run of statistics.cu beside what quantkit.statistics makes of the same values."""

from pathlib import Path

import ml_dtypes
import numpy as np

from quantkit.kernels.statistics_launch import (
    ABOVE,
    FOLD_KERNEL,
    KERNEL,
    SOURCE,
    StatisticsLaunch,
    counts_of,
    cube_of,
    launch_of,
    needs_above,
    needs_below,
    sums_of,
    table_words,
)
from quantkit.statistics.counting import Counts
from quantkit.statistics.reduction import reduce_cube
from quantkit.statistics.summing import ChannelSums

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def run_statistics(
    machine,
    cube: np.ndarray,
    *,
    channels: bool = True,
    exponent: int = -100,
    offset: int = 0,
    source: Path = SOURCE,
    launch: StatisticsLaunch | None = None,
) -> tuple[ChannelSums | None, Counts]:
    """What the kernel finds in a cube that begins `offset` elements into its buffer."""
    dtype = cube.dtype.name
    aligned = offset * cube.itemsize % 16 == 0
    # Few blocks, threads and elements a block: what is one turn for a GPU must be several here.
    launch = launch or launch_of(
        cube.shape, dtype, channels=channels, aligned=aligned, multiprocessors=1, threads=128
    )
    buffer = np.full(offset + cube.size, 1, cube.dtype)
    buffer[offset:] = cube.reshape(-1)
    out, above = np.zeros(launch.out_words, np.uint32), np.zeros(ABOVE, np.int32)
    parts = max(launch.parts, 1)
    sums, limits = np.full(2 * parts, np.pi), np.full(2 * parts, 77, np.int32)
    before, count, behind = cube_of(cube.shape, launch)
    machine.launch(
        source,
        KERNEL,
        buffer.view(np.uint8),
        np.int64(offset),
        out,
        above,
        sums,
        limits,
        np.int32(exponent),
        np.int64(before),
        np.int32(count),
        np.int64(behind),
        np.int32(launch.items),
        np.int32(launch.pieces),
        np.int64(launch.piece),
        np.int64(launch.rows),
        np.int32(launch.width),
        defines=launch.defines,
        grid=launch.grid,
        block=launch.block,
        shared_bytes=launch.shared_bytes,
    )
    words = table_words(dtype)
    counts = counts_of(
        out[:words],
        out[words:] if needs_below(out) else None,
        above if needs_above(out) else None,
        size=cube.size,
        dtype=dtype,
    )
    if not launch.channels:
        return None, counts
    found = np.full(3 * launch.channels, np.pi)
    machine.launch(
        source,
        FOLD_KERNEL,
        sums,
        limits,
        found,
        np.int32(launch.channels),
        np.int32(launch.groups),
        np.int32(launch.pieces),
        defines=launch.defines,
        grid=launch.fold_grid,
        block=256,
    )
    return sums_of(found, launch, cube.size), counts


def assert_as_numpy(machine, cube: np.ndarray, *, channels: bool = True, **options) -> None:
    """Counts and limits are NumPy's bit for bit, sums to 1e-12."""
    sums, counts = run_statistics(machine, cube, channels=channels, **options)
    with np.errstate(invalid="ignore", over="ignore"):
        values = cube.astype(np.float32)
    want_sums, want = reduce_cube(values, channels=channels, exponent=options.get("exponent", -100))
    assert want is not None
    names = ("size", "zeros", "nans", "infinities", "min", "max", "exponent")
    assert [repr(getattr(counts, n)) for n in names] == [repr(getattr(want, n)) for n in names]
    for one, two in ((counts.positive, want.positive), (counts.negative, want.negative)):
        assert one.first == two.first
        np.testing.assert_array_equal(one.prefixes, two.prefixes)
        np.testing.assert_array_equal(one.linear, two.linear)
    if want_sums is not None:
        assert sums is not None and sums.count == want_sums.count
        assert sums.min.tobytes() == want_sums.min.tobytes()
        assert sums.max.tobytes() == want_sums.max.tobytes()
        np.testing.assert_allclose(sums.abs_sum, want_sums.abs_sum, rtol=1e-12)
        both = np.isfinite(want_sums.sum)
        np.testing.assert_array_equal(sums.sum[~both], want_sums.sum[~both])
        assert np.all(np.abs(sums.sum[both] - want_sums.sum[both]) <= 1e-12 * want_sums.abs_sum[both])

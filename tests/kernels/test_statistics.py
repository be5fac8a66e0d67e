"""statistics.cu against quantkit.statistics: counts and limits bit for bit, sums to 1e-12."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.errors import KernelError
from quantkit.kernels.emulator import Mode, find_compiler, load
from quantkit.kernels.statistics_launch import launch_of

from .backends import EmulatorBackend
from .statistics_runs import DTYPES, assert_as_numpy, run_statistics

needs_emulator = pytest.mark.skipif(find_compiler() is None, reason="the emulator needs a C++ compiler")

# What a tensor may hold, drawn by the number of elements.
KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "relu": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
    "negative": lambda rng, n: -np.abs(rng.standard_normal(n)),
    "signed zeros": lambda rng, n: rng.choice([0.0, -0.0], n),
    "growing": lambda rng, n: rng.standard_normal(n) * np.exp2(np.linspace(-140, 126, n)),
    "one outlier": lambda rng, n: np.where(np.arange(n) == n // 2 + 1, 3e38, 1e-30 * rng.standard_normal(n)),
    "outlier below zero": lambda rng, n: np.where(np.arange(n) == n // 3, -60000.0, rng.standard_normal(n)),
    "subnormal": lambda rng, n: rng.integers(-5, 6, n) * 2.0**-149,
    "softmax": lambda rng, n: np.exp(-30 * rng.random(n)),
    "mask": lambda rng, n: rng.choice([0.0, -np.inf], n),
    "a few holes": lambda rng, n: np.where(rng.random(n) < 1e-2, np.nan, rng.standard_normal(n)),
    "nothing finite": lambda rng, n: rng.choice([np.nan, np.inf, -np.inf], n),
}
# A flat tensor; runs that are cut, that are taken whole, that are short; columns by fours, and one by one.
CUBES = [
    ((1, 1, 5003), False),
    ((2, 3, 2500), True),
    ((7, 5, 300), True),
    ((9, 70, 49), True),
    ((5, 3, 2), True),
    ((90, 264, 1), True),
    ((61, 35, 1), True),
]


def drawn(kind: str, cube: tuple[int, int, int], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(len(kind) + cube[0])
    with np.errstate(over="ignore"):
        return KINDS[kind](rng, int(np.prod(cube))).astype(np.float32).astype(DTYPES[dtype]).reshape(cube)


@pytest.mark.parametrize("index", range(len(CUBES)), ids=lambda i: str(CUBES[i][0]))
def test_every_shape_is_read_and_counted_as_numpy_counts_it(machine, index):
    """Every kind of value meets every type, and most ways to read a tensor."""
    (cube, channels), dtype = CUBES[index], list(DTYPES)[index % 3]
    for kind in list(KINDS)[index % 2 :: 2]:
        assert_as_numpy(machine, drawn(kind, cube, dtype), channels=channels)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cube", "channels"), CUBES, ids=str)
def test_every_kind_of_value_in_every_shape_is_counted_as_numpy_counts_it(machine, cube, channels, dtype):
    for kind in KINDS:
        assert_as_numpy(machine, drawn(kind, cube, dtype), channels=channels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_may_start_anywhere(machine, dtype):
    for offset in (1, 2, 3, 5, 7):
        for cube, channels in (((1, 1, 203), False), ((3, 2, 301), True), ((9, 8, 1), True)):
            assert_as_numpy(machine, drawn("normal", cube, dtype), channels=channels, offset=offset)


def test_a_tensor_of_one_element_is_counted(machine):
    for value in (0.0, -0.0, 1.5, np.nan, -np.inf, 2.0**-149):
        for channels in (False, True):
            assert_as_numpy(machine, np.full((1, 1, 1), value, np.float32), channels=channels)


def test_the_exponent_given_is_kept_where_values_are_smaller(machine):
    for exponent in (-100, 0, 5, 127):
        assert_as_numpy(machine, drawn("normal", (2, 3, 300), "float32"), exponent=exponent)
        assert_as_numpy(machine, drawn("softmax", (2, 3, 300), "float16"), exponent=exponent)


@needs_emulator
@given(
    cube=st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(1, 40)).flatmap(
        lambda shape: hnp.arrays(np.uint32, shape)
    ),
    dtype=st.sampled_from(sorted(DTYPES)),
    channels=st.booleans(),
    exponent=st.integers(-100, 127),
    offset=st.integers(0, 9),
    mode=st.sampled_from(Mode),
)
@settings(max_examples=60)
def test_any_bits_in_any_shape_are_counted_as_numpy_counts_them(
    cube, dtype, channels, exponent, offset, mode
):
    values = cube.view(np.float32) if dtype == "float32" else cube.astype(np.uint16).view(DTYPES[dtype])
    assert_as_numpy(EmulatorBackend(mode), values, channels=channels, exponent=exponent, offset=offset)


@needs_emulator
def test_neither_the_order_of_threads_nor_the_number_of_blocks_changes_a_count():
    x = drawn("growing", (40, 24, 50), "float32")
    found = []
    for multiprocessors in (1, 2, 5):
        launch = launch_of(x.shape, "float32", channels=True, multiprocessors=multiprocessors, threads=64)
        sums, counts = run_statistics(EmulatorBackend(Mode.SHUFFLED), x, launch=launch)
        found.append((sums, counts))
    for sums, counts in found[1:]:
        np.testing.assert_array_equal(counts.positive.linear, found[0][1].positive.linear)
        np.testing.assert_array_equal(counts.negative.prefixes, found[0][1].negative.prefixes)
        np.testing.assert_array_equal(sums.min, found[0][0].min)
        np.testing.assert_allclose(sums.abs_sum, found[0][0].abs_sum, rtol=1e-13)


@needs_emulator
@pytest.mark.parametrize("cube", [(6, 5, 300), (90, 264, 1)], ids=str)
def test_sums_are_the_same_bits_whatever_the_order_of_threads(cube):
    x = drawn("normal", cube, "float32")
    launch = launch_of(x.shape, "float32", channels=True, multiprocessors=1, threads=128)

    class Seeded(EmulatorBackend):
        def launch(self, source, name, *arguments, defines=None, **options):
            return load(source, name, defines).launch(
                *arguments, mode=Mode.SHUFFLED, seed=self.seed, **options
            )

    totals = set()
    for seed in (1, 2, 3):
        machine = Seeded(Mode.SHUFFLED)
        machine.seed = seed
        sums, _ = run_statistics(machine, x, launch=launch)
        totals.add((sums.sum.tobytes(), sums.abs_sum.tobytes()))
    assert len(totals) == 1


# --- the launch ---------------------------------------------------------------------------------------------


@given(
    cube=st.tuples(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 300_000)).filter(
        lambda c: np.prod(c, dtype=np.float64) < 2**32
    ),
    dtype=st.sampled_from(sorted(DTYPES)),
    channels=st.booleans(),
)
def test_every_element_has_one_item(cube, dtype, channels):
    before, count, behind = cube
    launch = launch_of(cube, dtype, channels=channels)
    if launch.defines["MODE"] == "COLUMNS":
        across = count // 4 if launch.defines["VECTOR"] else count
        stripes = -(-across // launch.width)
        assert launch.items == stripes * launch.groups
        assert (stripes - 1) * launch.width < across <= stripes * launch.width <= launch.block * stripes
    else:
        if launch.channels == 0 or count == 1:
            before, count, behind = 1, 1, before * count * behind
        assert launch.items == launch.groups * count * launch.pieces
        assert (launch.pieces - 1) * launch.piece < behind <= launch.pieces * launch.piece
    assert (launch.groups - 1) * launch.rows < before <= launch.groups * launch.rows
    assert 1 <= launch.grid <= 2 * 132
    # Two blocks of it on an H200, one on every GPU.
    assert 2 * (launch.shared_bytes + 1024) <= 228 * 1024 and launch.shared_bytes <= 99 * 1024


def test_an_unknown_type_and_an_endless_tensor_are_refused():
    with pytest.raises(KernelError, match=r"statistics: float64 has no kernel"):
        launch_of((1, 1, 5), "float64", channels=False)
    with pytest.raises(KernelError, match=r"more than 32 bits count; use a smaller batch"):
        launch_of((1, 1 << 16, 1 << 16), "float32", channels=False)


def test_the_grid_has_no_more_blocks_than_it_has_work_for():
    launch = launch_of((1, 1, 100_000), "float32", channels=False)
    assert launch.grid * launch.block // 32 <= launch.items + launch.block // 32
    assert dataclasses.replace(launch, channels=3).fold_grid == 1

"""The two seed kernels, whole: exact in every mode on shapes that fill no tile."""

import numpy as np
import pytest

from quantkit.kernels.emulator import Mode

from ..backends import EmulatorBackend
from ..layouts import product, small_integers
from .seed import mma_tile, wgmma_tile

# M, N and bytes of K (a multiple of 16, as packing leaves it).
SHAPES = [(1, 8, 16), (64, 64, 64), (130, 70, 272), (65, 130, 48), (17, 257, 1040)]


def operands(type_name: str, m: int, n: int, row_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(m + n + row_bytes)
    k = row_bytes // (2 if type_name in ("BF16", "F16") else 1)
    return small_integers(rng, (m, k), type_name), small_integers(rng, (n, k), type_name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mma_tile_is_exact_for_int8(machine, shape):
    a, b = operands("S8", *shape)
    np.testing.assert_array_equal(mma_tile(machine, "S8", a, b), product(a, b))


@pytest.mark.parametrize("type_name", ["E4M3", "E5M2", "BF16", "F16"])
def test_mma_tile_is_exact_for_small_integers_of_every_type(machine, type_name):
    a, b = operands(type_name, 70, 50, 208)
    np.testing.assert_array_equal(mma_tile(machine, type_name, a, b, stages=4), product(a, b))


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("shape", [*SHAPES, (400, 200, 640)], ids=str)
def test_wgmma_tile_is_exact_for_int8(machine, shape, cluster):
    a, b = operands("S8", *shape)
    np.testing.assert_array_equal(wgmma_tile(machine, "S8", a, b, cluster=cluster), product(a, b))


@pytest.mark.parametrize("type_name", ["E4M3", "E5M2", "BF16", "F16"])
def test_wgmma_tile_is_exact_for_small_integers_of_every_type(machine, type_name):
    a, b = operands(type_name, 150, 100, 400)
    d = wgmma_tile(machine, type_name, a, b, tile_n=128, stages=2, cluster=2)
    np.testing.assert_array_equal(d, product(a, b))


@pytest.mark.parametrize("tile_n", [16, 256])
def test_wgmma_tile_takes_narrow_and_wide_tiles(machine, tile_n):
    a, b = operands("S8", 200, 300, 272)
    np.testing.assert_array_equal(wgmma_tile(machine, "S8", a, b, tile_n=tile_n, stages=2), product(a, b))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_seed_of_the_scheduler_finds_fault_with_the_seed_kernels(compiler, seed):
    """Twenty more orders of threads and copies, the cluster's included."""

    class Seeded(EmulatorBackend):
        def launch(self, *arguments, **options):
            return super().launch(*arguments, seed=seed, **options)

    a, b = operands("S8", 300, 200, 656)
    for mode in (Mode.SHUFFLED, Mode.BOTH):
        for run in (mma_tile, wgmma_tile, lambda *args: wgmma_tile(*args, cluster=2)):
            np.testing.assert_array_equal(run(Seeded(mode), "S8", a, b), product(a, b))

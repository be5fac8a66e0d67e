"""Bugs planted in gemm_w4_mma.cu and in the header that stores its tiles: each is caught."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.kernels.compile import INCLUDE
from quantkit.kernels.w4.layout import pack4
from quantkit.kernels.w4.mma_heuristics import W4MmaTile
from quantkit.kernels.w4.mma_launch import SOURCE
from quantkit.kernels.w4.reference import w4_reference

from ..layouts import small_integers
from ..mutations import TILES, assert_caught, outcomes
from .mma import run_w4_mma
from .weights import DTYPES, weight

STORE = INCLUDE / "tile_store.h"


@dataclass(frozen=True)
class Run:
    """A product that is ragged in every direction, with its epilogue."""

    m: int
    n: int
    k: int
    kind: tuple[str, int]
    zeros: bool
    output: str
    tile: W4MmaTile

    @cached_property
    def operands(self) -> tuple[np.ndarray, Any, dict[str, Any], np.ndarray]:
        rng = np.random.default_rng(self.k)
        packed = pack4(weight(rng, self.n, self.k, *self.kind, zeros=self.zeros))
        a = small_integers(rng, (self.m, self.k), "BF16").astype(DTYPES["bfloat16"])
        options = {
            "output": self.output,
            "row_scale": (rng.integers(1, 4, self.m) / 8).astype(np.float32),
            "bias": rng.standard_normal(self.n).astype(np.float32),
        }
        return a, packed, options, w4_reference(a, packed, **options)

    def check(self, machine: Any, source: Path) -> None:
        a, packed, options, want = self.operands
        found = run_w4_mma(machine, a, packed, self.tile, source=source, gap=48, **options)
        np.testing.assert_array_equal(found, want)


# Slices, warps side by side, four columns stored at a time; and zero points, scales within a slab, single columns.
SLICED = Run(
    70, 140, 700, ("int4", 128), False, "bfloat16",
    W4MmaTile(tile_w=64, tile_a=64, warps_w=2, warps_a=1, slabs=2, stages=3, slices=2, order=2),
)  # fmt: skip
ZEROS = Run(
    3, 131, 601, ("uint4", 32), True, "float32", W4MmaTile(tile_w=128, tile_a=8, warps_w=4, slabs=4, stages=2)
)

MUTATIONS: dict[str, tuple[Path, str, str, Run, str]] = {
    "wait leaves one group too many": (
        SOURCE, "cp_async_wait<STAGES - 2>();\n            block", "cp_async_wait<STAGES - 1>();\n            block",
        SLICED, "every",
    ),
    "no wait before the first stage": (
        SOURCE, "cp_async_wait<STAGES - 2>();\n  block_sync();", "block_sync();", ZEROS, "every"
    ),
    "no barrier in the loop": (SOURCE, "block_sync();  // everyone's", "// everyone's", SLICED, "every"),
    "no commit for an empty group": (
        SOURCE, "if (step + STAGES - 1 < steps) load(step + STAGES - 1);\n    cp_async_commit();",
        "if (step + STAGES - 1 < steps) { load(step + STAGES - 1); cp_async_commit(); }", SLICED, "every",
    ),
    "fragments of the depth before": (SOURCE, "of_a[depth % SETS][j]", "of_a[(depth + 1) % SETS][j]", SLICED, "every"),
    "codes of the slab before": (
        SOURCE, "fetch_codes(at, (slab + 1) % SLABS)", "fetch_codes(at, slab)", ZEROS, "every"
    ),
    "A read without its swizzle": (
        SOURCE, "swizzled(row_of_lane, depth * 2 + chunk_of_lane)",
        "row_of_lane * ROW + (depth * 2 + chunk_of_lane) * 16", SLICED, "every",
    ),
    "K tail without a limit": (SOURCE, "left < 16 ? left : 16", "16", ZEROS, "every"),
    "rows beyond the end are read": (SOURCE, "m0 + row >= m_size || left < 0", "left < 0", SLICED, "every"),
    "groups beyond the weight are read": (
        SOURCE, "plane < planes ? count * BLOCK_BYTES : 0", "plane < planes ? PLANE_SIZE : 0", ZEROS, "every"
    ),
    "planes beyond the weight are read": (
        SOURCE, "plane < planes ? count * BLOCK_BYTES : 0", "count * BLOCK_BYTES", ZEROS, "every"
    ),
    "scales of a stage's first slab for all": (
        SOURCE, "const int64_t side = slab / GROUP_SLABS;", "const int64_t side = first_slab / GROUP_SLABS;",
        ZEROS, "every",
    ),
    "one zero point for a slab": (SOURCE, "pair * GROUPS + g)", "pair * GROUPS)", ZEROS, "every"),
    "scales of the pair of rows before": (SOURCE, "+ pair * PAIR_BYTES", "+ (pair ^ 1) * PAIR_BYTES", SLICED, "every"),
    "a slice starts where the last began": (
        SOURCE, "int64_t(all_steps) * (slice + 1) / slices) - first_step",
        "int64_t(all_steps) * (slice + 2) / slices) - first_step", SLICED, "every",
    ),
    "sums over a ring that is still read": (
        SOURCE, "block_sync();  // the ring is read", "// the ring is read", ZEROS, "every"
    ),
    "a piece over the one before": (SOURCE, "if (j0 > 0) block_sync();", "", SLICED, "some"),
    "pieces all in the first one's rows": (SOURCE, "* WARP_A + j0 * 8 +", "* WARP_A +", SLICED, "every"),
    "rows of W in the other half": (SOURCE, "lane / 4 + e / 2 * 8", "lane / 4 + (1 - e / 2) * 8", ZEROS, "every"),
    "powers of two not taken back": (SOURCE, "return rebased(x);", "return x;", SLICED, "every"),
    "tiles in another order": (
        TILES, "start + within % height, within / height", "start + within / height, within % height", SLICED, "every"
    ),
    "sums not released": (STORE, "atomic_add_acq_rel(arrivals", "atomic_add(arrivals", SLICED, "some"),
    "one slice too few is waited for": (
        STORE, "(base) == slices - 1;", "(base) == slices - 2;", SLICED, "some"
    ),
    "own sums added twice": (
        STORE, "QK_UNROLL for (int e = 0; e < 4; e++) sum[i][e] = 0;\n  for (int s", "{}\n  for (int s", SLICED, "every"
    ),
    "slices over each other": (STORE, "* slices * (Count", "* (Count", SLICED, "some"),
    "columns of the tile before": (STORE, "column = n0 + first;", "column = first;", SLICED, "every"),
}  # fmt: skip


def damaged(name: str, folder: Path) -> Path:
    """The kernel with one change in it, or in the header beside it, which its compiler finds first."""
    file, before, after, _, _ = MUTATIONS[name]
    texts = {path: path.read_text() for path in (SOURCE, STORE, TILES)}
    assert texts[file].count(before) >= 1, f"{file.name} no longer has {before!r}"
    texts[file] = texts[file].replace(before, after, 1)
    for path, text in texts.items():
        # Builds are kept by what the source says: a word of its own keeps this one from an undamaged one's place.
        (folder / path.name).write_text(f"// {name}\n{text}")
    return folder / SOURCE.name


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_caught(compiler, name, tmp_path):
    _, _, _, run, where = MUTATIONS[name]
    source = damaged(name, tmp_path)
    assert_caught(outcomes(lambda machine: run.check(machine, source)), where)


@pytest.mark.parametrize("run", [SLICED, ZEROS], ids=["sliced", "zeros"])
def test_the_kernel_is_exact_before_it_is_damaged(compiler, run):
    assert set(outcomes(lambda machine: run.check(machine, SOURCE)).values()) == {"exact"}

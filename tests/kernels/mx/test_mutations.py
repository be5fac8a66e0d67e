"""Bugs planted in gemm_blocks_sm120.cu: each is caught, by a report or by a wrong result."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.kernels.mx.heuristics import MxTile
from quantkit.kernels.mx.launch import SOURCE
from quantkit.kernels.mx.layout import PackedMx, pack_mx
from quantkit.kernels.mx.reference import mx_reference

from ..mutations import assert_caught, mutated, outcomes
from .runs import run_mx, tensor


@dataclass(frozen=True)
class Run:
    """A product that is ragged in every direction, with its epilogue."""

    m: int
    n: int
    k: int
    form: str
    tile: MxTile

    @cached_property
    def operands(self) -> tuple[PackedMx, PackedMx, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.k)
        a, w = (
            pack_mx(tensor(rng, self.m, self.k, self.form)),
            pack_mx(tensor(rng, self.n, self.k, self.form)),
        )
        bias = rng.standard_normal(self.n).astype(np.float32)
        return a, w, bias, mx_reference(a, w, bias=bias, output="float32")

    def check(self, machine: Any, source: Path) -> None:
        a, w, bias, want = self.operands
        found = run_mx(machine, a, w, self.tile, bias=bias, source=source, gap=48)
        np.testing.assert_array_equal(found, want)


SQUARE = Run(70, 131, 1300, "nvfp4", MxTile(tile_m=64, tile_n=64, warps_m=2, warps_n=2, stages=3, order=2))
FEW = Run(9, 68, 500, "mxfp8", MxTile(tile_m=16, tile_n=64, warps_m=1, warps_n=4, stages=2, slices=2))
MXFP4 = Run(33, 60, 600, "mxfp4", MxTile(tile_m=32, tile_n=128, warps_m=1, warps_n=4, stages=2))

MUTATIONS: dict[str, tuple[str, str, Run, str]] = {
    "wait leaves one group too many": (
        "cp_async_wait<STAGES - 2>();\n        block", "cp_async_wait<STAGES - 1>();\n        block", SQUARE, "every"
    ),
    "no barrier in the loop": ("block_sync();  // everyone's copies", "// everyone's copies", SQUARE, "every"),
    "fragments of the depth before": (
        "fragments[depth.value % 2], scales)", "fragments[(depth.value + 1) % 2], scales)", SQUARE, "every"
    ),
    "scales of the stage before": (
        "fetch_scales(next, following);", "fetch_scales(next, step);", FEW, "every"
    ),
    "scales of the next stage at its last depth": (
        "fragments[depth.value % 2], scales)", "fragments[depth.value % 2], next)", SQUARE, "every"
    ),
    "one byte of scales for all depths": ("byte = Depth * Type::scales % 4", "byte = 0", FEW, "every"),
    "one word of scales for all depths": ("word = Depth * Type::scales / 4", "word = 0", MXFP4, "every"),
    "A's scales from the other lanes": (
        "thread_a = decltype(i)::value % 2", "thread_a = (decltype(i)::value + 1) % 2", SQUARE, "every"
    ),
    "B's scales from one lane": ("thread_b = decltype(j)::value % 4", "thread_b = 0", SQUARE, "every"),
    "scales of rows in another order": (
        "lane % (MI == 1 ? 2 : 4) * 8;", "lane % 2 * 16 + lane / 2 % 2 * 8;", SQUARE, "every"
    ),
    "scales of A for B": ("scale_b + j * 32) * SCALES", "scale_a + j * 32) * SCALES", FEW, "every"),
    "pitch of A's scales for B's": (
        "scales_b + at * pitch_scales_b", "scales_b + at * pitch_scales_a", SQUARE, "every"
    ),
    "scales beyond K are read": ("scales_left < SCALES ? scales_left : SCALES", "SCALES", SQUARE, "every"),
    "codes beyond K are read": ("left < 16 ? left : 16", "16", FEW, "every"),
    "scales of rows beyond the end are read": (
        "at < (is_a ? m_size : n_size) ? scales_wanted : 0", "scales_wanted", SQUARE, "every"
    ),
    "read without the swizzle": (
        "swizzled(row_b, depth * 2 + chunk_b)", "row_b * ROW + (depth * 2 + chunk_b) * 16", SQUARE, "every"
    ),
    "every slice has the first one's scales": (
        "const int scale = (first_step + step)", "const int scale = (step)", FEW, "every"
    ),
    "sums over a ring that is still read": ("block_sync();  // the ring", "// the ring", MXFP4, "every"),
    "pieces in the first one's rows": ("* WARP_M + i * 16 +", "* WARP_M +", SQUARE, "every"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_caught(compiler, name, tmp_path):
    before, after, run, where = MUTATIONS[name]
    source = mutated(SOURCE, (before, after), tmp_path)
    assert_caught(outcomes(lambda machine: run.check(machine, source)), where)


@pytest.mark.parametrize("run", [SQUARE, FEW, MXFP4], ids=lambda run: run.form)
def test_the_kernel_is_exact_before_it_is_damaged(compiler, run):
    assert set(outcomes(lambda machine: run.check(machine, SOURCE)).values()) == {"exact"}

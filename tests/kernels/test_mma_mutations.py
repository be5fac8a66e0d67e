"""Bugs planted in gemm_mma.cu: each is caught, by a report or by a wrong result."""

from pathlib import Path

import numpy as np
import pytest

from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.mma_heuristics import MmaTile
from quantkit.kernels.mma_launch import SOURCE

from .gemms import oracle
from .mmas import MmaCase, run_mma
from .mutations import assert_caught, mutated, outcomes

SCALES = EpilogueKind(row_scale="each", column_scale="each", bias=True)
# Slices, ragged in every direction, two tiles each way; and e4m3 widened by moving bits, with columns stored singly.
SLICED = MmaCase(
    m=70,
    n=140,
    k=700,
    format="int8",
    output="bfloat16",
    kind=SCALES,
    gap=48,
    tile=MmaTile(tile_m=64, tile_n=128, warps_m=2, warps_n=2, row=64, stages=3, slices=2, group=2),
)
WIDENED = MmaCase(
    m=19,
    n=67,
    k=410,
    format="float8_e4m3fn",
    arch="sm_80",
    output="float32",
    tile=MmaTile(tile_m=16, tile_n=64, warps_m=1, warps_n=4, row=128, stages=3, group=1),
)

MUTATIONS = {
    "wait leaves one group too many": (
        "cp_async_wait<STAGES - 2>();\n        block_sync();  // everyone's",
        "cp_async_wait<STAGES - 1>();\n        block_sync();  // everyone's",
        "every",
    ),
    "no wait before the first stage": (
        "cp_async_wait<STAGES - 2>();\n  block_sync();",
        "block_sync();",
        "every",
    ),
    "barrier before the wait": (
        "cp_async_wait<STAGES - 2>();\n        block_sync();  // everyone's",
        "block_sync();\n        cp_async_wait<STAGES - 2>();  // everyone's",
        "every",
    ),
    "no barrier in the loop": ("block_sync();  // everyone's copies", "// everyone's copies", "every"),
    "no commit for an empty group": (
        "if (step + STAGES - 1 < steps) load(step + STAGES - 1);\n        cp_async_commit();",
        "if (step + STAGES - 1 < steps) { load(step + STAGES - 1); cp_async_commit(); }",
        "every",
    ),
    "copies a stage too early": (
        "if (step + STAGES - 1 < steps) load(step + STAGES - 1);",
        "if (step + STAGES < steps) load(step + STAGES);",
        "every",
    ),
    "the last stage is not copied": (
        "if (step + STAGES - 1 < steps) load",
        "if (step + STAGES < steps) load",
        "every",
    ),
    "fragments of the stage before": (
        "fetch(fragments[(k + 1) % 2], step + 1, 0)",
        "fetch(fragments[(k + 1) % 2], step, 0)",
        "every",
    ),
    "one set of fragments": ("multiply(sum, fragments[k % 2]);", "multiply(sum, fragments[0]);", "every"),
    "ring of another length": (
        "const uint32_t stage = base + step % STAGES * STAGE_BYTES;\n    // Moving",
        "const uint32_t stage = base + step % (STAGES - 1) * STAGE_BYTES;\n    // Moving",
        "every",
    ),
    "B read in A's swizzle": (
        "SECOND + place_b(warp % WARPS_N",
        "SECOND + place_a(warp % WARPS_N",
        "every",
    ),
    "columns dealt out otherwise": ("(column & 6) * 2 + q * 2", "(column & 6) * 2 + (q ^ 1) * 2", "every"),
    "operand steps added, not flipped": ("(fragment_a ^ k * 32)", "(fragment_a + k * 32)", "every"),
    "K tail without a limit": ("left < 0 ? 0 : left < 16 ? left : 16", "left < 0 ? 0 : 16", "every"),
    "rows beyond the end are read": ("skip < (is_a ? rows_a : rows_b) ? wanted : 0", "wanted", "every"),
    "pitch of the other operand": ("from_b + skip * pitch_b", "from_b + skip * pitch_a", "every"),
    "second half of A's rows": (
        "lane % 16, lane / 16);\n  const",
        "lane % 16, lane / 8 % 2);\n  const",
        "every",
    ),
    "rows of the sums": (
        "const int row = row0 + i * 16 + h * 8;",
        "const int row = row0 + i * 16 + h * 4;",
        "every",
    ),
    "factors of another row": (
        "epilogue::row_factors(output, row0 + i * 16 + h * 8)",
        "epilogue::row_factors(output, row0 + i * 16)",
        "every",
    ),
    "a slice starts where the last began": (
        "int64_t(all_steps) * (slice + 1) / slices) - first_step",
        "int64_t(all_steps) * (slice + 2) / slices) - first_step",
        "every",
    ),
    "sums not released": ("atomic_add_acq_rel(arrivals", "atomic_add(arrivals", "some"),
    "one slice too few is waited for": ("!= slices - 1) return;", "!= slices - 2) return;", "every"),
    "counter left as it is": ("if (arrived == slices - 1) st_global", "if (false) st_global", "every"),
    "slices overwrite each other": (
        "workspace + blockIdx.x * slices * slice_words",
        "workspace + blockIdx.x * slice_words",
        "some",
    ),
    "own sums added twice": (
        "QK_UNROLL for (int e = 0; e < 4; e++) sum[i][j][e] = 0;\n  for (int s",
        "{}\n  for (int s",
        "every",
    ),
    "no barrier before the arrival": ("block_sync();  // the arrival", "// the arrival", "some"),
    "tiles in another order than rows": (
        "start + within % height, within / height",
        "start + within / height, within % height",
        "every",
    ),
    "halves of a code's bits swapped": (
        "low = prmt(lower, upper, 0x5140)",
        "low = prmt(upper, lower, 0x5140)",
        "every",
    ),
    "products not scaled back": ("if constexpr (WIDEN) four", "if constexpr (false) four", "every"),
}


def check(machine, source: Path) -> None:
    for case in (SLICED, WIDENED):
        np.testing.assert_array_equal(run_mma(machine, case, source=source), oracle(case))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_in_gemm_mma_is_caught(compiler, name, tmp_path):
    before, after, where = MUTATIONS[name]
    source = mutated(SOURCE, (before, after), tmp_path)
    assert_caught(outcomes(lambda machine: check(machine, source)), where)


def test_gemm_mma_is_exact_before_it_is_damaged(compiler):
    assert set(outcomes(lambda machine: check(machine, SOURCE)).values()) == {"exact"}

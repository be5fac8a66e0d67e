"""Bugs planted in gemm_blocks_sm90.cu: each is caught, by a report of the emulator or by a wrong result."""

import numpy as np
import pytest

from quantkit.kernels.blocks.heuristics import BlocksTile
from quantkit.kernels.blocks.launch import SOURCE
from quantkit.kernels.epilogue import EpilogueKind

from ..mutations import assert_caught, mutated, outcomes
from .cases import Case, oracle, run, tensors_of

FULL = EpilogueKind(bias=True, activation="relu")
CASES = {
    # Several tiles a block, steps that are no multiple of four, a last block of K that is not whole.
    "ring": Case(
        m=150, n=392, k=712, block=128, output="bfloat16", kind=FULL,
        tile=BlocksTile(blocks_of_64=1, tile_n=128, stages=3),
    ),
    "tall": Case(
        m=200, n=136, k=328, block=128, output="bfloat16", kind=FULL,
        tile=BlocksTile(blocks_of_64=2, tile_n=128, stages=3, buffers=3),
    ),
    "pair": Case(
        m=150, n=264, k=328, block=128, output="bfloat16", kind=FULL,
        tile=BlocksTile(blocks_of_64=1, tile_n=64, stages=3, cluster=2),
    ),
    "swapped": Case(
        m=40, n=400, k=328, block=128, output="bfloat16", kind=FULL,
        tile=BlocksTile(blocks_of_64=2, tile_n=64, stages=3, swap=True),
    ),
    "split": Case(
        m=40, n=400, k=1800, block=128, output="bfloat16", kind=FULL,
        tile=BlocksTile(blocks_of_64=1, tile_n=32, stages=3, swap=True, split=2),
    ),
    "mx": Case(
        m=70, n=136, k=296, block=32, output="bfloat16", kind=FULL,
        tile=BlocksTile(blocks_of_64=1, tile_n=128, stages=3),
    ),
}  # fmt: skip

# name: (case, text, its replacement, whether 'every' mode must catch it or 'some')
MUTATIONS = {
    # ---- promotion
    "promotion without the sum before": (
        "ring",
        "fused_multiply_add(made[at], scale, sum[i][at])",
        "made[at] * scale",
        "every",
    ),
    "promotion without the scale": (
        "ring",
        "fused_multiply_add(made[at], scale, sum",
        "fused_multiply_add(made[at], 1.0f, sum",
        "every",
    ),
    "partial sums not started from zero": ("ring", "k * 32), k > 0);", "k * 32), true);", "every"),
    "partial sums kept from block to block": (
        "ring",
        "k * 32), k > 0);",
        "k * 32), step + k > 0);",
        "every",
    ),
    "promotion before the products are done": (
        "ring",
        "else wgmma_wait<0>();",
        "else wgmma_wait<1>();",
        "every",
    ),
    "the next wave started before this one is promoted": (
        "tall",
        "if (!more) release(s);",
        "if (!more) release(s);\n          if (PARTIALS == 1 && more) start(wave + 1);",
        "every",
    ),
    "two waves in the same registers": (
        "mx",
        "(partial[wave % PARTIALS], of_first",
        "(partial[0], of_first",
        "every",
    ),
    "a wave too many left unfinished": (
        "mx",
        "if (PARTIALS > 1 && more) wgmma_wait<1>();",
        "if (PARTIALS > 1 && more) wgmma_wait<2>();",
        "every",
    ),
    "sums not cleared for the next tile": (
        "ring",
        "sum[i][at] = 0.0f;",
        "if (tile == cluster) sum[i][at] = 0.0f;",
        "every",
    ),
    "blocks of rows exchanged": (
        "tall",
        "of_first + advance(i * 64 * ROW",
        "of_first + advance((MI - 1 - i) * 64 * ROW",
        "every",
    ),
    "block of K of the codes": (
        "mx",
        "of_second + advance(b * BLOCK + k * 32)",
        "of_second + advance(k * 32)",
        "every",
    ),
    # ---- which scale
    "scale of the step before": (
        "ring",
        "word_of(held[i], q);",
        "word_of(held[i], q > 0 ? q - 1 : 0);",
        "every",
    ),
    "scales of the first four stages for all": ("ring", "scales.pitch + step * 4", "scales.pitch", "every"),
    "weight's scale of the first columns": (
        "ring",
        "(SWAP ? first : second) / 128 + band",
        "band",
        "every",
    ),
    "weight's scale in blocks of 64": (
        "ring",
        "(SWAP ? first : second) / 128 + band",
        "(SWAP ? first : second) / 64 + band",
        "every",
    ),
    "band of the other rows": ("swapped", "(consumer * MI + i) / 2 : 0", "i / 2 : 0", "every"),
    "columns in the order of memory": (
        "mx",
        "DOWN * TILE_M * 4 + place_across(row - TILE_M) * 4",
        "DOWN * TILE_M * 4 + (row - TILE_M) * 4",
        "every",
    ),
    "scale of the row above": ("ring", "i * 64 + down + 8 * h) * 4)", "i * 64 + down) * 4)", "every"),
    "rows of the first consumer for both": (
        "ring",
        "b * TILE_M + consumer * MI * 64 + i * 64",
        "b * TILE_M + i * 64",
        "every",
    ),
    "first block of K for all": ("mx", "(MX ? b : band) * TILE_N", "band * TILE_N", "every"),
    "e8m0 off by one": (
        "mx",
        "e8m0_to_float(word >> (8 * b) & 0xff)",
        "e8m0_to_float((word >> (8 * b) & 0xff) + 1)",
        "every",
    ),
    "what follows the scales of a row": ("mx", "(start + q) * BLOCKS + b < blocks", "true", "every"),
    "rows of scales beyond the last": (
        "ring",
        "if (row >= scales.rows) return",
        "if (false) return",
        "every",
    ),
    # ---- who waits for whom
    "codes not awaited": ("ring", "mbarrier_wait_ring(full + 8 * s, parity);", "", "every"),
    "scales not awaited": ("ring", "mbarrier_wait_ring(ready + 8 * s, parity);", "", "some"),
    "scales overwritten before they are read": (
        "ring",
        "mbarrier_wait_ring(drained + 8 * s, parity);",
        "",
        "every",
    ),
    "codes overwritten before they are read": (
        "ring",
        "mbarrier_wait_ring(empty + 8 * s, parity);",
        "",
        "every",
    ),
    "phase of the producer inverted": (
        "ring",
        "parity = 1;  // the first",
        "parity = 0;  // the first",
        "every",
    ),
    "phase of the producer never turns": (
        "ring",
        "s = 0;\n        parity ^= 1;\n      }\n    };",
        "s = 0;\n      }\n    };",
        "every",
    ),
    "phase of the consumers never turns": ("ring", "s = 0;\n          parity ^= 1;", "s = 0;", "every"),
    "scales told before all lanes have written": (
        "ring",
        "warp_sync();\n            if (tid % 32 == 0) mbarrier_arrive(ready",
        "if (tid % 32 == 0) mbarrier_arrive(ready",
        "some",
    ),
    "scales drained before all lanes have read": (
        "ring",
        "warp_sync();\n        if (lane == 0) mbarrier_arrive(drained",
        "if (lane == 0) mbarrier_arrive(drained",
        "some",
    ),
    "drained by one warp alone": (
        "ring",
        "mbarrier_init(drained + 8 * s, 4 * CONSUMERS);",
        "mbarrier_init(drained + 8 * s, CONSUMERS);",
        "every",
    ),
    "ready by one warp alone": (
        "ring",
        "mbarrier_init(ready + 8 * s, LOADERS);",
        "mbarrier_init(ready + 8 * s, 1);",
        "some",
    ),
    "codes released as their products start": (
        "ring",
        "mbarrier_wait_ring(ready + 8 * s, parity);\n        QK_UNROLL",
        "release(s);\n        mbarrier_wait_ring(ready + 8 * s, parity);\n        QK_UNROLL",
        "every",
    ),
    "no wgmma fence after the promotion": (
        "tall",
        "wgmma_fence();",
        "if (step + wave == 0) wgmma_fence();",
        "every",
    ),
    # ---- clusters and the way out
    "multicast to one block": ("pair", "(1 << CLUSTER) - 1", "1", "every"),
    "multicast of the same half": ("pair", "{k, first + part}", "{k, first}", "every"),
    "blocks of a cluster take the same columns": (
        "pair",
        "(place.second * CLUSTER + neighbour) * TILE_N;\n          QK_ROLLED for (int step",
        "place.second * CLUSTER * TILE_N;\n          QK_ROLLED for (int step",
        "every",
    ),
    "released to one block only": ("pair", "if (thread < CLUSTER) {", "if (thread < 1) {", "every"),
    "factors of the span before": ("tall", "columns[turn % 2];", "columns[(turn + 1) % 2];", "every"),
    # ---- K split over a cluster
    "parts of K begin at 0": (
        "split",
        "const int k = (first_step + step) * ROW;",
        "const int k = step * ROW;",
        "every",
    ),
    "scales of a part begin at 0": (
        "split",
        "for (int start = first_step; start < first_step + steps; start += 4) {",
        "for (int start = 0; start < steps; start += 4) {",
        "every",
    ),
    "a part left out": (
        "split",
        "for (int part = 1; part < SPLIT; part++)",
        "for (int part = 2; part < SPLIT; part++)",
        "every",
    ),
    "parts not awaited": ("split", "mbarrier_wait(partials + 8 * consumer, exchange);", "", "some"),
    "parts awaited from one warp": (
        "split",
        "mbarrier_init(partials + 8 * c, 4 * (SPLIT - 1));",
        "mbarrier_init(partials + 8 * c, SPLIT - 1);",
        "every",
    ),
    "room not awaited": ("split", "mbarrier_wait(room + 8 * consumer, exchange ^ 1);", "", "some"),
    "room never given": (
        "split",
        "mbarrier_arrive_remote(map_to_rank(room + 8 * consumer, other));",
        "continue;",
        "every",
    ),
    "room given while stores still read": (
        "split",
        "store_wait_read<0>();\n          barrier_sync(1 + consumer, 128);\n        }",
        "store_wait_read<1>();\n        }",
        "some",
    ),
    "staged before all parts are read": (
        "split",
        "has left it\n          barrier_sync(1 + consumer, 128);",
        "has left it",
        "some",
    ),
    "every block stores the tile": (
        "split",
        "if (rank > 0) {\n          mbarrier_wait(room",
        "if (false) {\n          mbarrier_wait(room",
        "every",
    ),
    "buffer written while it is stored": (
        "tall",
        "store_wait_read<BUFFERS - 1>();",
        "store_wait_read<BUFFERS>();",
        "some",
    ),
}


def exact(name: str, source):
    case = CASES[name]
    tensors = tensors_of(case)
    want = oracle(case, tensors)

    def check(machine) -> None:
        d = run(machine, case, tensors, source=source, timeout_s=20.0)
        np.testing.assert_array_equal(d.view(np.uint8), want.view(np.uint8))

    return check


# A bug of each kind by default; the others are slow.
DEFAULT = (
    "promotion without the sum before", "partial sums kept from block to block", "two waves in the same registers",
    "scale of the step before", "band of the other rows", "columns in the order of memory",
    "what follows the scales of a row", "scales not awaited", "scales overwritten before they are read",
    "phase of the consumers never turns", "multicast of the same half", "parts not awaited",
    "scales of a part begin at 0",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in MUTATIONS]
)
def test_a_bug_in_the_kernel_is_caught(compiler, name, tmp_path):
    case, before, after, where = MUTATIONS[name]
    assert_caught(outcomes(exact(case, mutated(SOURCE, (before, after), tmp_path))), where)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_exact_before_it_is_damaged(compiler, name):
    assert set(outcomes(exact(name, SOURCE)).values()) == {"exact"}

"""Bugs planted in the seed kernels: each is caught, by a report or by a wrong result.

A mutation is one textual change of a kernel that is exact as it stands. The modes in which it must not pass are part
of the claim: 'every' mode for what the emulator reports whatever the schedule, 'some' for what shows in one of them.
"""

from pathlib import Path

import numpy as np
import pytest

from quantkit.kernels.emulator import EmulatorError, Mode

from ..backends import EmulatorBackend
from ..layouts import product, small_integers
from .seed import MMA, WGMMA, mma_tile, wgmma_tile

# name: (text, its replacement, where it must be caught, a part of some report; '' for a wrong result)
WGMMA_MUTATIONS = {
    "empty phase inverted": ("(turn / STAGES & 1) ^ 1", "(turn / STAGES & 1)", "every", "mbarrier_wait"),
    "full phase inverted": (
        "full + 8 * s, turn / STAGES & 1",
        "full + 8 * s, ~turn / STAGES & 1",
        "every",
        "",
    ),
    "no wait for an empty stage": ("mbarrier_wait(empty + 8 * s, (turn / STAGES & 1) ^ 1);", "", "every", ""),
    "no wait for a full stage": ("mbarrier_wait(full + 8 * s, turn / STAGES & 1);", "", "every", ""),
    "too few bytes expected": (
        "expect(full + 8 * s, STAGE_BYTES)",
        "expect(full + 8 * s, STAGE_BYTES / 2)",
        "every",
        "",
    ),
    "too many bytes expected": (
        "full + 8 * s, STAGE_BYTES)",
        "full + 8 * s, STAGE_BYTES + 16)",
        "every",
        "bytes missing",
    ),
    "phase of a ring of another length": (
        "full + 8 * s, turn / STAGES & 1",
        "full + 8 * s, turn / (STAGES + 1) & 1",
        "every",
        "",
    ),
    "stage released as it is issued": (
        "release(turn - 1);\n        }",
        "release(turn);\n        }",
        "every",
        "",
    ),
    "stage released before the wait": (
        "wgmma_wait<1>();\n          release",
        "release",
        "every",
        "may still read",
    ),
    "wait leaves one group too many": ("wgmma_wait<1>();", "wgmma_wait<2>();", "every", ""),
    "no wait before the epilogue": ("wgmma_wait<0>();\n", "", "every", "unfinished wgmma"),
    "no commit": ("wgmma_commit();", "", "every", ""),
    "no wgmma fence": ("wgmma_fence();", "", "every", "no wgmma_fence"),
    "last stage of a tile not released": ("release(turn - 1);\n      QK_UNROLL", "QK_UNROLL", "every", ""),
    "accumulators not cleared": ("step + k > 0", "true", "every", ""),
    "accumulators cleared every step": ("step + k > 0", "k > 0", "every", ""),
    "empty barrier counts one consumer": ("CONSUMERS * CLUSTER)", "CLUSTER)", "every", ""),
    "full barrier counts two": (
        "mbarrier_init(full + 8 * s, 1)",
        "mbarrier_init(full + 8 * s, 2)",
        "every",
        "mbarrier_wait",
    ),
    "barriers not published": ("fence_mbarrier_init();", "", "every", "fence_mbarrier_init"),
    "no meeting after initialisation": ("block_sync();", "", "every", "mbarrier"),
    "stride of the descriptor halved": ("address, 0, 1024", "address, 0, 512", "every", ""),
    "swizzle of the descriptor": ("1024, Swizzle::BYTES_128", "1024, Swizzle::BYTES_64", "every", ""),
    "no swizzle in the descriptor": ("1024, Swizzle::BYTES_128", "1024, Swizzle::NONE", "every", ""),
    "operand steps twice as far": ("stage_b + k * 32", "stage_b + k * 64", "every", ""),
    "second consumer reads the first's rows": (
        "s * STAGE_BYTES + consumer * 64 * ROW",
        "s * STAGE_BYTES",
        "every",
        "",
    ),
    "stages overlap": (
        "s * STAGE_BYTES;\n          mbarrier_wait",
        "s * (STAGE_BYTES - 1024);\n          mbarrier_wait",
        "every",
        "",
    ),
    "producer's stage shifted": (
        "const uint32_t stage = base + s * STAGE_BYTES;",
        "const uint32_t stage = base + s * STAGE_BYTES + 64;",
        "every",
        "not a multiple of 1024",
    ),
    "k in bytes, not elements": ("step * ROW / (32 / Type::depth)", "step * ROW * 2", "every", ""),
    "row predicate dropped": ("row < m_size && column < n_size", "column < n_size", "every", "buffer"),
    "column predicate off by one": ("column < n_size)", "column <= n_size)", "every", ""),
    "row of the fragment": ("lane / 4 + e / 2 * 8;", "lane / 4 + e % 2 * 8;", "every", ""),
    "tiles counted too low": ("(n_size + TILE_N - 1) / TILE_N", "n_size / TILE_N", "every", ""),
    "registers taken and none given": ("decrease_registers<40>();", "", "every", "pool lacks registers"),
}
CLUSTER_MUTATIONS = {
    "multicast to one block": ("(1 << CLUSTER) - 1", "1", "every", ""),
    "multicast of the same half": ("{k, n0 + part}", "{k, n0}", "every", ""),
    "release told to one block only": ("tid % 128 < CLUSTER", "tid % 128 < 1", "every", ""),
    "release told to itself twice": (
        "map_to_rank(barrier, tid % 128)",
        "map_to_rank(barrier, rank)",
        "some",
        "",
    ),
    "empty barrier forgets the neighbour": ("CONSUMERS * CLUSTER)", "CONSUMERS)", "every", ""),
    "blocks leave without a word": (
        "if (CLUSTER > 1) {  // no block leaves",
        "if (0) {  // no block leaves",
        "some",
        "has ended",
    ),
    "only the block meets at the start": (
        "  if (CLUSTER > 1) {\n    cluster_arrive();\n    cluster_wait();\n  } else {",
        "  if (0) {\n  } else {",
        "every",
        "of another block",
    ),
}
MMA_MUTATIONS = {
    "wait leaves one copy too many": (
        "cp_async_wait<STAGES - 2>",
        "cp_async_wait<STAGES - 1>",
        "every",
        "unfinished",
    ),
    "no wait": ("cp_async_wait<STAGES - 2>();", "", "every", "unfinished"),
    "no barrier in the loop": ("block_sync();  // everyone's", "// everyone's", "every", ""),
    "barrier before the wait": (
        "cp_async_wait<STAGES - 2>();\n    block_sync();",
        "block_sync();\n    cp_async_wait<STAGES - 2>();",
        "every",
        "",
    ),
    "no commit in the loop": (
        "load(step + STAGES - 1);\n    cp_async_commit();",
        "load(step + STAGES - 1);",
        "every",
        "",
    ),
    "prefetch one stage too far": (
        "if (step + STAGES - 1 < steps) load(step + STAGES - 1);",
        "if (step + STAGES < steps) load(step + STAGES);",
        "every",
        "",
    ),
    "ring of another length": (
        "stage_a = base + step % STAGES",
        "stage_a = base + step % (STAGES - 1)",
        "every",
        "",
    ),
    "swizzle of the reader": ("row >> 1 & 3", "(threadIdx.x < 64 ? row : row >> 1) & 3", "every", ""),
    "rows read without a predicate": (
        "const bool inside = source_row < (is_a ? m_size : n_size) &&",
        "const bool inside =",
        "every",
        "buffer",
    ),
    "K tail without a predicate": ("&& byte < row_bytes", "", "every", ""),
    "operands exchanged in registers": (
        "fragment_b[j][0], fragment_b[j][1], fragment_b[j + 1][0]",
        "fragment_b[j][0], fragment_b[j + 1][0], fragment_b[j][1]",
        "every",
        "",
    ),
    "column of the fragment": ("lane % 4 * 2 + e % 2", "lane % 4 + e % 2 * 4", "every", ""),
    "half a chunk": ("inside ? 16 : 0);", "inside ? 8 : 0);", "every", ""),
    "store past the last column": (
        "row < m_size && column < n_size",
        "row < m_size && column <= n_size",
        "every",
        "",
    ),
}


def mutated(source: Path, change: tuple[str, str], folder: Path) -> Path:
    text = source.read_text()
    assert text.count(change[0]) >= 1, f"{source.name} no longer has {change[0]!r}"
    path = folder / source.name
    path.write_text(text.replace(change[0], change[1], 1))
    return path


def outcomes(run) -> dict[Mode, str]:
    """What each mode says: 'exact', 'wrong', or the report."""
    said = {}
    for mode in Mode:
        rng = np.random.default_rng(3)
        a, b = small_integers(rng, (150, 592), "S8"), small_integers(rng, (130, 592), "S8")
        try:
            said[mode] = (
                "exact" if np.array_equal(run(EmulatorBackend(mode), "S8", a, b), product(a, b)) else "wrong"
            )
        except EmulatorError as error:
            said[mode] = str(error)
    return said


def check(said: dict[Mode, str], where: str, part: str) -> None:
    passed = [mode.name for mode, text in said.items() if text == "exact"]
    assert len(passed) <= (0 if where == "every" else len(Mode) - 1), f"passed in {passed}"
    assert any(part in text for text in said.values()), said


@pytest.mark.parametrize("name", WGMMA_MUTATIONS)
def test_a_bug_in_the_wgmma_kernel_is_caught(compiler, name, tmp_path):
    before, after, where, part = WGMMA_MUTATIONS[name]
    source = mutated(WGMMA, (before, after), tmp_path)
    check(outcomes(lambda *args: wgmma_tile(*args, source=source, grid=3)), where, part)


@pytest.mark.parametrize("name", CLUSTER_MUTATIONS)
def test_a_bug_in_the_cluster_is_caught(compiler, name, tmp_path):
    before, after, where, part = CLUSTER_MUTATIONS[name]
    source = mutated(WGMMA, (before, after), tmp_path)
    check(outcomes(lambda *args: wgmma_tile(*args, source=source, grid=4, cluster=2)), where, part)


@pytest.mark.parametrize("name", MMA_MUTATIONS)
def test_a_bug_in_the_mma_kernel_is_caught(compiler, name, tmp_path):
    before, after, where, part = MMA_MUTATIONS[name]
    source = mutated(MMA, (before, after), tmp_path)
    check(outcomes(lambda *args: mma_tile(*args, source=source)), where, part)


@pytest.mark.parametrize("source", [WGMMA, MMA], ids=lambda s: s.stem)
def test_the_kernels_are_exact_before_they_are_damaged(compiler, source):
    runs = {MMA: [mma_tile], WGMMA: [wgmma_tile, lambda *args: wgmma_tile(*args, cluster=2)]}
    for run in runs[source]:
        assert set(outcomes(run).values()) == {"exact"}

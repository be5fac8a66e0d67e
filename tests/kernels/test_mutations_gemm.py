"""Bugs planted in gemm_sm90.cu and its headers: each is caught, by a report of the emulator or by a wrong result.

A mutation is one textual change of a kernel that is exact as it stands, run on a case that uses what was changed. The
modes in which it must not pass are part of the claim: 'every' mode for what shows whatever the schedule, 'some' for
what shows in one of them. Where a part of a report is named, a mode must have given that report.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.kernels.compile import INCLUDE
from quantkit.kernels.emulator import EmulatorError, Mode, load
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.gemm_launch import SOURCE
from quantkit.kernels.heuristics import Tile

from .gemms import DTYPES, Case, Tensors, oracle, run, tensors_of

FULL = EpilogueKind(row_scale="each", column_scale="each", bias=True, activation="relu")
QUANTIZING = EpilogueKind(
    row_scale="each", column_scale="each", zero_point="each", bias=True, residual="before", residual_type="int8",
    activation="clip", output_zero_point=True,
)  # fmt: skip
CASES = {
    "ring": Case(
        m=150, n=392, k=592, format="int8", output="bfloat16", kind=FULL,
        tile=Tile(blocks_of_64=1, tile_n=128, stages=3),
    ),
    "tall": Case(
        m=300, n=136, k=592, format="int8", output="bfloat16", kind=FULL,
        tile=Tile(blocks_of_64=2, tile_n=128, stages=3),
    ),
    "pair": Case(
        m=300, n=392, k=592, format="float8_e4m3fn", output="bfloat16", kind=FULL,
        tile=Tile(blocks_of_64=1, tile_n=128, stages=3, cluster=2),
    ),
    "turns": Case(
        m=300, n=520, k=272, format="int8", output="bfloat16", kind=FULL,
        tile=Tile(blocks_of_64=1, tile_n=128, stages=3, pingpong=True),
    ),
    "swapped": Case(
        m=40, n=400, k=592, format="int8", output="bfloat16", kind=FULL,
        tile=Tile(blocks_of_64=1, tile_n=64, stages=3, swap=True),
    ),
    "wide": Case(
        m=40, n=400, k=592, format="int8", output="float32", kind=FULL,
        tile=Tile(blocks_of_64=1, tile_n=64, stages=3, swap=True),
    ),
    "split": Case(
        m=70, n=400, k=1040, format="int8", output="bfloat16", kind=FULL,
        tile=Tile(blocks_of_64=1, tile_n=64, stages=3, consumers=1, swap=True, split=4),
    ),
    "halves": Case(
        m=70, n=400, k=1040, format="int8", output="bfloat16", kind=FULL,
        tile=Tile(blocks_of_64=1, tile_n=256, stages=2, swap=True, split=2),
    ),
    "order": Case(
        m=70, n=400, k=1040, format="bfloat16", output="float32",
        tile=Tile(blocks_of_64=1, tile_n=64, stages=3, consumers=1, swap=True, split=4),
    ),
    "shares": Case(
        m=40, n=400, k=592, format="int8", output="bfloat16", kind=FULL,
        tile=Tile(blocks_of_64=1, tile_n=64, stages=3, consumers=1, swap=True, stream=True),
    ),
    "shares of two": Case(
        m=100, n=800, k=592, format="int8", output="bfloat16", kind=FULL,
        tile=Tile(blocks_of_64=1, tile_n=64, stages=3, swap=True, stream=True),
    ),
    "ragged": Case(
        m=150, n=130, k=592, format="int8", output="bfloat16", kind=FULL,
        tile=Tile(blocks_of_64=1, tile_n=128, stages=3),
    ),
    "eight": Case(
        m=150, n=400, k=272, format="int8", output="int8", kind=QUANTIZING,
        tile=Tile(blocks_of_64=1, tile_n=128, stages=3),
    ),
}  # fmt: skip

# name: (case, text, its replacement, where it must be caught, a part of some report; '' for a wrong result too)
KERNEL_MUTATIONS: Mapping[str, tuple[str, str, str, str, str]] = {
    # ---- the ring
    "empty phase inverted": (
        "ring",
        "uint32_t parity = 1;  // the first",
        "uint32_t parity = 0;  // the first",
        "every",
        "deadlock",
    ),
    "full phase inverted": (
        "ring",
        "exchanges = 0;\n    uint32_t parity = 0;",
        "exchanges = 0;\n    uint32_t parity = 1;",
        "every",
        "",
    ),
    "phase of the producer never turns": (
        "ring",
        "s = 0;\n            parity ^= 1;",
        "s = 0;",
        "every",
        "",
    ),
    "no wait for an empty stage": ("ring", "mbarrier_wait_ring(empty + 8 * s, parity);", "", "every", ""),
    "no wait for a full stage": ("ring", "mbarrier_wait_ring(full + 8 * s, parity);", "", "every", ""),
    "too few bytes expected": (
        "ring",
        "full + 8 * s, STAGE_BYTES)",
        "full + 8 * s, STAGE_BYTES - SECOND)",
        "every",
        "",
    ),
    "too many bytes expected": (
        "ring",
        "full + 8 * s, STAGE_BYTES)",
        "full + 8 * s, STAGE_BYTES + 16)",
        "every",
        "bytes missing",
    ),
    "stage released as it is issued": (
        "ring",
        "release(previous);\n          }",
        "release(s);\n          }",
        "every",
        "",
    ),
    "stage released before the wait": (
        "ring",
        "wgmma_wait<1>();\n            release(previous);",
        "release(previous);\n            wgmma_wait<1>();",
        "every",
        "an asynchronous operation reads with no barrier between",
    ),
    "wait leaves one group too many": ("ring", "wgmma_wait<1>();", "wgmma_wait<2>();", "every", ""),
    "no wait before the epilogue": ("ring", "wgmma_wait<0>();", "", "every", "unfinished wgmma"),
    "last stage of a tile not released": (
        "ring",
        "wgmma_settle(sum[i]);\n        release(previous);",
        "wgmma_settle(sum[i]);",
        "every",
        "deadlock",
    ),
    "no commit": ("ring", "wgmma_commit();", "", "every", ""),
    "no wgmma fence": ("ring", "wgmma_fence();", "", "every", "no wgmma_fence"),
    "accumulators not cleared": ("ring", "step + k > 0", "true", "every", ""),
    "empty barrier counts one consumer": ("ring", "SHARED_ROWS * CLUSTER", "CLUSTER", "every", ""),
    "full barrier counts two": (
        "ring",
        "mbarrier_init(full + 8 * s, 1)",
        "mbarrier_init(full + 8 * s, 2)",
        "every",
        "deadlock",
    ),
    "barriers not published": ("ring", "fence_mbarrier_init();", "", "every", "fence_mbarrier_init"),
    "no meeting after initialisation": ("ring", "else block_sync();", "", "every", "mbarrier"),
    "every warp of the producer copies": (
        "ring",
        "shuffle(tid / 32, 0) == 0 && elect_one()",
        "elect_one()",
        "every",
        "",
    ),
    "every thread of a warp copies": (
        "ring",
        "shuffle(tid / 32, 0) == 0 && elect_one()",
        "tid < 32",
        "every",
        "",
    ),
    "stages overlap": (
        "ring",
        "const uint32_t stage = base + s * STAGE_BYTES;",
        "const uint32_t stage = base + s * (STAGE_BYTES - 1024);",
        "every",
        "",
    ),
    # ---- descriptors and coordinates
    "stride of the descriptor halved": ("ring", "address, 0, 1024,", "address, 0, 512,", "every", ""),
    "swizzle of the descriptor": ("ring", "1024, Swizzle::BYTES_128", "1024, Swizzle::BYTES_64", "every", ""),
    "operand steps twice as far": (
        "ring",
        "of_second + advance(k * 32)",
        "of_second + advance(k * 64)",
        "every",
        "",
    ),
    "second consumer reads the first's rows": (
        "ring",
        "PINGPONG ? 0 : consumer * MI * 64 * ROW",
        "0",
        "every",
        "",
    ),
    "second block of rows read twice": (
        "tall",
        "of_first + advance(i * 64 * ROW",
        "of_first + advance(0 * ROW",
        "every",
        "",
    ),
    "k in bytes of one type for all": (
        "ring",
        "* (ROW / 32) * Type::depth",
        "* (ROW / 32) * 16",
        "every",
        "",
    ),
    "tiles counted too low": (
        "ring",
        "(second_size + TILE_N - 1) / TILE_N",
        "second_size / TILE_N",
        "every",
        "",
    ),
    # ---- clusters
    "multicast to one block": ("pair", "(1 << CLUSTER) - 1", "1", "every", ""),
    "multicast of the same half": ("pair", "{k, second + part}", "{k, second}", "every", ""),
    "release told to one block only": ("pair", "if (thread < CLUSTER) {", "if (thread < 1) {", "every", ""),
    "only the block meets at the start": (
        "pair",
        "if (CLUSTER > 1) cluster_wait();",
        "if (CLUSTER > 1) block_sync();",
        "every",
        "",
    ),
    "blocks leave without a word": (
        "pair",
        "if (CLUSTER > 1) {  // no block leaves",
        "if (0) {  // no block leaves",
        "some",
        "",
    ),
    # ---- ping-pong
    "both consumers take every tile": ("turns", "(PINGPONG ? consumer * clusters : 0)", "0", "every", ""),
    "the other's stages not skipped": (
        "turns",
        "if (PINGPONG && consumer == 1) skip(steps);",
        "",
        "every",
        "",
    ),
    "a turn given to oneself": (
        "turns",
        "turns + 8 * (consumer ^ 1)",
        "turns + 8 * consumer",
        "every",
        "deadlock",
    ),
    # ---- the way out
    "row of the fragment": (
        "ring",
        "warp * 16 + lane / 4, across",
        "warp * 16 + lane / 8, across",
        "every",
        "",
    ),
    "buffers not awaited": ("ring", "store_wait_read<1>();", "store_wait_read<2>();", "some", ""),
    "no barrier before a buffer is written": (
        "ring",
        "// the store before last has left this buffer\n            barrier_sync(1 + consumer, 128);",
        "",
        "some",
        "",
    ),
    "no barrier before the store": (
        "ring",
        "fence_proxy_async();\n          barrier_sync(1 + consumer, 128);",
        "fence_proxy_async();",
        "some",
        "",
    ),
    "no proxy fence before the store": ("ring", "fence_proxy_async();", "", "every", ""),
    "consumers share a named barrier": (
        "ring",
        "fence_proxy_async();\n          barrier_sync(1 + consumer, 128);",
        "fence_proxy_async();\n          barrier_sync(1, 128);",
        "some",
        "",
    ),
    "stores still read as the block ends": (
        "ring",
        "if (TMA_STORE && thread == 0) store_wait_read<0>();",
        "",
        "some",
        "",
    ),
    "one buffer for both": ("ring", "buffer ^= 1;", "", "some", ""),
    "factors of the piece before": ("ring", "columns[turn % 2];", "columns[(turn + 1) % 2];", "every", ""),
    "second box of wide elements forgotten": (
        "wide",
        "if (ELEMENT_BYTES == 4) tma_store",
        "if (0) tma_store",
        "every",
        "",
    ),
    # ---- K split over a cluster
    "parts of k overlap": (
        "split",
        "all_steps * (rank + 1) / SPLIT - first_step",
        "all_steps * (rank + 1) / SPLIT - first_step + (rank == 0)",
        "every",
        "",
    ),
    "parts of k begin at 0": ("split", "(first_step + step) * (ROW", "step * (ROW", "every", ""),
    "columns of another owner sent": (
        "split",
        "bits_of(of_owner(o, part",
        "bits_of(of_owner(rank, part",
        "every",
        "",
    ),
    "own columns not picked": ("split", "if (rank == o) picked = of_owner(o, at);", "", "every", ""),
    "two senders in one slot": (
        "split",
        "const int slot = rank < o ? rank : rank - 1;",
        "const int slot = rank / 2;",
        "every",
        "",
    ),
    "partial sums added in another order": (
        "order",
        "const int slot = source < rank ? source : source - 1;",
        "const int slot = SPLIT - 2 - (source < rank ? source : source - 1);",
        "every",
        "",
    ),
    "a sender left out": (
        "split",
        "for (int source = 0; source < SPLIT; source++) {",
        "for (int source = 1; source < SPLIT; source++) {",
        "every",
        "",
    ),
    "partial sums not awaited": (
        "split",
        "mbarrier_wait(partials + 8 * consumer, exchanges & 1);",
        "",
        "every",
        "",
    ),
    "partial sums awaited from one warp": (
        "split",
        "mbarrier_init(partials + 8 * c, 4 * (SPLIT - 1));",
        "mbarrier_init(partials + 8 * c, SPLIT - 1);",
        "every",
        "",
    ),
    "arrival before the warp's words": (
        "split",
        "          warp_sync();\n          if (lane == 0)  // after all",
        "          if (lane == 0)  // after all",
        "some",
        "",
    ),
    "room not awaited": (
        "halves",
        "if (!owner || OWNERS > 1) mbarrier_wait(room",
        "if (0) mbarrier_wait(room",
        "some",
        "",
    ),
    "room given before it is read": (
        "halves",
        "mbarrier_wait(partials + 8 * consumer, exchanges & 1);",
        "if (part + 1 < ROUNDS) grant_room();\n            mbarrier_wait(partials + 8 * consumer, exchanges & 1);",
        "every",
        "",
    ),
    "room of the last tile never given": (
        "split",
        "barrier_sync(1 + consumer, 128);\n        grant_room();",
        "barrier_sync(1 + consumer, 128);",
        "every",
        "deadlock",
    ),
    "room given while stores still read": (
        "split",
        "if (thread == 0) store_wait_read<0>();\n        barrier_sync",
        "barrier_sync",
        "some",
        "",
    ),
    "others written before they run": ("split", "if (exchanges == 0) cluster_wait();", "", "every", ""),
    # ---- stream-K
    "a share begins a step late": (
        "shares",
        "whole, start_of_share(cluster, share, extra),",
        "whole, start_of_share(cluster, share, extra) + (cluster == 1),",
        "every",
        "",
    ),
    "a share runs into the next tile": (
        "shares",
        "left < steps - begin ? begin + left : steps",
        "begin + left",
        "every",
        "",
    ),
    "both pieces of a share in one place": (
        "shares",
        "int64_t(block) * 2 + (start_of_share(block, share, extra) < first_unit)",
        "int64_t(block) * 2",
        "every",
        "",
    ),
    "pieces of both consumers in one place": ("shares of two", "+ tid - 128;", "+ thread;", "every", ""),
    "consumers count their arrivals together": (
        "shares of two",
        "(left[p] - whole) * CONSUMERS + consumer",
        "(left[p] - whole) * CONSUMERS",
        "every",
        "",
    ),
    "arrival before all threads have left their sums": (
        "shares",
        "nobody waits.\n          barrier_sync(1 + consumer, 128);",
        "nobody waits.",
        "some",
        "",
    ),
    "flags read before they are written": (
        "shares",
        "          }\n          barrier_sync(1 + consumer, 128);\n        }\n        if (++looked",
        "          }\n        }\n        if (++looked",
        "some",
        "",
    ),
    "arrivals order nothing": ("shares", "atomic_add_acq_rel(", "atomic_add(", "some", ""),
    "one arrival too early": ("shares", "== others;", "== others - 1;", "some", ""),
    "counters left as they are": ("shares", "if (is_last) st_global(counter, 0u);", "", "every", "zero"),
    "last piece of a tile not added": ("shares", "block <= end;", "block < end;", "every", ""),
    "sums begin with what was there": (
        "shares",
        "at++) sum[i][at] = 0;",
        "at++) sum[i][at] = 7;",
        "every",
        "",
    ),
    "whole tiles shared once more": (
        "shares of two",
        "schedule.whole + tile, begin",
        "tile, begin",
        "some",
        "",
    ),
    "split blocks finish the same columns": ("split", "owner ? rank * OWNED : 0", "0", "every", ""),
}

HEADER_MUTATIONS: Mapping[str, tuple[str, str, str, str, str, str]] = {
    "order of tiles beyond its group": ("ring", "tiles.h", "within / height", "within / Height", "every", ""),
    "row scale of the next row": (
        "ring",
        "epilogue.h",
        "output.row_scale + row)",
        "output.row_scale + row / 2 * 2)",
        "every",
        "",
    ),
    "column scale of the next column": (
        "ragged",
        "epilogue.h",
        "output.column_scale + column)",
        "output.column_scale + (column ^ 1))",
        "every",
        "",
    ),
    "pair of scales swapped": (
        "ring",
        "epilogue.h",
        "low.scale = portable::bits_float(pair.x);",
        "low.scale = portable::bits_float(pair.y);",
        "every",
        "",
    ),
    "bias before the scale": (
        "ring",
        "epilogue.h",
        "if (COLUMN_SCALE != SCALE_NONE) x = x * column.scale;\n  if (BIAS) x = x + column.bias;",
        "if (BIAS) x = x + column.bias;\n  if (COLUMN_SCALE != SCALE_NONE) x = x * column.scale;",
        "every",
        "",
    ),
    "column predicate off by one": (
        "ragged",
        "epilogue.h",
        "column >= output.n_size) return;",
        "column > output.n_size) return;",
        "every",
        "",
    ),
    "row predicate dropped": (
        "ragged",
        "epilogue.h",
        "if (row >= output.m_size || column",
        "if (column",
        "every",
        "buffer",
    ),
    "factors read beyond the end": (
        "ring",
        "epilogue.h",
        "const bool inside = column < output.n_size;\n  auto load",
        "const bool inside = true;\n  auto load",
        "every",
        "buffer",
    ),
    "zero point added": (
        "eight",
        "epilogue.h",
        "uint32_t(sum) - uint32_t(row.zero_point)",
        "uint32_t(sum) + uint32_t(row.zero_point)",
        "every",
        "",
    ),
    "residual after the activation": (
        "eight",
        "epilogue.h",
        "if (RESIDUAL == RESIDUAL_BEFORE) x = x + residual;",
        "",
        "every",
        "",
    ),
    "residual of the neighbour": (
        "eight",
        "epilogue.h",
        "values[1] = static_cast<float>(static_cast<int8_t>(pair >> 8));",
        "values[1] = values[0];",
        "every",
        "",
    ),
    "zero point before the rounding": (
        "eight",
        "epilogue.h",
        "(q + to_integer) - to_integer : q;\n  return float_to_s8(q + numbers.zero_point);",
        "q : q;\n  return float_to_s8(q + 0.25f + numbers.zero_point);",
        "every",
        "",
    ),
    "swizzle of the staging": ("ring", "staging.h", "row & 7 :", "row & 3 :", "every", ""),
    "swizzle of short staged rows": ("eight", "staging.h", "row >> 1 & 3)", "row & 3)", "every", ""),
    "matrices of stmatrix exchanged": (
        "ring",
        "staging.h",
        "warp * 16 + matrix % 2 * 8 + within",
        "warp * 16 + matrix / 2 * 8 + within",
        "every",
        "",
    ),
    "swapped output not transposed": (
        "swapped",
        "staging.h",
        "stmatrix_x4_transposed(to",
        "stmatrix_x4(to",
        "every",
        "",
    ),
    "residuals without a predicate": (
        "eight",
        "staging.h",
        "return r < output.m_size && c < output.n_size ?",
        "return c < output.n_size ?",
        "every",
        "buffer",
    ),
}


class Damaged:
    """The emulator in one mode, with the headers of a folder before the project's own."""

    def __init__(self, mode: Mode, folder: Path) -> None:
        self.mode, self.folder = mode, folder

    def launch(self, source: Path, name: str, *arguments: Any, defines: Any = None, **options: Any) -> None:
        load(source, name, defines, include=self.folder).launch(
            *arguments, mode=self.mode, timeout_s=20.0, **options
        )


def damaged(folder: Path, file: Path, before: str, after: str) -> Path:
    """A copy of the kernel and its own headers with one change; the kernel's path."""
    for path in (SOURCE, *(INCLUDE / name for name in ("epilogue.h", "staging.h", "tiles.h"))):
        text = path.read_text()
        if path == file:
            assert before in text, f"{path.name} no longer has {before!r}"
            text = text.replace(before, after, 1)
        (folder / path.name).write_text(text)
    return folder / SOURCE.name


def expected(name: str) -> tuple[Tensors, np.ndarray]:
    """Operands of a case and its exact result; for the order of sums, real numbers and what the sound kernel gives."""
    case = CASES[name]
    tensors = tensors_of(case)
    if name != "order":
        return tensors, oracle(case, tensors)
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((rows, case.k)).astype(DTYPES[case.format]) for rows in (case.m, case.n))
    tensors = replace(tensors, a=a, b=b)
    return tensors, run(Damaged(Mode.EAGER, INCLUDE), case, tensors)


def outcomes(name: str, source: Path) -> dict[Mode, str]:
    """What each mode says: 'exact', 'wrong', or the report."""
    (tensors, want), said, case = expected(name), {}, CASES[name]
    for mode in Mode:
        try:
            d = run(Damaged(mode, source.parent), case, tensors, source=source)
            said[mode] = "exact" if np.array_equal(d.view(np.uint8), want.view(np.uint8)) else "wrong"
        except (EmulatorError, AssertionError) as error:
            said[mode] = str(error)
    return said


def check(said: dict[Mode, str], where: str, part: str) -> None:
    passed = [mode.name for mode, text in said.items() if text == "exact"]
    assert len(passed) <= (0 if where == "every" else len(Mode) - 1), f"passed in {passed}: {said}"
    assert any(part in text for text in said.values()), said


@pytest.mark.parametrize("name", KERNEL_MUTATIONS)
def test_a_bug_in_the_kernel_is_caught(compiler, name, tmp_path):
    case, before, after, where, part = KERNEL_MUTATIONS[name]
    check(outcomes(case, damaged(tmp_path, SOURCE, before, after)), where, part)


@pytest.mark.parametrize("name", HEADER_MUTATIONS)
def test_a_bug_in_its_headers_is_caught(compiler, name, tmp_path):
    case, header, before, after, where, part = HEADER_MUTATIONS[name]
    check(outcomes(case, damaged(tmp_path, INCLUDE / header, before, after)), where, part)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_exact_before_it_is_damaged(compiler, name, tmp_path):
    assert set(outcomes(name, damaged(tmp_path, SOURCE, "", "")).values()) == {"exact"}

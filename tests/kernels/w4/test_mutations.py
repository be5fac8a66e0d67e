"""Bugs planted in the kernels for four-bit weights and in their decoding: a report or a wrong number shows each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.kernels.compile import INCLUDE
from quantkit.kernels.w4.heuristics import W4Few, W4Tile
from quantkit.kernels.w4.launch import FEW_SOURCE, SOURCE
from quantkit.kernels.w4.layout import pack4
from quantkit.kernels.w4.reference import w4_reference

from ..layouts import small_integers
from ..mutations import assert_caught, outcomes
from .weights import DTYPES, run_w4, weight

DECODE = INCLUDE / "w4_decode.h"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A product that is exact as the kernels stand. identity: D is the weight, whatever its scales."""

    tile: W4Tile | W4Few
    kind: tuple[str, int | None] = ("int4", 128)
    shape: tuple[int, int, int] = (13, 300, 1100)
    zeros: bool = False
    scale_type: str = "bfloat16"
    activations: str = "bfloat16"
    identity: bool = False

    @property
    def is_int8(self) -> bool:
        return self.activations == "int8"

    def check(self, machine: Any, source: Path) -> None:
        m, n, k = self.shape
        rng = np.random.default_rng(7)
        form, group = self.kind
        w = weight(
            rng, n, k, form, group, zeros=self.zeros, scale_type=self.scale_type, simple=not self.identity
        )
        packed = pack4(w, activation_bits=8 if self.is_int8 else 16)
        a = np.eye(m, k) if self.identity else small_integers(rng, (m, k), "BF16")
        a = a.astype(DTYPES[self.activations])
        d = run_w4(machine, a, packed, self.tile, source=source)
        np.testing.assert_array_equal(d, w4_reference(a, packed, output="float32"))


PIECES = Run(tile=W4Tile(tile_n=16, consumers=1, slabs=2, grain=4, stages=3))
SHORT = Run(tile=PIECES.tile, shape=(13, 64, 64))
PAIR = Run(tile=W4Tile(tile_n=16, consumers=1, slabs=2, grain=2, stages=2, cluster=2))
ZEROS = Run(tile=PIECES.tile, kind=("uint4", 32), zeros=True)
CODES = Run(tile=PIECES.tile, shape=(32, 130, 96), kind=("int4", 32), identity=True)
SPLIT = Run(tile=PIECES.tile, shape=(32, 130, 96), kind=("int4", 32), scale_type="float32", identity=True)
NVFP4 = Run(tile=PIECES.tile, shape=(32, 130, 96), kind=("nvfp4", 16), identity=True)
MXFP4 = Run(tile=PIECES.tile, shape=(32, 130, 96), kind=("mxfp4", 32), identity=True)
FEW = Run(tile=W4Few(tile_n=16, warps_w=3, warps_k=2, slabs=4, stages=2))
FEW_PAIR = Run(tile=W4Few(tile_n=8, warps_w=2, slabs=2, stages=2, cluster=2))
FEW_ZEROS = Run(tile=W4Few(tile_n=16, warps_w=3, slabs=2, stages=2), kind=("uint4", 64), zeros=True)

BYTES = Run(tile=PIECES.tile, kind=("int4", 32), shape=(13, 130, 300), activations="int8")

# name: (file, text, its replacement, what shows it, where it must be caught)
MUTATIONS = {
    "eight taken for seven, int8": (DECODE, "128 - zero * f.scale", "128 - (zero - 1) * f.scale", BYTES, "every"),
    "no sign for int8": (DECODE, "+ f.offset) ^ 0x80808080u", "+ f.offset)", BYTES, "every"),
    "rows exchanged for int8": (DECODE, ">> r % 2 * 4 & 0x0f", ">> (r + 1) % 2 * 4 & 0x0f", BYTES, "every"),
    "no wait for a full stage": (SOURCE, "mbarrier_wait_ring(full + 8 * s, parity);", "", PIECES, "every"),
    "no wait for an empty stage": (SOURCE, "mbarrier_wait_ring(empty + 8 * s, parity);", "", PIECES, "every"),
    "too few bytes expected": (SOURCE, "expect(barrier, CODES_AT + count", "expect(barrier, count", PIECES, "every"),
    "granule decoded over one that is multiplied": (SOURCE, "wgmma_wait<1>();\n", "", PIECES, "every"),
    "stage released with its last granule": (
        SOURCE, "if (granule == 0 && step > segment.begin) release(previous);",
        "if (granule == GRANULES - 1) release(s);", PIECES, "every",
    ),
    "no wait for the last products": (SOURCE, "wgmma_wait<0>();", "", PIECES, "every"),
    "no fence before wgmma": (SOURCE, "wgmma_fence();", "", PIECES, "every"),
    "half of the registers": (
        SOURCE, "zero[side][i], fragments[granule % 2]", "zero[side][i], fragments[0]", PIECES, "every"
    ),
    "longer shares forgotten": (
        SOURCE, "(block < s.extra ? block : s.extra)", "0", PIECES, "every"
    ),
    "pieces in one slot": (
        SOURCE, "(Shares::start_of(shares, block) < first_unit)", "0", PIECES, "every"
    ),
    "counters not set back": (SOURCE, "if (is_last) st_global(counter, 0u);", "", PIECES, "every"),
    "arrival releases nothing": (SOURCE, "atomic_add_acq_rel(counter, 1)", "atomic_add(counter, 1)", PIECES, "some"),
    "one piece too few added": (SOURCE, "block + p <= last ?", "block + p < last ?", PIECES, "every"),
    "codes beyond the last block": (SOURCE, "left < BLOCKS ? left : BLOCKS", "BLOCKS", PAIR, "every"),
    "codes beyond the last slab": (SOURCE, "slab < slabs ? slab : slabs - 1", "slab", SHORT, "every"),
    "release told to one block": (SOURCE, "if (lane < CLUSTER) {", "if (lane < 1) {", PAIR, "every"),
    "both fetch the same rows of A": (SOURCE, "place.a * TILE_N + part}", "place.a * TILE_N}", PAIR, "every"),
    "blocks leave without a word": (
        SOURCE, "if (CLUSTER > 1) {  // no block leaves", "if (0) {  // no block leaves", PAIR, "some"
    ),
    "eight taken for seven": (DECODE, "both(0x8008)", "both(0x8007)", CODES, "every"),
    "nibble of the next register": (DECODE, "word >> 4 * r &", "word >> 4 * (r ^ 1) &", CODES, "every"),
    "second part of a scale dropped": (DECODE, "multiply(value, f.rest)", "MINUS_ZERO", SPLIT, "every"),
    "both rows with one scale": (DECODE, "factor_of(raw, GROUPS + group)", "factor_of(raw, group)", CODES, "every"),
    "both rows with the upper zero point": (DECODE, "zeros[group] >> 4", "zeros[group] & 15", ZEROS, "every"),
    "one scale for a slab": (DECODE, "GROUPS > 1 ? depth * GROUPS / 4 : 0", "0", ZEROS, "every"),
    "exponent of the fourth code": (DECODE, "(word >> 5) & both(0x0100)", "(word >> 4) & both(0x0100)", NVFP4, "every"),
    "bias of e4m3": (DECODE, "both(0x7600)", "both(0x7580)", NVFP4, "every"),
    "bias of e8m0": (DECODE, "i % 4 * 0x0101) * 128;", "i % 4 * 0x0101) * 128 + both(0x80);", MXFP4, "every"),
    "one half of K added": (FEW_SOURCE, "along_k > 0 ? 0 : WARPS_K - 1", "0", FEW, "every"),
    "sums over a ring that is still read": (
        FEW_SOURCE, "barrier_sync(1, 32 * WARPS);  // everyone", "// everyone", FEW, "some"
    ),
    "half of a slab of A": (FEW_SOURCE, "half * 4 + lane / 8", "lane / 8", FEW, "every"),
    "K of A in another order": (
        FEW_SOURCE, "{of_a[j][k * 2], of_a[j][k * 2 + 1]}", "{of_a[j][k], of_a[j][k + 2]}", FEW, "every"
    ),
    "zero points of an odd group": (FEW_SOURCE, "first % 2 * 8", "0", FEW_ZEROS, "every"),
    "multicast to one block": (FEW_SOURCE, "(1 << CLUSTER) - 1", "1 << rank", FEW_PAIR, "every"),
    "stage released before it is read": (
        FEW_SOURCE, "      const uint32_t stage = base + s * STAGE_BYTES;\n      QK_UNROLL",
        "      const uint32_t stage = base + s * STAGE_BYTES;\n"
        "      if (lane == 0) mbarrier_arrive_ring(empty + 8 * s);\n      QK_UNROLL",
        FEW, "every",
    ),
}  # fmt: skip


def damaged(name: str, folder: Path) -> Path:
    """A kernel with one change in it, or in the header beside it, which its compiler finds first."""
    file, before, after, run, _ = MUTATIONS[name]
    source = FEW_SOURCE if isinstance(run.tile, W4Few) else SOURCE
    texts = {path: path.read_text() for path in (source, DECODE)}
    assert texts[file].count(before) >= 1, f"{file.name} no longer has {before!r}"
    texts[file] = texts[file].replace(before, after, 1)
    for path, text in texts.items():
        # Builds are kept by what the source says: a word of its own keeps this one from an undamaged one's place.
        (folder / path.name).write_text(f"// {name}\n{text}")
    return folder / source.name


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_caught(compiler, name, tmp_path):
    _, _, _, run, where = MUTATIONS[name]
    source = damaged(name, tmp_path)
    assert_caught(outcomes(lambda machine: run.check(machine, source)), where)


@pytest.mark.parametrize(
    "run", {run: None for _, _, _, run, _ in MUTATIONS.values()}, ids=lambda run: str(run.kind)
)
def test_the_kernels_are_exact_before_they_are_damaged(compiler, run):
    source = FEW_SOURCE if isinstance(run.tile, W4Few) else SOURCE
    assert set(outcomes(lambda machine: run.check(machine, source)).values()) == {"exact"}

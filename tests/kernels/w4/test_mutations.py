"""Bugs planted in the kernels for four-bit weights and in their decoding: a report or a wrong number shows each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor
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
    spread: int = 0  # of MXFP4's scales, for e4m3 activations
    rising: bool = False  # large activations first, then small ones

    @property
    def bits(self) -> int:
        return 8 if self.activations in ("int8", "float8_e4m3fn") else 16

    def check(self, machine: Any, source: Path) -> None:
        m, n, k = self.shape
        rng = np.random.default_rng(7)
        form, group = self.kind
        w = weight(
            rng, n, k, form, group, zeros=self.zeros, scale_type=self.scale_type, simple=not self.identity
        )
        if self.activations == "float8_e4m3fn" and form == "mxfp4":
            scale = np.ldexp(np.float32(1), -rng.integers(0, self.spread + 1, w.qparams.scale.shape))
            w = QTensor(w.qvalue, QParams(scale.astype(np.float32)), w.spec)
        packed = pack4(w, activation_bits=self.bits, activations=self.activations)
        a = np.eye(m, k) if self.identity else small_integers(rng, (m, k), "BF16")
        if self.rising:
            a = np.where(np.arange(k) < 128, 448.0, np.where(np.arange(k) % 32 == 0, 1.125, 0.0)) * np.ones(
                (m, 1)
            )
        a = a.astype(DTYPES[self.activations])
        d = run_w4(machine, a, packed, self.tile, source=source)
        np.testing.assert_array_equal(d, w4_reference(a, packed, output="float32"))


PIECES = Run(tile=W4Tile(tile_n=16, consumers=1, slabs=2, grain=4, stages=3))
SHORT = Run(tile=PIECES.tile, kind=("int4", 32), shape=(13, 64, 64))
PAIR = Run(tile=W4Tile(tile_n=16, consumers=1, slabs=2, grain=2, stages=2, cluster=2))
ZEROS = Run(tile=PIECES.tile, kind=("uint4", 32), zeros=True)
CODES = Run(tile=PIECES.tile, shape=(32, 130, 96), kind=("int4", 32), identity=True)
SPLIT = Run(tile=PIECES.tile, shape=(32, 130, 96), kind=("int4", 32), scale_type="float32", identity=True)
NVFP4 = Run(tile=PIECES.tile, shape=(32, 130, 96), kind=("nvfp4", 16), identity=True)
MXFP4 = Run(tile=PIECES.tile, shape=(32, 130, 96), kind=("mxfp4", 32), identity=True)
FEW = Run(tile=W4Few(tile_n=16, warps_w=3, warps_k=2, slabs=4, stages=2))
FEW_GROUPS = Run(tile=W4Few(tile_n=8, warps_w=2, warps_k=1, slabs=4, stages=2), kind=("int4", 128))
FEW_MANY = Run(tile=W4Few(tile_n=8, warps_w=7, warps_k=4, slabs=4, stages=4), shape=(3, 300, 600))
FEW_PAIR = Run(tile=W4Few(tile_n=8, warps_w=2, slabs=2, stages=2, cluster=2))
FEW_ZEROS = Run(tile=W4Few(tile_n=16, warps_w=3, slabs=2, stages=2), kind=("uint4", 64), zeros=True)

EIGHT = Run(
    tile=W4Tile(tile_n=16, consumers=1, slabs=1, grain=2, stages=3), kind=("mxfp4", 32), shape=(13, 130, 600),
    activations="float8_e4m3fn", spread=3,
)  # fmt: skip
EIGHT_CODES = Run(
    tile=EIGHT.tile,
    kind=("mxfp4", 32),
    shape=(96, 130, 96),
    activations="float8_e4m3fn",
    identity=True,
    spread=5,
)
EIGHT_DEEP = Run(
    tile=EIGHT.tile,
    kind=("mxfp4", 32),
    shape=(96, 130, 96),
    activations="float8_e4m3fn",
    identity=True,
    spread=14,
)
EIGHT_LARGE = Run(
    tile=EIGHT.tile,
    kind=("mxfp4", 32),
    shape=(3, 8, 1000),
    activations="float8_e4m3fn",
    spread=0,
    rising=True,
)
# Of integers by e4m3: groups of 128, and two of them in K.
SIGNED = Run(
    tile=EIGHT.tile, kind=("int4", 128), shape=(13, 130, 300), activations="float8_e4m3fn", identity=True
)
FEW_BYTES = Run(
    tile=W4Few(tile_n=16, warps_w=3, slabs=1, stages=2),
    kind=("int4", 64),
    shape=(13, 130, 300),
    activations="int8",
)
BYTES = Run(tile=PIECES.tile, kind=("int4", 32), shape=(13, 130, 300), activations="int8")

# name: (file, text, its replacement, what shows it, where it must be caught)
MUTATIONS = {
    "eight taken for seven, int8": (DECODE, "128 - zero * f.scale", "128 - (zero - 1) * f.scale", BYTES, "every"),
    "no sign for int8": (DECODE, "+ f.offset) ^ 0x80808080u", "+ f.offset)", BYTES, "every"),
    "rows exchanged for int8": (DECODE, ">> r % 2 * 4 & 0x0f", ">> (r + 1) % 2 * 4 & 0x0f", BYTES, "every"),
    "sign of the other row for e4m3": (
        DECODE, "signs = r % 2 ? word << 4 : word", "signs = r % 2 ? word : word << 4", EIGHT_CODES, "every"
    ),
    "selectors of the upper row for both": (
        DECODE, "r % 2 ? selectors >> 16 : selectors", "selectors", EIGHT_CODES, "every"
    ),
    "selectors with their signs": (DECODE, "word & 0x77777777u", "word", EIGHT_CODES, "every"),
    "a half of e4m3 as zero": (DECODE, "0x0c080000u - 2", "0x0c000000u - 2", EIGHT_CODES, "every"),
    "the step of a power of two": (DECODE, "index * 0x08080808u", "index * 0x04040404u", EIGHT_CODES, "every"),
    "subnormals taken for normals": (DECODE, "if (DEEP && index < 3)", "if (0)", EIGHT_DEEP, "every"),
    "the wrong subnormals": (DECODE, "0x06040200u", "0x06030200u", EIGHT_DEEP, "every"),
    "magnitude without its sign's one": (DECODE, "code + (code >> 7 & 0x01010101u)", "code", SIGNED, "every"),
    "signs of neighbours taken along": (DECODE, "& 0x87878787u", "& 0x8f8f8f8fu", SIGNED, "every"),
    "the lower row shifted, not turned": (DECODE, "word << 4 | word >> 28", "word << 4", SIGNED, "every"),
    "sums of both rows with one scale": (SOURCE, "sum_scale(raw[0][i], 1)", "sum_scale(raw[0][i], 0)", SIGNED, "every"),
    "scales of the other row": (SOURCE, "scales[v / 2 % 2]", "scales[v % 2]", SIGNED, "every"),
    "sums without their scales": (SOURCE, "if constexpr (SCALED_SUMS && ", "if constexpr (false && ", SIGNED, "every"),
    "no promotion": (SOURCE, "!PROMOTE || depth > 0", "true", EIGHT_LARGE, "every"),
    "promoted before the products end": (
        SOURCE, "        if constexpr (PROMOTE) {\n          wgmma_wait<0>();", "        if constexpr (PROMOTE) {",
        EIGHT, "every",
    ),
    "stage of e4m3 never released": (
        SOURCE, "          release(s);\n          QK_UNROLL", "          QK_UNROLL", EIGHT, "every"
    ),
    "lower rows with the scale of upper ones": (DECODE, "lower ? 0x1p122f : 0x1p126f", "0x1p126f", SPLIT, "every"),
    "codes of lower rows unshifted": (
        DECODE, "(r % 2 == 0 ? both(0x000f) : both(0x00f0))", "both(0x000f)", CODES, "every"
    ),
    "no shift for the upper codes": (DECODE, "near = r < 2 ? word : word >> 8;", "near = word;", CODES, "every"),
    "the third code's sign left behind": (DECODE, "(word >> 4 | word << 28)", "(word >> 4)", NVFP4, "every"),
    "scales of the next group": (DECODE, "return i % 2 ? word >> 8", "return i % 2 == 0 ? word >> 8", NVFP4, "every"),
    "scales read once too seldom": (
        FEW_SOURCE, "if (o % SHARED_BY != 0) continue;", "if (o != 0) continue;", FEW_GROUPS, "every"
    ),
    "A of the first half": (FEW_SOURCE, "^ half * 64)", "^ 0)", FEW, "every"),
    "factors of columns never fetched": (
        FEW_SOURCE, "if (!FETCH_EARLY && along_k == 0) fetch_columns();", "", FEW_MANY, "every"
    ),
    "no wait for a full stage": (SOURCE, "mbarrier_wait_ring(full + 8 * s, parity);", "", PIECES, "every"),
    "no wait for an empty stage": (SOURCE, "mbarrier_wait_ring(empty + 8 * s, parity);", "", PIECES, "every"),
    "too few bytes expected": (SOURCE, "expect(barrier, CODES_AT + count", "expect(barrier, count", PIECES, "every"),
    "granule decoded over one that is multiplied": (SOURCE, "wgmma_wait<1>();\n", "", PIECES, "every"),
    "stage released with its last granule": (
        SOURCE, "if (!PROMOTE && granule == 0 && step > segment.begin) release(previous);",
        "if (granule == GRANULES - 1) release(s);", PIECES, "every",
    ),
    "no wait for the last products": (
        SOURCE, "      if constexpr (!PROMOTE) {\n        wgmma_wait<0>();", "      if constexpr (!PROMOTE) {",
        PIECES, "every",
    ),
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
    "scales beyond the last slab": (SOURCE, "slab < slabs ? slab : slabs - 1", "slab", SHORT, "every"),
    "codes beyond the last plane": (SOURCE, "plane < planes ? plane : planes - 1", "plane", BYTES, "every"),
    "codes of the first plane twice": (SOURCE, "plane = slab * PLANES + p;", "plane = slab * PLANES;", BYTES, "every"),
    "sets of few rows begin at the same stage": (FEW_SOURCE, "s = along_k;", "s = 0;", FEW, "every"),
    "the other chain of few rows forgotten": (
        FEW_SOURCE, "sum[i][j][e] += sums[CHAINS - 1][i][j][e];", ";", FEW, "every"
    ),
    "a stage of few rows freed by every set": (FEW_SOURCE, "WARPS_W * CLUSTER);", "WARPS * CLUSTER);", FEW, "every"),
    "planes of few rows one after the other": (
        FEW_SOURCE, "((o * PLANES + plane) * TILE + i)", "((o * PLANES) * TILE + i)", FEW_BYTES, "every"
    ),
    "codes of few rows beyond the last plane": (
        FEW_SOURCE, "plane < planes ? plane : planes - 1", "plane", FEW_BYTES, "every"
    ),
    "release told to one block": (SOURCE, "if (lane < CLUSTER) {", "if (lane < 1) {", PAIR, "every"),
    "both fetch the same rows of A": (SOURCE, "place.second * TILE_N + part}", "place.second * TILE_N}", PAIR, "every"),
    "blocks leave without a word": (
        SOURCE, "if (CLUSTER > 1) {  // no block leaves", "if (0) {  // no block leaves", PAIR, "some"
    ),
    "eight taken for seven": (DECODE, "both(0x8008)", "both(0x8007)", CODES, "every"),
    "eight taken for nine in lower rows": (DECODE, "both(0x8080)", "both(0x8090)", CODES, "every"),
    "nibble of the next register": (
        DECODE, "(r % 2 == 0 ? both(0x000f) : both(0x00f0))", "(r % 2 == 0 ? both(0x00f0) : both(0x000f))",
        CODES, "every",
    ),
    "second part of a scale dropped": (DECODE, "multiply(value, f.rest)", "MINUS_ZERO", SPLIT, "every"),
    "both rows with one scale": (DECODE, "factor_of(raw, GROUPS + group)", "factor_of(raw, group)", CODES, "every"),
    "both rows with the upper zero point": (DECODE, "zeros[group] >> 4", "zeros[group] & 15", ZEROS, "every"),
    "one scale for a slab": (DECODE, "GROUPS > 1 ? depth * GROUPS / 4 : 0", "0", ZEROS, "every"),
    "exponent of the fourth code": (DECODE, "(word >> 6 & both(0x0100))", "(word >> 5 & both(0x0100))", NVFP4, "every"),
    "bits above e4m3": (DECODE, "both(0x7000) +", "both(0x6000) +", NVFP4, "every"),
    "lowest bit of e8m0": (DECODE, "& both(0x7f80), i % 4", "& both(0x7f00), i % 4", MXFP4, "every"),
    "one half of K added": (FEW_SOURCE, "along_k > 0 ? 0 : WARPS_K - 1", "0", FEW, "every"),
    "sums over a ring that is still read": (
        FEW_SOURCE, "barrier_sync(1, 32 * WARPS);  // everyone", "// everyone", FEW, "some"
    ),
    "K of A in another order": (
        FEW_SOURCE, "{of_a[j][k * 2], of_a[j][k * 2 + 1]}", "{of_a[j][k], of_a[j][k + 2]}", FEW, "every"
    ),
    "zero points of an odd group": (FEW_SOURCE, "lane / 4 + first % 2 * 8", "lane / 4", FEW_ZEROS, "every"),
    "multicast to one block": (FEW_SOURCE, "(1 << CLUSTER) - 1", "1 << rank", FEW_PAIR, "every"),
    "stage released before it is read": (
        FEW_SOURCE, "      uint32_t raw[MI][PAIR_WORDS + 1], zero[MI][GROUPS];\n",
        "      uint32_t raw[MI][PAIR_WORDS + 1], zero[MI][GROUPS];\n"
        "      if (lane == 0) mbarrier_arrive_ring(empty + 8 * s);\n",
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

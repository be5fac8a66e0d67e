"""Bugs planted in quantize.cu: each is caught, by a report or by a code or scale that is not NumPy's."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from quantkit.formats import FP8_E4M3, INT8, UINT8, QParams, QuantSpec
from quantkit.formats.presets import ACTIVATION_SPECS
from quantkit.kernels.quantize_launch import SOURCE, QuantizeKind
from quantkit.kernels.quantize_reference import NormReference

from .mutations import assert_caught, mutated, outcomes
from .quantizes import assert_equal

NORM = NormReference(kind="layer")
TOKENS = QuantizeKind(x_type="bfloat16", spec=QuantSpec(format=FP8_E4M3, dynamic="token"), norm="layer")
MUTATIONS = {
    "the first warp's result for the row": (
        "(warp / WARPS * WARPS + lane % WARPS) * 4",
        "(warp / WARPS * WARPS) * 4",
        "every",
    ),
    "no barrier before results are read": (
        "block_sync();\n    mine = ld_shared",
        "mine = ld_shared",
        "every",
    ),
    "no barrier before they are overwritten": ("block_sync();  // before", "// before", "some"),
    "quotients not corrected": (
        "float better = corrected(q, x, by.scale, by.reciprocal);",
        "float better = q;",
        "every",
    ),
    "negative zeros lose their sign": (
        "if (CODES == CODES_E4M3 || CODES == CODES_E2M1) better",
        "if (false) better",
        "every",
    ),
    "a power of two too small": (
        "((bits & 0x7fffffu) > mantissa)",
        "((bits & 0x7fffffu) >= mantissa)",
        "every",
    ),
    "NVFP4 scales rounded once": ("(beyond > 0x7fff0u && beyond < 0x80010u)", "false", "every"),
    "scale of a neighbouring block": ("+ column / BLOCK;", "+ column / CHUNK;", "every"),
    "half a block's amax": (
        "for (int mask = BLOCK / CHUNK / 2; mask > 0",
        "for (int mask = BLOCK / CHUNK / 4; mask > 0",
        "every",
    ),
    "codes of rows that are not there": ("const bool inside = is_row &&", "const bool inside =", "every"),
    "tail of a row without a limit": (
        "if (column + i < columns) st_global(to + i, static",
        "if (true) st_global(to + i, static",
        "every",
    ),
    "high nibble first": ("e2m1_code(q[i]) << (i * 4)", "e2m1_code(q[i]) << ((i ^ 1) * 4)", "every"),
    "infinite quotients corrected": (
        "(q < 4096.0f && q > -4096.0f) ? better : q;",
        "true ? better : q;",
        "every",
    ),
    "zero point before rounding": (
        "((q + to_integer) - to_integer) + zero",
        "((q + zero + to_integer) - to_integer)",
        "every",
    ),
    "variance around zero": ("(value - mean) * (value - mean)", "value * value", "every"),
    "no multiplier": (
        "vector_chunk(multiplier, column, columns, factor);",
        "QK_UNROLL for (float& f : factor) f = 1;",
        "every",
    ),
    "the multiplier of the first columns": (
        "vector_chunk(multiplier, column,",
        "vector_chunk(multiplier, column % 64,",
        "every",
    ),
    "bias after the multiplier": (
        "y[i] = y[i] + factor[i];\n      }\n      if (MULTIPLY) {",
        "if (!MULTIPLY) y[i] = y[i] + factor[i];\n      }\n      if (MULTIPLY) {",
        "every",
    ),
    "norm without its weight": ("if (NORM_WEIGHT) {", "if (false) {", "every"),
    "norm without epsilon": ("square_root(square + epsilon)", "square_root(square)", "every"),
    "RMS around the mean": ("if (NORM == NORM_LAYER) mean =", "if (true) mean =", "every"),
    "elements beyond the row keep the mean": (
        "y[i] = is_column(VECTOR ? column : column + i) ? y[i] : 0.0f",
        "y[i] = y[i]",
        "every",
    ),
}


def check(machine, source: Path) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 530)) * [[1], [-0.02], [300]]).astype(np.float32)
    x[0, :4] = [-0.0, 3e38, -3e38, 0.125]
    x[1, 32:64] = 0.4375  # 1.75 · 2⁻²: the largest e4m3 code of the scale 2⁻¹⁰
    low = np.clip(x, -7, 7).astype(np.float16)
    # Rows far from zero: what a norm makes of no element would be their largest.
    bf16 = (rng.standard_normal((3, 1205)) + 40).astype(ml_dtypes.bfloat16)
    run = {"source": source}
    assert_equal(machine, bf16, TOKENS, norm=NORM, **run)
    for name in ("fp8-block", "mxfp8"):
        assert_equal(machine, low, QuantizeKind(x_type="float16", spec=ACTIVATION_SPECS[name]), **run)
    # As it comes before a layer that was smoothed: a norm with all it has, then a factor for each column.
    weight, bias, factor = (rng.standard_normal(1205).astype(np.float32) for _ in range(3))
    small = (rng.standard_normal((3, 1205)) * 2.0**-7 + 2.0**-8).astype(ml_dtypes.bfloat16)
    kind = QuantizeKind(
        x_type="bfloat16",
        spec=ACTIVATION_SPECS["fp8-block"],
        norm="rms",
        norm_weight=True,
        norm_bias=True,
        multiply=True,
    )
    rms = NormReference(kind="rms", weight=weight, bias=bias)
    assert_equal(machine, small, kind, norm=rms, multiplier=factor, **run)
    fixed = QuantSpec(format=UINT8, symmetric=False)
    kind = QuantizeKind(x_type="float32", spec=fixed, zero_point=True)
    assert_equal(machine, x, kind, QParams(np.float32(0.25), np.uint8(3)), **run)
    kind = QuantizeKind(x_type="float32", spec=QuantSpec(format=INT8))
    assert_equal(machine, near_middles(), kind, QParams(np.float32(0.0123), np.int8(0)), **run)
    kind = QuantizeKind(x_type="float32", spec=ACTIVATION_SPECS["nvfp4"])
    assert_equal(machine, near_scales(), kind, global_scale=np.float32(0.0037), **run)


def near_middles() -> np.ndarray:
    """Within an ulp or two of (code + ½) · 0.0123."""
    rng = np.random.default_rng(3)
    middles = (rng.integers(-127, 127, (4, 512)) + 0.5).astype(np.float32) * np.float32(0.0123)
    return (middles.view(np.int32) + rng.integers(-2, 3, middles.shape)).astype(np.int32).view(np.float32)


def near_scales() -> np.ndarray:
    """Blocks whose amax is within an ulp or two of the middle of two e4m3 codes times 6 · 0.0037."""
    codes = np.arange(0x40, 0x7E, dtype=np.uint8).view(FP8_E4M3.dtype).astype(np.float64)
    amax = ((codes[:-1] + codes[1:]) / 2 * 6 * float(np.float32(0.0037))).astype(np.float32)
    x = np.zeros((5, amax.size * 16 - 5), np.float32)
    for row, nudge in enumerate(range(-2, 3)):
        x[row, ::16] = (amax.view(np.int32) + nudge).astype(np.int32).view(np.float32)
        x[row, 3::16] = amax * np.float32(0.3)
    return x


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_in_quantize_is_caught(compiler, name, tmp_path):
    before, after, where = MUTATIONS[name]
    source = mutated(SOURCE, (before, after), tmp_path)
    assert_caught(outcomes(lambda machine: check(machine, source)), where)


def test_quantize_is_exact_before_it_is_damaged(compiler):
    assert set(outcomes(lambda machine: check(machine, SOURCE)).values()) == {"exact"}

"""Fused multiply-add of pairs of 16-bit floats: one rounding, subnormals kept."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ..layouts import DTYPES

SOURCE = Path(__file__).with_name("pairs.cu")
# Bits of the significand, exponent of the smallest subnormal, and of the first power of two beyond the largest.
FORMATS = {"BF16": (8, -133, 128), "F16": (11, -24, 16)}


def rounded(x: Fraction, type_name: str) -> float:
    """To the nearest number of the type, ties to even; infinity beyond the largest."""
    bits, smallest, beyond = FORMATS[type_name]
    if x == 0:
        return 0.0
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent += abs(x) >= Fraction(2) ** (exponent + 1)
    exponent -= abs(x) < Fraction(2) ** exponent
    quantum = Fraction(2) ** max(exponent - bits + 1, smallest)
    nearest = round(x / quantum) * quantum
    return float("inf") * (1 if x > 0 else -1) if abs(nearest) >= Fraction(2) ** beyond else float(nearest)


@pytest.mark.parametrize("type_name", FORMATS)
def test_a_pair_rounds_once_each(machine, type_name):
    rng = np.random.default_rng(0)
    count = 1500
    codes = rng.integers(0, 1 << 16, (3, 2 * count)).astype(np.uint16)
    # Sums that cancel, and those just off a tie: c is near -a b, or half a unit of it.
    near = slice(0, count)
    values = codes.view(DTYPES[type_name])
    with np.errstate(all="ignore"):
        values[2, near] = -(values[0, near].astype(np.float64) * values[1, near].astype(np.float64))
        values[2, : count // 2] *= DTYPES[type_name].type(2.0**-9)
    codes[~np.isfinite(values.astype(np.float32))] = 0
    a, b, c = (np.ascontiguousarray(row).view(np.uint32) for row in codes)
    d = np.zeros(count, np.uint32)
    machine.launch(
        SOURCE, "fma_pairs", a, b, c, d, np.int32(count), defines={"TYPE": type_name}, grid=1, block=32
    )
    exact = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), type_name)
        for x, y, z in values.astype(np.float64).T
    ]
    np.testing.assert_array_equal(d.view(DTYPES[type_name]).astype(np.float64), exact)


@pytest.mark.parametrize("type_name", FORMATS)
def test_a_product_of_a_subnormal_is_exact(machine, type_name):
    """What decoding of four bits rests on: integers as subnormals, times a large power of two."""
    _, smallest, _ = FORMATS[type_name]
    q = np.arange(16, dtype=np.uint16)
    power = np.full(16, 2.0 ** (-smallest - 10)).astype(DTYPES[type_name]).view(np.uint16)
    d = np.zeros(8, np.uint32)
    zero = np.full(8, 0x80008000, np.uint32)
    machine.launch(
        SOURCE, "fma_pairs", q.view(np.uint32), power.view(np.uint32), zero, d, np.int32(8),
        defines={"TYPE": type_name}, grid=1, block=32,
    )  # fmt: skip
    np.testing.assert_array_equal(d.view(DTYPES[type_name]).astype(np.float64), q / 1024)

"""Bugs planted in statistics.cu: each is caught, by a report or by a statistic that is not NumPy's."""

from pathlib import Path

import numpy as np
import pytest

from quantkit.kernels.statistics_launch import SOURCE

from .mutations import assert_caught, mutated, outcomes
from .statistics_runs import DTYPES, assert_as_numpy

RUNS, SHORT, COLUMNS, FLAT = (2, 3, 2501), (9, 10, 49), (90, 264, 1), (1, 1, 5003)
MUTATIONS = {
    "zeros of the table not awaited": ("  block_sync();\n  QK_ROLLED for", "  QK_ROLLED for", "float32", FLAT, "every"),
    "table read before all have counted": (
        "  block_sync();\n  // Each block begins elsewhere",
        "  // Each block begins elsewhere",
        "float32",
        FLAT,
        "every",
    ),
    "coarse keys everywhere": ("largest(key, static_cast", "least(key, static_cast", "float32", FLAT, "every"),
    "negative values in the positive row": ("(bits >> 31) * ROW", "0", "bfloat16", FLAT, "every"),
    "no sample": ("? load_element(x, at) & 0x7fffffffu : 0;", "? 0x7e800000u : 0;", "float32", FLAT, "every"),
    "head of a run forgotten": ("if (lane < head) visit_one", "if (false) visit_one", "float32", RUNS, "every"),
    "tail of a run forgotten": ("if (lane < length - tail)", "if (false)", "float16", RUNS, "every"),
    "a step of short runs too long": ("row += down, column += along;", "row++;", "float32", SHORT, "every"),
    "a column of another group": (
        "item % groups * width + thread % width",
        "item / groups * width + thread % width",
        "float32",
        COLUMNS,
        "every",
    ),
    "sums read before they are stored": (
        "            block_sync();\n            if (slot + half < left) {",
        "            if (slot + half < left) {",
        "float32",
        COLUMNS,
        "every",
    ),
    "an odd slot added twice": ("slot + half < left", "slot + half <= left", "float32", COLUMNS, "every"),
    "parts of neighbouring channels mixed": (
        "* channels + channel) * pieces + i % pieces;",
        "* channels) * pieces + channel + i % pieces;",
        "float32",
        RUNS,
        "every",
    ),
    "infinities among the limits": (
        "if (magnitude < INFINITY_BITS) limit",
        "if (true) limit",
        "float32",
        RUNS,
        "every",
    ),
    "holes of one lane kept to itself": ("odd & ODD_NAN) p.lo", "false) p.lo", "float32", COLUMNS, "every"),
    "items taken twice": ("gridDim.x + taken);", "taken);", "float32", (9000, 264, 1), "every"),
    "the next item read before it is known": (
        "gridDim.x + taken);\n      block_sync();",
        "gridDim.x + taken);",
        "float32",
        (9000, 264, 1),
        "some",
    ),
    "words of the flush left out": ("begin + i - 2 * ROW", "begin", "float32", RUNS, "every"),
    "signs of what lies below": (
        "c.below + (bits >> 16)",
        "c.below + (magnitude >> 16)",
        "float32",
        FLAT,
        "every",
    ),
}  # fmt: skip


def values(cube: tuple[int, int, int], dtype: str) -> np.ndarray:
    """A bit of everything."""
    rng = np.random.default_rng(5)
    n = int(np.prod(cube))
    x = rng.standard_normal(n) * np.exp2(-40 * (rng.random(n) < 0.05))
    x[rng.random(n) < 0.02] = 0
    x[[7, n // 2]] = 900, -2000
    x[n // 3] = np.inf
    x[n // 5] = np.nan
    return x.astype(DTYPES[dtype]).reshape(cube)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_caught(compiler, tmp_path: Path, name: str):
    old, new, dtype, cube, where = MUTATIONS[name]
    source = mutated(SOURCE, (old, new), tmp_path)
    x = values(cube, dtype)

    def check(machine):
        try:
            assert_as_numpy(machine, x, channels=cube != FLAT, source=source)
        except ValueError as error:  # keys or limits that cannot be
            raise AssertionError(str(error)) from error

    said = outcomes(check)
    assert_caught(said, where)


@pytest.mark.parametrize(
    ("dtype", "cube"), [("float32", RUNS), ("float32", COLUMNS), ("bfloat16", FLAT)], ids=str
)
def test_without_a_bug_all_is_right(compiler, dtype, cube):
    said = outcomes(lambda machine: assert_as_numpy(machine, values(cube, dtype), channels=cube != FLAT))
    assert set(said.values()) == {"exact"}

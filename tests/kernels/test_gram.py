"""gram.cu against XᵀX in float64."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from quantkit.kernels.compile import ARCHITECTURES, compile_kernel, is_available
from quantkit.kernels.gram import SOURCE, gram_launch

from .mutations import assert_caught, mutated, outcomes
from .sass import opcodes, tools

TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def upper(machine, x: np.ndarray, before: np.ndarray, source: Path = SOURCE) -> np.ndarray:
    """`before` and the products i ≤ j of x's columns."""
    tokens, size = x.shape
    launch = gram_launch(size, x.dtype.name)
    pitch = -(-size // 8) * 8
    padded = np.zeros((tokens, pitch), x.dtype)
    padded[:, :size] = x
    g = before.copy()
    machine.launch(
        source,
        "gram",
        padded.view(np.uint8),
        g,
        np.int32(tokens),
        np.int32(size),
        np.int32(pitch),
        defines=launch.defines,
        grid=launch.grid,
        block=launch.block,
        shared_bytes=launch.shared_bytes,
    )
    return g


def whole(rng: np.random.Generator, tokens: int, size: int, dtype: str) -> np.ndarray:
    """Whole numbers, whose sums have one right answer."""
    return rng.integers(-9, 10, (tokens, size)).astype(TYPES[dtype])


def assert_exact(machine, tokens: int, size: int, dtype: str, source: Path = SOURCE) -> None:
    rng = np.random.default_rng(tokens)
    x, before = whole(rng, tokens, size, dtype), np.triu(rng.standard_normal((size, size)))
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(upper(machine, x, before, source), before + np.triu(wide.T @ wide))


# One token, a step less one, tiles that are full and that are not, a channel alone.
@pytest.mark.parametrize(
    ("tokens", "size", "dtype"),
    [
        (1, 1, "float16"),
        (31, 9, "bfloat16"),
        (130, 136, "bfloat16"),
        (64, 128, "float16"),
        (97, 260, "float16"),
    ],
)
def test_products_of_whole_numbers_are_exact(machine, tokens, size, dtype):
    assert_exact(machine, tokens, size, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_sums_of_any_numbers_keep_the_bound_that_is_stated(machine, dtype):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((300, 40)) * np.exp2(rng.uniform(-6, 6, 40))).astype(TYPES[dtype])
    wide = x.astype(np.float64)
    error = np.abs(upper(machine, x, np.zeros((40, 40))) - np.triu(wide.T @ wide))
    most = np.sqrt((wide**2).sum(axis=0))
    # Tensor cores cut sums off instead of rounding them: twice as much.
    assert np.all(error <= 300 * 2.0**-23 * most[:, None] * most)


MUTATIONS = {
    "a stage read before it is there": ("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();", "some"),
    "a stage overwritten while it is read": ("block_sync();  // everybody's", "warp_sync();  // everybody's", "some"),
    "rows and columns of a tile swapped": ("(panel ? column : row)", "(panel ? row : column)", "every"),
    "tokens beyond the end": ("token < tokens && ", "", "every"),
    "a swizzle of its own for reading": (
        "m][3], stage + place(t, c));",
        "m][3], stage + t * 256 + c * 16);",
        "every",
    ),
    "halves of K exchanged": ("k + lane / 16 * 8", "k + 8 - lane / 16 * 8", "every"),
    "the mirror image too": ("r <= c0 + n * 8 + e && c0", "r < size && c0", "every"),
    "what was there is lost": ("ld_global(to) + ", "", "every"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_caught(compiler, tmp_path: Path, name: str):
    old, new, where = MUTATIONS[name]
    source = mutated(SOURCE, (old, new), tmp_path)
    assert_caught(outcomes(lambda machine: assert_exact(machine, 170, 136, "float16", source)), where)


@pytest.mark.skipif(
    not is_available() or tools() is None, reason="NVRTC or its disassembler is not installed"
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_runs_on_the_tensor_core_and_keeps_to_registers(tmp_path_factory, arch):
    launch = gram_launch(4096, "bfloat16")
    kernel = compile_kernel(
        SOURCE, arch=arch, defines=launch.defines, cache=tmp_path_factory.getbasetemp() / "gram"
    )
    assert (kernel.spill_bytes, kernel.stack_bytes, kernel.warnings) == (0, 0, ())
    # Two blocks on a multiprocessor, one on Blackwell's.
    assert kernel.registers <= (255 if arch in ("sm_100a", "sm_120a") else 128)
    found = opcodes(kernel.cubin)
    assert found["HMMA"] >= 16 and found["LDSM"] >= 6 and found["LDGSTS"] > 0
    assert found["LDL"] == found["STL"] == 0

"""wgmma against NumPy: types, widths, descriptors, A from registers."""

from pathlib import Path

import numpy as np
import pytest

from quantkit.kernels.cuda.generate_wgmma import legal_n

from ..backends import EmulatorBackend
from ..layouts import (
    DTYPES,
    accumulator,
    depth,
    descriptor,
    image_core_matrices,
    image_swizzled,
    product,
    small_integers,
    wgmma_a_fragment,
    wgmma_d_index,
)

SOURCE = Path(__file__).with_name("instructions.cu")
MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes of the swizzle: its code in a descriptor


def operand(matrix: np.ndarray, span: int, start: int) -> tuple[np.ndarray, np.uint64, int]:
    """The operand's shared memory image, its descriptor at offset `start`, and the bytes from K step to K step."""
    if span:
        return image_swizzled(matrix, span), descriptor(start, 16, 8 * span, MODES[span]), 32
    width = matrix.shape[1] * matrix.itemsize
    leading, stride = 128, 8 * width
    image = image_core_matrices(matrix, leading, stride, matrix.shape[0] * width)
    return image, descriptor(start, leading, stride, 0), 2 * leading


def run_wgmma(machine, type_name, a, b, c, n, span, *, steps=1, registers=False, accumulate=True):
    """D of `steps` wgmmas over the K of a and b, and what each register should hold by the layout."""
    image_a, descriptor_a, step_a = operand(a, span, 0)
    start_b = -(-image_a.size // 1024) * 1024
    image_b, descriptor_b, step_b = operand(b, span, start_b)
    image = np.zeros(start_b + image_b.size, np.uint8)
    image[: image_a.size], image[start_b:] = image_a, image_b
    k = depth(type_name)
    fragments = np.concatenate([wgmma_a_fragment(a[:, s * k : s * k + k]) for s in range(steps)])
    d = c[wgmma_d_index(n)].astype(accumulator(type_name))
    defines = {"WGMMA_TYPE": type_name, "N": n, "A_REGISTERS": int(registers), "STEPS": steps}
    arguments = (
        image,
        np.int32(image.size),
        fragments,
        descriptor_a,
        descriptor_b,
        np.int32(step_a),
        np.int32(step_b),
    )
    machine.launch(
        SOURCE,
        "wgmma_steps",
        *arguments,
        np.int32(accumulate),
        d,
        defines=defines,
        grid=1,
        block=128,
        shared_bytes=image.size,
    )
    return d


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("span", MODES)
@pytest.mark.parametrize("type_name", DTYPES)
def test_wgmma_reads_every_type_through_every_swizzle(machine, type_name, span, registers):
    rng = np.random.default_rng(span)
    steps = max(1, span // 32)
    k = depth(type_name) * steps
    n = 40 if type_name != "S8" else 48
    a, b = small_integers(rng, (64, k), type_name), small_integers(rng, (n, k), type_name)
    c = rng.integers(-100, 100, (64, n))
    d = run_wgmma(machine, type_name, a, b, c, n, span, steps=steps, registers=registers)
    np.testing.assert_array_equal(d, product(a, b, c)[wgmma_d_index(n)])


@pytest.mark.parametrize("type_name", ["S8", "E4M3"])
def test_wgmma_writes_every_width(machine, type_name):
    """Every N on a GPU; on the emulator, where N is an ordinary number, the ends and some between."""
    widths = legal_n(type_name)
    if isinstance(machine, EmulatorBackend):
        widths = [widths[0], widths[2], widths[len(widths) // 2], widths[-1]]
    rng = np.random.default_rng(11)
    for n in widths:
        a, b = small_integers(rng, (64, 32), type_name), small_integers(rng, (n, 32), type_name)
        c = rng.integers(-100, 100, (64, n))
        d = run_wgmma(machine, type_name, a, b, c, n, 32)
        np.testing.assert_array_equal(d, product(a, b, c)[wgmma_d_index(n)], err_msg=f"N = {n}")


def test_wgmma_without_accumulate_ignores_what_the_registers_held(machine):
    rng = np.random.default_rng(12)
    a, b = small_integers(rng, (64, 32), "E4M3"), small_integers(rng, (8, 32), "E4M3")
    d = run_wgmma(machine, "E4M3", a, b, np.full((64, 8), np.nan), 8, 32, accumulate=False)
    np.testing.assert_array_equal(d, product(a, b)[wgmma_d_index(8)])


def run_at(machine, image: np.ndarray, a: np.uint64, b: np.uint64) -> np.ndarray:
    """D [64, 16] of int8 operands of 128-byte rows that lie in `image` where the descriptors say."""
    d = np.zeros((8, 128), np.int32)
    arguments = (
        image,
        np.int32(image.size),
        np.zeros(1, np.uint32),
        a,
        b,
        np.int32(32),
        np.int32(32),
        np.int32(0),
        d,
    )
    defines = {"WGMMA_TYPE": "S8", "N": 16, "A_REGISTERS": 0, "STEPS": 4}
    machine.launch(
        SOURCE, "wgmma_steps", *arguments, defines=defines, grid=1, block=128, shared_bytes=image.size
    )
    out = np.zeros((64, 16), np.int32)
    out[wgmma_d_index(16)] = d
    return out


@pytest.mark.parametrize("row", [64, 8, 3])
def test_an_operand_may_start_at_any_row_of_a_larger_tile(machine, row):
    """The second consumer warpgroup's rows, and even a row inside the swizzle's pattern, with base_offset 0."""
    rng = np.random.default_rng(13)
    a, b = small_integers(rng, (128, 128), "S8"), small_integers(rng, (16, 128), "S8")
    image = np.concatenate([image_swizzled(a, 128), image_swizzled(b, 128)])
    d = run_at(machine, image, descriptor(row * 128, 0, 1024, 1), descriptor(128 * 128, 0, 1024, 1))
    np.testing.assert_array_equal(d, product(a[row : row + 64], b))


def test_base_offset_says_where_the_pattern_starts(machine):
    """A tile whose pattern was laid out from a start that is no multiple of 1024."""
    rng = np.random.default_rng(14)
    a, b = small_integers(rng, (64, 128), "S8"), small_integers(rng, (16, 128), "S8")
    shifted = np.zeros(72 * 128, np.uint8)
    shifted[3 * 128 : 67 * 128] = image_swizzled(a, 128)
    image = np.concatenate([shifted, image_swizzled(b, 128)])
    d = run_at(
        machine, image, descriptor(3 * 128, 0, 1024, 1, base_offset=3), descriptor(72 * 128, 0, 1024, 1)
    )
    np.testing.assert_array_equal(d, product(a, b))

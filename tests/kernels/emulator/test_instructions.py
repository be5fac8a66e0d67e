"""Each instruction of the layer against NumPy, on the emulator in every mode and on a GPU where there is one."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ..backends import gpu
from ..layouts import (
    DTYPES,
    LANE,
    a_fragment,
    accumulator,
    b_fragment,
    d_index,
    depth,
    product,
    small_integers,
)

SOURCE = Path(__file__).with_name("instructions.cu")


def run(machine, name, *arguments, grid=1, block=32, **options):
    machine.launch(SOURCE, name, *arguments, grid=grid, block=block, **options)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8 if values.itemsize == 1 else f"u{values.itemsize}").astype(np.uint32)


# ---- memory ----------------------------------------------------------------------------------------------------


def test_loads_and_stores_of_every_width_move_the_bytes_they_name(machine):
    data = np.random.default_rng(0).integers(0, 256, 3584, dtype=np.uint8)
    out = np.zeros_like(data)
    run(machine, "widths", data, out, shared_bytes=2560)
    spans = [(0, 32), (512, 64), (1024, 128), (1536, 256), (2048, 512), (2560, 32), (3072, 512)]
    for start, length in spans:
        np.testing.assert_array_equal(out[start : start + length], data[start : start + length])


def test_cp_async_copies_the_valid_bytes_and_zeros_the_rest(machine):
    rng = np.random.default_rng(1)
    data = rng.integers(1, 256, 896, dtype=np.uint8)
    valid = np.concatenate([rng.integers(0, size + 1, 32) for size in (16, 8, 4)]).astype(np.int32)
    out = np.zeros_like(data)
    run(machine, "cp_async", data, out, valid, shared_bytes=896)
    expected = data.copy()
    for part, (start, size) in enumerate([(0, 16), (512, 8), (768, 4)]):
        piece = expected[start : start + 32 * size].reshape(32, size)
        piece[np.arange(size) >= valid[part * 32 : part * 32 + 32, None]] = 0
    np.testing.assert_array_equal(out, expected)


# ---- fragments -------------------------------------------------------------------------------------------------


def test_ldmatrix_gives_lane_l_the_pair_at_row_l_div_4(machine):
    data = np.random.default_rng(2).integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    out = np.zeros((10, 32), np.uint32)
    run(machine, "ldmatrix", data.reshape(-1).view(np.uint8), out, shared_bytes=512)
    plain = data.reshape(4, 8, 4, 2).view(np.uint32).reshape(4, 32)
    transposed = np.ascontiguousarray(data.transpose(0, 2, 1)).view(np.uint32).reshape(4, 32)
    np.testing.assert_array_equal(out[:4], plain)
    np.testing.assert_array_equal(out[4:8], transposed)
    np.testing.assert_array_equal(out[8:], plain[1:3])


def test_stmatrix_is_the_inverse_of_ldmatrix(machine):
    if machine.arch < (9, 0):
        pytest.skip("stmatrix starts at sm_90")
    data = np.random.default_rng(3).integers(0, 2**32, (4, 32), dtype=np.uint32)
    out = np.zeros(1280, np.uint8)
    run(machine, "stmatrix", data, out, shared_bytes=1280)
    matrices = data.view(np.uint16).reshape(4, 8, 8)
    np.testing.assert_array_equal(out[:512].view(np.uint16).reshape(4, 8, 8), matrices)
    np.testing.assert_array_equal(out[512:1024].view(np.uint16).reshape(4, 8, 8), matrices.transpose(0, 2, 1))
    np.testing.assert_array_equal(out[1024:].view(np.uint16).reshape(2, 8, 8), matrices[:2])


@pytest.mark.parametrize("type_name", DTYPES)
def test_mma_adds_the_product_of_its_fragments(machine, type_name):
    rng = np.random.default_rng(4)
    k = depth(type_name)
    a, b = small_integers(rng, (16, k), type_name), small_integers(rng, (8, k), type_name)
    c = rng.integers(-100, 100, (16, 8))
    d = c[d_index()].astype(accumulator(type_name))
    run(machine, "mma_once", a_fragment(a), b_fragment(b), d, defines={"TYPE": type_name})
    np.testing.assert_array_equal(d, product(a, b, c)[d_index()])


# By type of codes: K of an instruction, and the scales of a row in it.
BLOCK_TYPES = {"MXFP8": (32, 1), "MXFP4": (64, 2), "NVFP4": (64, 4)}


def blocks(rng: np.random.Generator, rows: int, type_name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of 32 bytes of codes, the scales' codes [rows, scales], and what they stand for; products are exact."""
    k, count = BLOCK_TYPES[type_name]
    values = rng.integers(-4, 5, (rows, k)).astype(np.float32)
    if type_name == "MXFP8":
        codes = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    else:
        nibbles = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        codes = nibbles[:, ::2] | nibbles[:, 1::2] << np.uint8(4)
    form = ml_dtypes.float8_e4m3fn if type_name == "NVFP4" else ml_dtypes.float8_e8m0fnu
    scales = np.ldexp(1.0, rng.integers(-2, 3, (rows, count))).astype(np.float32)
    return codes, scales.astype(form).view(np.uint8), values * np.repeat(scales, k // count, axis=1)


@pytest.mark.parametrize(
    ("type_name", "byte", "thread_a", "thread_b"),
    [("MXFP8", 0, 0, 0), ("MXFP8", 3, 1, 3), ("MXFP4", 2, 0, 2), ("MXFP4", 0, 1, 1), ("NVFP4", 0, 1, 2)],
)
def test_mma_blocks_takes_scales_from_the_lanes_and_bytes_it_names(
    machine, type_name, byte, thread_a, thread_b
):
    """Every other lane, and every other byte, holds rubbish."""
    if machine is gpu() and machine.arch != (12, 0):
        pytest.skip("block scales start at sm_120")
    rng = np.random.default_rng(5)
    count = BLOCK_TYPES[type_name][1]
    (a, of_a, wide_a), (b, of_b, wide_b) = blocks(rng, 16, type_name), blocks(rng, 8, type_name)
    scales_a, scales_b = (rng.integers(0, 256, (32, 4)).astype(np.uint8) for _ in range(2))
    for row in range(16):
        scales_a[4 * (row % 8) + 2 * thread_a + row // 8, byte : byte + count] = of_a[row]
    for row in range(8):
        scales_b[4 * row + thread_b, byte : byte + count] = of_b[row]
    c = rng.integers(-100, 100, (16, 8))
    d = c[d_index()].astype(np.float32)
    defines = {"BLOCK_TYPE": type_name, "BYTE": byte, "THREAD_A": thread_a, "THREAD_B": thread_b}
    words = [part.view(np.uint32).reshape(-1) for part in (scales_a, scales_b)]
    run(machine, "mma_blocks_once", a_fragment(a), b_fragment(b), *words, d, defines=defines)
    np.testing.assert_array_equal(d, product(wide_a, wide_b, c)[d_index()])


def test_mma_s8_wraps_at_32_bits(machine):
    a, b = np.full((16, 32), 127, np.int8), np.full((8, 32), 127, np.int8)
    d = np.full((4, 32), np.iinfo(np.int32).max, np.int32)
    run(machine, "mma_once", a_fragment(a), b_fragment(b), d, defines={"TYPE": "S8"})
    assert (d == np.iinfo(np.int32).min + 32 * 127 * 127 - 1).all()


# ---- barriers, clusters ----------------------------------------------------------------------------------------


def test_mbarrier_phases_alternate_and_complete_by_count(machine):
    out = np.zeros(9, np.uint32)
    run(machine, "mbarrier_rounds", out, np.int32(9), block=64, shared_bytes=32)
    np.testing.assert_array_equal(out, np.arange(9) ** 2 + 1)


def test_named_barriers_join_only_the_threads_they_count(machine):
    out = np.zeros((5, 32), np.uint32)
    run(machine, "named_barriers", out, np.int32(5), block=128, shared_bytes=512)
    np.testing.assert_array_equal(out, np.arange(5)[:, None] * 3000 + 600 + 3 * LANE)


@pytest.mark.parametrize("size", [2, 4])
def test_clusters_share_memory_and_barriers(machine, size):
    out = np.zeros((2 * size, 2, 32), np.uint32)
    defines = {"CLUSTER": size}
    run(machine, "cluster_ring", out, grid=2 * size, cluster=size, shared_bytes=528, defines=defines)
    left = (np.arange(2 * size) - 1) % size
    np.testing.assert_array_equal(out[:, 0], left[:, None] * 100 + LANE)
    np.testing.assert_array_equal(out[:, 1], left[:, None] * 7 + LANE)


def test_blocks_hand_over_by_flags_and_counters(machine):
    blocks = 6
    flag, counter, slots = np.zeros(1, np.uint32), np.zeros(1, np.uint32), np.zeros((blocks, 32), np.uint32)
    out, total, whole = (
        np.array([0, 0, 5, *[0] * 61], np.uint32),
        np.zeros(1, np.float32),
        np.zeros(1, np.int32),
    )
    run(machine, "turns", flag, counter, slots, out, total, whole, grid=blocks, multiprocessors=blocks)
    np.testing.assert_array_equal(out[32:], 15 + blocks * LANE)
    assert (out[0], out[1], out[2], counter[0]) == (blocks, blocks * 32 - 1, 9, blocks + 10)
    assert (total[0], whole[0]) == (0.5 * 32 * blocks, -2 * 32 * blocks)


def test_registers_move_between_warpgroups(machine):
    out = np.zeros(1, np.uint32)
    run(machine, "trade_registers", out, block=384)
    assert out[0] == 256


def test_one_lane_is_elected(machine):
    out = np.zeros(1, np.uint32)
    run(machine, "elect", out)
    assert out[0] == 1


# ---- lanes and arithmetic --------------------------------------------------------------------------------------


def test_lanes_exchange_values(machine):
    x = np.random.default_rng(5).standard_normal(32).astype(np.float32)
    out, votes = np.zeros((4, 32), np.float32), np.zeros(1, np.uint32)
    run(machine, "lanes", x, out, votes)
    down = np.where(LANE + 3 < 32, LANE + 3, LANE)
    np.testing.assert_array_equal(out, [np.full(32, x[5]), x[LANE * 7 % 32], x[LANE ^ 13], x[down]])
    assert votes[0] == sum(1 << i for i in range(32) if x[i] > 0)


def test_lop3_prmt_dp4a_and_twice_follow_their_definitions(machine):
    rng = np.random.default_rng(6)
    a, b, c = rng.integers(0, 2**32, (3, 256), dtype=np.uint32)
    out = np.zeros((6, 256), np.uint32)
    run(machine, "integers", a, b, c, out, np.int32(256))
    np.testing.assert_array_equal(out[0], a & b | c)
    np.testing.assert_array_equal(out[1], a ^ b ^ c)
    source = np.stack([a, b], axis=1).view(np.uint8)  # eight bytes, b's on top
    nibbles = c[:, None] >> (4 * np.arange(4, dtype=np.uint32)) & 15
    picked = np.take_along_axis(source, (nibbles & 7).astype(np.int64), axis=1)
    sign = np.where(picked & 0x80, 255, 0)
    np.testing.assert_array_equal(out[2].view(np.uint8).reshape(-1, 4), np.where(nibbles & 8, sign, picked))
    dots = (a.view(np.int8).astype(np.int64) * b.view(np.int8)).reshape(-1, 4).sum(axis=1)
    np.testing.assert_array_equal(out[3], (dots + c).astype(np.uint32))
    np.testing.assert_array_equal(out[4], (a & 0xFFFF) * np.uint32(0x10001))
    np.testing.assert_array_equal(out[5], (a >> 16) * np.uint32(0x10001))


def interesting_floats() -> np.ndarray:
    """Every exponent, halfway points, both zeros, subnormals, infinities and NaN."""
    rng = np.random.default_rng(7)
    random_bits = rng.integers(0, 2**32, 6000, dtype=np.uint32).view(np.float32)
    around = rng.standard_normal(4000).astype(np.float32) * np.float32(2.0) ** rng.integers(-20, 20, 4000)
    # All values halfway between two codes of an 8-bit float, and their neighbours.
    codes = np.arange(127, dtype=np.uint8)
    halves = []
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        values = codes.view(dtype).astype(np.float32)
        halves.append((values[1:] + values[:-1]) / 2)
    middle = np.concatenate(halves)
    middle = middle[np.isfinite(middle)]
    edges = np.float32(
        [0, -0.0, np.inf, -np.inf, np.nan, 448, 464, 465, 57344, 61440, 65504, 65520, 127.5, -128.5]
    )
    near = [np.nextafter(middle, np.float32(s), dtype=np.float32) for s in (np.inf, -np.inf)]
    fours = np.arange(-64, 65, dtype=np.float32) / 8
    return np.concatenate([random_bits, around, middle, *near, -middle, edges, fours]).astype(np.float32)


def saturated(x: np.ndarray, dtype: type, nan_code: int) -> np.ndarray:
    """Codes of ml_dtypes' rounding, with satfinite's treatment of what is too large."""
    info = ml_dtypes.finfo(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        codes = bits(np.clip(x, float(info.min), float(info.max)).astype(dtype))
    return np.where(np.isnan(x), nan_code, codes)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_narrowing_rounds_to_nearest_even_and_saturates(machine):
    low = interesting_floats()
    high = np.random.default_rng(8).permutation(low)
    out = np.zeros((6, low.size), np.uint32)
    run(machine, "narrow", low, high, out, np.int32(low.size))

    def pair(convert, width):
        return convert(low) | convert(high) << width

    def plain(dtype):
        return lambda x: np.where(np.isnan(x), 0x7FFF, bits(x.astype(dtype)))

    np.testing.assert_array_equal(out[0], pair(plain(ml_dtypes.bfloat16), 16))
    np.testing.assert_array_equal(out[1], pair(plain(np.float16), 16))
    np.testing.assert_array_equal(out[2], pair(lambda x: saturated(x, ml_dtypes.float8_e4m3fn, 0x7F), 8))
    np.testing.assert_array_equal(out[3], pair(lambda x: saturated(x, ml_dtypes.float8_e5m2, 0x7F), 8))
    np.testing.assert_array_equal(out[4], pair(lambda x: saturated(x, ml_dtypes.float4_e2m1fn, 7), 4))
    integers = np.clip(np.rint(np.nan_to_num(low, nan=0)), -128, 127).astype(np.int8)
    np.testing.assert_array_equal(out[5], integers.view(np.uint8))


def test_e8m0_scales_round_up_to_a_power_of_two(machine):
    rng = np.random.default_rng(9)
    x = np.abs(rng.integers(0, 0x7F800000, 4000, dtype=np.uint32).view(np.float32))
    x = np.concatenate([x, np.ldexp(np.float32(1), np.arange(-149, 128)), np.float32([0, np.inf, np.nan])])
    x = np.concatenate([x, np.nextafter(x[:300], np.float32(np.inf), dtype=np.float32)]).astype(np.float32)
    out = np.zeros(x.size, np.uint32)
    run(machine, "scales", x, x[::-1].copy(), out, np.int32(x.size))
    codes = out & 0xFF
    np.testing.assert_array_equal(out >> 8, codes[::-1])
    assert (codes[np.isnan(x)] == 0xFF).all()
    finite = np.isfinite(x) & (x > 0) & (x <= 2.0**127)
    value = np.ldexp(1.0, codes.astype(int) - 127)
    assert (value[finite] >= x[finite].astype(np.float64)).all()
    assert ((value[finite] / 2 < x[finite]) | (codes[finite] == 0)).all()
    assert (codes[~np.isnan(x) & (x > 2.0**127)] == 0xFE).all()
    assert (codes[x == 0] == 0).all()


def test_widening_is_exact(machine):
    codes = np.arange(2**16, dtype=np.uint32)
    out = np.zeros((8, codes.size), np.float32)
    run(machine, "widen", codes | codes[::-1] << 16, out, np.int32(codes.size))
    low, high = codes.astype(np.uint16), codes[::-1].astype(np.uint16)
    for row, (code, dtype) in enumerate(
        [(low, ml_dtypes.bfloat16), (high, ml_dtypes.bfloat16), (low, np.float16), (high, np.float16)]
    ):
        np.testing.assert_array_equal(out[row], code.view(dtype).astype(np.float32))
    for row, dtype in ((4, ml_dtypes.float8_e4m3fn), (6, ml_dtypes.float8_e5m2)):
        pairs = low.view(np.uint8).reshape(-1, 2)
        expected = pairs.view(dtype).astype(np.float32)
        np.testing.assert_array_equal(out[row : row + 2].T, expected)


def test_approximations_keep_their_bounds_and_products_round_twice(machine):
    x = np.random.default_rng(10).uniform(-8, 8, 5000).astype(np.float32)
    x[-1] = np.nan
    out = np.zeros((7, x.size), np.float32)
    run(machine, "approximate", x, out, np.int32(x.size))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(out[0], 1 / exact, rtol=2**-22)
    np.testing.assert_allclose(out[1], np.exp2(exact), rtol=2**-21)
    np.testing.assert_allclose(out[2], np.tanh(exact), rtol=2**-10.9)
    np.testing.assert_array_equal(out[3], (exact * exact - 1).astype(np.float32))
    np.testing.assert_array_equal(out[4], x * x - np.float32(1))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out[5], np.sqrt(x))
    np.testing.assert_array_equal(out[6], np.fmax(x[0], np.abs(x)))

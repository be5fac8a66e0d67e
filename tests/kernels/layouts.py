"""Layouts of the PTX ISA, written in NumPy: fragments in registers, operands in shared memory."""

import ml_dtypes
import numpy as np

# type tag of the instruction layer: NumPy dtype of its elements
DTYPES = {
    "S8": np.dtype(np.int8),
    "E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


def accumulator(type_name: str) -> np.dtype:
    return np.dtype(np.int32 if type_name == "S8" else np.float32)


def depth(type_name: str) -> int:
    """K of one instruction: 32 bytes."""
    return 32 // DTYPES[type_name].itemsize


def words(matrix: np.ndarray) -> np.ndarray:
    """Rows of any element type as rows of 32-bit words."""
    return np.ascontiguousarray(matrix).view(np.uint32)


LANE = np.arange(32)


def a_fragment(a: np.ndarray) -> np.ndarray:
    """[16, K] to registers [4, 32 lanes] ("Matrix Fragments for mma.m16n8k32", A)."""
    w = words(a)
    return np.stack([w[LANE // 4 + 8 * (i % 2), LANE % 4 + 4 * (i // 2)] for i in range(4)])


def b_fragment(b: np.ndarray) -> np.ndarray:
    """[8, K] to registers [2, 32 lanes]."""
    w = words(b)
    return np.stack([w[LANE // 4, LANE % 4 + 4 * i] for i in range(2)])


def d_index() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each accumulator register [4, 32 lanes] of mma."""
    i = np.arange(4)[:, None]
    return LANE // 4 + 8 * (i // 2), LANE % 4 * 2 + i % 2


def wgmma_d_index(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each accumulator register [N / 2, 128 threads] of wgmma."""
    r, t = np.arange(n // 2)[:, None], np.arange(128)
    return 16 * (t // 32) + t % 32 // 4 + 8 * (r // 2 % 2), 8 * (r // 4) + t % 4 * 2 + r % 2


def wgmma_a_fragment(a: np.ndarray) -> np.ndarray:
    """[64, K] to registers [4, 128 threads]: each warp's sixteen rows as in mma."""
    return np.concatenate([a_fragment(a[16 * w : 16 * w + 16]) for w in range(4)], axis=1)


def swizzled(offset: np.ndarray, span: int) -> np.ndarray:
    """Byte offsets after the swizzle of `span` bytes: 16-byte chunks exchanged by the 128-byte line's number."""
    return offset ^ ((offset >> 7 & (span // 16 - 1)) << 4) if span else offset


def image_swizzled(matrix: np.ndarray, span: int) -> np.ndarray:
    """[rows, span bytes] as TMA leaves it in shared memory with that swizzle."""
    data = np.ascontiguousarray(matrix).view(np.uint8)
    rows, width = data.shape
    assert width == span
    offset = np.arange(rows)[:, None] * span + np.arange(span)
    image = np.zeros(rows * span, np.uint8)
    image[swizzled(offset, span)] = data
    return image


def image_core_matrices(matrix: np.ndarray, leading: int, stride: int, size: int) -> np.ndarray:
    """[rows, bytes] as 8 x 16-byte core matrices, `leading` apart along K and `stride` along the rows."""
    data = np.ascontiguousarray(matrix).view(np.uint8)
    row, byte = np.arange(data.shape[0])[:, None], np.arange(data.shape[1])
    image = np.zeros(size, np.uint8)
    image[row // 8 * stride + row % 8 * 16 + byte // 16 * leading + byte % 16] = data
    return image


def descriptor(address: int, leading: int, stride: int, mode: int, base_offset: int = 0) -> np.uint64:
    """The 64 bits of "Matrix Descriptor Format"; mode: 0 none, 1 128-byte, 2 64-byte, 3 32-byte swizzle."""
    fields = address >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | base_offset << 49 | mode << 62
    return np.uint64(fields)


def small_integers(rng: np.random.Generator, shape: tuple[int, ...], type_name: str) -> np.ndarray:
    """Values whose dot products are exact in any accumulation: full range for S8, -4 … 4 for floats."""
    if type_name == "S8":
        return rng.integers(-128, 128, shape, dtype=np.int8)
    return rng.integers(-4, 5, shape).astype(np.float32).astype(DTYPES[type_name])


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray | float = 0) -> np.ndarray:
    """a @ b.T + c in float64, exact for `small_integers`."""
    return a.astype(np.float64) @ b.astype(np.float64).T + c

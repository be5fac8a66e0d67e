import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.formats import FP4_E2M1, FP8_E4M3, INT2, INT3, INT4, INT8, UINT2, UINT3, UINT4, UINT8
from quantkit.formats.packing import code_bits, codes_from_bits, pack_bits, unpack_bits

FORMATS = [INT2, UINT2, INT3, UINT3, INT4, UINT4, INT8, UINT8, FP4_E2M1, FP8_E4M3]


def bits_of(*values):
    return np.array(values, np.uint8)


@pytest.mark.parametrize(
    ("bits", "pattern", "packed"),
    [
        (4, [0x1, 0x2, 0x3, 0x4], [0x21, 0x43]),
        (4, [0xA, 0xB, 0xC], [0xBA, 0x0C]),
        (2, [0, 1, 2, 3], [0b11_10_01_00]),
        (2, [3, 0, 0, 0, 1], [0b11, 0b01]),
        # 001 010 011 100 101 110 111 000, the first lowest.
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
        (3, [7], [0b111]),
        (8, [0x12, 0x34], [0x12, 0x34]),
    ],
)
def test_the_first_code_lies_in_the_lowest_bits(bits, pattern, packed):
    assert pack_bits(bits_of(*pattern), bits).tolist() == packed
    assert unpack_bits(bits_of(*packed), bits, len(pattern)).tolist() == pattern


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(data=st.data(), rows=st.integers(1, 3), size=st.integers(1, 40))
def test_what_was_packed_comes_back_at_any_size(bits, data, rows, size):
    pattern = np.array(
        data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * size, max_size=rows * size)), np.uint8
    ).reshape(rows, size)
    packed = pack_bits(pattern, bits)
    assert packed.shape == (rows, -(-size * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, size), pattern)


@pytest.mark.parametrize(
    ("fmt", "values", "pattern"),
    [
        (INT4, [-1, -8, 7], [0xF, 0x8, 0x7]),
        (INT3, [-1, -4, 3], [0b111, 0b100, 0b011]),
        (INT2, [-1, -2, 1], [0b11, 0b10, 0b01]),
        (UINT4, [15, 8], [0xF, 0x8]),
        (FP4_E2M1, [-6.0, 0.5, 6.0, -0.0], [0xF, 0x1, 0x7, 0x8]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_code_has_the_bits_of_its_format(fmt, values, pattern):
    codes = np.array(values, np.float32).astype(fmt.dtype)
    assert code_bits(codes, fmt).tolist() == pattern


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_code_returns_from_its_bits(fmt):
    codes = fmt.codes()
    back = codes_from_bits(code_bits(codes, fmt), fmt)
    assert back.dtype == fmt.dtype
    assert back.tobytes() == codes.tobytes()


@pytest.mark.parametrize(
    ("fmt", "data_type"),
    [
        (INT4, onnx.TensorProto.INT4),
        (UINT4, onnx.TensorProto.UINT4),
        (FP4_E2M1, onnx.TensorProto.FLOAT4E2M1),
    ],
    ids=["int4", "uint4", "fp4_e2m1"],
)
@pytest.mark.parametrize("size", [6, 7])
def test_four_bits_are_packed_as_onnx_packs_them(fmt, data_type, size):
    codes = np.resize(fmt.codes(), size)
    packed = pack_bits(code_bits(codes, fmt), 4)
    tensor = onnx.TensorProto(dims=[size], data_type=data_type, raw_data=packed.tobytes())
    read = onnx.numpy_helper.to_array(tensor)
    assert read.astype(np.float32).tolist() == codes.astype(np.float32).tolist()


def test_two_dimensions_are_packed_row_by_row():
    codes = np.array([[1, 2, 3], [-1, -2, -3]], np.float32).astype(ml_dtypes.int4)
    assert pack_bits(code_bits(codes, INT4), 4).tolist() == [[0x21, 0x03], [0xEF, 0x0D]]

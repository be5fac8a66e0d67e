import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit.errors import SpecError
from quantkit.formats import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    INT4,
    INT8,
    INT16,
    UINT4,
    QuantSpec,
    dequantize,
    qparams_from_range,
    quantize,
    range_of,
)
from quantkit.formats.compressed_tensors import pack_int32, to_compressed_tensors, unpack_fp4, unpack_int32

WEIGHT = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32)
_BLOCKS_OF_16 = {"format": FP4_E2M1, "axis": 1, "block_size": 16}


def quantized(spec, w=WEIGHT):
    return quantize(w, qparams_from_range(range_of(w, spec), spec), spec)


def test_literal_words():
    codes = np.array([[-8, -7, -6, -5, -4, -3, -2, -1, 7]])
    # −8 is stored as 0; the first code lies lowest.
    assert pack_int32(codes, 4).tolist() == [[0x76543210, 0xF]]
    assert pack_int32(codes.T, 4, axis=0).tolist() == [[0x76543210], [0xF]]
    assert pack_int32(np.array([[-128, 127]]), 8).tolist() == [[0xFF00]]
    assert pack_int32(np.full((1, 8), 7), 4).tolist() == [[-1]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@given(data=st.data())
def test_words_give_back_the_codes_at_any_size(bits, axis, data):
    codes = data.draw(
        hnp.arrays(
            np.int8,
            hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
            elements=st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        )
    )
    packed = pack_int32(codes, bits, axis)
    assert packed.shape[axis] == -(-codes.shape[axis] * bits // 32)
    np.testing.assert_array_equal(unpack_int32(packed, bits, codes.shape[axis], axis), codes)


@pytest.mark.parametrize("fmt", [INT4, UINT4, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_tensors_of_an_integer_weight_decode_to_it(fmt, symmetric):
    weight = quantized(QuantSpec(format=fmt, axis=1, block_size=16, symmetric=symmetric), WEIGHT + 0.5)
    found = to_compressed_tensors(weight)
    assert found["weight_shape"].tolist() == [24, 64]
    codes = unpack_int32(found["weight_packed"], fmt.bits, 64).astype(np.float32)
    zero = np.zeros((24, 4), np.float32)
    assert ("weight_zero_point" in found) == (not symmetric)
    if not symmetric:
        zero = unpack_int32(found["weight_zero_point"], fmt.bits, 24, axis=0).astype(np.float32)
    scale = found["weight_scale"]
    values = (codes.reshape(24, 4, 16) - zero[..., None]) * scale[..., None]
    np.testing.assert_array_equal(values.reshape(24, 64), dequantize(weight))


def test_nvfp4_stores_the_reciprocal_of_the_global_scale():
    weight = quantized(QuantSpec(**_BLOCKS_OF_16, scale_format=FP8_E4M3))
    found = to_compressed_tensors(weight)
    assert found["weight_global_scale"].shape == (1,)
    assert found["weight_global_scale"][0] == pytest.approx(2688 / np.abs(WEIGHT).max(), rel=1e-6)
    assert found["weight_scale"].dtype == ml_dtypes.float8_e4m3fn
    assert found["weight_packed"].shape == (24, 32)
    codes = unpack_fp4(found["weight_packed"], 64).astype(np.float32)
    scale = found["weight_scale"].astype(np.float32) / found["weight_global_scale"]
    values = codes * np.repeat(scale, 16, axis=1)
    np.testing.assert_allclose(values, dequantize(weight), rtol=1e-6)


def test_mx_scales_are_stored_as_their_exponents():
    spec = QuantSpec(format=FP4_E2M1, axis=1, block_size=32, scale_format=E8M0)
    weight = quantized(spec)
    found = to_compressed_tensors(weight)
    assert set(found) == {"weight_packed", "weight_scale"}
    assert found["weight_scale"].dtype == np.uint8
    np.testing.assert_array_equal(2.0 ** (found["weight_scale"].astype(float) - 127), weight.qparams.scale)
    mxfp8 = to_compressed_tensors(
        quantized(QuantSpec(format=FP8_E4M3, axis=1, block_size=32, scale_format=E8M0))
    )
    assert mxfp8["weight"].dtype == ml_dtypes.float8_e4m3fn
    assert mxfp8["weight_scale"].dtype == np.uint8


@pytest.mark.parametrize(
    ("fields", "shape"),
    [({}, (1,)), ({"axis": 0}, (24, 1)), ({"block_shape": (16, 16)}, (2, 4))],
    ids=["tensor", "channel", "tiles"],
)
def test_float8_stays_as_it_is_beside_its_scales(fields, shape):
    weight = quantized(QuantSpec(format=FP8_E4M3, **fields))
    found = to_compressed_tensors(weight)
    assert found["weight"] is weight.qvalue
    assert found["weight_scale"].shape == shape


def test_a_channel_has_one_scale_in_a_column():
    found = to_compressed_tensors(quantized(QuantSpec(format=INT4, axis=0, symmetric=False)))
    assert found["weight_scale"].shape == (24, 1)
    assert found["weight_zero_point"].shape == (3, 1)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (QuantSpec(format=INT4, axis=0, block_size=16), (24, 64), "scales along axis 1, not 0; transpose it"),
        (QuantSpec(format=INT4, axis=1), (24, 64), "scales along axis 0, not 1; transpose it"),
        (QuantSpec(format=INT16, axis=0), (24, 64), "integers of 2, 3, 4 or 8 bits"),
        (QuantSpec(**_BLOCKS_OF_16), (24, 64), "no E2M1 with float scales"),
        (QuantSpec(**_BLOCKS_OF_16, scale_format=FP8_E4M3), (24, 15), "wants an even K, not 15"),
        (QuantSpec(format=INT4, axis=0), (2, 3, 4), "holds matrices"),
    ],
)
def test_what_the_files_cannot_hold_is_refused(spec, shape, message):
    with pytest.raises(SpecError, match=message):
        to_compressed_tensors(quantized(spec, np.ones(shape, np.float32)))

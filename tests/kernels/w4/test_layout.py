"""Packing of four-bit weights: nothing is lost, nothing is wasted, and what no kernel takes is refused."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import KernelError
from quantkit.formats.format import FP4_E2M1, FP8_E4M3, INT4, INT8, UINT4
from quantkit.formats.layout import size_bytes
from quantkit.formats.packing import code_bits
from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor, dequantize
from quantkit.formats.spec import QuantSpec
from quantkit.kernels.w4.layout import pack4, two_levels, unpack4
from quantkit.kernels.w4.reference import decoded4

from .weights import KINDS, weight


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    zeros=st.booleans(),
    scale_type=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 1000),
)
def test_unpacking_undoes_packing(n, k, kind, zeros, scale_type, seed):
    form, group = kind
    w = weight(
        np.random.default_rng(seed), n, k, form, group, zeros=zeros, scale_type=scale_type, simple=False
    )
    packed = pack4(w)
    codes, scales, zero = unpack4(packed)
    want = code_bits(w.qvalue, w.spec.format)
    if form == "nvfp4":  # under a scale of zero codes mean nothing
        want = np.where(np.repeat(w.qparams.scale == 0, 16, axis=1)[:, :k], 0, want)
    np.testing.assert_array_equal(codes, want)
    held = w.qparams.scale.astype(np.float64)
    if w.qparams.global_scale is not None:
        held = held * float(w.qparams.global_scale)
    np.testing.assert_array_equal(scales, held.reshape(n, -1))
    if zero is None:
        assert w.qparams.zero_point is None or np.all(code_bits(w.qparams.zero_point, w.spec.format) % 8 == 0)
    else:
        stored = code_bits(w.qparams.zero_point, w.spec.format).reshape(n, -1)
        np.testing.assert_array_equal(zero, stored)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 400),
    kind=st.sampled_from([kind for kind in KINDS if "int" in kind[0]]),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_unpacking_undoes_packing_for_int8_activations(n, k, kind, zeros, seed):
    form, group = kind
    rng = np.random.default_rng(seed)
    w = weight(rng, n, k, form, group, zeros=zeros, middling=True, simple=False)
    scale = w.qparams.scale if group is None else two_levels(w.qparams.scale)
    w = QTensor(w.qvalue, QParams(scale, w.qparams.zero_point), w.spec)
    if zeros and group is not None:  # steps of 16 and zero points off the middle leave an int8
        w = QTensor(w.qvalue, QParams(two_levels(w.qparams.scale, 8), w.qparams.zero_point), w.spec)
    codes, scales, zero = unpack4(pack4(w, activation_bits=8))
    np.testing.assert_array_equal(codes, code_bits(w.qvalue, w.spec.format))
    np.testing.assert_array_equal(scales.astype(np.float32), w.qparams.scale.reshape(n, -1))
    if zero is not None:
        np.testing.assert_array_equal(zero, code_bits(w.qparams.zero_point, w.spec.format).reshape(n, -1))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 400),
    spread=st.integers(0, 14),
    top=st.integers(-120, 120),
    seed=st.integers(0, 1000),
)
def test_unpacking_undoes_packing_for_e4m3_activations(n, k, spread, top, seed):
    rng = np.random.default_rng(seed)
    w = weight(rng, n, k, "mxfp4", 32)
    groups = w.qparams.scale.shape[1]
    scale = np.ldexp(np.float32(1), np.clip(top - rng.integers(0, spread + 1, (n, groups)), -126, 127))
    w = QTensor(w.qvalue, QParams(scale.astype(np.float32)), w.spec)
    packed = pack4(w, activation_bits=8)
    codes, scales, zero = unpack4(packed)
    np.testing.assert_array_equal(codes, code_bits(w.qvalue, w.spec.format))
    magnitudes = np.zeros((n, groups * 32), np.uint8)
    magnitudes[:, :k] = codes & 7
    counts = magnitudes.reshape(n, groups, 32).any(axis=2)  # a group of zeros may have any scale
    np.testing.assert_array_equal(scales[counts], scale.astype(np.float64)[counts])
    assert zero is None
    # What the kernel multiplies by is an e4m3 number.
    values = decoded4(packed, "float8_e4m3fn")
    np.testing.assert_array_equal(values.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), values)
    assert spread > 11 or not packed.layout.deep or top < -106


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 600),
    group=st.sampled_from([128, 256, None]),
    scale_type=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 1000),
)
def test_unpacking_undoes_packing_of_integers_for_e4m3_activations(n, k, group, scale_type, seed):
    w = weight(np.random.default_rng(seed), n, k, "int4", group, scale_type=scale_type, simple=False)
    packed = pack4(w, activation_bits=8, activations="float8_e4m3fn")
    codes, scales, zero = unpack4(packed)
    np.testing.assert_array_equal(codes, code_bits(w.qvalue, w.spec.format))
    np.testing.assert_array_equal(scales, w.qparams.scale.astype(np.float64).reshape(n, -1))
    assert zero is None and packed.layout.activations == ("float8_e4m3fn",)
    values = decoded4(packed, "float8_e4m3fn") * packed.channel_scale[:, None]
    np.testing.assert_array_equal(values.astype(np.float32), dequantize(w))


@pytest.mark.parametrize(
    ("kind", "zeros", "complaint"),
    [
        (("int4", 64), False, "groups of 64 by e4m3, whose sums of 128 are added at once; use groups of 128"),
        (("uint4", 128), True, "has zero points, which no product by e4m3 takes"),
        (("nvfp4", 16), False, "only fp4_e2m1 with scales of e8m0"),
    ],
)
def test_what_is_not_multiplied_by_e4m3_is_refused(kind, zeros, complaint):
    w = weight(np.random.default_rng(0), 8, 256, *kind, zeros=zeros)
    with pytest.raises(KernelError, match=complaint):
        pack4(w, activation_bits=8, activations="float8_e4m3fn")


def test_groups_of_zeros_do_not_spread_the_scales_of_e4m3():
    codes = np.ones((2, 96), np.float32)
    codes[:, 32:64] = 0
    spec = weight(np.random.default_rng(0), 1, 32, "mxfp4", 32).spec
    for far in (-40, 40):
        scale = np.ldexp(np.float32(1), [[0, far, -3]] * 2).astype(np.float32)
        w = QTensor(codes.astype(FP4_E2M1.dtype), QParams(scale), spec)
        packed = pack4(w, activation_bits=8)
        values = decoded4(packed, "float8_e4m3fn") * packed.channel_scale[:, None]
        np.testing.assert_array_equal(values, dequantize(w))
        assert not packed.layout.deep


def test_scales_too_far_apart_for_e4m3_are_refused():
    spec = weight(np.random.default_rng(0), 1, 32, "mxfp4", 32).spec
    scale = np.ldexp(np.float32(1), [[0, -15]]).astype(np.float32)
    w = QTensor(np.ones((1, 64)).astype(FP4_E2M1.dtype), QParams(scale), spec)
    with pytest.raises(KernelError, match=r"row 0 has scales 2\^0 and 2\^-15, too far apart for e4m3"):
        pack4(w, activation_bits=8)


def test_two_levels_are_within_half_a_step_of_the_scales():
    scale = np.random.default_rng(0).random((50, 30)).astype(np.float32) + np.float32(1e-3)
    found = two_levels(scale)
    unit = scale.max(axis=1, keepdims=True) / 16
    inside = scale >= unit / 2
    assert np.all(np.abs(found - scale)[inside] <= 0.5001 * np.broadcast_to(unit, scale.shape)[inside])
    np.testing.assert_array_equal(found.max(axis=1), scale.max(axis=1))


def test_scales_that_are_no_whole_multiples_are_refused_for_int8():
    w = weight(np.random.default_rng(0), 8, 256, "int4", 32, simple=False)
    with pytest.raises(KernelError, match="make them so with two_levels"):
        pack4(w, activation_bits=8)
    with pytest.raises(KernelError, match="only fp4_e2m1 with scales of e8m0"):
        pack4(weight(np.random.default_rng(0), 8, 256, "nvfp4", 16), activation_bits=8)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("zeros", [False, True])
def test_packed_bytes_are_what_the_format_needs(kind, zeros):
    form, group = kind
    for n, k in ((1024, 2880), (4096, 4096)):
        w = weight(np.random.default_rng(0), n, k, form, group, zeros=zeros, simple=False)
        needed = size_bytes((n, k), w.spec, scale_bytes=4 if group is None else 2)
        if group is None and zeros:
            needed = size_bytes((n, k), w.spec)
        # A factor of each row comes with the scales of groups.
        factors = 0 if group is None else n * 4
        assert abs(pack4(w).size_bytes - needed - factors) <= 0.01 * needed


@pytest.mark.parametrize(
    ("kind", "activations"),
    [
        *((kind, "int8") for kind in (("int4", 128), ("uint4", 32), ("int4", None))),
        *((kind, "float8_e4m3fn") for kind in (("mxfp4", 32), ("int4", 128), ("int4", None))),
    ],
)
@pytest.mark.parametrize("k", [2880, 2944, 4096])
def test_packed_bytes_for_activations_of_eight_bits_are_what_the_format_needs(kind, activations, k):
    """Also where K ends in the middle of a slab of 128."""
    w = weight(np.random.default_rng(0), 1024, k, *kind, zeros=kind[0] == "uint4", middling=True)
    width = 2 if (kind, activations) == (("int4", 128), "float8_e4m3fn") else 1
    needed = size_bytes((1024, k), w.spec, scale_bytes=4 if kind[1] is None else width)
    factors = 0 if kind[1] is None else 1024 * 4
    packed = pack4(w, activation_bits=8, activations=activations)
    assert abs(packed.size_bytes - needed - factors) <= 0.01 * needed


def test_scales_take_the_narrowest_type_that_holds_them():
    rng = np.random.default_rng(0)
    for scale_type in ("bfloat16", "float16", "float32"):
        w = weight(rng, 70, 256, "int4", 128, simple=False, scale_type=scale_type)
        assert pack4(w).layout.scales == scale_type
        assert pack4(w, scale_type="float32").layout.scales == "float32"
    with pytest.raises(KernelError, match="bfloat16 does not hold its scales exactly"):
        pack4(w, scale_type="bfloat16")


def test_scales_of_any_size_are_kept():
    for magnitude in (2.0**-60, 1e-8, 3e4, 2.0**40):
        scale = (np.array([[1.0, 1.5, 0.0, 1.75]] * 3) * magnitude).astype(ml_dtypes.bfloat16)
        spec = QuantSpec(format=INT4, axis=1, block_size=32)
        codes = np.ones((3, 128)).astype(INT4.dtype)
        params = QParams(scale.astype(np.float32), np.zeros((3, 4)).astype(INT4.dtype))
        _, found, _ = unpack4(pack4(QTensor(codes, params, spec)))
        np.testing.assert_array_equal(found, scale.astype(np.float64))


def _int4(shape=(8, 128), scale=None, **spec) -> QTensor:
    codes = np.ones(shape).astype(INT4.dtype)
    found = np.ones((), np.float32) if scale is None else scale
    return QTensor(codes, QParams(found, np.zeros(found.shape, INT4.dtype)), QuantSpec(format=INT4, **spec))


@pytest.mark.parametrize(
    ("refused", "complaint"),
    [
        (QTensor(np.ones((4, 4), np.int8), QParams(np.float32(1)), QuantSpec(format=INT8)), "int8 is no format"),
        (_int4((8,)), "is not a matrix"),
        (_int4(scale=np.ones((8, 3), np.float32), axis=1, block_size=48), "powers of two from 32 on"),
        (_int4(scale=np.ones((1, 128), np.float32), axis=0, block_size=8), "axis 1, in blocks, or axis 0"),
        (_int4(scale=-np.ones((8, 4), np.float32), axis=1, block_size=32), "negative or not finite"),
        (_int4(scale=np.full((8, 4), np.nan, np.float32), axis=1, block_size=32), "negative or not finite"),
    ],
)  # fmt: skip
def test_what_no_kernel_takes_is_refused(refused, complaint):
    with pytest.raises(KernelError, match=complaint):
        pack4(refused)


def test_an_unsigned_weight_with_zero_points_in_the_middle_is_a_symmetric_one():
    codes = np.arange(16 * 64).reshape(16, 64) % 16
    params = QParams(np.ones((16, 1), np.float32), np.full((16, 1), 8).astype(UINT4.dtype))
    packed = pack4(QTensor(codes.astype(UINT4.dtype), params, QuantSpec(format=UINT4, axis=1, block_size=64)))
    assert packed.zeros is None


def test_bytes_lie_where_the_kernel_reads_them():
    """One code that is not zero: the byte and the nibble of the fragment that a thread of wgmma gets."""
    for row, column in ((0, 0), (9, 1), (16, 8), (70, 100), (63, 63), (5, 2)):
        codes = np.zeros((128, 128), np.int8)
        codes[row, column] = 1
        params = QParams(np.ones(128, np.float32), np.zeros(128).astype(INT4.dtype))
        packed = pack4(QTensor(codes.astype(INT4.dtype), params, QuantSpec(format=INT4, axis=0)))
        words = packed.codes.view(np.uint32) ^ np.uint32(0x88888888)
        slab, block, word = np.argwhere(words)[0]
        thread, step = divmod(int(word), 4)
        lane, k = thread % 32, column % 64
        assert (slab, block, thread // 32) == (column // 64, row // 64, row % 64 // 16)
        assert (lane // 4, lane % 4, step) == (row % 8, k % 8 // 2, k // 16)
        register = row // 8 % 2 + k % 16 // 8 * 2
        assert words[slab, block, word] == 1 << (4 * register + 16 * (k % 2))


def test_e4m3_scales_are_kept_with_their_subnormals():
    every = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = np.resize(every, (2, 64))
    params = QParams(scale, None, np.float32(1))
    w = weight(np.random.default_rng(0), 2, 1024, "nvfp4", 16)
    _, found, _ = unpack4(pack4(QTensor(w.qvalue, params, w.spec)))
    np.testing.assert_array_equal(found, scale)
    assert w.spec.scale_format == FP8_E4M3 and math.isclose(every.min(), 0)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import SpecError
from quantkit.formats import (
    E8M0,
    FP4_E2M1,
    FP8_E4M3,
    INT4,
    INT8,
    UINT4,
    QParams,
    QuantSpec,
    Range,
    dequantize,
    dynamic_qparams,
    fake_quantize,
    layout,
    qparams_from_range,
    quantize,
    range_of,
    scale_shape,
    size_bytes,
)

LAYOUTS = {
    "tensor": {},
    "channel 0": {"axis": 0},
    "channel -1": {"axis": -1},
    "block 0": {"axis": 0, "block_size": 3},
    "block -1": {"axis": -1, "block_size": 4},
    "tiles": {"block_shape": (2, 3)},
    "token": {"dynamic": "token"},
}
SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple)


def literal_group(index, shape, fields):
    """Which scale the element at `index` has, written out."""
    if fields.get("dynamic") == "token":
        return (*index[:-1], 0)
    if "block_shape" in fields:
        rows, columns = fields["block_shape"]
        return (*index[:-2], index[-2] // rows, index[-1] // columns)
    if "axis" not in fields:
        return ()
    axis = fields["axis"] % len(shape)
    if "block_size" not in fields:
        return (index[axis],)
    return tuple(i // fields["block_size"] if at == axis else i for at, i in enumerate(index))


@pytest.mark.parametrize("name", LAYOUTS)
@given(shape=SHAPES)
def test_every_element_is_quantized_with_the_scale_of_its_group(name, shape):
    fields = LAYOUTS[name]
    spec = QuantSpec(format=INT8, **fields)
    scales = np.arange(1, 1 + np.prod(scale_shape(shape, spec), dtype=int), dtype=np.float32)
    scales = scales.reshape(scale_shape(shape, spec))
    zeros = (np.arange(scales.size) % 7).astype(np.int8).reshape(scales.shape)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 40
    found = quantize(x, QParams(scales, zeros), spec)
    back = dequantize(found)
    for index in np.ndindex(shape):
        group = literal_group(index, shape, fields)
        code = np.clip(np.rint(x[index] / scales[group]) + zeros[group], -128, 127)
        assert found.qvalue[index] == code
        assert back[index] == (np.float32(code) - zeros[group]) * scales[group]


@pytest.mark.parametrize("name", LAYOUTS)
@given(shape=SHAPES)
def test_a_groups_range_is_that_of_its_own_elements(name, shape):
    fields = LAYOUTS[name]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    found = range_of(x, QuantSpec(format=INT8, **fields))
    lo, hi = np.full(found.lo.shape, np.inf), np.full(found.hi.shape, -np.inf)
    for index in np.ndindex(shape):
        group = literal_group(index, shape, fields)
        lo[group], hi[group] = min(lo[group], x[index]), max(hi[group], x[index])
    np.testing.assert_array_equal(found.lo, lo)
    np.testing.assert_array_equal(found.hi, hi)


@pytest.mark.parametrize("name", LAYOUTS)
@given(shape=SHAPES)
def test_grouping_puts_each_element_into_its_scales_column(name, shape):
    fields = LAYOUTS[name]
    spec = QuantSpec(format=INT8, **fields)
    x = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    columns = layout.to_groups(x, spec)
    scales = np.arange(columns.shape[1]).reshape(scale_shape(shape, spec))
    expected = {}
    for index in np.ndindex(shape):
        expected.setdefault(int(scales[literal_group(index, shape, fields)]), []).append(float(x[index]))
    for column, values in expected.items():
        # What fills up a short block is zero.
        assert sorted(v for v in columns[:, column].tolist() if v) == sorted(values)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(70_001, 3), (3, 70_001), (5, 301, 202)], ids=str)
def test_work_in_slabs_does_not_show(name, shape):
    spec = QuantSpec(format=INT4, **LAYOUTS[name])
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    params = qparams_from_range(range_of(x, spec), spec)
    assert params.zero_point is not None
    scale, zero = (
        layout.spread(a.astype(np.float32), shape, spec) for a in (params.scale, params.zero_point)
    )
    expected = (np.clip(np.rint(x / scale) + zero, -8, 7) - zero) * scale
    np.testing.assert_array_equal(fake_quantize(x, params, spec), expected)


def test_a_short_last_block_is_a_block_of_what_is_there():
    x = np.array([[1, 2, 3, 4, 100]], np.float32)
    spec = QuantSpec(format=FP8_E4M3, axis=1, block_size=4)
    assert range_of(x, spec).hi.tolist() == [[4, 100]]
    filled = np.pad(x, ((0, 0), (0, 3)))
    params = qparams_from_range(range_of(x, spec), spec)
    np.testing.assert_array_equal(fake_quantize(x, params, spec), fake_quantize(filled, params, spec)[:, :5])


def test_dynamic_scales_are_those_of_the_tensor_itself():
    x = np.array([[1.0, -448, 2, 2], [0, 0, 7, 896]], np.float32)
    per_block = dynamic_qparams(x, QuantSpec(format=FP8_E4M3, axis=-1, block_size=2, dynamic="block"))
    assert per_block.scale.tolist() == [[1, np.float32(2 / 448)], [1, 2]]
    per_token = dynamic_qparams(x, QuantSpec(format=FP8_E4M3, dynamic="token"))
    assert per_token.scale.tolist() == [[1], [2]]
    assert dynamic_qparams(x, QuantSpec(format=FP8_E4M3, dynamic="tensor")).scale == 2


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (QuantSpec(format=INT8, axis=2), (2, 3), r"no axis 2 in a tensor of shape \(2, 3\)"),
        (QuantSpec(format=INT8, block_shape=(2, 2)), (3,), "int8, block 2×2 for a tensor of shape"),
        (QuantSpec(format=INT8, dynamic="token"), (), "dynamic per token for a tensor of shape"),
    ],
)
def test_a_tensor_without_the_axes_of_its_spec_is_refused(spec, shape, message):
    with pytest.raises(SpecError, match=message):
        scale_shape(shape, spec)


@pytest.mark.parametrize(
    ("spec", "scales", "wanted"),
    [
        (QuantSpec(format=INT8, axis=0, block_size=4), (1, 3), r"\(2, 3\)"),
        (QuantSpec(format=INT8, block_shape=(4, 2)), (5, 3), r"\(2, 2\)"),
        (QuantSpec(format=INT8, dynamic="token"), (5,), r"\(5, 1\)"),
    ],
)
def test_scales_of_another_number_are_refused_with_the_number_that_fits(spec, scales, wanted):
    params = QParams(np.ones(scales, np.float32), np.zeros(scales, np.int8))
    with pytest.raises(SpecError, match=f"scale: shape .*give {wanted}"):
        quantize(np.ones((5, 3), np.float32), params, spec)


def test_an_empty_tensor_has_no_range():
    with pytest.raises(SpecError, match="has no values"):
        range_of(np.zeros((0, 3), np.float32), QuantSpec(format=INT8))


def test_a_range_of_blocks_keeps_their_shape():
    found = qparams_from_range(Range([[-1, 0], [0, 2]], [[1, 0], [0, 2]]), QuantSpec(format=INT4, axis=0))
    assert found.scale.shape == (2, 2)
    assert found.scale[0, 1] == 1


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (QuantSpec(format=INT8), 256 * 100 + 4),
        (QuantSpec(format=INT8, axis=1), 256 * 100 + 400),
        (QuantSpec(format=INT4, axis=0, block_size=128), 256 * 100 // 2 + 2 * 100 * 4),
        (
            QuantSpec(format=UINT4, axis=0, block_size=128, symmetric=False),
            256 * 100 // 2 + 2 * 100 * 4 + 2 * 100 // 2,
        ),
        (QuantSpec(format=FP4_E2M1, axis=0, block_size=16, scale_format=FP8_E4M3), 12_800 + 1600 + 4),
        (QuantSpec(format=FP4_E2M1, axis=0, block_size=32, scale_format=E8M0), 12_800 + 800),
        (QuantSpec(format=FP8_E4M3, block_shape=(128, 128)), 25_600 + 2 * 4),
    ],
    ids=str,
)
def test_a_tensor_takes_its_codes_and_its_scales(spec, size):
    assert size_bytes((256, 100), spec) == size


def test_half_a_byte_takes_a_byte():
    assert size_bytes((3,), QuantSpec(format=INT4), scale_bytes=2) == 2 + 2

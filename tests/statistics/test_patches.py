import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.statistics import patches as module
from quantkit.statistics.patches import patches, same_pads


def convolved(x, w, strides, pads, dilations, groups):
    """A convolution of two spatial axes, literally."""
    padded = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    n, _, height, width = padded.shape
    out_channels, per_group, kh, kw = w.shape
    rows = (height - (kh - 1) * dilations[0] - 1) // strides[0] + 1
    columns = (width - (kw - 1) * dilations[1] - 1) // strides[1] + 1
    y = np.zeros((n, out_channels, rows, columns))
    for b, o, i, j in np.ndindex(y.shape):
        first = o // (out_channels // groups) * per_group
        for ci, ki, kj in np.ndindex(per_group, kh, kw):
            at = i * strides[0] + ki * dilations[0], j * strides[1] + kj * dilations[1]
            y[b, o, i, j] += padded[b, first + ci, *at] * w[o, ci, ki, kj]
    return y


@given(
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
)
def test_patches_times_the_weight_are_the_convolution(groups, kernel, strides, dilations, pads):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 2 * groups, 6, 7)), rng.normal(size=(2 * groups, 2, *kernel))
    rows = np.concatenate(
        list(patches(x, kernel=kernel, strides=strides, pads=pads, dilations=dilations, groups=groups)),
        axis=1,
    )
    by_group = np.einsum("gmk,gok->gom", rows, w.reshape(groups, 2, -1))
    wanted = convolved(x, w, strides, pads, dilations, groups)
    found = by_group.reshape(2 * groups, 2, *wanted.shape[2:]).swapaxes(0, 1)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_pieces_hold_what_the_whole_does(monkeypatch):
    x = np.random.default_rng(1).normal(size=(5, 3, 8)).astype(np.float32)
    how = {"kernel": (3,), "strides": (2,), "pads": (1, 1), "dilations": (1,)}
    whole = list(patches(x, **how))
    monkeypatch.setattr(module, "_PIECE", 1)
    pieces = list(patches(x, **how))
    assert len(whole) == 1 and len(pieces) == 5
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole[0])


@pytest.mark.parametrize(("lower", "wanted"), [(False, [0, 1]), (True, [1, 0])])
def test_an_odd_zero_goes_where_auto_pad_says(lower, wanted):
    assert same_pads((8,), kernel=(3,), strides=(2,), dilations=(1,), lower=lower) == wanted


def test_same_pads_give_the_length_over_the_stride():
    pads = same_pads((7, 10), kernel=(3, 5), strides=(1, 3), dilations=(2, 1), lower=False)
    x = np.zeros((1, 1, 7, 10), np.float32)
    (rows,) = patches(x, kernel=(3, 5), strides=(1, 3), pads=pads, dilations=(2, 1))
    assert rows.shape == (1, 7 * 4, 15)

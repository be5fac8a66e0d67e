"""What a convolution multiplies with its weight: the patches of its input, as rows (im2col)."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# Elements of a piece.
_PIECE = 1 << 20
# What a piece takes at most while it is cut: itself, and the padded input that it is cut from.
PATCHES_BYTES = 2 * 4 * _PIECE


def patches(
    x: NDArray[np.generic],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int = 1,
) -> Iterator[NDArray[np.generic]]:
    """Yield the patches of an input [batch, channels, …spatial], piece by piece.

    A piece has the shape (groups, vectors, channels / groups · kernel size), its last axis in the order of a Conv's
    weight [out, channels / groups, …kernel].

    Args:
        x: the input.
        kernel, strides, dilations: one number for every spatial axis.
        pads: zeros before every spatial axis, then after each, as ONNX orders them.
        groups: the groups of the convolution.
    """
    spatial = len(kernel)
    width = list(zip(pads[:spatial], pads[spatial:], strict=True))
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, 2 + spatial))
    sizes = [
        max((length + sum(pad) - extent) // stride + 1, 0)
        for length, pad, extent, stride in zip(x.shape[2:], width, extents, strides, strict=True)
    ]
    row = x.shape[1] * math.prod(kernel)
    step = max(_PIECE // max(row * math.prod(sizes), 1), 1)
    every = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
    within = tuple(slice(None, None, d) for d in dilations)
    for start in range(0, x.shape[0], step):
        padded = np.pad(x[start : start + step], [(0, 0), (0, 0), *width])
        windows = np.lib.stride_tricks.sliding_window_view(padded, extents, axes)[(*every, *within)]
        # [batch, channels, …places, …kernel] → [batch, groups, channels / groups, …]
        split = windows.reshape(windows.shape[0], groups, -1, *windows.shape[2:])
        places = tuple(range(3, 3 + spatial))
        behind = tuple(range(3 + spatial, 3 + 2 * spatial))
        rows = split.transpose(1, 0, *places, 2, *behind)
        yield rows.reshape(groups, -1, row // groups)


def same_pads(
    shape: Sequence[int],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    lower: bool,
) -> list[int]:
    """Return the pads with which an input of this spatial shape gives ⌈length / stride⌉ places (auto_pad SAME_*).

    An odd zero goes to the end, or to the start where `lower`.
    """
    before, after = [], []
    for length, k, stride, dilation in zip(shape, kernel, strides, dilations, strict=True):
        total = max((-(-length // stride) - 1) * stride + (k - 1) * dilation + 1 - length, 0)
        small, large = total // 2, total - total // 2
        before.append(large if lower else small)
        after.append(small if lower else large)
    return [*before, *after]

"""Where the scales of a tensor lie: which elements share one, and in what order the scales are stored."""

import math
from collections.abc import Iterator
from types import EllipsisType

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import SpecError
from quantkit.formats.spec import QuantSpec

# Elements worked on at a time: what is computed of a slab stays in a core's cache, and beside a weight of
# gigabytes it needs no memory.
_SLAB = 1 << 17

Rows = slice | EllipsisType


def scale_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """Return the shape of the scales of a tensor of `shape`.

    () per tensor, (channels,) per channel, (…, 1) per token; in blocks the tensor's own shape with every blocked
    axis shortened to ⌈length / block⌉.

    Raises:
        SpecError: the tensor has no such axis.
    """
    if spec.dynamic == "token":
        _check_rank(shape, 1, spec)
        return (*shape[:-1], 1)
    if spec.block_shape is not None:
        _check_rank(shape, 2, spec)
        rows, columns = spec.block_shape
        return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    if spec.axis is None:
        return ()
    axis = _axis(shape, spec)
    if spec.block_size is None:
        return (shape[axis],)
    return (*shape[:axis], -(-shape[axis] // spec.block_size), *shape[axis + 1 :])


def size_bytes(shape: tuple[int, ...], spec: QuantSpec, *, scale_bytes: int = 4) -> int:
    """Return the bytes that a tensor of `shape` takes: codes, scales and, where they are free, zero points.

    Each is packed without gaps, a whole number of bytes. Scales take `scale_bytes` unless `spec.scale_format` says
    otherwise.
    """
    codes, scales = math.prod(shape), math.prod(scale_shape(shape, spec))
    taken = _bytes(codes * spec.format.bits)
    if spec.scale_format is None:
        taken += scales * scale_bytes
    else:
        taken += _bytes(scales * spec.scale_format.bits) + (4 if spec.has_global_scale else 0)
    return taken + (0 if spec.symmetric else _bytes(scales * spec.format.bits))


def check_scales(values: NDArray[np.generic], shape: tuple[int, ...], spec: QuantSpec) -> None:
    """Raise `SpecError` unless `values`, scales or zero points, are as many as a tensor of `shape` needs."""
    wanted = scale_shape(shape, spec)
    if values.shape != wanted:
        raise SpecError(
            f"scale: shape {values.shape} for a tensor of {shape} in {spec}"
            f"{'' if spec.axis is None else f' on axis {spec.axis}'}; give {wanted}."
        )


def spread(values: NDArray[np.float32], shape: tuple[int, ...], spec: QuantSpec) -> NDArray[np.float32]:
    """Return `values`, of `scale_shape(shape, spec)`, so shaped that they broadcast against a tensor of `shape`."""
    if spec.block_shape is not None:
        for axis, size in zip((-2, -1), spec.block_shape, strict=True):
            values = _repeat(values, size, len(shape) + axis, shape)
        return values
    if spec.axis is None:
        return values
    axis = _axis(shape, spec)
    if spec.block_size is not None:
        return _repeat(values, spec.block_size, axis, shape)
    return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def slabs(shape: tuple[int, ...], spec: QuantSpec) -> Iterator[tuple[Rows, Rows]]:
    """Yield pieces of a tensor that can be worked on one after the other: rows of the tensor, rows of its scales.

    A piece takes whole blocks, so it can be quantized as a tensor of its own. `...` stands for everything.
    """
    if not shape:
        yield ..., ...
        return
    step = _alignment(shape, spec)
    row_size = max(math.prod(shape[1:]), 1)
    height = max(_SLAB // row_size // step, 1) * step
    follows = len(scale_shape(shape, spec)) == len(shape) or (
        spec.axis is not None and _axis(shape, spec) == 0
    )
    for start in range(0, shape[0], height):
        stop = min(start + height, shape[0])
        yield slice(start, stop), slice(start // step, -(-stop // step)) if follows else ...


def to_groups(x: NDArray[np.float32], spec: QuantSpec) -> NDArray[np.float32]:
    """Return `x` with the elements that share a scale in one column, shape (elements, scales).

    Columns are in the order of the scales; short blocks are filled up with zeros. A view where one will do.
    """
    shape = scale_shape(x.shape, spec)
    if spec.block_shape is not None:
        (rows, columns), lead = spec.block_shape, x.ndim - 2
        x = _filled(_filled(x, rows, lead), columns, lead + 1)
        tiles = x.reshape(*x.shape[:-2], shape[-2], rows, shape[-1], columns)
        return np.moveaxis(tiles, (lead + 1, lead + 3), (0, 1)).reshape(rows * columns, -1)
    if spec.axis is None:
        return x.reshape(-1, 1) if not shape else np.moveaxis(x, -1, 0).reshape(x.shape[-1], -1)
    axis = _axis(x.shape, spec)
    if spec.block_size is None:
        return np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    x = _filled(x, spec.block_size, axis)
    blocks = x.reshape(*x.shape[:axis], shape[axis], spec.block_size, *x.shape[axis + 1 :])
    return np.moveaxis(blocks, axis + 1, 0).reshape(spec.block_size, -1)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _alignment(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Rows along the first axis that have to stay together because they share scales."""
    if spec.block_shape is not None:
        return spec.block_shape[0] if len(shape) == 2 else 1
    if spec.block_size is not None and _axis(shape, spec) == 0:
        return spec.block_size
    return 1


def _axis(shape: tuple[int, ...], spec: QuantSpec) -> int:
    assert spec.axis is not None
    if not -len(shape) <= spec.axis < len(shape):
        raise SpecError(
            f"scale: no axis {spec.axis} in a tensor of shape {shape}; choose one that it has, or axis=None."
        )
    return spec.axis % len(shape)


def _check_rank(shape: tuple[int, ...], rank: int, spec: QuantSpec) -> None:
    if len(shape) < rank:
        raise SpecError(f"scale: {spec} for a tensor of shape {shape}; give one of rank {rank} or more.")


def _repeat(values: NDArray[np.float32], size: int, axis: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    whole = np.repeat(values, size, axis=axis)
    # The last block may be short.
    return whole if whole.shape[axis] == shape[axis] else whole.take(np.arange(shape[axis]), axis=axis)


def _filled(x: NDArray[np.float32], size: int, axis: int) -> NDArray[np.float32]:
    """`x` with zeros after it, so that its length along `axis` is a multiple of `size`."""
    missing = -x.shape[axis] % size
    return np.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x

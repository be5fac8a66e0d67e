"""A part of a product: some rows, columns and elements of K, with the scales that belong to them."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.formats import QParams, QTensor
from quantkit.formats.spec import QuantSpec
from quantkit.kernels.family import Operands
from quantkit.kernels.work import Work


def cropped(work: Work, operands: Operands, *, m: int, n: int, k: int) -> tuple[Work, Operands]:
    """Return the first rows, columns and elements of K of a product, as a work of its own."""
    m, n, k = min(work.m, m, len(operands.activations)), min(work.n, n), min(work.k, k)
    return replace(work, m=m, n=n, k=k), taken(operands, slice(m), slice(n), slice(k))


def taken(operands: Operands, rows: Any, columns: Any, inner: slice) -> Operands:
    """Return the operands of some rows and columns of D, and of a part of K."""
    scale, block = operands.scale, operands.block
    if scale is not None and block is not None:
        scale = np.ascontiguousarray(scale[rows, : _blocks_of(inner, operands.activations.shape[1], block)])
    elif scale is not None and scale.size > 1:
        scale = scale[rows]
    return Operands(
        activations=np.ascontiguousarray(operands.activations[rows, inner]),
        scale=scale,
        weight=_taken_weight(operands.weight, columns, inner),
        bias=None if operands.bias is None else operands.bias[columns],
        origin=operands.origin,
        block=block,
        global_scale=operands.global_scale,
    )


def _taken_weight(weight: QTensor | NDArray[Any], rows: Any, inner: slice) -> QTensor | NDArray[Any]:
    if not isinstance(weight, QTensor):
        return np.ascontiguousarray(weight[rows, inner])
    n, k = weight.qvalue.shape
    if weight.spec.block_shape is not None:
        return _taken_tiles(weight, rows, inner)
    blocks = slice(None if inner.stop is None else -(-min(inner.stop, k) // (weight.spec.block_size or k)))

    def part(parameter: NDArray[Any] | None) -> NDArray[Any] | None:
        if parameter is None or parameter.ndim == 0 or parameter.shape[0] != n:
            return parameter
        return parameter[rows] if parameter.ndim == 1 else parameter[rows, blocks]

    params = weight.qparams
    scale = part(params.scale)
    assert scale is not None
    return QTensor(
        np.ascontiguousarray(weight.qvalue[rows, inner]),
        QParams(scale, part(params.zero_point), params.global_scale),
        weight.spec,
    )


def _taken_tiles(weight: QTensor, rows: Any, inner: slice) -> QTensor:
    """Some rows of a weight in tiles: the first ones in tiles as they were, else each with the scales of its own."""
    n, k = weight.qvalue.shape
    height, width = weight.spec.block_shape or (1, 1)
    held = weight.qparams.scale[:, : _blocks_of(inner, k, width)]
    codes = np.ascontiguousarray(weight.qvalue[rows, inner])
    if isinstance(rows, slice) and rows.start is None:
        return QTensor(codes, QParams(held[: -(-len(codes) // height)]), weight.spec)
    spec = QuantSpec(format=weight.spec.format, axis=1, block_size=width)
    return QTensor(codes, QParams(np.repeat(held, height, axis=0)[:n][rows]), spec)


def _blocks_of(inner: slice, k: int, block: int) -> int:
    return -(-min(k if inner.stop is None else inner.stop, k) // block)

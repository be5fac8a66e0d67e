"""A MatMul, Gemm or convolution as the product of matrices that it is; a convolution is made one by im2col."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantkit.bench.reading import Operand
from quantkit.statistics.patches import patches, same_pads

# By the element types of activations and weights.
_STORED = {
    ("int8", "int8"): "int8",
    ("e4m3", "e4m3"): "fp8",
    ("bf16", "int8"): "w8a16",
    ("bf16", "int4"): "int4",
    ("int8", "int4"): "w4a8",
    ("e4m3", "int4"): "w4a8-fp8",
    ("bf16", "int2"): "int2",
}
_FOUR_BIT_FLOATS = {16: "nvfp4", 32: "mxfp4"}
# Of weights in blocks; activations are quantized as they come, where the file does not say so.
_EIGHT_BIT_FLOATS = {32: "mxfp8", 128: "fp8-block"}


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which patches of its input a convolution multiplies, as ONNX's attributes say it."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    groups: int

    def places(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many patches lie along each spatial axis."""
        pads = self.padding(spatial)
        half = len(spatial)
        return tuple(
            max((size + pads[i] + pads[half + i] - (k - 1) * d - 1) // s + 1, 0)
            for i, (size, k, d, s) in enumerate(
                zip(spatial, self.kernel, self.dilations, self.strides, strict=True)
            )
        )

    def padding(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Return the zeros before every spatial axis, then after each."""
        if self.auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
            return self.pads
        found = same_pads(
            spatial,
            kernel=self.kernel,
            strides=self.strides,
            dilations=self.dilations,
            lower=self.auto_pad == "SAME_LOWER",
        )
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """The product that a layer is: rows × n × k, `count` times (groups of a convolution, heads of attention).

    grows: what of it grows with the batch, the rows or the count.
    """

    rows: int
    n: int
    k: int
    count: int = 1
    grows: Literal["rows", "count"] = "rows"

    def at(self, batch: int, samples: int) -> "Gemm":
        """Return the product of `batch` samples, this being that of `samples`."""
        if self.grows == "count":
            return replace(self, count=max(self.count * batch // samples, 1))
        if self.rows % samples:
            return self
        return replace(self, rows=self.rows // samples * batch)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear operator.

    Attributes:
        activations, weights: what it reads; `weights` too may be computed, as in attention.
        window: of a convolution.
        turned: the constant stands on the left (W @ X), or A is transposed: the rows of the product lie along the
            last axis of the activations.
        n_first: the weight is stored [n, k].
        bias: one float32 an output channel, or None. relu: a Relu behind it is all that reads it.
    """

    node: str
    op_type: str
    activations: Operand
    weights: Operand
    window: Window | None = None
    turned: bool = False
    n_first: bool = False
    bias: NDArray[np.float32] | None = None
    relu: bool = False

    @property
    def format(self) -> str:
        """The name of the format that the file stores it in; "" for one that no product here has."""
        a, w = self.activations, self.weights
        if w.element == "bf16":
            # Whatever its activations were rounded to before: the product is one of floats.
            return "bf16"
        if w.element == "e2m1":
            name = _FOUR_BIT_FLOATS.get(w.block_size or 0, "")
            return f"{name}-fp4" if name and a.element == "e2m1" else name
        if w.element == "e4m3" and w.block_size in _EIGHT_BIT_FLOATS:
            return _EIGHT_BIT_FLOATS[w.block_size]
        return _STORED.get((a.element, w.element), "")

    @property
    def is_constant(self) -> bool:
        """Whether its weight is there to be read."""
        return self.weights.codes is not None

    def gemm(self, shapes: Mapping[str, tuple[int, ...]]) -> Gemm:
        """Return the product, given the shapes of the computed tensors."""
        x = shapes[self.activations.tensor]
        if self.window is not None:
            return self._convolution(x, self.window)
        if not self.is_constant:
            w = shapes[self.weights.tensor]
            heads = np.broadcast_shapes(x[:-2], w[:-2]) if len(x) > 1 and len(w) > 1 else ()
            rows = x[-2] if len(x) > 1 else 1
            n = w[-1] if len(w) > 1 else 1
            return Gemm(rows=rows, n=n, k=x[-1], count=math.prod(heads), grows="count")
        shape = self.weights.shape
        first, second = (shape[-2], shape[-1]) if len(shape) > 1 else (shape[-1], 1)
        n, k = (first, second) if self.n_first else (second, first)
        count = math.prod(shape[:-2])
        return Gemm(rows=max(math.prod(x) // k // count, 1), n=n, k=k, count=count)

    def _convolution(self, x: tuple[int, ...], window: Window) -> Gemm:
        shape = self.weights.shape
        kernel = math.prod(window.kernel)
        if self.op_type == "ConvTranspose":
            # Every vector of the input times [k, n]; what falls on one place of the output is added afterwards.
            rows = x[0] * math.prod(x[2:])
            return Gemm(rows=rows, n=shape[1] * kernel, k=shape[0] // window.groups, count=window.groups)
        rows = x[0] * math.prod(window.places(x[2:]))
        return Gemm(rows=rows, n=shape[0] // window.groups, k=shape[1] * kernel, count=window.groups)

    def weight_matrix(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the weight of its first group or head as floats [n, k]; computed ones are taken from `tensors`."""
        if not self.is_constant:
            w = self.weights.values(tensors[self.weights.tensor])
            w = w if w.ndim > 1 else w.reshape(-1, 1)
            return np.ascontiguousarray(w.reshape(-1, *w.shape[-2:])[0].T)
        w = self.weights.floats()
        if self.window is None:
            w = w if w.ndim > 1 else w.reshape(-1, 1)
            w = w.reshape(-1, *w.shape[-2:])[0]
            return np.ascontiguousarray(w if self.n_first else w.T)
        if self.op_type == "ConvTranspose":
            first = w[: w.shape[0] // self.window.groups]
            return np.ascontiguousarray(first.reshape(first.shape[0], -1).T)
        return w[: w.shape[0] // self.window.groups].reshape(w.shape[0] // self.window.groups, -1)

    def code_matrix(self) -> tuple[NDArray[Any], NDArray[np.float32]] | None:
        """Return the stored codes [n, k] and their scales (one, or n); None where they are not stored so simply."""
        w = self.weights
        if w.codes is None or w.scale is None or w.block_size or self.op_type == "ConvTranspose":
            return None
        if (w.zero_point is not None and np.any(w.zero_point)) or w.codes.dtype.kind == "u":
            return None
        if self.window is not None:
            if self.window.groups > 1 or (w.scale.size > 1 and w.axis != 0):
                return None
            return w.codes.reshape(w.codes.shape[0], -1), w.scale.reshape(-1)
        if w.codes.ndim != 2:
            return None
        n_axis = 0 if self.n_first != w.transposed else 1
        if w.scale.size > 1 and (w.axis is None or w.axis % 2 != n_axis):
            return None
        return w.codes if n_axis == 0 else np.ascontiguousarray(w.codes.T), w.scale.reshape(-1)

    def block_matrix(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return the stored codes [n, k] of a matrix in blocks along K, and their scales [n, blocks].

        None where they are not stored so, or with zero points that are not the middle of unsigned codes.
        """
        w = self.weights
        if w.codes is None or w.scale is None or not w.block_size or self.window is not None:
            return None
        n_axis = 0 if self.n_first != w.transposed else 1
        if w.codes.ndim != 2 or w.scale.ndim != 2 or (w.axis or 0) % 2 == n_axis:
            return None
        # Four bits without a sign: 0 … 15 around 8.
        middle = 8 if w.codes.dtype.name == "uint4" else 0
        if middle and w.zero_point is None:
            return None
        if w.zero_point is not None and np.any(w.zero_point.astype(np.float32) != middle):
            return None
        codes = w.codes.astype(np.float32) - middle
        return (codes, w.scale) if n_axis == 0 else (np.ascontiguousarray(codes.T), w.scale.T)

    def activation_rows(self, x: NDArray[Any], limit: int) -> NDArray[np.float32]:
        """Return at most `limit` rows [rows, k] of its first group or head, spread over what `x` holds."""
        x = self.activations.values(x)
        if self.window is not None:
            return self._patches(x, self.window, limit)
        if not self.is_constant:
            x = x.reshape(-1, *x.shape[-2:])[0] if x.ndim > 1 else x.reshape(1, -1)
        elif self.turned:
            x = np.moveaxis(x, -2, -1)
        return _spread(x.reshape(-1, x.shape[-1]), limit)

    def _patches(self, x: NDArray[np.float32], window: Window, limit: int) -> NDArray[np.float32]:
        channels = x.shape[1] // window.groups
        x = x[:, :channels]
        if self.op_type == "ConvTranspose":
            return _spread(np.moveaxis(x, 1, -1).reshape(-1, channels), limit)
        each = -(-limit // x.shape[0])
        found = [
            _spread(piece[0].astype(np.float32), each)
            for sample in x
            for piece in patches(
                sample[None],
                kernel=window.kernel,
                strides=window.strides,
                pads=window.padding(x.shape[2:]),
                dilations=window.dilations,
            )
        ]
        return np.concatenate(found)[:limit]


def _spread(rows: NDArray[Any], limit: int) -> NDArray[Any]:
    """At most `limit` rows, from the first to the last."""
    if len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]

"""Float activations on the GPU to codes and scales, in one pass, as the matrix products take them.

q = quantize_activation(x, QuantSpec(format=INT8, dynamic="token"), norm=Norm(kind="rms", weight=w))
d = matmul(q.codes, weight, epilogue=Epilogue(row_scale=q.scale))

q = quantize_activation(x, ACTIVATION_SPECS["fp8-block"])
d = matmul(q, weight)  # of a weight in blocks of 128 × 128
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from quantkit.errors import KernelError
from quantkit.formats.format import FP4_E2M1, INT8
from quantkit.formats.spec import QuantSpec
from quantkit.kernels import device as gpu
from quantkit.kernels.compile import compile_kernel
from quantkit.kernels.gemm_checks import described_place, place_of
from quantkit.kernels.quantize_launch import (
    INPUTS,
    KERNEL,
    SOURCE,
    QuantizeKind,
    check_spec,
    launch_of,
)

# Rows that nothing distinguishes are quantized as fewer, longer ones, up to this many columns.
_LONG_ROW = 8192


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm over the last axis, applied before quantizing.

    rms: x / sqrt(mean(x²) + epsilon) · weight. layer: (x − mean) / sqrt(var + epsilon) · weight + bias. weight and
    bias: float32 on the device, one a column, or None.
    """

    kind: Literal["rms", "layer"]
    weight: Any = None
    bias: Any = None
    epsilon: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class QuantizedActivation:
    """Codes on the device and what they mean.

    codes: int8, or uint8 (uint8, e4m3; e2m1 two to a byte, the first in the low nibble), of x's shape with the last
    axis shortened for e2m1; rows start at multiples of 16 bytes, so the array may be a view of a wider one.
    scale: float32, or uint8 codes of e8m0 or e4m3; (…, 1) per token, (…, ⌈k / block⌉) in blocks, whose rows start at
    multiples of 16 bytes too, (1,) where it was given. zero_point: of all codes. global_scale: what e4m3 scales are in
    units of.
    """

    codes: Any
    scale: Any
    zero_point: int
    global_scale: Any
    spec: QuantSpec


def quantize_activation(
    x: Any,
    spec: QuantSpec,
    *,
    scale: Any = None,
    zero_point: int | None = None,
    global_scale: Any = None,
    norm: Norm | None = None,
    multiplier: Any = None,
) -> QuantizedActivation:
    """Return the codes of norm(x) · multiplier on the current stream, without waiting for them.

    Without a norm, codes and scales are those of `quantkit.formats`, bit for bit, where x is finite and scales are
    normal numbers; NaN becomes NaN or the middle code, and no part of a scale.

    Args:
        x: [..., k], float32, float16 or bfloat16 (also as uint16).
        spec: int8, uint8 or fp8_e4m3 with a fixed scale for the tensor or `dynamic="token"`; with `dynamic="block"`
            blocks along the last axis with float32 scales, e8m0 ones (MXFP8, MXFP4) or e4m3 ones (NVFP4).
        scale: the fixed one; a float, or a float32 array of one on the device.
        zero_point: with a fixed scale; the middle code unless given.
        global_scale: of e4m3 scales; a float, or a float32 array of one.
        norm: applied first. multiplier: float32 on the device, one a column: what SmoothQuant and AWQ rescale by.

    Raises:
        KernelError: shapes, types or devices that do not fit, or a specification that no kernel knows.
    """
    if not isinstance(spec, QuantSpec):
        raise KernelError(
            f"quantize_activation: spec: is a {type(spec).__name__}, not a QuantSpec; "
            "QuantSpec(format=INT8, dynamic='token') is one."
        )
    cupy = gpu.cupy()
    device = gpu.current()
    check_spec(spec)
    _check(x, spec, scale, zero_point, global_scale, norm, multiplier, device)
    lead, k = tuple(x.shape[:-1]), int(x.shape[-1])
    m = int(np.prod(lead, dtype=np.int64))
    middle = spec.format.middle
    zero = middle if zero_point is None else zero_point

    per_byte = 2 if spec.format == FP4_E2M1 else 1
    width = -(-k // per_byte)
    pitch = -(-width // 16) * 16
    codes = cupy.empty((*lead, pitch), np.int8 if spec.format == INT8 else np.uint8)[..., :width]
    fixed = _number(scale, device)
    scales, scale_pitch = _scales(spec, k)
    found = fixed
    if spec.dynamic is not None:
        found = cupy.empty((*lead, scale_pitch), _scale_type(spec))[..., :scales]
    result = QuantizedActivation(
        codes=codes,
        scale=found,
        zero_point=zero,
        global_scale=_number(global_scale, device),
        spec=spec,
    )
    if m * k == 0:
        return result

    kind = QuantizeKind(
        x_type="bfloat16" if str(x.dtype) == "uint16" else str(x.dtype),
        spec=spec,
        norm=norm.kind if norm else "none",
        norm_weight=norm is not None and norm.weight is not None,
        norm_bias=norm is not None and norm.bias is not None,
        multiply=multiplier is not None,
        zero_point=zero != middle,
    )
    x = x.reshape(m, k)
    if k > 1 and int(x.strides[1]) != x.itemsize:
        x = cupy.ascontiguousarray(x)
    step = int(x.strides[0]) // x.itemsize if m > 1 else k
    vectors = [norm.weight if norm else None, norm.bias if norm else None, multiplier]
    aligned = k % 8 == 0 and all(
        array is None or (array.data.ptr % 16 == 0 and extent % 16 == 0)
        for array, extent in ((x, step * x.itemsize), *((vector, 0) for vector in vectors))
    )
    together = 1
    whole = spec.dynamic != "block" or (k % (spec.block_size or 1) == 0 and scales == scale_pitch)
    if not kind.whole_rows and not kind.multiply and whole and step == k and pitch * per_byte == k:
        while m % (2 * together) == 0 and 2 * together * k <= _LONG_ROW:
            together *= 2
    launch = launch_of(kind, m // together, k * together, vector=aligned)
    pointers = [codes, found, fixed, result.global_scale, *vectors]
    if spec.dynamic is None:
        pointers[1] = None  # nothing is written
    _function(device, tuple(sorted(launch.defines.items())))(
        launch.grid,
        (launch.block,),
        (
            np.uint64(x.data.ptr),
            *(np.uint64(0 if array is None else array.data.ptr) for array in pointers),
            np.float32(zero - middle),
            np.float32(norm.epsilon if norm else 0),
            np.int32(m // together),
            np.int32(k * together),
            np.int64(step * together),
            np.int64(pitch * together),
            np.int64(scale_pitch * together),
        ),
        shared_mem=launch.shared_bytes,
    )
    return result


def _scales(spec: QuantSpec, k: int) -> tuple[int, int]:
    """Return how many scales a row has, and how many lie from one row to the next."""
    if spec.block_size is None:
        return 1, 1
    count, whole = -(-k // spec.block_size), 16 // np.dtype(_scale_type(spec)).itemsize
    return count, -(-count // whole) * whole


def _scale_type(spec: QuantSpec) -> type:
    return np.float32 if spec.scale_format is None else np.uint8


def _number(value: Any, device: int) -> Any:
    return gpu.scalar(device, float(value)) if isinstance(value, int | float | np.number) else value


def _check(
    x: Any,
    spec: QuantSpec,
    scale: Any,
    zero_point: int | None,
    global_scale: Any,
    norm: Norm | None,
    multiplier: Any,
    device: int,
) -> None:
    if not hasattr(x, "device"):
        raise KernelError(
            f"quantize_activation: x: is a {type(x).__name__}, not an array on the GPU; make it one with cupy.asarray."
        )
    names = {*INPUTS, "uint16"}
    fixed = spec.dynamic is None
    complaints = [
        (str(x.dtype) not in names, f"x: {x.dtype}; use float32, float16 or bfloat16"),
        (x.ndim < 1, "x: a number, not a matrix; reshape it to (rows, columns)"),
        (
            place_of(x) != device,
            f"x: lies on {described_place(x)}, not on GPU {device}; move it with cupy.asarray",
        ),
        (fixed and scale is None, "a fixed scale is needed; give scale, or a spec with dynamic scales"),
        (not fixed and scale is not None, "scale given, and computed from x; leave one out"),
        (zero_point is not None and (not fixed or spec.format.kind == "float"), "no zero point is free here"),
        (
            zero_point is not None and not spec.format.min <= zero_point <= spec.format.max,
            f"zero_point {zero_point} is no {spec.format.name}",
        ),
        (spec.has_global_scale and global_scale is None, "scales in e4m3 need a global_scale"),
        (not spec.has_global_scale and global_scale is not None, "global_scale has no meaning here"),
    ]
    for name, number in (("scale", scale), ("global_scale", global_scale)):
        right = number is None or isinstance(number, int | float | np.number) or _fits(number, 1)
        complaints.append((not right, f"{name}: a float, or a float32 array of one"))
    k = int(x.shape[-1]) if x.ndim else 0
    vectors = {"multiplier": multiplier}
    if norm is not None:
        vectors |= {"norm.weight": norm.weight, "norm.bias": norm.bias}
    for name, vector in vectors.items():
        right = vector is None or _fits(vector, k)
        complaints.append(
            (not right, f"{name}: {getattr(vector, 'size', 0)} values; contiguous float32, {k}")
        )
    for wrong, complaint in complaints:
        if wrong:
            raise KernelError(f"quantize_activation: {complaint}.")


def _fits(array: Any, size: int) -> bool:
    return bool(array.size == size and array.dtype == np.float32 and array.flags.c_contiguous)


@lru_cache(maxsize=1024)
def _function(device: int, defines: tuple[tuple[str, str | int], ...]) -> Any:
    built = compile_kernel(SOURCE, arch=gpu.architecture(device), defines=dict(defines))
    return gpu.cupy().RawModule(path=str(built.cubin)).get_function(KERNEL)

"""Matrix products of quantized operands on a GPU: pack a weight once, multiply activations by it.

D[m, n] = activation((A @ W.T)[m, n] · row_scale[m] · weight_scale[n] + bias[n]), summed in int32 or float32, each
further operation rounded to float32, D rounded once to its own type.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from quantkit.errors import KernelError
from quantkit.formats.quantize import QTensor
from quantkit.kernels import device as gpu
from quantkit.kernels.gemm_launch import EpilogueKind, Launch, launch_of
from quantkit.kernels.heuristics import ITEM_BYTES, OUTPUT_BYTES, Device, Problem, Tile, choose

# What arrays carry each format on the device: CuPy has no eight-bit floats.
_CARRIERS = {"int8": "int8", "float8_e4m3fn": "uint8", "bfloat16": "bfloat16"}
_FORMATS = {"int8": "int8", "e4m3": "float8_e4m3fn", "float8_e4m3fn": "float8_e4m3fn", "bfloat16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What happens to the sums before they are stored.

    row_scale: of the activations; a float or an array of one for all, or a float32 array of one a row.
    bias: float32, one a column. activation: None or "relu".
    """

    row_scale: Any = None
    bias: Any = None
    activation: str | None = None


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight laid out for the kernels of `arch`.

    data: [n, pitch] on the device, rows padded with zeros to a multiple of 16 bytes. scale: float32 on the device,
    one or n of them; None stands for 1. format: int8, float8_e4m3fn or bfloat16.
    """

    data: Any
    scale: Any
    n: int
    k: int
    format: str
    arch: str


def pack_weight(weight: QTensor, arch: str | None = None) -> PackedWeight:
    """Return `weight` [n, k], quantized per tensor or per row, on the current GPU.

    arch: whose layout it gets; that of the current GPU by default.

    Raises:
        KernelError: not a matrix, or a format, zero point or granularity that no kernel takes.
    """
    name = weight.spec.format.name
    found = _FORMATS.get(name)
    values, params = weight.qvalue, weight.qparams
    if found is None:
        raise KernelError(f"weight: no kernel multiplies {name}; use int8 or e4m3.")
    if values.ndim != 2:
        raise KernelError(f"weight: shape {values.shape} is not a matrix; reshape it to (outputs, inputs).")
    if params.zero_point is not None and np.any(params.zero_point):
        raise KernelError("weight: has a zero point; quantize it symmetrically.")
    scale = np.asarray(params.effective_scale, np.float32).reshape(-1)
    per_row = weight.spec.axis in (0, -2) and weight.spec.block_size is None
    if scale.size != 1 and not (per_row and scale.size == values.shape[0]):
        raise KernelError(
            f"weight: {scale.size} scales for {values.shape}; quantize per tensor or along axis 0."
        )
    return pack_codes(values, scale, found, arch)


def pack_codes(
    values: np.ndarray, scale: np.ndarray | None, format_name: str, arch: str | None = None
) -> PackedWeight:
    """Return codes [n, k] of a format and their float32 scales (one, n, or None) on the current GPU."""
    cupy = gpu.cupy()
    device = int(cupy.cuda.Device().id)
    n, k = values.shape
    item = ITEM_BYTES[format_name]
    padded = np.zeros((n, -(-k * item // 16) * 16), np.uint8)
    padded[:, : k * item] = np.ascontiguousarray(values).view(np.uint8)
    return PackedWeight(
        data=cupy.asarray(padded),
        scale=None if scale is None else cupy.asarray(np.ascontiguousarray(scale, np.float32)),
        n=n,
        k=k,
        format=format_name,
        arch=arch or gpu.architecture(device),
    )


def matmul(
    a: Any,
    weight: PackedWeight,
    *,
    epilogue: Epilogue | None = None,
    out_dtype: str = "bfloat16",
    out: Any = None,
    tile: Tile | None = None,
) -> Any:
    """Return D = a @ weight.T on the current stream, without waiting for it.

    a: [..., k] of the weight's format; e4m3 travels as uint8, bfloat16 as bfloat16 or uint16.
    out_dtype: bfloat16, float16, float32, or int32 (sums of int8, with no epilogue and no scales).
    out: a C-contiguous array to write, of the right shape and item size. tile: instead of the chosen one.

    Raises:
        KernelError: shapes, types or devices that do not fit, or a GPU without this kernel.
    """
    cupy = gpu.cupy()
    epilogue = epilogue or Epilogue()
    device = int(cupy.cuda.Device().id)
    _check(a, weight, epilogue, out_dtype, device)
    lead, n, k = tuple(a.shape[:-1]), weight.n, weight.k
    m = int(np.prod(lead, dtype=np.int64))
    if out is None:
        out = cupy.empty((*lead, n), _output_dtype(out_dtype))
    elif out.size != m * n or out.itemsize != OUTPUT_BYTES[out_dtype] or not out.flags.c_contiguous:
        raise KernelError(
            f"out: {out.shape} {out.dtype} is not a contiguous ({m}, {n}) array of {out_dtype}."
        )
    if m == 0:
        return out
    a, pitch = _aligned(a.reshape(m, k), cupy)
    row_scale, rows = _vector(epilogue.row_scale, device)
    raw = out_dtype == "int32"
    kind = EpilogueKind(
        row_scale=rows if not raw else "none",
        column_scale="none" if raw or weight.scale is None else "one" if weight.scale.size == 1 else "each",
        bias=epilogue.bias is not None,
        relu=epilogue.activation == "relu",
    )
    problem = Problem(m=m, n=n, k=k, format=weight.format, output=out_dtype)
    launch = _planned(problem, tile, kind, gpu.multiprocessors(device))
    operands = [
        (a.data.ptr, (m, k), pitch),
        (weight.data.data.ptr, (n, k), int(weight.data.shape[1])),
    ]
    if launch.swap:
        operands.reverse()
    boxes = launch.first_box, launch.second_box
    maps = [
        gpu.tensor_map(address, weight.format, shape, step, box)
        for (address, shape, step), box in zip(operands, boxes, strict=True)
    ]
    to = out.data.ptr
    width = OUTPUT_BYTES[out_dtype]
    stored = (
        gpu.tensor_map(to, out_dtype, (m, n), n * width, launch.output_box) if launch.tma_store else maps[0]
    )
    pointers = [0 if array is None else array.data.ptr for array in (row_scale, weight.scale, epilogue.bias)]
    gpu.kernel_of(launch, device)(
        (launch.grid,),
        (launch.block,),
        (
            *maps,
            stored,
            np.uint64(to),
            *map(np.uint64, pointers),
            np.int32(m),
            np.int32(n),
            np.int32(problem.row_bytes),
        ),
        shared_mem=launch.shared_bytes,
    )
    return out


@lru_cache(maxsize=4096)
def _planned(problem: Problem, tile: Tile | None, kind: EpilogueKind, multiprocessors: int) -> Launch:
    tile = tile or choose(problem, Device(multiprocessors=multiprocessors))
    return launch_of(problem, tile, kind, multiprocessors)


def _check(a: Any, weight: PackedWeight, epilogue: Epilogue, out_dtype: str, device: int) -> None:
    arch = gpu.architecture(device)
    carriers = (
        {_CARRIERS[weight.format], "uint16"} if weight.format == "bfloat16" else {_CARRIERS[weight.format]}
    )
    m = int(np.prod(a.shape[:-1], dtype=np.int64))
    scale, bias = epilogue.row_scale, epilogue.bias
    plain = scale is None and bias is None and epilogue.activation is None
    complaints = [
        (arch != "sm_90a", f"GPU {device} is {arch}; this kernel runs on sm_90a"),
        (
            weight.arch != arch,
            f"the weight was packed for {weight.arch}, GPU {device} is {arch}; pack it again",
        ),
        (a.ndim < 1 or a.shape[-1] != weight.k, f"a: {a.shape} does not end in the weight's k = {weight.k}"),
        (str(a.dtype) not in carriers, f"a: {a.dtype} for a weight of {weight.format}; pass {min(carriers)}"),
        (out_dtype not in OUTPUT_BYTES, f"out_dtype {out_dtype!r}; one of {', '.join(OUTPUT_BYTES)}"),
        (
            out_dtype == "int32" and (weight.format != "int8" or not plain),
            "int32 holds plain sums of int8 only",
        ),
        (epilogue.activation not in (None, "relu"), f"activation {epilogue.activation!r}; None or relu"),
        (
            scale is not None
            and not isinstance(scale, float)
            and (scale.size not in (1, m) or scale.dtype != np.float32),
            f"row_scale: {getattr(scale, 'size', 0)} values; float32, one or {m}",
        ),
        (
            bias is not None and (bias.size != weight.n or bias.dtype != np.float32),
            f"bias: {getattr(bias, 'size', 0)} values; float32, {weight.n}",
        ),
    ]
    vectors = [("row_scale", scale), ("bias", bias), ("the weight's scale", weight.scale)]
    complaints += [
        (hasattr(array, "data") and array.data.ptr % 8 != 0, f"{name}: starts at an odd float; copy it")
        for name, array in vectors
    ]
    for wrong, complaint in complaints:
        if wrong:
            raise KernelError(f"matmul: {complaint}.")


def _aligned(a: Any, cupy: Any) -> tuple[Any, int]:
    """Return `a` with rows that start at multiples of 16 bytes, a copy if they did not, and the pitch in bytes."""
    m, k = a.shape
    pitch = int(a.strides[0]) if m > 1 else -(-k * a.itemsize // 16) * 16
    if int(a.strides[1]) == a.itemsize and pitch % 16 == 0 and a.data.ptr % 16 == 0:
        return a, pitch
    pitch = -(-k * a.itemsize // 16) * 16
    padded = cupy.empty((m, pitch // a.itemsize), a.dtype)
    padded[:, :k] = a
    return padded, pitch


def _vector(scale: Any, device: int) -> tuple[Any, str]:
    if scale is None:
        return None, "none"
    if isinstance(scale, float):
        return gpu.scalar(device, scale), "one"
    return scale, "one" if scale.size == 1 else "each"


def _output_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)

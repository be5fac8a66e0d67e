"""One run of quantize.cu, or of a damaged copy of it, beside what NumPy makes of the same values."""

from pathlib import Path

import ml_dtypes
import numpy as np

from quantkit.formats import QParams
from quantkit.formats.packing import code_bits, pack_bits
from quantkit.kernels.quantize_launch import KERNEL, SOURCE, QuantizeKind, launch_of
from quantkit.kernels.quantize_reference import NormReference, quantize_reference

X_TYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
NULL = np.uint64(0)


def run_quantize(
    machine,
    x: np.ndarray,
    kind: QuantizeKind,
    qparams: QParams | None = None,
    *,
    global_scale: np.ndarray | None = None,
    norm: NormReference | None = None,
    multiplier: np.ndarray | None = None,
    source: Path = SOURCE,
    vector: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The packed codes and the scales (as stored) of the kernel; rubbish lay where they are written."""
    (rows, columns), spec = x.shape, kind.spec
    vector = columns % 8 == 0 if vector is None else vector
    launch = launch_of(kind, rows, columns, vector=vector)
    per_byte = 2 if spec.format.bits == 4 else 1
    width = -(-columns // per_byte)
    pitch = -(-width // 16) * 16
    codes = np.full((rows, pitch), 0xAA, np.uint8)
    blocks = -(-columns // spec.block_size) if spec.block_size else 1
    scale_pitch = blocks + 3 if spec.block_size else 1
    scales = np.full((rows, scale_pitch), 0xAA, np.float32 if spec.scale_format is None else np.uint8)
    one = np.ones(1, np.float32)
    zero = 0 if qparams is None or qparams.zero_point is None else int(qparams.zero_point)
    zero -= spec.format.middle if qparams is not None and qparams.zero_point is not None else 0
    machine.launch(
        source,
        KERNEL,
        x.view(np.uint8) if x.dtype != np.float32 else x,
        codes,
        NULL if spec.dynamic is None else scales,
        one if qparams is None else qparams.scale.reshape(1),
        one if global_scale is None else global_scale.reshape(1),
        NULL if norm is None or norm.weight is None else norm.weight,
        NULL if norm is None or norm.bias is None else norm.bias,
        NULL if multiplier is None else multiplier,
        np.float32(zero),
        np.float32(norm.epsilon if norm else 0),
        np.int32(rows),
        np.int32(columns),
        np.int64(columns),
        np.int64(pitch),
        np.int64(scale_pitch),
        defines=launch.defines,
        grid=launch.grid,
        block=launch.block,
        shared_bytes=launch.shared_bytes,
    )
    assert np.all(codes[:, width:] == 0xAA), "nothing is written between rows"
    assert np.all(scales[:, blocks:] == 0xAA), "nor between rows of scales"
    return codes[:, :width], scales[:, :blocks]


def numpy_codes(
    x: np.ndarray,
    kind: QuantizeKind,
    qparams: QParams | None = None,
    *,
    global_scale: np.ndarray | None = None,
    norm: NormReference | None = None,
    multiplier: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The same of the oracle."""
    spec = kind.spec
    launch = launch_of(kind, *x.shape, vector=x.shape[1] % 8 == 0)
    found = quantize_reference(
        x, spec, qparams, global_scale=global_scale, norm=norm, multiplier=multiplier,
        row_threads=launch.row_threads,
    )  # fmt: skip
    bits = code_bits(found.qvalue, spec.format)
    codes = pack_bits(bits, 4) if spec.format.bits == 4 else bits
    scales = found.qparams.scale
    if spec.scale_format is not None:
        scales = scales.astype(spec.scale_format.dtype).view(np.uint8)
    return codes, scales


def assert_equal(machine, x: np.ndarray, kind: QuantizeKind, *arguments, **options) -> None:
    """Codes and scales are NumPy's, bit for bit."""
    codes, scales = run_quantize(machine, x, kind, *arguments, **options)
    options.pop("source", None)
    options.pop("vector", None)
    want_codes, want_scales = numpy_codes(x, kind, *arguments, **options)
    if kind.spec.dynamic is not None:
        np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(codes, want_codes)

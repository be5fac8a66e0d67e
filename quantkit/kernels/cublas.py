"""The one product of cuBLAS that benchmarks need where torch is not installed, bf16 by CuPy's binding, and its time."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels import device
from quantkit.kernels.gpus import Gpu

_R_16BF = 14  # CUDA_R_16BF
_COMPUTE_32F = 68
_DEFAULT_ALGORITHM = -1
_NO, _TRANSPOSED = 0, 1


def cublas_bf16_us(m: int, n: int, k: int, gpu: Gpu) -> float:
    """Return how long cuBLAS takes at least for D[m, n] = A[m, k] @ W[n, k].T in bf16, from an empty L2, as modelled.

    A launch, and the longer of the bytes at 0.9 of the memory's rate and the products at 0.8 of the tensor cores': what
    the fastest of its products took on an H200, from one row to 8192, within 4 %.
    """
    moved_us = 2 * (m * k + n * k + m * n) / (0.9e3 * gpu.dram_gb_per_s)
    return 3.6 + max(moved_us, 2 * m * n * k / (0.8e6 * gpu.peak_tflops["bf16"]))


def cublas_bf16(activations: NDArray[Any], weight: NDArray[Any], m: int) -> Callable[[], Any]:
    """Return a call of D[m, n] = A[m, k] @ W[n, k].T in bf16, on the current stream; D is [m, n] of uint16.

    activations: bfloat16 [rows, k], repeated up to m rows. weight: bfloat16 [n, k].

    Raises:
        KernelError: CuPy is not installed.
    """
    cupy = device.cupy()
    cublas = importlib.import_module("cupy_backends.cuda.libs.cublas")
    small = cupy.asarray(np.ascontiguousarray(activations).view(np.uint16))
    a = small if len(small) == m else small[cupy.arange(m) % len(small)]
    w = cupy.asarray(np.ascontiguousarray(weight).view(np.uint16))
    (n, k), out = weight.shape, cupy.empty((m, len(weight)), np.uint16)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)

    def run() -> Any:
        # Columns first, as cuBLAS counts: D.T [n, m] = W.T.T [n, k] · A.T [k, m].
        cublas.gemmEx(
            cupy.cuda.Device().cublas_handle, _TRANSPOSED, _NO, n, m, k, one.ctypes.data, w.data.ptr, _R_16BF, k,
            a.data.ptr, _R_16BF, k, zero.ctypes.data, out.data.ptr, _R_16BF, n, _COMPUTE_32F, _DEFAULT_ALGORITHM,
        )  # fmt: skip
        return out

    return run

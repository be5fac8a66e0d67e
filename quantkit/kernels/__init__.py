"""GPU kernels: CUDA C++ that this project writes, compiled for the exact GPU, emulated on the CPU for its tests.

`pack_weight` lays a quantized weight out on the current GPU, `matmul` multiplies activations by it.
"""

from quantkit.kernels.gemm import Epilogue, PackedWeight, matmul, pack_weight

__all__ = ["Epilogue", "PackedWeight", "matmul", "pack_weight"]

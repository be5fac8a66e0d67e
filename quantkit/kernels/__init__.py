"""GPU kernels: CUDA C++ that this project writes, compiled for the exact GPU, emulated on the CPU for its tests.

`pack_weight` lays a quantized weight out on the current GPU, `quantize_activation` makes codes of activations, and
`matmul` multiplies them.
"""

from quantkit.kernels.gemm import Epilogue, PackedWeight, matmul, pack_weight
from quantkit.kernels.quantize import Norm, QuantizedActivation, quantize_activation
from quantkit.kernels.w4.operands import Workspace4

__all__ = [
    "Epilogue",
    "Norm",
    "PackedWeight",
    "QuantizedActivation",
    "Workspace4",
    "matmul",
    "pack_weight",
    "quantize_activation",
]

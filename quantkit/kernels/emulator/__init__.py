"""A CPU emulator of CUDA thread blocks, for testing kernels bit for bit without a GPU.

    kernel = load(Path("gemm.cu"), "gemm", {"TILE_N": 128})
    kernel.launch(a, b, d, np.int32(m), grid=(4, 2), block=256, shared_bytes=49152, mode=Mode.LAZY)

A kernel includes cuda/include/instructions.h and nothing else; its CUDA and its emulated form are the same source.
What the emulator does not model: time, bank conflicts, caches, weak ordering of plain global stores (all threads see
a store at once), divergence within a warp (all lanes take part in warp functions), and blocks without clusters of
more than one dimension.
"""

from quantkit.kernels.emulator.build import build_kernel, build_library, find_compiler
from quantkit.kernels.emulator.launch import EmulatorError, Kernel, LaunchReport, Mode, launch, load
from quantkit.kernels.emulator.tensor_map import Swizzle, TensorMap

__all__ = [
    "EmulatorError",
    "Kernel",
    "LaunchReport",
    "Mode",
    "Swizzle",
    "TensorMap",
    "build_kernel",
    "build_library",
    "find_compiler",
    "launch",
    "load",
]

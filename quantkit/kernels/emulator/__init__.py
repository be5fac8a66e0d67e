"""A CPU emulator of CUDA thread blocks, for testing kernels bit for bit without a GPU.

    kernel = load(Path("gemm.cu"), "gemm", {"TILE_N": 128})
    kernel.launch(a, b, d, np.int32(m), grid=(4, 2), block=256, shared_bytes=49152, mode=Mode.LAZY)

A kernel includes cuda/include/instructions.h and nothing else; its CUDA and its emulated form are the same source.

Integers and conversions are exact, matrix instructions round as an H200's do (multiply.cpp has the model), and float
expressions round as NVRTC's builds do. Beyond results, a launch is watched for what no GPU promises to do right:
accesses out of range or misaligned, reads of unfinished copies, memory overwritten while it is still read, accesses
of two threads with no barrier between, missing proxy fences, misused barriers and registers, deadlock. The first is
reported with kernel, block, thread, file and line.

Not modelled: time, bank conflicts, caches; divergence inside a warp (all 32 lanes take part in warp functions);
plain pointers, which are only fenced in by guard pages: kernels access memory through ld_ and st_ functions; weak
ordering between the threads of one block; clusters of more than one dimension; K-minor operands of wgmma.
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

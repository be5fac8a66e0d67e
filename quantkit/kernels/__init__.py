"""GPU kernels: CUDA C++ that this project writes, compiled for the exact GPU, emulated on the CPU for its tests."""

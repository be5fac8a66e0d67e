"""Benchmarks: every product of matrices in a model, on the GPU that is here, beside what others have.

cases ─────────▶ choose ───────▶ run on operands ──▶ rows
opening.py       kernels/        measuring.py        result.py
find_layers.py   families.py     peers.py            plot.py
feeding.py                       or the emulator
operands.py                      on what cropping.py leaves
"""

from quantkit.bench.result import Benchmark
from quantkit.bench.row import BenchRow
from quantkit.bench.run import bench_model

__all__ = ["BenchRow", "Benchmark", "bench_model"]

"""Benchmarks: every product of matrices in a model, on the GPU that is here, beside what others have.

cases ─────────▶ choose ───────▶ run on operands ──▶ rows
find_layers.py   kernels/        measuring.py        result.py
feeding.py       families.py     peers.py            plot.py
operands.py                      or the emulator
"""

from quantkit.bench.result import Benchmark
from quantkit.bench.row import BenchRow
from quantkit.bench.run import bench_model

__all__ = ["BenchRow", "Benchmark", "bench_model"]

"""How long a calibration method takes to solve a tensor's range: milliseconds, median of several runs.

    python benchmarks/solving.py

The histograms are of 400,000 values, rescaled so that their linear bins number from just above 2048 (amax a
power of two) to 4096. Observing and the ranges of weights are timed beside it, in nanoseconds a value.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from quantkit.calibrators import get_calibrator, list_calibrators, weight_range
from quantkit.formats import FP8_E4M3, INT8, INT16, UINT8, QuantSpec
from quantkit.statistics import ChannelStats, FloatHistogram

SPECS = [
    QuantSpec(format=INT8),
    QuantSpec(format=UINT8, symmetric=False),
    QuantSpec(format=INT16),
    QuantSpec(format=FP8_E4M3),
]
SIZES = (4_096, 65_536, 4_000_000)


def median_time_s(call: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def histogram_of(x: NDArray[np.float32]) -> FloatHistogram:
    histogram = FloatHistogram()
    histogram.observe(x)
    return histogram


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds that each calibration method takes a tensor.")
    parser.add_argument("--runs", type=int, default=25, help="runs to take the median of (default 25)")
    runs = parser.parse_args().runs

    rng = np.random.default_rng(0)
    laplace = rng.laplace(size=400_000)
    print("ms a tensor       bins " + "".join(f"{spec!s:>20}" for spec in SPECS))
    for amax in (1.0, 1.4, 1.99):
        histogram = histogram_of((laplace / np.abs(laplace).max() * amax).astype(np.float32))
        bins = histogram.linear_magnitudes().counts.size
        for method in list_calibrators():
            calibrator = get_calibrator(method)
            times = [median_time_s(partial(calibrator.solve, histogram, spec), runs) for spec in SPECS]
            print(f"{method:<16}{bins:>6} " + "".join(f"{time_s * 1e3:>20.2f}" for time_s in times))

    print(f"\n{'ns a value':<18}" + "".join(f"{size:>14,}" for size in SIZES))
    for name, make in (
        ("histogram signed", lambda x: (FloatHistogram(), x)),
        ("histogram relu", lambda x: (FloatHistogram(), np.maximum(x, 0))),
        ("channels (N, 64)", lambda x: (ChannelStats(1), x.reshape(-1, 64))),
    ):
        cells = []
        for size in SIZES:
            statistic, x = make(rng.normal(size=size).astype(np.float32))
            cells.append(median_time_s(partial(statistic.observe, x), runs) / size * 1e9)
        print(f"{name:<18}" + "".join(f"{cell:>14.2f}" for cell in cells))

    w = rng.normal(size=(1024, 1024)).astype(np.float32)
    print("\nms a weight of 1024 × 1024, per channel, method mse")
    for fmt in (INT8, FP8_E4M3):
        spec = QuantSpec(format=fmt, axis=0)
        print(f"{fmt.name:<18}{median_time_s(partial(weight_range, w, spec, 'mse'), 5) * 1e3:>14.0f}")


if __name__ == "__main__":
    main()

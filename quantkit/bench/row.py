"""One product of a benchmark: what ran, how fast, how right."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.kernels.timing import Timing
from quantkit.kernels.work import Work

BASELINE = "cuBLAS bf16"
# Rounding of sums and of D stays below: fp8's accumulator loses some 10⁻³. What errs more is no rounding.
WRONG_FROM = 1e-2


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One product in one format.

    Attributes:
        layers: the nodes that compute it, all of one shape; the first one's numbers were used.
        op_type: of the first.
        batch: samples at a time; None for shapes that were given.
        calls: how often one run of the model computes it.
        asked: the format that was asked for; "as stored" for a quantized file's own.
        work: its shape and format.
        kernel, configuration: what was chosen, "" where no kernel takes it. tuned: it was timed once, not modelled.
        predicted_us: what the model of time says; None where no kernel takes it. bf16_us: what cuBLAS takes in bf16, as
            modelled.
        roofline_us, bound: the least time that the GPU allows, and what bounds it.
        timing: of the kernel; None where nothing was timed.
        peers: timings of others on the same numbers. refused: why those that did not run did not.
        error: ‖D − oracle‖ / ‖oracle‖ over the part of D that was compared; None where nothing was.
        checked: that part, in words.
        origin: where the activations came from.
    """

    layers: tuple[str, ...]
    op_type: str
    batch: int | None
    calls: int
    asked: str
    work: Work
    kernel: str
    configuration: str
    tuned: bool
    predicted_us: float | None
    bf16_us: float
    roofline_us: float
    bound: str
    timing: Timing | None = None
    peers: Mapping[str, Timing] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    error: float | None = None
    checked: str = ""
    origin: str = ""

    @property
    def time_us(self) -> float | None:
        """The measured time, else the predicted one."""
        return self.predicted_us if self.timing is None else self.timing.median_us

    @property
    def tflops(self) -> float | None:
        """10¹² operations a second."""
        return None if self.time_us is None else self.work.operations / self.time_us * 1e-6

    @property
    def gb_per_s(self) -> float | None:
        """10⁹ bytes a second that must move at least."""
        return None if self.time_us is None else self.work.size_bytes / self.time_us * 1e-3

    @property
    def roofline_percent(self) -> float | None:
        """How much of what the GPU allows is reached."""
        return None if self.time_us is None else 100 * self.roofline_us / self.time_us

    def speedup(self, *peers: str) -> float | None:
        """How many times faster it is than the fastest of those peers; None where none of them was timed."""
        times = [self.peers[name].median_us for name in peers if name in self.peers]
        return min(times) / self.timing.median_us if times and self.timing is not None else None

    @property
    def vs_bf16(self) -> float | None:
        """Speed-up over cuBLAS in bf16."""
        return self.speedup(BASELINE)

    @property
    def predicted_vs_bf16(self) -> float | None:
        """The same of the modelled times."""
        return None if not self.predicted_us else self.bf16_us / self.predicted_us

    @property
    def vs_same_format(self) -> float | None:
        """Speed-up over cuBLASLt in the same format, the fastest of its ways."""
        return self.speedup(*(name for name in self.peers if name.startswith("cuBLASLt")))

    @property
    def is_wrong(self) -> bool:
        """Whether D errs by more than rounding explains."""
        return self.error is not None and not self.error < WRONG_FROM

    @property
    def name(self) -> str:
        """The first layer's name, and how many more there are."""
        more = len(self.layers) - 1
        return f"{self.layers[0]} +{more}" if more > 0 else "".join(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON would hold it."""
        work, timing = self.work, self.timing
        return {
            "layers": list(self.layers),
            "op_type": self.op_type,
            "batch": self.batch,
            "calls": self.calls,
            "asked": self.asked,
            "m": work.m,
            "n": work.n,
            "k": work.k,
            "format": work.format,
            "group": work.group,
            "bias": work.bias,
            "relu": work.relu,
            "output": work.output,
            "kernel": self.kernel,
            "configuration": self.configuration,
            "tuned": self.tuned,
            "predicted_us": self.predicted_us,
            "predicted_speedup_over_cublas_bf16": self.predicted_vs_bf16,
            "time_us": None if timing is None else timing.median_us,
            "q1_us": None if timing is None else timing.q1_us,
            "q3_us": None if timing is None else timing.q3_us,
            "tflops": self.tflops,
            "gb_per_s": self.gb_per_s,
            "roofline_us": self.roofline_us,
            "roofline_percent": self.roofline_percent,
            "bound": self.bound,
            "speedup_over_cublas_bf16": self.vs_bf16,
            "speedup_over_cublaslt_same_format": self.vs_same_format,
            "peers_us": {name: peer.median_us for name, peer in self.peers.items()},
            "peers_quartiles_us": {name: [peer.q1_us, peer.q3_us] for name, peer in self.peers.items()},
            "refused": dict(self.refused),
            # JSON has no infinity.
            "relative_error": "infinite" if self.error == math.inf else self.error,
            "checked": self.checked,
            "activations": self.origin,
        }


def relative_error(d: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return ‖d − wanted‖ / ‖wanted‖; 0 where all values are equal, infinite where d is not finite and should be."""
    assert d.shape == wanted.shape, f"{d.shape} against {wanted.shape}"
    got, want = d.astype(np.float64), wanted.astype(np.float64)
    if np.array_equal(got, want):
        return 0.0
    error = float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-300))
    return error if math.isfinite(error) else math.inf

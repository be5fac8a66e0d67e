"""What a benchmark found, as a table, as JSON, as CSV, and as a notebook shows it."""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantkit.graph import LeftAlone
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.timing import Timing
from quantkit.kernels.work import Work
from quantkit.tables import Cell, Table

Mode = Literal["measured", "predicted", "emulated"]
BASELINE = "cuBLAS bf16"


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
        predicted_us: what the model of time says; None where no kernel takes it.
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
    def vs_same_format(self) -> float | None:
        """Speed-up over cuBLASLt in the same format, the fastest of its ways."""
        return self.speedup(*(name for name in self.peers if name.startswith("cuBLASLt")))

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
            "refused": dict(self.refused),
            "relative_error": self.error,
            "checked": self.checked,
            "activations": self.origin,
        }


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The products of a model, or of shapes, in some formats on a GPU.

    Attributes:
        model: its name; None for shapes.
        gpu: whose ceilings and kernels are shown. mode: measured on it, predicted for it, or emulated without it.
        rows: in the model's order, by batch and format.
        left: operators that are no product here, with the reason.
        notes: what one should know to read the figures.
        facts: driver, compiler, clocks: what measured times depend on besides the code.
    """

    model: str | None
    gpu: Gpu
    mode: Mode
    rows: tuple[BenchRow, ...]
    left: tuple[LeftAlone, ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> Table:
        """Return the rows as a table, with the columns that this mode has figures for."""
        batches = {row.batch for row in self.rows}
        columns: list[tuple[str, list[Cell]]] = []
        if any(row.layers for row in self.rows):
            columns.append(("layer", [row.name for row in self.rows]))
        if len(batches) > 1:
            columns.append(("batch", [row.batch for row in self.rows]))
        if any(row.calls > 1 for row in self.rows):
            columns.append(("calls", [row.calls for row in self.rows]))
        columns += [
            ("m × n × k", [f"{r.work.m} × {r.work.n} × {r.work.k}" for r in self.rows]),
            ("format", [r.work.format for r in self.rows]),
            ("kernel", [_kernel(r) for r in self.rows]),
        ]
        if self.mode == "measured":
            columns += self._measured()
        elif self.mode == "predicted":
            columns += [("predicted µs", [_digits(r.predicted_us) for r in self.rows]), *self._rates()]
            columns.append(("roofline µs", [_digits(r.roofline_us) for r in self.rows]))
            columns.append(("bound by", [r.bound for r in self.rows]))
        else:
            columns += [
                ("emulated", [r.checked or None for r in self.rows]),
                ("error", [_error(r.error) for r in self.rows]),
            ]
        return Table([title for title, _ in columns], zip(*(cells for _, cells in columns), strict=True))

    def _measured(self) -> list[tuple[str, list[Cell]]]:
        rows = self.rows
        columns: list[tuple[str, list[Cell]]] = [
            ("µs", [_digits(r.time_us) for r in rows]),
            (
                "± µs",
                [None if r.timing is None else _digits((r.timing.q3_us - r.timing.q1_us) / 2) for r in rows],
            ),
            *self._rates(),
            ("× bf16", [_times(r.vs_bf16) for r in rows]),
            ("× same", [_times(r.vs_same_format) for r in rows]),
        ]
        others = dict.fromkeys(n for r in rows for n in r.peers if not n.startswith("cuBLAS"))
        columns += [(f"× {name}", [_times(r.speedup(name)) for r in rows]) for name in others]
        return [*columns, ("error", [_error(r.error) for r in rows])]

    def _rates(self) -> list[tuple[str, list[Cell]]]:
        return [
            ("TFLOP/s", [_digits(r.tflops) for r in self.rows]),
            ("GB/s", [None if r.gb_per_s is None else round(r.gb_per_s) for r in self.rows]),
            (
                "% roofline",
                [_percent(r.roofline_percent) for r in self.rows],
            ),
        ]

    def totals(self) -> dict[tuple[int | None, str], dict[str, float]]:
        """Return, by batch and format asked for, the time of one run of all products, and its speed-ups where known.

        {"time_us", "speedup_over_cublas_bf16", "speedup_over_cublaslt_same_format"}: a speed-up is over the rows
        that the peer ran, each as often as the model calls it.
        """
        found = {}
        for key in dict.fromkeys((row.batch, row.asked) for row in self.rows):
            part = [row for row in self.rows if (row.batch, row.asked) == key]
            if any(row.time_us is None for row in part):
                continue  # a sum without some of its parts would look fast
            told = {"time_us": math.fsum(r.calls * (r.time_us or 0) for r in part)}
            for name, ratio in (
                ("speedup_over_cublas_bf16", BenchRow.vs_bf16),
                ("speedup_over_cublaslt_same_format", BenchRow.vs_same_format),
            ):
                pairs = [(r.calls * (r.time_us or 0), ratio.fget(r)) for r in part]  # type: ignore[attr-defined]
                known = [(time, times) for time, times in pairs if times is not None]
                if known:
                    told[name] = math.fsum(t * x for t, x in known) / math.fsum(t for t, _ in known)
            found[key] = told
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON would hold it."""
        return {
            "model": self.model,
            "gpu": self.gpu.name,
            "mode": self.mode,
            "facts": dict(self.facts),
            "rows": [row.to_dict() for row in self.rows],
            "totals": [
                {"batch": batch, "format": name, **told} for (batch, name), told in self.totals().items()
            ],
            "left": [{"node": x.node, "op_type": x.op_type, "reason": x.reason} for x in self.left],
            "notes": list(self.notes),
        }

    def csv(self) -> str:
        """Return the rows as CSV, one a product, peers in columns of their own."""
        peers = dict.fromkeys(name for row in self.rows for name in row.peers)
        plain = [
            {k: v for k, v in row.to_dict().items() if k not in ("peers_us", "refused", "layers")}
            | {"layers": " ".join(row.layers)}
            | {f"{name} us": row.peers[name].median_us if name in row.peers else None for name in peers}
            for row in self.rows
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(plain[0]) if plain else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain)
        return text.getvalue()

    def summary(self) -> Table:
        """Return the totals as a table: what one run of all products takes, by batch and format."""
        rows: list[tuple[Cell, ...]] = [
            (
                None if batch is None else batch,
                name,
                _digits(told["time_us"]),
                _times(told.get("speedup_over_cublas_bf16")),
                _times(told.get("speedup_over_cublaslt_same_format")),
            )
            for (batch, name), told in self.totals().items()
        ]
        return Table(("batch", "format", "µs for all products", "× bf16", "× same"), rows)

    def __str__(self) -> str:
        return self.table().text()

    def __repr__(self) -> str:
        return f"Benchmark(model={self.model!r}, gpu={self.gpu.name!r}, mode={self.mode!r}, rows={len(self.rows)})"

    def _repr_html_(self) -> str:
        return self.table().html()


def _kernel(row: BenchRow) -> str | None:
    if not row.kernel:
        return None
    return f"{row.kernel} {row.configuration}{' (tuned)' if row.tuned else ''}"


def _digits(value: float | None) -> float | None:
    """Three digits, as many as a time has that differs by a percent from run to run; all before the point."""
    if value is None:
        return None
    return round(value) if value >= 1000 else float(f"{value:.3g}")


def _percent(value: float | None) -> float | None:
    return None if value is None else round(value) if value >= 10 else float(f"{value:.2g}")


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _error(value: float | None) -> str | None:
    return None if value is None else "exact" if value == 0 else f"{value:.1e}"


def relative_error(d: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Return ‖d − wanted‖ / ‖wanted‖; 0 where all values are equal, infinite where d is not finite and should be."""
    assert d.shape == wanted.shape, f"{d.shape} against {wanted.shape}"
    got, want = d.astype(np.float64), wanted.astype(np.float64)
    if np.array_equal(got, want):
        return 0.0
    error = float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-300))
    return error if math.isfinite(error) else math.inf

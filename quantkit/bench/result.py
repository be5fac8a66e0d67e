"""What a benchmark found, as a table, as JSON, as CSV, and as a notebook shows it."""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quantkit.bench.row import BenchRow
from quantkit.graph import LeftAlone
from quantkit.kernels.gpus import Gpu
from quantkit.tables import Cell, Table

Mode = Literal["measured", "predicted", "emulated"]


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
            columns.append(("× bf16", [_times(r.predicted_vs_bf16) for r in self.rows]))
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
            {
                k: v
                for k, v in row.to_dict().items()
                if k not in ("peers_us", "peers_quartiles_us", "refused", "layers")
            }
            | {"layers": ";".join(row.layers)}
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
        totals = self.totals()
        columns: list[tuple[str, list[Cell]]] = [
            ("batch", [batch for batch, _ in totals]),
            ("format", [name for _, name in totals]),
            ("µs for all products", [_digits(told["time_us"]) for told in totals.values()]),
        ]
        if self.mode == "measured":
            columns += [
                ("× bf16", [_times(told.get("speedup_over_cublas_bf16")) for told in totals.values()]),
                (
                    "× same",
                    [_times(told.get("speedup_over_cublaslt_same_format")) for told in totals.values()],
                ),
            ]
        return Table([title for title, _ in columns], zip(*(cells for _, cells in columns), strict=True))

    def refusals(self) -> list[str]:
        """Return a line for each reason that a peer had not to run: how many products, the first one, and why."""
        grouped: dict[tuple[str, str], list[BenchRow]] = {}
        for row in self.rows:
            for peer, reason in row.refused.items():
                grouped.setdefault((peer, reason), []).append(row)
        return [
            f"{peer} refused {len(rows)} product{'' if len(rows) == 1 else 's'} "
            f"({rows[0].work.m} × {rows[0].work.n} × {rows[0].work.k} {rows[0].work.format}"
            f"{' first' if len(rows) > 1 else ''}): {reason}"
            for (peer, reason), rows in grouped.items()
        ]

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

"""Calibrated tiny models and their plans, made once each: what the tests of solving, exporting and simulating share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from quantkit.calibrators import get_calibrator
from quantkit.data import open_data
from quantkit.export import get_emitter
from quantkit.graph import Graph, ModelLike, load_graph
from quantkit.observing.observe import observe
from quantkit.planning.plan import Plan
from quantkit.planning.presets import get_preset
from quantkit.planning.solve import solve
from quantkit.statistics import FloatHistogram
from tests.models import MODELS, Feed

TARGETS = ("tensorrt", "ort", "ort-cpu")
# Models in which nothing can be quantized, whatever the preset.
NOTHING = frozenset(
    {
        "conv_dynamic_weight",
        "empty_graph",
        "float64",
        "matmul_gemv",
        "nothing_to_quantize",
        "quantized_throughout",
    }
)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A cleaned model, what was observed of it, and the feeds that it was observed on."""

    graph: Graph
    histograms: dict[str, FloatHistogram]
    feeds: list[Feed]

    def plan(
        self,
        target: str = "tensorrt",
        preset: str = "int8",
        *,
        everything: bool = True,
        method: str = "minmax",
    ) -> Plan:
        """Solve it for a target."""
        return solve(
            self.graph,
            self.histograms,
            preset=get_preset(preset),
            target=get_emitter(target).target,
            calibrator=get_calibrator(method),
            everything=everything,
        )


def calibrate(model: ModelLike, feeds: Sequence[Feed]) -> Calibrated:
    """Observe a model."""
    graph = load_graph(model)
    found = observe(graph, open_data(list(feeds), graph.inputs))
    histograms = {name: s.histogram for name, s in found.statistics.items()}
    return Calibrated(graph=graph, histograms=histograms, feeds=list(feeds))


@cache
def calibrated(name: str) -> Calibrated:
    """Observe a model of the table on eight of its feeds."""
    return calibrate(MODELS[name].build(), MODELS[name].feeds(8))


def images(*shape: int, count: int = 8, amax: float = 3.0, seed: int = 0) -> list[Feed]:
    """Return feeds {"x": [1, *shape]} of N(0, 1) values, one of which is ±`amax`."""
    rng = np.random.default_rng(seed)
    feeds = []
    for _ in range(count):
        x = np.clip(rng.standard_normal((1, *shape)), -amax, amax).astype(np.float32)
        x.reshape(-1)[0] = amax
        feeds.append({"x": x})
    return feeds


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """10·log10(Σ ref² / Σ (other − ref)²) over the elements that are finite in both."""
    exact, found = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    finite = np.isfinite(exact) & np.isfinite(found)
    noise = float(((found - exact)[finite] ** 2).sum())
    signal = float((exact[finite] ** 2).sum())
    return float("inf") if noise == 0 else 10 * np.log10(max(signal, 1e-300) / noise)

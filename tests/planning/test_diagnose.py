from dataclasses import replace

import numpy as np
import pytest

from quantkit.calibrators import get_calibrator
from quantkit.export import get_emitter
from quantkit.planning.diagnose import clipping_warnings
from quantkit.planning.plan import Plan
from quantkit.planning.presets import get_preset
from quantkit.planning.solve import solve
from tests.models import model_of, normal
from tests.plans import Calibrated, calibrate


@pytest.fixture(scope="module")
def heavy_tailed() -> Calibrated:
    model = model_of("(float[N,64] x) => (float[N,8] y) { y = MatMul (x, w) }", w=normal(64, 8))
    rng = np.random.default_rng(0)
    return calibrate(model, [{"x": rng.standard_t(3, (16, 64)).astype(np.float32)} for _ in range(8)])


def plan_that_clips(held: Calibrated, method: str) -> Plan:
    """A plan of half of the values' range, said to be solved by `method`."""
    plan = solve(
        held.graph,
        held.histograms,
        preset=get_preset("int8"),
        target=get_emitter("ort").target,
        calibrator=get_calibrator("percentile", percentile=90.0),
    )
    return replace(plan, method=method)


@pytest.mark.parametrize(
    ("method", "others"),
    [
        ("entropy", "mse or percentile"),
        ("mse", "percentile or minmax"),
        ("percentile", "mse or minmax"),
        ("smoothquant+mse", "smoothquant+percentile or smoothquant+minmax"),
        ("awq+gptq+entropy+bias", "awq+gptq+bias+mse or awq+gptq+bias+percentile"),
        ("a-plug-in", "mse or percentile"),
    ],
)
def test_a_method_that_clips_is_told_of_two_others(
    heavy_tailed: Calibrated, method: str, others: str
) -> None:
    (line,) = clipping_warnings(plan_that_clips(heavy_tailed, method), heavy_tailed.histograms)
    assert line.startswith(f"{method} clips 1 tensor by more")
    assert f"compare with --method {others}:" in line


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_method_that_keeps_what_counts_is_not_warned_of(heavy_tailed: Calibrated, method: str) -> None:
    assert not clipping_warnings(heavy_tailed.plan(method=method), heavy_tailed.histograms)

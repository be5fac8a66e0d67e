"""What a GPU's calibration is checked with, on the emulator."""

import importlib.util
from types import ModuleType

import numpy as np
import pytest

from quantkit.kernels import statistics as reducing
from quantkit.observing import devices
from quantkit.runtime import CPU, Provider
from tests.bench.fakes import FakeClock
from tests.conftest import ROOT
from tests.observing.test_devices import Lent, cupy  # noqa: F401 - a fixture


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, cupy: Lent) -> ModuleType:  # noqa: F811
    # Scripts in benchmarks/ are no package: they are loaded by their path.
    path = ROOT / "benchmarks" / "statistics_run.py"
    spec = importlib.util.spec_from_file_location("statistics_run", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CUDA", Provider(name=CPU.name, device=CPU.device))
    monkeypatch.setattr(module, "CHECKED", [((1, 1, 403), False), ((3, 6, 70), True)])
    monkeypatch.setattr(module, "SAMPLES", 2)
    monkeypatch.setattr(module, "GRAMS", [(36, 2, 1500)])
    monkeypatch.setattr(module, "SHORT_GRAMS", [(265, 1, 40)])
    return module


def test_all_that_is_checked_is_right_where_the_kernels_are(script):
    assert devices.Gpu.provider == CPU
    found = script.check_statistics()
    assert found["wrong"] == []
    assert found["cases"] > 2 * 3 * len(script.KINDS)


def test_a_wrong_count_is_told(script, monkeypatch, capsys):
    right = reducing.counts_of

    def wrong(out, *rest, **options):
        out = out.copy()
        out[0] += 1  # NaN
        return right(out, *rest, **options)

    monkeypatch.setattr(reducing, "counts_of", wrong)
    for other in ("grams_agree", "fetched_exactly", "calibrated_alike"):
        monkeypatch.setattr(script, other, lambda: iter(()))
    monkeypatch.setattr(script, "CHECKED", script.CHECKED[:1])
    found = script.check_statistics()
    assert len(found["wrong"]) == found["cases"] == 3 * len(script.KINDS)
    assert "WRONG (1, 1, 403) float32 normal: " in capsys.readouterr().out


def test_a_share_of_a_copy_counts_what_the_copy_reads_and_writes(script, monkeypatch, capsys):
    clock = FakeClock()
    monkeypatch.setattr(script, "TIMED", [("little", (2, 3, 64), True)])
    script.gpu.cupy().copyto = lambda to, source: setattr(clock, "now", clock.now + 10.0)
    start = script.start_reduction

    def timed(*arguments, **options):
        clock.now += 5.0
        return start(*arguments, **options)

    monkeypatch.setattr(script, "start_reduction", timed)
    rows = script.time_statistics(3, 0.0, clock)
    assert [row["dtype"] for row in rows] == list(script.TYPES)
    for row in rows:
        assert (row["us"], row["copy_us"]) == (5.0, 10.0)
        # A copy of twice the time moves twice the bytes.
        np.testing.assert_allclose(row["share_of_copy"], 1.0)
        assert row["gb_per_s"] == pytest.approx(384 * (4 if row["dtype"] == "float32" else 2) / 5e3)
    assert "100%" in capsys.readouterr().out


def test_gram_matrices_are_timed_beside_products_of_cublas(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "GRAM_SIZES", (264,))
    monkeypatch.setattr(script, "GRAM_VECTORS", 40)
    (row,) = script.time_grams(1, 0.0, FakeClock())
    assert row["us"].keys() == {"gram", "float64", "float32"}
    assert "refused" not in capsys.readouterr().out

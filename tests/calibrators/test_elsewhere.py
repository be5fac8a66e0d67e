"""Searches that are given another array module than NumPy work with it alone, and find the same."""

import numpy as np
import pytest

from quantkit.calibrators.awq import awq_scale
from quantkit.calibrators.gptq import gptq
from quantkit.calibrators.layer import Layer
from quantkit.calibrators.scale_search import search_scales
from quantkit.calibrators.weight_layout import WeightLayout
from quantkit.calibrators.weight_rounding import round_weight
from quantkit.formats import FP4_E2M1, INT4, INT8, UINT4, QuantSpec
from tests.calibrators.array_module import Module
from tests.calibrators.layers import correlated, gram_of, weights

SPECS = {
    "int4 g8": QuantSpec(format=INT4, axis=0, block_size=8),
    "int4 per channel": QuantSpec(format=INT4, axis=1),
    "uint4 g8": QuantSpec(format=UINT4, axis=0, block_size=8, symmetric=False),
    "fp4 g8": QuantSpec(format=FP4_E2M1, axis=0, block_size=8),
    "int8": QuantSpec(format=INT8),
}


def layer(spec: QuantSpec) -> Layer:
    w = weights(24, 12)
    return Layer(
        w=w, layout=WeightLayout(out_axis=1), spec=spec, gram=gram_of(correlated(200, 24, outliers=2))
    )


def test_arrays_from_elsewhere_do_not_mix_with_numpys() -> None:
    there = Module().asarray(np.ones(3))
    for mix in (lambda: there + np.ones(3), lambda: np.asarray(there), lambda: np.ones(3) @ there):
        with pytest.raises(TypeError, match="elsewhere"):
            mix()
    assert float((there * 2).sum()) == 6


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gptq_finds_the_same_elsewhere(spec: QuantSpec) -> None:
    made = layer(spec)
    assert made.gram is not None
    here = gptq(made.w, made.gram, spec, made.layout)
    there = gptq(made.w, made.gram, spec, made.layout, xp=Module())  # type: ignore[arg-type]
    np.testing.assert_array_equal(here.qvalue, there.qvalue)
    np.testing.assert_array_equal(here.qparams.scale, there.qparams.scale)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_search_of_scales_finds_the_same_elsewhere(spec: QuantSpec) -> None:
    made = layer(spec)
    assert made.gram is not None
    here = search_scales(made.w, made.gram, spec, made.layout)
    there = search_scales(made.w, made.gram, spec, made.layout, xp=Module())  # type: ignore[arg-type]
    np.testing.assert_array_equal(here.scale, there.scale)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_awq_finds_the_same_elsewhere(spec: QuantSpec) -> None:
    made = layer(spec)
    here = awq_scale([made, made], 24)
    there = awq_scale([made, made], 24, xp=Module())  # type: ignore[arg-type]
    np.testing.assert_array_equal(here.scale, there.scale)
    assert (here.ratio, here.balance, here.error) == (there.ratio, there.balance, there.error)


@pytest.mark.parametrize("rounding", ["amax", "mse", "weighted", "output", "gptq"])
def test_a_weight_is_rounded_the_same_elsewhere(rounding: str) -> None:
    made = layer(SPECS["int4 g8"])
    here = round_weight(made, rounding, correct_bias=True)  # type: ignore[arg-type]
    there = round_weight(made, rounding, correct_bias=True, xp=Module())  # type: ignore[arg-type]
    np.testing.assert_array_equal(here.qtensor.qvalue, there.qtensor.qvalue)
    assert here.output_error == there.output_error

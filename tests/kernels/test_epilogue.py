"""epilogue.h, value by value: quotients that round as divisions do, activations within their bounds."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from quantkit.errors import KernelError
from quantkit.kernels.compile import INCLUDE
from quantkit.kernels.emulator import Mode, load
from quantkit.kernels.epilogue import EpilogueKind, EpilogueValues
from quantkit.kernels.reference import activation_reference, output_reference

SOURCE = Path(__file__).with_name("epilogue_values.cu")
DTYPES = {
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float32": np.dtype(np.float32),
}
SCALES = [2.0**-100, 1e-12, 0.0078125, 0.013, 1 / 3, 1.0, 1.9999999, 97.0, 3.4e7, 2.0**100]


def finish(launch, x: np.ndarray, kind: EpilogueKind, values: EpilogueValues, output: str) -> np.ndarray:
    d = np.zeros(x.size, DTYPES[output])
    unused = np.zeros(4, np.float32)
    launch(
        np.ascontiguousarray(x, np.float32),
        d,
        *(unused,) * 6,
        values.packed(),
        np.int32(1),
        np.int32(x.size),
        defines=kind.defines(output),
        grid=1,
        block=128,
    )
    return d


def on(machine):
    return lambda *arguments, **options: machine.launch(SOURCE, "epilogue_values", *arguments, **options)


def near_ties(scale: float, halves: np.ndarray) -> np.ndarray:
    """Floats whose quotient by `scale` lies at a tie of the output, and their neighbours, of both signs."""
    with np.errstate(over="ignore"):
        at = (halves * np.float64(np.float32(scale))).astype(np.float32)
    around = [at]
    for _ in range(3):
        around = [
            np.nextafter(around[0], np.float32(-np.inf)),
            *around,
            np.nextafter(around[-1], np.float32(np.inf)),
        ]
    together = np.concatenate(around)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, 1e-45, 1e-38], np.float32)
    return np.concatenate([together, -together, special])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("zero_point", [0, -128, 37])
def test_int8_codes_are_those_of_a_division(machine, scale, zero_point):
    x = near_ties(scale, np.arange(0, 300) + 0.5)
    kind = EpilogueKind(output_zero_point=zero_point != 0)
    values = EpilogueValues(scale=scale, zero_point=zero_point)
    want = output_reference(x, "int8", values)
    np.testing.assert_array_equal(finish(on(machine), x, kind, values, "int8"), want)


@pytest.mark.parametrize("scale", SCALES)
def test_e4m3_codes_are_those_of_a_division(machine, scale):
    grid = np.unique(np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64))
    grid = grid[np.isfinite(grid) & (grid >= 0)]
    x = near_ties(scale, (grid[1:] + grid[:-1]) / 2)
    values = EpilogueValues(scale=scale)
    want = output_reference(x, "float8_e4m3fn", values)
    got = finish(on(machine), x, EpilogueKind(), values, "float8_e4m3fn")
    np.testing.assert_array_equal(got.view(np.uint8) & 0x7F, want.view(np.uint8) & 0x7F)
    finite = ~np.isnan(x)
    np.testing.assert_array_equal(got.view(np.uint8)[finite], want.view(np.uint8)[finite])


@pytest.mark.parametrize("scale", SCALES)
def test_a_negative_zero_keeps_its_sign(machine, scale):
    x = np.array([0.0, -0.0, -1e-45, -1e-38], np.float32)
    got = finish(on(machine), x, EpilogueKind(), EpilogueValues(scale=scale), "float8_e4m3fn")
    assert np.signbit(got.astype(np.float32)).tolist() == [False, True, True, True]


def test_a_product_with_the_reciprocal_alone_would_not_do(compiler, tmp_path):
    """The ties above tell a division from what it is made of."""
    header = (INCLUDE / "epilogue.h").read_text()
    before = "return q < 4096.0f && q > -4096.0f ? better : q;"
    assert before in header
    (tmp_path / "epilogue.h").write_text(header.replace(before, "return q;"))
    source = tmp_path / SOURCE.name
    source.write_text(SOURCE.read_text())

    def launch(*arguments, defines, **options):
        load(source, "epilogue_values", defines, include=tmp_path).launch(*arguments, **options)

    wrong = 0
    for scale in SCALES:
        x, values = near_ties(scale, np.arange(0, 300) + 0.5), EpilogueValues(scale=scale)
        wrong += np.sum(
            finish(launch, x, EpilogueKind(), values, "int8") != output_reference(x, "int8", values)
        )
    assert wrong > 0


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_smooth_activations_lie_within_their_bound(machine, activation):
    rng = np.random.default_rng(2)
    x = np.concatenate(
        [np.linspace(-90, 90, 20001), rng.standard_normal(20000), [0.0, -0.0, 1e-30, -1e30, 1e30]]
    )
    x = x.astype(np.float32)
    got = finish(on(machine), x, EpilogueKind(activation=activation), EpilogueValues(), "float32")
    want = activation_reference(x, activation, EpilogueValues()).astype(np.float64)
    assert np.all(np.abs(got - want) <= np.abs(want) * 2.0**-15 + 2.0**-120)


def test_clip_and_relu_keep_nan_and_limits(machine):
    x = np.array([-2, -1, -0.0, 0.5, 1, 3, np.nan, np.inf, -np.inf], np.float32)
    values = EpilogueValues(low=-1, high=1)
    for activation in ("clip", "relu"):
        got = finish(on(machine), x, EpilogueKind(activation=activation), values, "float32")
        np.testing.assert_array_equal(got, activation_reference(x, activation, values))
    assert np.isnan(got[6])


def test_a_scale_without_a_normal_reciprocal_is_refused():
    for scale in (0.0, -1.0, 2.0**-101, 2.0**101, float("nan")):
        with pytest.raises(KernelError, match="output scale"):
            EpilogueValues(scale=scale)


def test_the_emulator_runs_what_the_table_of_kinds_can_say(compiler):
    """Every macro of every kind is one the header knows: an unknown name would not compile."""
    x = np.linspace(-3, 3, 64).astype(np.float32)
    for activation in ("none", "relu", "clip", "gelu", "gelu_tanh", "silu"):
        kernel = load(SOURCE, "epilogue_values", EpilogueKind(activation=activation).defines("float32"))
        d = np.zeros(64, np.float32)
        unused = np.zeros(4, np.float32)
        kernel.launch(
            x, d, *(unused,) * 6, EpilogueValues(high=1).packed(), np.int32(1), np.int32(64),
            grid=1, block=128, mode=Mode.LAZY,
        )  # fmt: skip
        assert d.any()

"""quantize.cu against quantkit.formats, bit for bit, in every mode of the emulator and on a GPU where there is one."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from quantkit.errors import KernelError
from quantkit.formats import (
    FP8_E4M3,
    FP8_E5M2,
    INT4,
    INT8,
    UINT8,
    QParams,
    QuantSpec,
    dynamic_qparams,
    quantize,
)
from quantkit.formats.presets import ACTIVATION_SPECS
from quantkit.kernels.emulator import Mode, find_compiler
from quantkit.kernels.quantize_launch import QuantizeKind, check_spec, launch_of, row_threads
from quantkit.kernels.quantize_reference import NormReference, quantize_reference, row_means

from .backends import EmulatorBackend, gpu
from .pairs import pairwise
from .quantizes import X_TYPES, assert_equal, run_quantize

STATIC = {
    "int8": (QuantSpec(format=INT8), QParams(np.float32(0.023), np.int8(0))),
    "int8 zero point": (
        QuantSpec(format=INT8, symmetric=False),
        QParams(np.float32(0.023), np.int8(-77)),
    ),
    "uint8": (QuantSpec(format=UINT8, symmetric=False), QParams(np.float32(0.017), np.uint8(3))),
    "fp8": (QuantSpec(format=FP8_E4M3), QParams(np.float32(0.0071))),
}
SPECS: dict[str, tuple[QuantSpec, QParams | None]] = STATIC | {
    "int8 token": (QuantSpec(format=INT8, dynamic="token"), None),
    "uint8 token": (QuantSpec(format=UINT8, dynamic="token"), None),
    "fp8 token": (QuantSpec(format=FP8_E4M3, dynamic="token"), None),
    "fp8 blocks": (ACTIVATION_SPECS["fp8-block"], None),
    "int8 blocks": (QuantSpec(format=INT8, axis=-1, block_size=32, dynamic="block"), None),
    "mxfp8": (ACTIVATION_SPECS["mxfp8"], None),
    "mxfp4": (ACTIVATION_SPECS["mxfp4"], None),
    "nvfp4": (ACTIVATION_SPECS["nvfp4"], None),
}
BEFORE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "multiplier": {"multiply": True},
    "rms": {"norm": "rms", "norm_weight": True},
    "bare rms": {"norm": "rms"},
    "layer": {"norm": "layer", "norm_weight": True, "norm_bias": True},
    "layer, multiplier": {"norm": "layer", "norm_weight": True, "multiply": True},
}
FACTORS: dict[str, list[Any]] = {
    "spec": list(SPECS),
    "columns": [1, 130, 264, 2880, 8200],
    "before": list(BEFORE),
    "rows": [1, 3, 17],
    "x_type": list(X_TYPES),
    "mode": list(Mode),
}


def legal(row: dict[str, Any]) -> bool:
    return row.get("rows", 1) * row.get("columns", 1) < 50000


ROWS = [tuple(row.values()) for row in ({f: row[f] for f in FACTORS} for row in pairwise(FACTORS, legal))]


def values(rows: int, columns: int, x_type: str, seed: int = 0) -> np.ndarray:
    """Rows of sizes that differ, one of zeros, a few outliers."""
    rng = np.random.default_rng([rows, columns, seed])
    x = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-6, 3, (rows, 1)))
    x[rng.random(x.shape) < 0.002] *= 50
    if rows > 2:
        x[1] = 0
    return x.astype(X_TYPES[x_type])


def run_row(machine, name: str, columns: int, before: str, rows: int, x_type: str) -> None:
    spec, qparams = SPECS[name]
    chosen = BEFORE[before]
    kind = QuantizeKind(x_type=x_type, spec=spec, zero_point=name in ("int8 zero point", "uint8"), **chosen)
    rng = np.random.default_rng(columns)
    weight, bias, multiplier = (rng.standard_normal(columns).astype(np.float32) for _ in range(3))
    norm = None
    if "norm" in chosen:
        norm = NormReference(
            kind=chosen["norm"],
            weight=weight if kind.norm_weight else None,
            bias=bias if kind.norm_bias else None,
        )
    assert_equal(
        machine,
        values(rows, columns, x_type),
        kind,
        qparams,
        global_scale=np.float32(0.0031) if spec.has_global_scale else None,
        norm=norm,
        multiplier=multiplier if kind.multiply else None,
    )


@pytest.mark.parametrize(
    ("spec", "columns", "before", "rows", "x_type", "where"),
    [(*row[:-1], EmulatorBackend(row[-1])) for row in ROWS] + [(*row[:-1], gpu()) for row in ROWS if gpu()],
    ids=lambda value: None if isinstance(value, str | int) else getattr(value, "mode", "gpu"),
)
def test_codes_and_scales_are_those_of_numpy(compiler, spec, columns, before, rows, x_type, where):
    run_row(where, spec, columns, before, rows, x_type)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row[:-1] for row in ROWS], ids=str)
def test_codes_and_scales_are_those_of_numpy_in_every_mode(machine, row):
    run_row(machine, *row)


# ---- every value -------------------------------------------------------------------------------------------


def every(x_type: str) -> np.ndarray:
    """All finite values of a 16-bit type, in rows of 256."""
    x = np.arange(1 << 16, dtype=np.uint16).view(X_TYPES[x_type])
    x = x[np.isfinite(x.astype(np.float32))]
    return x[: len(x) // 256 * 256].reshape(-1, 256)


@pytest.mark.parametrize("x_type", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", STATIC)
def test_every_sixteen_bit_value_is_quantized_as_numpy_does(compiler, name, x_type):
    """Among them infinitely large quotients and subnormal ones."""
    spec, qparams = STATIC[name]
    kind = QuantizeKind(x_type=x_type, spec=spec, zero_point=name in ("int8 zero point", "uint8"))
    assert_equal(EmulatorBackend(Mode.EAGER), every(x_type), kind, qparams)


@pytest.mark.parametrize("scale", [2.0**-126, 3e-38, 1.7e38, 2.0**127, 1.0, 0.1])
def test_scales_at_the_ends_of_float32_divide_exactly(compiler, scale):
    qparams = QParams(np.float32(scale))
    kind = QuantizeKind(x_type="bfloat16", spec=QuantSpec(format=FP8_E4M3))
    assert_equal(EmulatorBackend(Mode.EAGER), every("bfloat16"), kind, qparams)


@pytest.mark.skipif(find_compiler() is None, reason="the emulator needs a C++ compiler")
@settings(max_examples=60, deadline=None)
@given(
    x=npst.arrays(np.float32, (2, 64), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    name=st.sampled_from(["int8 token", "fp8 token", "int8 blocks", "mxfp8", "mxfp4"]),
)
def test_any_finite_values_get_numpys_scales_and_codes(x, name):
    kind = QuantizeKind(x_type="float32", spec=SPECS[name][0])
    assert_equal(EmulatorBackend(Mode.EAGER), x, kind)


def test_quotients_next_to_the_middle_of_two_codes_are_rounded_as_a_division_rounds_them(compiler):
    """x within two ulp of (code + ½) · scale, where an estimate of the quotient would fall on the other side."""
    rng = np.random.default_rng(3)
    scale = np.float32(0.0123)
    middles = (rng.integers(-127, 127, (20, 512)) + 0.5).astype(np.float32) * scale
    nudged = (middles.view(np.int32) + rng.integers(-2, 3, middles.shape)).astype(np.int32).view(np.float32)
    kind = QuantizeKind(x_type="float32", spec=QuantSpec(format=INT8))
    assert_equal(EmulatorBackend(Mode.EAGER), nudged, kind, QParams(scale, np.int8(0)))


def test_nvfp4_scales_next_to_the_middle_of_two_codes_are_rounded_twice_as_numpy_does(compiler):
    """amax within two ulp of (middle of two e4m3 codes) · 6 · global: there the kernel repeats it in double."""
    every_code = np.arange(0x7E, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    middles = (every_code[:-1] + every_code[1:]) / 2
    global_scale = np.float32(0.0037)
    amax = (middles * 6 * float(global_scale)).astype(np.float32)
    rows = np.stack([(amax.view(np.int32) + d).astype(np.int32).view(np.float32) for d in range(-2, 3)])
    x = np.zeros((len(rows), amax.size * 16), np.float32)
    x[:, ::16] = rows
    x[:, 5::16] = rows * np.float32(-0.4)
    kind = QuantizeKind(x_type="float32", spec=ACTIVATION_SPECS["nvfp4"])
    assert_equal(EmulatorBackend(Mode.EAGER), x, kind, global_scale=global_scale)


def test_nan_stays_nan_or_becomes_the_middle_code_and_is_no_part_of_a_scale(machine):
    x = np.ones((2, 64), np.float32)
    x[0, 3] = np.nan
    for spec, code in (
        (QuantSpec(format=FP8_E4M3, dynamic="token"), 0x7F),
        (QuantSpec(format=INT8, dynamic="token"), 0),
        (QuantSpec(format=UINT8, dynamic="token"), 128),
    ):
        codes, scales = run_quantize(machine, x, QuantizeKind(x_type="float32", spec=spec))
        assert codes[0, 3] & 0x7F == code & 0x7F
        np.testing.assert_array_equal(scales[0], scales[1])
        assert np.all(np.delete(codes[0], 3) == codes[1, 0])


@pytest.mark.parametrize("name", ["int8 token", "fp8 blocks", "nvfp4"])
def test_single_elements_and_whole_vectors_are_read_alike(compiler, name):
    """Where rows do not start at multiples of 16 bytes, elements are read one by one."""
    spec, _ = SPECS[name]
    kind = QuantizeKind(x_type="bfloat16", spec=spec)
    options = {"global_scale": np.float32(0.01)} if spec.has_global_scale else {}
    x, machine = values(5, 272, "bfloat16"), EmulatorBackend(Mode.EAGER)
    whole, single = (run_quantize(machine, x, kind, vector=vector, **options) for vector in (True, False))
    for one, other in zip(whole, single, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("columns", "before"), [(40000, "nothing"), (17000, "layer")])
def test_rows_too_long_for_the_registers_are_read_again(compiler, columns, before):
    kind = QuantizeKind(x_type="bfloat16", spec=SPECS["int8 token"][0], **BEFORE[before])
    assert launch_of(kind, 1, columns, vector=True).defines["RESIDENT"] == 0
    run_row(EmulatorBackend(Mode.BOTH), "int8 token", columns, before, 1, "bfloat16")


# ---- the oracle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 7, 64, 1000, 9001])
@pytest.mark.parametrize("threads", [8, 32, 256])
def test_the_sums_of_the_oracle_are_sums(columns, threads):
    x = np.random.default_rng(columns).standard_normal((3, columns)).astype(np.float32)
    want = x.astype(np.float64).mean(1, keepdims=True)
    bound = np.abs(x).mean(1, keepdims=True) * 2.0**-20
    assert np.all(np.abs(row_means(x, threads) - want) <= bound)


def test_the_norms_of_the_oracle_are_those_of_the_textbook():
    x = values(4, 768, "float32")
    weight, bias = (np.random.default_rng(i).standard_normal(768).astype(np.float32) for i in (0, 1))
    wide = x.astype(np.float64)
    rms = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight
    centred = wide - wide.mean(1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * weight + bias
    spec = QuantSpec(format=INT8, dynamic="token")
    for kind, true, shift in (("rms", rms, None), ("layer", layer, bias)):
        norm = NormReference(kind=kind, weight=weight, bias=shift)  # type: ignore[arg-type]
        found = quantize_reference(x, spec, norm=norm)
        want = quantize(true, dynamic_qparams(true, spec), spec)
        np.testing.assert_allclose(found.qparams.scale, want.qparams.scale, rtol=1e-5)
        difference = found.qvalue.astype(int) - want.qvalue.astype(int)
        assert np.abs(difference).max() <= 1
        assert np.count_nonzero(difference) <= x.size // 1000


# ---- how it is launched ------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 63, 64, 1000, 2880, 8192, 28672, 10**6])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("before", ["nothing", "layer"])
def test_launches_cover_every_element_and_keep_blocks_in_a_warp(name, columns, before):
    kind = QuantizeKind(x_type="bfloat16", spec=SPECS[name][0], **BEFORE[before])
    launch = launch_of(kind, 1000, columns, vector=columns % 8 == 0)
    d = launch.defines
    threads, rows, chunks = (int(d[macro]) for macro in ("ROW_THREADS", "ROWS", "CHUNKS"))
    assert launch.block == threads * rows <= 1024
    assert launch.block % 32 == 0
    assert launch.grid[0] * rows >= 1000
    assert kind.whole_rows or launch.grid[1] * threads * chunks * 8 >= columns
    assert not d["RESIDENT"] or launch.grid[1] * threads * chunks * 8 >= columns
    assert threads * 8 % int(d["BLOCK"]) == 0
    assert launch.grid[1] <= 65535
    assert row_threads(columns, kind) == launch.row_threads


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (QuantSpec(format=INT4), "no kernel makes int4"),
        (QuantSpec(format=FP8_E5M2), "no kernel makes fp8_e5m2"),
        (QuantSpec(format=INT8, dynamic="tensor"), "cannot see a whole tensor"),
        (QuantSpec(format=INT8, axis=0), "one for the tensor"),
        (QuantSpec(format=UINT8, symmetric=False, dynamic="token"), "no zero point"),
        (QuantSpec(format=INT8, axis=0, block_size=32, dynamic="block"), "use axis −1"),
        (QuantSpec(format=INT8, axis=-1, block_size=48, dynamic="block"), "blocks of 48"),
        (replace(ACTIVATION_SPECS["mxfp8"], scale_rule="ocp"), "rceil"),
        (replace(ACTIVATION_SPECS["nvfp4"], scale_format=None), "needs blocks with scales"),
        (replace(ACTIVATION_SPECS["nvfp4"], scale_format=FP8_E5M2), "float32, e8m0 or fp8_e4m3"),
    ],
    ids=str,
)
def test_what_no_kernel_makes_is_refused(spec, complaint):
    with pytest.raises(KernelError, match=complaint):
        check_spec(spec)

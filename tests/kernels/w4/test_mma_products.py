"""gemm_w4_mma.cu against its oracle, in the modes of the emulator and on a GPU where there is one."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor, dequantize
from quantkit.kernels.emulator import Mode
from quantkit.kernels.w4.layout import pack4
from quantkit.kernels.w4.mma_heuristics import W4MmaTile
from quantkit.kernels.w4.reference import decoded4, w4_reference

from ..backends import EmulatorBackend, gpu
from ..layouts import small_integers
from ..pairs import pairwise
from .mma import run_w4_mma
from .test_products import DECODINGS, every_code
from .weights import (
    DTYPES,
    assert_no_schedule_changes_the_sums,
    assert_only_the_accumulator_loses,
    weight,
)

# Each arrangement of warps, length of a stage and way to share K, as small as they come.
TILES = {
    "few": W4MmaTile(tile_w=64, tile_a=8, warps_w=4, slabs=4, stages=3),
    "few of three": W4MmaTile(tile_w=64, tile_a=8, warps_w=4, slabs=2, stages=2, slices=3),
    "two groups": W4MmaTile(tile_w=128, tile_a=16, warps_w=4, slabs=2, stages=4, order=1),
    "side by side": W4MmaTile(tile_w=64, tile_a=32, warps_w=2, warps_a=2, slabs=1, stages=3, slices=2),
    "wide": W4MmaTile(tile_w=128, tile_a=64, warps_w=4, slabs=1, stages=3, order=2),
    "widest": W4MmaTile(tile_w=128, tile_a=128, warps_w=4, slabs=1, stages=3),
}
FACTORS: Mapping[str, list[Any]] = {
    "tile": list(TILES),
    "kind": [
        ("int4", 32), ("int4", 128), ("int4", None), ("uint4", 32), ("uint4", 64), ("nvfp4", 16), ("mxfp4", 32),
    ],
    "shape": [(1, 8, 128), (3, 130, 200), (17, 1, 2880), (64, 136, 300), (130, 72, 96)],
    "zeros": [False, True],
    "scale_type": ["bfloat16", "float16", "float32"],
    "activations": ["bfloat16", "float16"],
    "output": ["bfloat16", "float32", "int8"],
    "epilogue": ["bare", "row scale", "bias and relu"],
    "mode": list(Mode),
}  # fmt: skip


def legal(row: Mapping[str, Any]) -> bool:
    """Zero points belong to integers."""
    return not (row.get("zeros") and row.get("kind", ("int4", 32))[0] in ("nvfp4", "mxfp4"))


def operands(row: Mapping[str, Any]):
    """Activations, weight, packed, and the epilogue's arguments, of numbers whose products and sums are exact."""
    m, n, k = row["shape"]
    rng = np.random.default_rng(m + n + k)
    form, group = row["kind"]
    w = weight(rng, n, k, form, group, zeros=row["zeros"], scale_type=row["scale_type"])
    scale_type = row["scale_type"] if form in ("int4", "uint4") and group is not None else None
    a = small_integers(rng, (m, k), "BF16").astype(DTYPES[row["activations"]])
    options: dict[str, Any] = {"output": row["output"]}
    if row["epilogue"] != "bare":
        options["row_scale"] = (rng.integers(1, 4, m) / 8).astype(np.float32)
    if row["epilogue"] == "bias and relu":
        options |= {"bias": rng.standard_normal(n).astype(np.float32), "activation": "relu"}
    return a, w, pack4(w, scale_type=scale_type if group is None or group < k else None), options


CASES = [(row, EmulatorBackend(row["mode"])) for row in pairwise(FACTORS, legal)]


def check(machine: Any, row: Mapping[str, Any]) -> None:
    a, w, packed, options = operands(row)
    want = w4_reference(a, packed, **options)
    if row["epilogue"] == "bare" and row["output"] == "float32":  # what the format says
        np.testing.assert_array_equal(want, a.astype(np.float64) @ dequantize(w).astype(np.float64).T)
    found = run_w4_mma(machine, a, packed, TILES[row["tile"]], gap=32 if len(a) % 2 else 0, **options)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    ("row", "where"),
    [*CASES, *((row, gpu()) for row, _ in CASES if gpu())],
    ids=lambda value: "-".join(str(v) for v in value.values()) if isinstance(value, dict) else "",
)
def test_every_pair_of_format_shape_types_tile_epilogue_and_mode_is_exact(compiler, row, where):
    check(where, row)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row, _ in CASES], ids=lambda row: "-".join(str(v) for v in row.values())
)
def test_every_case_is_exact_in_every_mode(machine, row):
    check(machine, row)


@pytest.mark.parametrize(
    ("shape", "kind", "zeros", "tile"),
    [
        ((3, 130, 600), ("int4", 128), False, "few"),
        ((17, 72, 400), ("uint4", 32), True, "two groups"),
        ((40, 8, 900), ("int4", None), False, "side by side"),
    ],
    ids=str,
)
def test_products_with_int8_are_exact(machine, shape, kind, zeros, tile):
    m, n, k = shape
    rng = np.random.default_rng(m + n + k)
    packed = pack4(weight(rng, n, k, *kind, zeros=zeros, middling=True), activation_bits=8)
    a = rng.integers(-128, 128, (m, k)).astype(np.int8)
    options: dict[str, Any] = {
        "output": "float32", "row_scale": np.float32(rng.random(m) + 0.5), "bias": np.float32(rng.random(n)),
    }  # fmt: skip
    found = run_w4_mma(machine, a, packed, TILES[tile], **options)
    np.testing.assert_array_equal(found, w4_reference(a, packed, **options))


@pytest.mark.parametrize(("tile", "deep"), [("few", True), ("side by side", False)])
def test_products_of_mxfp4_with_e4m3_are_exact(machine, tile, deep):
    """Weights at both ends of what e4m3 holds, in slabs of their own: sums fit the tensor core's bits."""
    rng = np.random.default_rng(9)
    w = weight(rng, 130, 700, "mxfp4", 32)
    scale = np.ldexp(np.float32(1), rng.integers(-1, 2, w.qparams.scale.shape))
    if deep:
        scale = np.where(np.arange(scale.shape[1]) // 4 % 2 == 1, scale * np.float32(2.0**-11), scale)
    w = QTensor(w.qvalue, QParams(scale.astype(np.float32)), w.spec)
    packed = pack4(w, activation_bits=8)
    assert packed.layout.deep == deep
    a = rng.integers(-2, 3, (20, 700)).astype(DTYPES["e4m3"])
    want = a.astype(np.float64) @ dequantize(w).astype(np.float64).T
    np.testing.assert_array_equal(run_w4_mma(machine, a, packed, TILES[tile]), want.astype(np.float32))


# ---- decoding and real values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "scale_type", "activations"), DECODINGS)
def test_every_code_is_decoded_as_the_oracle_says(compiler, form, scale_type, activations):
    """An identity for activations: D is the weight itself, under every scale that the type can tell apart."""
    w = every_code(form, scale_type, activations)
    packed = pack4(w, scale_type=scale_type or None)
    a = np.eye(w.qvalue.shape[1]).astype(DTYPES[activations])
    d = run_w4_mma(EmulatorBackend(Mode.EAGER), a, packed, TILES["two groups"])
    values = decoded4(packed, activations) * packed.channel_scale.astype(np.float64)[:, None]
    np.testing.assert_array_equal(d.T, values.astype(np.float32))
    if form in ("nvfp4", "mxfp4"):
        np.testing.assert_array_equal(d.T, dequantize(w))


@pytest.mark.parametrize("tile", ["few of three", "wide"])
@pytest.mark.parametrize("form", ["int4", "nvfp4"])
def test_real_values_stay_within_what_the_accumulator_loses(compiler, form, tile):
    """Slices are rounded once more."""
    assert_only_the_accumulator_loses(
        lambda machine, a, packed: run_w4_mma(machine, a, packed, TILES[tile]),
        EmulatorBackend(Mode.EAGER),
        form,
        768,
    )


def test_which_slice_comes_last_does_not_change_the_sums(compiler):
    assert_no_schedule_changes_the_sums(
        lambda machine, a, packed: run_w4_mma(machine, a, packed, TILES["few of three"]), 100
    )


def test_more_slices_than_steps_leave_some_without_work(compiler):
    rng = np.random.default_rng(0)
    packed = pack4(weight(rng, 20, 64, "int4", 32))
    a = small_integers(rng, (3, 64), "BF16")
    found = run_w4_mma(EmulatorBackend(Mode.SHUFFLED), a, packed, TILES["few of three"])
    np.testing.assert_array_equal(found, w4_reference(a, packed, output="float32"))

"""gemm_blocks_sm120.cu against its oracle, in the modes of the emulator and on a GPU of that kind if there is one."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor, dequantize
from quantkit.kernels.emulator import Mode
from quantkit.kernels.mx.heuristics import MxTile
from quantkit.kernels.mx.layout import pack_mx, row_scales
from quantkit.kernels.mx.reference import mx_reference, values_mx

from ..backends import EmulatorBackend, gpu
from ..pairs import pairwise
from .runs import SPECS, run_mx, tensor

# Each arrangement of warps and of registers of scales, as small as they come, and ways to share K.
TILES = {
    "few": MxTile(tile_m=16, tile_n=64, warps_m=1, warps_n=4, stages=3),
    "few of three": MxTile(tile_m=16, tile_n=128, warps_m=1, warps_n=4, stages=2, slices=3),
    "two rows": MxTile(tile_m=32, tile_n=64, warps_m=1, warps_n=4, stages=4, order=1),
    "square": MxTile(tile_m=64, tile_n=64, warps_m=2, warps_n=2, stages=2, slices=2, order=2),
    "wide": MxTile(tile_m=64, tile_n=128, warps_m=2, warps_n=2, stages=2),
    "eight warps": MxTile(tile_m=128, tile_n=128, warps_m=2, warps_n=4, stages=2),
}
FACTORS: Mapping[str, list[Any]] = {
    "tile": list(TILES),
    "form": list(SPECS),
    "shape": [(1, 8, 128), (3, 130, 700), (17, 1, 1001), (70, 136, 32), (130, 36, 1), (40, 200, 2880)],
    "output": ["bfloat16", "float16", "float32", "int8"],
    "epilogue": ["bare", "bias and relu"],
    "mode": list(Mode),
}
CASES = [(row, EmulatorBackend(row["mode"])) for row in pairwise(FACTORS)]


def blackwell() -> Any:
    """GPU 0 if it is of the kind."""
    found = gpu()
    return found if found is not None and found.arch == (12, 0) else None


def check(machine: Any, row: Mapping[str, Any]) -> None:
    m, n, k = row["shape"]
    rng = np.random.default_rng(m + n + k)
    of_a, of_w = tensor(rng, m, k, row["form"]), tensor(rng, n, k, row["form"])
    a, w = pack_mx(of_a), pack_mx(of_w)
    options: dict[str, Any] = {"output": row["output"]}
    if row["epilogue"] != "bare":
        options |= {"bias": rng.standard_normal(n).astype(np.float32), "activation": "relu"}
    want = mx_reference(a, w, **options)
    if row["epilogue"] == "bare" and row["output"] == "float32":  # what the format says
        plain = dequantize(of_a).astype(np.float64) @ dequantize(of_w).astype(np.float64).T
        np.testing.assert_array_equal(want, plain)
    np.testing.assert_array_equal(run_mx(machine, a, w, TILES[row["tile"]], gap=32, **options), want)


@pytest.mark.parametrize(
    ("row", "where"),
    [*CASES, *((row, blackwell()) for row, _ in CASES if blackwell())],
    ids=lambda value: "-".join(str(v) for v in value.values()) if isinstance(value, dict) else "",
)
def test_every_pair_of_format_shape_output_tile_epilogue_and_mode_is_exact(compiler, row, where):
    check(where, row)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row, _ in CASES], ids=lambda row: "-".join(str(v) for v in row.values())
)
@pytest.mark.parametrize("mode", list(Mode))
def test_every_case_is_exact_in_every_mode(compiler, row, mode):
    check(EmulatorBackend(mode), row)


@pytest.mark.parametrize("form", SPECS)
def test_every_code_under_every_scale_is_multiplied_as_its_value(compiler, form):
    """Weights hold every code, under every scale that float32's range leaves; activations are ones in one block."""
    spec = SPECS[form]
    block = spec.block_size
    if form == "nvfp4":
        scale = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    else:
        scale = np.ldexp(1.0, np.arange(-120, 110)).astype(np.float32)
    codes = np.arange(256 if form == "mxfp8" else 16, dtype=np.uint8)
    codes = codes[codes % 128 != 127] if form == "mxfp8" else codes
    # A row for each scale; codes of one column at a time meet a one.
    bits = np.resize(codes, (len(scale), -(-len(codes) // block) * block))
    values = bits.view(spec.format.dtype) if form == "mxfp8" else bits.view(ml_dtypes.float4_e2m1fn)
    blocks = bits.shape[1] // block
    held = None if form != "nvfp4" else np.float32(1)
    w = QTensor(values, QParams(np.repeat(scale[:, None], blocks, axis=1), None, held), spec)
    one = np.eye(bits.shape[1]).astype(values.dtype)
    a = QTensor(one, QParams(np.ones((len(one), blocks), np.float32), None, held), spec)
    d = run_mx(EmulatorBackend(Mode.EAGER), pack_mx(a), pack_mx(w), TILES["wide"])
    np.testing.assert_array_equal(d.T, dequantize(w))


@pytest.mark.parametrize("form", SPECS)
def test_a_scale_that_is_nan_makes_its_row_nan_and_no_other(compiler, form):
    rng = np.random.default_rng(3)
    a, w = pack_mx(tensor(rng, 20, 100, form)), pack_mx(tensor(rng, 40, 100, form))
    a.scales[7, 1] = 0x7F if form == "nvfp4" else 0xFF
    d = run_mx(EmulatorBackend(Mode.EAGER), a, w, TILES["few"])
    rows = np.arange(20) == 7
    assert np.isnan(d[rows]).all() and np.isfinite(d[~rows]).all()


@pytest.mark.parametrize("tile", ["few of three", "wide"])
@pytest.mark.parametrize("form", SPECS)
def test_real_values_stay_within_what_the_accumulator_loses(compiler, form, tile):
    """An instruction adds its products with at least 21 bits of the largest; slices are rounded once more."""
    rng = np.random.default_rng(5)
    a, w = (pack_mx(tensor(rng, rows, 1100, form, simple=False)) for rows in (14, 70))
    d = run_mx(EmulatorBackend(Mode.EAGER), a, w, TILES[tile])
    wide = [values_mx(part) * float(part.global_scale or 1) for part in (a, w)]
    instructions = 1100 / (32 if form == "mxfp8" else 64) + 3
    bound = instructions * 2.0**-21 * (np.abs(wide[0]) @ np.abs(wide[1]).T)
    assert np.all(np.abs(d - wide[0] @ wide[1].T) <= bound)


def test_more_slices_than_steps_leave_some_without_work(compiler):
    rng = np.random.default_rng(0)
    a, w = pack_mx(tensor(rng, 3, 40, "mxfp4")), pack_mx(tensor(rng, 20, 40, "mxfp4"))
    found = run_mx(EmulatorBackend(Mode.SHUFFLED), a, w, TILES["few of three"])
    np.testing.assert_array_equal(found, mx_reference(a, w, output="float32"))


def test_scales_of_a_row_are_a_byte_for_each_block():
    assert [row_scales(form, 33) for form in SPECS] == [2, 2, 3]

"""The kernels for four-bit weights against their oracle, in every mode of the emulator and on a GPU if there is one."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from quantkit.formats.format import FP4_E2M1, INT4, UINT4
from quantkit.formats.packing import codes_from_bits
from quantkit.formats.qparams import QParams
from quantkit.formats.quantize import QTensor, dequantize
from quantkit.formats.spec import QuantSpec
from quantkit.kernels.compile import compile_kernel, is_available
from quantkit.kernels.emulator import Mode
from quantkit.kernels.epilogue import EpilogueKind
from quantkit.kernels.heuristics import SHARED_LIMIT
from quantkit.kernels.w4.heuristics import (
    W4Few,
    W4Problem,
    W4Tile,
    schedule_of,
    w4_choose,
    w4_rank,
)
from quantkit.kernels.w4.launch import FEW_SOURCE, SOURCE, w4_few_launch_of, w4_launch_of
from quantkit.kernels.w4.layout import pack4
from quantkit.kernels.w4.reference import decoded4, w4_reference

from ..backends import EmulatorBackend
from ..layouts import small_integers
from ..pairs import pairwise
from ..sass import listing, opcodes, tools
from .weights import (
    DTYPES,
    KINDS,
    assert_no_schedule_changes_the_sums,
    assert_only_the_accumulator_loses,
    run_w4,
    weight,
)

# Every arrangement of warps, depth of granules and kind of sharing, as small as they come.
TILES = {
    "wide": W4Tile(tile_n=128, consumers=2, slabs=1, grain=2, stages=3),
    "tall": W4Tile(tile_n=32, consumers=1, blocks_of_64=2, slabs=2, grain=2, stages=2, order=1),
    "deep": W4Tile(tile_n=16, consumers=2, slabs=2, grain=4, stages=3),
    "whole": W4Tile(tile_n=64, consumers=1, slabs=1, grain=2, stages=3, stream=False),
    "pair": W4Tile(tile_n=32, consumers=1, slabs=2, grain=4, stages=2, cluster=2),
    "few": W4Few(tile_n=8, warps_w=3, slabs=2, stages=3),
    "few by k": W4Few(tile_n=16, warps_w=2, groups=2, warps_k=2, slabs=4, stages=2),
    "few wide": W4Few(tile_n=48, warps_w=3, slabs=2, stages=2),
    "few pair": W4Few(tile_n=8, warps_w=2, warps_k=2, slabs=4, stages=2, cluster=2),
}
SHAPES = [(1, 8, 128), (3, 130, 200), (16, 1, 2880), (17, 130, 96), (64, 136, 300), (130, 72, 64)]
FACTORS: Mapping[str, list[Any]] = {
    "shape": SHAPES,
    "kind": [kind for kind in KINDS if kind not in (("uint4", 64), ("int4", 128))],
    "zeros": [False, True],
    "scale_type": ["bfloat16", "float16", "float32"],
    "activations": ["bfloat16", "float16"],
    "output": ["bfloat16", "float16", "float32", "int8"],
    "tile": list(TILES),
    "epilogue": ["bare", "row scale", "bias and relu"],
}


def legal(row: Mapping[str, Any]) -> bool:
    """A stage's slabs share a group of 256 only if they begin with it; zero points belong to integers."""
    if row.get("zeros") and row.get("kind", ("int4", 32))[0] in ("nvfp4", "mxfp4"):
        return False
    m = row.get("shape", (1, 1, 1))[0]
    return m <= 64 or "few" not in row.get("tile", "")


CASES = pairwise(FACTORS, legal)


def operands(row: Mapping[str, Any]):
    """Activations, packed weight, and the epilogue's arguments, of numbers whose products and sums are exact."""
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
    return a, w, pack4(w, scale_type=scale_type), options


@pytest.mark.parametrize("row", CASES, ids=lambda row: "-".join(str(v) for v in row.values()))
def test_products_are_exact(machine, row):
    """Every pair of shape, format, group, zero points, types, tile and epilogue."""
    a, w, packed, options = operands(row)
    want = w4_reference(a, packed, **options)
    plain = a.astype(np.float64) @ dequantize(w).astype(np.float64).T  # what the format says
    if row["epilogue"] == "bare" and row["output"] == "float32":
        np.testing.assert_array_equal(want, plain)
    np.testing.assert_array_equal(run_w4(machine, a, packed, TILES[row["tile"]], **options), want)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("kind", "zeros"),
    [(kind, zeros) for kind in KINDS for zeros in (False, True) if "int" in kind[0] or not zeros],
    ids=str,
)
def test_products_are_exact_for_all_groups_and_tiles(compiler, tile, kind, zeros):
    """All of them, on shapes that end within a group, a pair of rows and a block, in every mode."""
    for shape in ((16, 1, 2880), (3, 8, 300), (13, 130, 130)):
        row = {
            "shape": shape, "kind": kind, "zeros": zeros, "scale_type": "bfloat16", "activations": "bfloat16",
            "output": "float32", "epilogue": "bare",
        }  # fmt: skip
        a, w, packed, _ = operands(row)
        plain = a.astype(np.float64) @ dequantize(w).astype(np.float64).T
        for mode in Mode:
            d = run_w4(EmulatorBackend(mode), a, packed, TILES[tile])
            np.testing.assert_array_equal(d, plain.astype(np.float32))


# Every kind of sharing, group and output with int8 activations, in full range.
EIGHT_BITS = [
    ((3, 130, 600), ("int4", 128), False, "float32", "deep"),
    ((17, 130, 400), ("uint4", 32), True, "bfloat16", "tall"),
    ((64, 8, 2880), ("int4", 64), False, "float16", "wide"),
    ((130, 72, 96), ("uint4", None), True, "int8", "whole"),
    ((16, 1, 300), ("int4", None), False, "float32", "pair"),
    ((1, 130, 1000), ("uint4", 64), True, "float32", "few"),
    ((16, 72, 900), ("int4", 128), False, "bfloat16", "few by k"),
    ((3, 200, 700), ("int4", 32), True, "float32", "few pair"),
    ((21, 72, 400), ("int4", 64), False, "float32", "few wide"),
]


@pytest.mark.parametrize(("shape", "kind", "zeros", "output", "tile"), EIGHT_BITS, ids=str)
def test_products_with_int8_are_exact(machine, shape, kind, zeros, output, tile):
    m, n, k = shape
    rng = np.random.default_rng(m + n + k)
    w = weight(rng, n, k, *kind, zeros=zeros, middling=True)
    packed = pack4(w, activation_bits=8)
    a = rng.integers(-128, 128, (m, k)).astype(np.int8)
    options: dict[str, Any] = {
        "output": output,
        "row_scale": np.float32(rng.random(m) + 0.5),
        "bias": rng.standard_normal(n).astype(np.float32),
    }
    want = w4_reference(a, packed, **options)
    np.testing.assert_array_equal(decoded4(packed, "int8"), np.rint(decoded4(packed, "int8")))
    true = decoded4(packed, "int8") * packed.channel_scale[:, None]
    np.testing.assert_array_equal(true, dequantize(w).astype(np.float64))
    np.testing.assert_array_equal(run_w4(machine, a, packed, TILES[tile], **options), want)


# Weights of a consumer, or of four; tiles shared, whole, and of a pair of blocks; sums of 128 of K apart in each.
PROMOTED = {
    "narrow": W4Tile(tile_n=8, consumers=1, slabs=1, grain=2, stages=3),
    "four": W4Tile(tile_n=16, consumers=4, slabs=1, grain=2, stages=2, stream=False),
    "tall": W4Tile(tile_n=32, consumers=2, blocks_of_64=2, slabs=1, grain=2, stages=2, order=1),
    "wide": W4Tile(tile_n=128, consumers=2, slabs=1, grain=2, stages=2),
    "pair": W4Tile(tile_n=32, consumers=1, slabs=1, grain=2, stages=2, cluster=2),
}
FACTORS_OF_E4M3: Mapping[str, list[Any]] = {
    "shape": [(1, 8, 128), (16, 1, 2880), (17, 130, 300), (130, 72, 200)],
    "tile": list(PROMOTED),
    "output": ["bfloat16", "float32"],
    "deep": [False, True],
    "epilogue": ["bare", "row scale and bias"],
}


@pytest.mark.parametrize("row", pairwise(FACTORS_OF_E4M3), ids=lambda row: "-".join(map(str, row.values())))
def test_products_of_mxfp4_with_e4m3_are_exact(machine, row):
    """Activations of e4m3, weights at both ends of what e4m3 holds: sums of a slab fit the tensor core's bits."""
    m, n, k = row["shape"]
    rng = np.random.default_rng(m + n + k)
    w = weight(rng, n, k, "mxfp4", 32)
    scale = np.ldexp(np.float32(1), rng.integers(-1, 2, w.qparams.scale.shape))
    if row["deep"]:  # in slabs of their own, for 2^-14 of the others is below what a tensor core adds to them
        slabs = np.arange(scale.shape[1]) // 4 % 2 == 1
        scale = np.where(slabs, scale * np.float32(2.0**-11), scale)
    w = QTensor(w.qvalue, QParams(scale.astype(np.float32)), w.spec)
    a = rng.integers(-2, 3, (m, k)).astype(DTYPES["e4m3"])
    packed = pack4(w, activation_bits=8)
    assert packed.layout.deep == (row["deep"] and k > 128)
    options: dict[str, Any] = {"output": row["output"]}
    if row["epilogue"] != "bare":
        options["row_scale"] = (rng.integers(1, 4, m) / 8).astype(np.float32)
        options["bias"] = rng.standard_normal(n).astype(np.float32)
    want = w4_reference(a, packed, **options)
    if row["epilogue"] == "bare" and row["output"] == "float32":
        plain = a.astype(np.float64) @ dequantize(w).astype(np.float64).T
        np.testing.assert_array_equal(want, plain.astype(np.float32))
    np.testing.assert_array_equal(run_w4(machine, a, packed, PROMOTED[row["tile"]], **options), want)


# Every tile, type of scales and output; groups that end within K, and one scale a row.
INTEGERS_BY_E4M3 = [
    ((1, 8, 128), 128, "bfloat16", "narrow", "float32"),
    ((16, 1, 2880), 128, "float16", "four", "bfloat16"),
    ((17, 130, 300), 128, "float32", "tall", "float32"),
    ((130, 72, 200), 256, "bfloat16", "wide", "int8"),
    ((3, 130, 700), None, "float32", "pair", "float32"),
    ((13, 130, 600), 128, "bfloat16", "pair", "bfloat16"),
]


@pytest.mark.parametrize(("shape", "group", "scale_type", "tile", "output"), INTEGERS_BY_E4M3, ids=str)
def test_products_of_integers_with_e4m3_are_exact(machine, shape, group, scale_type, tile, output):
    m, n, k = shape
    rng = np.random.default_rng(m + n + k)
    w = weight(rng, n, k, "int4", group)
    packed = pack4(
        w, activation_bits=8, activations="float8_e4m3fn", scale_type=None if group is None else scale_type
    )
    a = rng.integers(-4, 5, (m, k)).astype(DTYPES["e4m3"])
    options: dict[str, Any] = {"output": output, "row_scale": (rng.integers(1, 4, m) / 8).astype(np.float32)}
    want = w4_reference(a, packed, **options)
    np.testing.assert_array_equal(run_w4(machine, a, packed, PROMOTED[tile], **options), want)
    if output == "float32":
        plain = a.astype(np.float64) @ dequantize(w).astype(np.float64).T
        np.testing.assert_array_equal(want, (plain * options["row_scale"][:, None]).astype(np.float32))


def test_every_integer_is_decoded_to_e4m3_as_the_format_says(compiler):
    """An identity for activations: D is the weight, each integer in each of a word's eight places."""
    bits = np.stack([np.roll(np.arange(128, dtype=np.uint8) % 16, turn) for turn in range(32)])
    spec = QuantSpec(format=INT4, axis=1, block_size=128)
    scale = np.ldexp(np.float32(1.25), np.arange(32).reshape(-1, 1) - 16).astype(np.float32)
    w = QTensor(codes_from_bits(bits, INT4), QParams(scale, np.zeros((32, 1), INT4.dtype)), spec)
    packed = pack4(w, activation_bits=8, activations="float8_e4m3fn")
    d = run_w4(EmulatorBackend(Mode.EAGER), np.eye(128).astype(DTYPES["e4m3"]), packed, PROMOTED["tall"])
    np.testing.assert_array_equal(d.T, dequantize(w))


def test_sums_of_e4m3_are_promoted(machine):
    """A large sum, then small products: the tensor core alone would cut each of them, apart they stay exact."""
    w = QTensor(
        np.full((8, 4096), 1.5, FP4_E2M1.dtype),
        QParams(np.ones((8, 128), np.float32)),
        weight(np.random.default_rng(0), 1, 32, "mxfp4", 32).spec,
    )
    a = np.zeros((3, 4096), DTYPES["e4m3"])
    a[:, :128], a[:, 128::32] = 32, 1.125
    d = run_w4(machine, a, pack4(w, activation_bits=8), PROMOTED["narrow"])
    np.testing.assert_array_equal(d, np.full((3, 8), 128 * 1.5 * 32 + 124 * 1.5 * 1.125, np.float32))


# ---- decoding ----------------------------------------------------------------------------------------------------


def every_code(form: str, scale_type: str, activations: str) -> QTensor:
    """Every code under 24 scales (with every zero point), one a row; as many of them as the type can tell apart."""
    rng = np.random.default_rng(1)
    if form == "nvfp4":
        scale = np.arange(0x7F, dtype=np.uint8).view(DTYPES["e4m3"]).astype(np.float32).reshape(-1, 1)
        spec, params = weight(rng, 1, 16, "nvfp4", 16).spec, QParams(scale, None, np.float32(1))
    elif form == "mxfp4":
        top = 12 if activations == "float16" else 60  # below 2^-24 of a row's largest fp16 has nothing
        scale = np.ldexp(1.0, np.arange(-top, top)).astype(np.float32).reshape(-1, 1)
        # Two groups a row, the second the largest of all: the first keeps its distance.
        scale = np.concatenate([scale, np.full_like(scale, scale.max())], axis=1)
        spec, params = weight(rng, 1, 32, "mxfp4", 32).spec, QParams(scale)
    else:
        fmt = INT4 if form == "int4" else UINT4
        scale = (rng.random((24, 1)) + 0.5) * np.ldexp(1.0, rng.integers(-9, 9, (24, 1)))
        scale = (
            np.repeat(scale, 1 if form == "int4" else 16, axis=0)
            .astype(DTYPES[scale_type])
            .astype(np.float32)
        )
        zero = np.zeros(len(scale)) if form == "int4" else np.arange(len(scale)) % 16
        spec = QuantSpec(format=fmt, axis=1, block_size=32, symmetric=form == "int4")
        params = QParams(scale, zero.reshape(-1, 1).astype(fmt.dtype))
    k = 64 if form == "mxfp4" else 16 if form == "nvfp4" else 32
    bits = np.resize(np.arange(16, dtype=np.uint8), (len(params.scale), k))
    return QTensor(codes_from_bits(bits, FP4_E2M1 if "fp4" in form else spec.format), params, spec)


DECODINGS = [
    (form, scale_type, activations)
    for activations in ("bfloat16", "float16")
    for form, scale_types in {
        "int4": ("bfloat16", "float16", "float32"),
        "uint4": ("bfloat16", "float16", "float32"),
        "nvfp4": ("",),
        "mxfp4": ("",),
    }.items()
    for scale_type in scale_types
]


@pytest.mark.parametrize("tile", ["deep", "few"])
@pytest.mark.parametrize(("form", "scale_type", "activations"), DECODINGS)
def test_every_code_is_decoded_as_the_oracle_says(compiler, form, scale_type, activations, tile):
    """An identity for activations: D is the weight itself."""
    w = every_code(form, scale_type, activations)
    packed = pack4(w, scale_type=scale_type or None)
    k = w.qvalue.shape[1]
    a = np.eye(k).astype(DTYPES[activations])
    d = run_w4(EmulatorBackend(Mode.EAGER), a, packed, TILES[tile])
    values = decoded4(packed, activations)
    np.testing.assert_array_equal(
        d.T, (values * packed.channel_scale.astype(np.float64)[:, None]).astype(np.float32)
    )
    # And the oracle says what the format says: exactly, or rounded to A's type where the scale is of another.
    true = dequantize(w).astype(np.float64)
    if form in ("nvfp4", "mxfp4"):
        np.testing.assert_array_equal(d.T, true)
    else:
        bits = 8 if activations == "bfloat16" else 11
        assert np.all(np.abs(d.T - true) <= 2.0**-bits * (1 + 2.0**-6) * np.abs(true))


@pytest.mark.parametrize("spread", [11, 14])
def test_every_code_under_every_scale_is_decoded_to_e4m3_as_the_format_says(compiler, spread):
    """Each row has the largest scale in its first group, and one of `spread` + 1 smaller ones in the second."""
    spec = weight(np.random.default_rng(1), 1, 32, "mxfp4", 32).spec
    for top in (-100, 0, 100):
        scale = np.ldexp(np.float32(1), top - np.arange(spread + 1)).astype(np.float32)
        pairs = np.stack([np.full_like(scale, scale[0]), scale], axis=1)
        bits = np.resize(np.arange(16, dtype=np.uint8), (spread + 1, 64))
        w = QTensor(codes_from_bits(bits, FP4_E2M1), QParams(pairs), spec)
        packed = pack4(w, activation_bits=8)
        assert packed.layout.deep == (spread > 11)
        d = run_w4(EmulatorBackend(Mode.EAGER), np.eye(64).astype(DTYPES["e4m3"]), packed, PROMOTED["tall"])
        np.testing.assert_array_equal(d.T, dequantize(w))


@pytest.mark.parametrize("tile", ["narrow", "wide"])
def test_real_values_of_e4m3_stay_within_what_the_accumulator_loses(machine, tile):
    rng = np.random.default_rng(5)
    m, n, k = 7, 130, 1000
    plain = weight(rng, n, k, "mxfp4", 32)
    scale = np.ldexp(np.float32(1), rng.integers(-4, 5, plain.qparams.scale.shape)).astype(np.float32)
    packed = pack4(QTensor(plain.qvalue, QParams(scale), plain.spec), activation_bits=8)
    a = rng.standard_normal((m, k)).astype(DTYPES["e4m3"])
    d = run_w4(machine, a, packed, PROMOTED[tile])
    w = decoded4(packed, "float8_e4m3fn") * packed.channel_scale.astype(np.float64)[:, None]
    wide = a.astype(np.float64)
    assert np.all(np.abs(d - wide @ w.T) <= 2.0**-10 * (np.abs(wide) @ np.abs(w).T))


@pytest.mark.parametrize("tile", ["deep", "wide", "few by k"])
@pytest.mark.parametrize("form", ["int4", "nvfp4"])
def test_real_values_stay_within_what_the_accumulator_loses(machine, form, tile):
    assert_only_the_accumulator_loses(
        lambda machine, a, packed: run_w4(machine, a, packed, TILES[tile]), machine, form, 512
    )


def test_which_piece_comes_last_does_not_change_the_sums(compiler):
    assert_no_schedule_changes_the_sums(
        lambda machine, a, packed: run_w4(machine, a, packed, TILES["deep"]), 200
    )


# ---- what is built -----------------------------------------------------------------------------------------------

KIND = EpilogueKind(row_scale="each", column_scale="each", bias=True)


def problem(m: int, n: int = 8192, k: int = 8192, **options: Any) -> W4Problem:
    usual = {
        "activations": "bfloat16",
        "output": "bfloat16",
        "codes": "int4",
        "group": 128,
        "scales": "bfloat16",
    }
    return W4Problem(m=m, n=n, k=k, **(usual | {"zeros": False} | options))


NVFP4 = {"codes": "fp4_e2m1", "group": 16, "scales": "e4m3"}
MXFP4 = {"codes": "fp4_e2m1", "group": 32, "scales": "e8m0"}
SHIPPED = [
    problem(1, 28672),
    problem(16, 28672, **NVFP4),
    problem(16, **MXFP4),
    problem(32, 28672),
    problem(24, 28672, **NVFP4),
    problem(64, 4096, 4096),
    problem(56, 4096, 4096, **NVFP4),
    problem(64, 28672),
    problem(256),
    problem(4096, **NVFP4),
    problem(4096, codes="uint4", group=32, zeros=True, activations="float16"),
    problem(16, 28672, activations="int8", scales="uint8"),
    problem(32, 28672, activations="int8", scales="uint8"),
    problem(64, activations="int8", scales="uint8"),
    problem(64, 28672, activations="int8", scales="uint8"),
    problem(4096, activations="int8", scales="uint8"),
    problem(1, 28672, activations="float8_e4m3fn", **MXFP4),
    problem(64, activations="float8_e4m3fn", **MXFP4),
    problem(4096, activations="float8_e4m3fn", **MXFP4, deep=True),
    problem(16, 28672, activations="float8_e4m3fn"),
    problem(4096, activations="float8_e4m3fn", scales="float32"),
]


@pytest.mark.skipif(
    not is_available() or tools() is None, reason="NVRTC or its disassembler is not installed"
)
@pytest.mark.parametrize("shipped", SHIPPED, ids=str)
def test_chosen_configurations_decode_in_registers(shipped, tmp_path_factory):
    """The tensor core takes A from registers, nothing goes through local memory, wgmma is not serialized."""
    cache = tmp_path_factory.getbasetemp() / "w4-cubins"
    tile = w4_choose(shipped)
    few = isinstance(tile, W4Few)
    launch = w4_few_launch_of(shipped, tile, KIND) if few else w4_launch_of(shipped, tile, KIND, 132)
    built = compile_kernel(FEW_SOURCE if few else SOURCE, arch="sm_90a", defines=launch.defines, cache=cache)
    found = opcodes(built.cubin)
    letter = {"int8": "I", "float8_e4m3fn": "Q"}.get(shipped.activations, "H")
    assert {name for name in found if name.endswith("MMA")} == {f"{letter}MMA" if few else f"{letter}GMMA"}
    lines = [line for line in listing(built.cubin) if "GMMA" in line]
    assert all(re.search(r"GMMA\S* R\d+, R\d+, gdesc", line) for line in lines), "A is not in registers"
    assert few == (not lines)
    assert (found["LDL"], found["STL"], built.spill_bytes, built.stack_bytes) == (0, 0, 0, 0)
    # Codes become numbers two at a time, by bits and one operation; e4m3 four at a time, by a table.
    if shipped.activations == "float8_e4m3fn":
        assert shipped.codes == "int4" or found["PRMT"] >= 4 * 4
    else:
        assert shipped.activations == "int8" or found["HFMA2"] + found["HMUL2"] >= 16
    assert built.warnings == ()


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="NVRTC is not installed")
@pytest.mark.parametrize(
    "form",
    [
        {},
        NVFP4,
        {"zeros": True, "group": 32, "scales": "float32"},
        {"activations": "int8", "scales": "uint8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 16, 24, 40, 48, 64, 256])
def test_every_candidate_decodes_in_registers(m, form, tmp_path):
    for one in (problem(m, **form), problem(m, 28672, **form)):
        for tile in w4_rank(one):
            few = isinstance(tile, W4Few)
            launch = w4_few_launch_of(one, tile, KIND) if few else w4_launch_of(one, tile, KIND, 132)
            source = FEW_SOURCE if few else SOURCE
            built = compile_kernel(source, arch="sm_90a", defines=launch.defines, cache=tmp_path)
            assert (built.spill_bytes, built.stack_bytes, built.warnings) == (0, 0, ()), tile


@pytest.mark.skipif(
    not is_available() or tools() is None, reason="NVRTC or its disassembler is not installed"
)
@pytest.mark.parametrize("tile", [TILES["deep"], TILES["pair"], w4_choose(problem(256))], ids=str)
def test_nothing_touches_the_sums_of_products_that_still_run(tile, tmp_path_factory):
    """Between the last product and the wait for it no instruction may name an accumulator: a compiler can put copies
    there, and on a GPU they hold what the sums were a moment before.
    """
    launch = w4_launch_of(problem(256), tile, KIND, 132)
    cache = tmp_path_factory.getbasetemp() / "w4-cubins"
    lines = listing(compile_kernel(SOURCE, arch="sm_90a", defines=launch.defines, cache=cache).cubin)
    last = max(i for i, line in enumerate(lines) if "HGMMA" in line)
    wait = next(i for i in range(last, len(lines)) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in lines[i])
    first = int(re.search(r"HGMMA\S* R(\d+)", lines[last]).group(1))
    sums = set(range(first, first + tile.tile_n // 2))
    for line in lines[last + 1 : wait]:
        assert not sums & {int(number) for number in re.findall(r"\bR(\d+)", line)}, line


# ---- which tile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize(
    "form", [{}, {"zeros": True, "group": 32, "scales": "float32"}, NVFP4, MXFP4], ids=str
)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (16, 64, 100000), (5, 100000, 7), (33, 130, 2880), (5000, 64, 64)]
)
def test_every_shape_gets_tiles_that_fit(shape, form, output):
    m, n, k = shape
    found = w4_rank(problem(m, n, k, output=output, **form))
    assert found
    for tile in found:
        assert tile.shared_bytes(problem(m, n, k, output=output, **form)) <= SHARED_LIMIT
        assert tile.threads <= 1024


def test_tiles_are_cut_only_where_they_would_leave_multiprocessors_idle():
    tile = W4Tile(tile_n=64, consumers=2, blocks_of_64=2)
    assert schedule_of(problem(64, 132 * 256), tile, 132) == (132, 132)
    assert schedule_of(problem(64, 8192), tile, 132) == (132, 0)
    assert schedule_of(problem(64, 300 * 256), tile, 132) == (132, 132)
    assert schedule_of(problem(64, 64, 64), tile, 132) == (1, 0)

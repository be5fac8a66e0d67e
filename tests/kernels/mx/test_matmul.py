"""Quantize, pack, multiply: MX and NVFP4 on both sides from the door to the launch, on a GPU that is the emulator."""

from typing import Any

import numpy as np
import pytest

from quantkit.errors import KernelError
from quantkit.formats import dynamic_qparams, qparams_from_range, quantize, range_of
from quantkit.formats.presets import ACTIVATION_SPECS, weight_spec
from quantkit.kernels import Epilogue, matmul, pack_weight, quantize_activation, tuning
from quantkit.kernels.blocks.matmul import PackedBlockWeight
from quantkit.kernels.mx import matmul as launcher
from quantkit.kernels.mx.heuristics import MxTile
from quantkit.kernels.mx.layout import pack_mx
from quantkit.kernels.mx.matmul import PackedMxWeight
from quantkit.kernels.mx.reference import mx_reference
from quantkit.kernels.w4.operands import PackedWeight4

from ..fake_cupy import FakeCupy, install
from .runs import SPECS

M, N, K = 9, 72, 410
SLICED = MxTile(tile_m=16, tile_n=64, warps_m=1, warps_n=4, stages=2, slices=2)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, compiler: str) -> FakeCupy:
    fake = install(monkeypatch, "sm_120a")
    monkeypatch.setattr(tuning, "best_entry", lambda key, device: None)
    monkeypatch.setattr(launcher, "_launch", launcher._launch.__wrapped__)
    return fake


def whole(rows: int, k: int = K) -> np.ndarray:
    """Whole numbers that every code holds when its scale is 1, as one element of each block makes it."""
    x = np.random.default_rng([rows, k]).integers(-4, 5, (rows, k)).astype(np.float32)
    x[:, ::16] = 6.0
    return x


def packed(name: str) -> tuple[Any, Any]:
    """A weight, and what was packed of it for activations of its own format."""
    spec = weight_spec(name, channel_axis=0, contraction_axis=1)
    x = whole(N)
    held = quantize(x, qparams_from_range(range_of(x, spec), spec), spec)
    return held, pack_weight(held, activations=None if name == "mxfp8" else "fp4_e2m1")


def activations(name: str, x: np.ndarray) -> tuple[Any, Any]:
    """Activations as the oracle has them, and as the kernel quantizes them."""
    spec = ACTIVATION_SPECS[name]
    params = dynamic_qparams(x, spec)
    return quantize(x, params, spec), params.global_scale


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tile", [None, SLICED], ids=["chosen", "sliced"])
def test_quantized_activations_and_packed_weights_multiply_as_they_are(cupy, name, tile):
    x = whole(M)
    weight, held = packed(name)
    assert isinstance(held, PackedMxWeight)
    a, shared = activations(name, x)
    q = quantize_activation(
        cupy.asarray(x.reshape(3, M // 3, K)),
        ACTIVATION_SPECS[name],
        global_scale=None if shared is None else cupy.asarray(np.asarray(shared, np.float32).reshape(1)),
    )
    bias = np.arange(N, dtype=np.float32)
    epilogue = Epilogue(bias=cupy.asarray(bias), activation="relu")
    d = matmul(q, held, epilogue=epilogue, out_dtype="float32", tile=tile)
    assert cupy.launches[-1][0] == "gemm_blocks_sm120" and d.shape == (3, M // 3, N)
    want = mx_reference(pack_mx(a), pack_mx(weight), bias=bias, activation="relu", output="float32")
    np.testing.assert_array_equal(np.asarray(d).reshape(M, N), want)


def test_a_row_scale_multiplies_beside_the_global_one(cupy):
    x = whole(M)
    weight, held = packed("nvfp4")
    a, shared = activations("nvfp4", x)
    q = quantize_activation(
        cupy.asarray(x), ACTIVATION_SPECS["nvfp4"], global_scale=cupy.asarray(np.float32(shared).reshape(1))
    )
    rows = np.random.default_rng(0).random(M, np.float32)
    d = matmul(q, held, epilogue=Epilogue(row_scale=cupy.asarray(rows)), out_dtype="float32")
    bare = mx_reference(pack_mx(a), pack_mx(weight), output="float32")
    np.testing.assert_allclose(np.asarray(d), bare * rows[:, None], rtol=2.0**-22)


def test_a_captured_call_is_not_sliced(cupy):
    _, held = packed("mxfp4")
    q = quantize_activation(cupy.asarray(whole(M)), ACTIVATION_SPECS["mxfp4"])
    found = [cupy.asnumpy(matmul(q, held, out_dtype="float32", tile=SLICED))]
    assert cupy.launches[-1][1]["SLICED"] == 1
    cupy.capturing = True
    found.append(cupy.asnumpy(matmul(q, held, out_dtype="float32", tile=SLICED)))
    assert cupy.launches[-1][1]["SLICED"] == 0
    np.testing.assert_array_equal(*found)


def test_other_activations_and_architectures_get_other_kernels(cupy):
    """Four-bit weights for 16-bit activations are decoded, and MXFP8 elsewhere is promoted block by block."""
    weight, _ = packed("nvfp4")
    assert isinstance(pack_weight(weight), PackedWeight4)
    spec = weight_spec("mxfp8", channel_axis=0, contraction_axis=1)
    eight = quantize(whole(N), qparams_from_range(range_of(whole(N), spec), spec), spec)
    assert isinstance(pack_weight(eight, arch="sm_90a"), PackedBlockWeight)
    assert isinstance(pack_weight(eight), PackedMxWeight)


def test_what_does_not_fit_is_refused(cupy, monkeypatch):
    _, held = packed("mxfp4")
    x = cupy.asarray(whole(M))
    q = quantize_activation(x, ACTIVATION_SPECS["mxfp4"])
    for a, options, complaint in (
        (x, {}, "pass what quantize_activation gave"),
        (quantize_activation(x, ACTIVATION_SPECS["mxfp8"]), {}, "for a weight in mxfp4; quantize them alike"),
        (quantize_activation(x[:, :300], ACTIVATION_SPECS["mxfp4"]), {}, "k = 410 takes 205"),
        (q, {"out_dtype": "int32"}, "int32 would hold sums without their scales"),
        (q, {"epilogue": Epilogue(bias=cupy.asarray(np.ones(3, np.float32)))}, "bias: 3 values"),
    ):
        with pytest.raises(KernelError, match=complaint):
            matmul(a, held, **options)
    monkeypatch.setattr(launcher.gpu, "architecture", lambda device: "sm_100a")
    with pytest.raises(KernelError, match="on sm_100a; it needs sm_120a"):
        matmul(q, held)
    integers = weight_spec("int4", channel_axis=0, contraction_axis=1)
    four = quantize(whole(N), qparams_from_range(range_of(whole(N), integers), integers), integers)
    with pytest.raises(KernelError, match="int4 in blocks of 128 along axis 1; quantize it to mxfp8"):
        pack_mx(four)

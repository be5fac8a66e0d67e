"""matmul's door, without a GPU: what it refuses and the mend it names; arrays here are NumPy's with a device."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from quantkit.errors import KernelError
from quantkit.formats import INT8, QuantSpec, qparams_from_range, quantize, range_of
from quantkit.kernels import device, matmul, pack_weight, quantize_activation
from quantkit.kernels.gemm import pack_codes
from quantkit.kernels.gemm_checks import check_product
from quantkit.kernels.gemm_operands import Epilogue, PackedWeight

ARCH = "sm_90a"


class Array(np.ndarray):
    """A NumPy array that says on which GPU it lies."""

    device = SimpleNamespace(id=0)


def array(shape, dtype=np.float32, device: int = 0):
    made = np.zeros(shape, dtype).view(Array)
    made.device = SimpleNamespace(id=device)
    return made


WEIGHT = PackedWeight(
    data=array((8, 32), np.uint8),
    scale=array(8),
    n=8,
    k=32,
    format="int8",
    arch=ARCH,
    code_sums=array(8, np.int32),
)


def check(*, a=None, weight=WEIGHT, epilogue=None, out_dtype="bfloat16", out=None) -> None:
    a = array((4, 32), np.int8) if a is None else a
    check_product(a, weight, epilogue or Epilogue(), out_dtype, out, 0, ARCH)


def test_what_fits_is_let_through():
    check()
    check(a=array((2, 2, 32), np.uint8), epilogue=Epilogue(zero_point=128))
    check(
        epilogue=Epilogue(
            row_scale=array(4), zero_point=array(4, np.int32), bias=array(8), residual=array((4, 8), np.int8),
            activation="clip", clip=(0.0, 6.0), output_scale=0.1, output_zero_point=-3,
        ),
        out_dtype="int8",
        out=array((4, 8), np.int8),
    )  # fmt: skip
    check(epilogue=Epilogue(zero_point=3), out_dtype="int32")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"a": array((4, 31), np.int8)}, "does not end in the weight's k = 32"),
        ({"a": array((4, 32), np.float32)}, "pass int8 or uint8"),
        ({"weight": replace(WEIGHT, arch="sm_80")}, "packed for sm_80"),
        ({"a": np.broadcast_to(np.int8(0), (2**31 - 9, 32)).view(Array)}, "cut the product into parts"),
        ({"a": array((4, 32), np.int8, device=1)}, "a lies on GPU 1, not on GPU 0; move it"),
        ({"a": np.zeros((4, 32), np.int8)}, "a lies on the CPU, not on GPU 0; move it with cupy.asarray"),
        ({"a": [[0] * 32] * 4}, "a: is a list, not an array on the GPU; make it one with cupy.asarray"),
        ({"out": np.zeros((4, 8), np.uint16)}, "out lies on the CPU, not on GPU 0"),
        ({"epilogue": Epilogue(bias=np.zeros(8, np.float32))}, "bias lies on the CPU, not on GPU 0"),
        ({"epilogue": Epilogue(row_scale=np.float32(2))}, "row_scale lies on the CPU, not on GPU 0"),
        ({"out_dtype": "int4"}, "one of int32"),
        ({"out_dtype": "int32", "epilogue": Epilogue(bias=array(8))}, "plain sums of int8 only"),
        ({"out": array((4, 8), np.float32)}, "is not a contiguous"),
        ({"out": array((8, 4), np.uint16).T}, "is not a contiguous"),
        ({"epilogue": Epilogue(output_scale=0.5)}, "are for int8 and float8_e4m3fn"),
        ({"epilogue": Epilogue(output_scale=0.0), "out_dtype": "int8"}, "outside of 2^-100"),
        ({"epilogue": Epilogue(output_zero_point=300), "out_dtype": "int8"}, "from -128 to 127"),
        ({"epilogue": Epilogue(output_zero_point=3), "out_dtype": "float8_e4m3fn"}, "int8 has them"),
        ({"epilogue": Epilogue(row_scale=array(3))}, "one or 4"),
        ({"epilogue": Epilogue(row_scale=array(4, np.float64))}, "float32, one or 4"),
        ({"epilogue": Epilogue(zero_point=array(4))}, "int32, one or 4"),
        ({"epilogue": Epilogue(zero_point=1), "weight": replace(WEIGHT, code_sums=None)}, "no sums of codes"),
        ({"epilogue": Epilogue(bias=array(4))}, "bias: 4 values"),
        ({"epilogue": Epilogue(residual=array((8, 4), np.float64))}, "residual"),
        ({"epilogue": Epilogue(residual=array((4, 4)))}, "residual"),
        ({"epilogue": Epilogue(activation="tanh")}, "None, relu, clip, gelu"),
        ({"epilogue": Epilogue(activation="clip")}, "give both or neither"),
        ({"epilogue": Epilogue(clip=(0, 1))}, "give both or neither"),
    ],
)  # fmt: skip
def test_what_no_kernel_computes_is_refused_with_the_mend(call, says):
    with pytest.raises(KernelError, match="matmul: ") as refused:
        check(**call)
    assert says in str(refused.value)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


def test_without_a_gpu_the_door_says_so(monkeypatch):
    def no_driver():
        raise RuntimeError("cudaErrorInsufficientDriver: the driver is missing\nand more")

    monkeypatch.setattr(device, "cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(Device=no_driver)))
    calls = (
        lambda: matmul(array((4, 32), np.int8), WEIGHT),
        lambda: pack_codes(np.zeros((8, 32), np.int8), None, "int8"),
        lambda: quantize_activation(array((4, 32)), QuantSpec(format=INT8, dynamic="token")),
    )
    for call in calls:
        with pytest.raises(
            KernelError, match=r"^no GPU here \(cudaErrorInsufficientDriver: .*missing\); run"
        ):
            call()


def test_what_was_not_quantized_or_packed_is_refused_with_the_step_that_is_missing():
    floats = np.zeros((8, 32), np.float32)
    spec = QuantSpec(format=INT8, axis=0)
    quantized = quantize(floats, qparams_from_range(range_of(floats, spec), spec), spec)
    for given in (floats, None):
        with pytest.raises(
            KernelError, match=r"not a QTensor; quantize it with quantkit\.formats\.quantize first"
        ):
            pack_weight(given)
    for given in (floats, None, quantized):
        with pytest.raises(KernelError, match=r"weight: is a \w+; pass what pack_weight makes of it\."):
            matmul(floats, given)


@pytest.mark.parametrize(
    ("x", "spec", "says"),
    [
        (array((4, 32)), "int8", r"spec: is a str, not a QuantSpec; QuantSpec\(format=INT8"),
        ([1.0], QuantSpec(format=INT8, dynamic="token"), r"x: is a list, not an array on the GPU"),
        (
            np.zeros((4, 32), np.float32),
            QuantSpec(format=INT8, dynamic="token"),
            r"x: lies on the CPU, not on GPU 0",
        ),
        (
            array((4, 32), device=1),
            QuantSpec(format=INT8, dynamic="token"),
            r"x: lies on GPU 1, not on GPU 0",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused_with_the_mend(monkeypatch, x, spec, says):
    here = SimpleNamespace(cuda=SimpleNamespace(Device=lambda: SimpleNamespace(id=0)))
    monkeypatch.setattr(device, "cupy", lambda: here)
    with pytest.raises(KernelError, match=rf"^quantize_activation: {says}"):
        quantize_activation(x, spec)

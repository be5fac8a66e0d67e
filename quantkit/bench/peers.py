"""What others have for the same product, where it is installed: torch (cuBLAS, cuBLASLt), Triton, nvmath, Humming.

A peer gets the same numbers: the codes where it takes them, else their values in bfloat16. What a library refuses, or
cannot do for a format, is told and left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantkit.bench.row import BASELINE
from quantkit.formats.quantize import QTensor, dequantize
from quantkit.kernels.cublas import cublas_bf16
from quantkit.kernels.family import Operands
from quantkit.kernels.timing import Contender
from quantkit.kernels.work import FORMATS, Work

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library. module: what must be importable. calls: its ways to compute a product, by name."""

    name: str
    module: str
    calls: Callable[["TorchOperands"], Calls]


class TorchOperands:
    """A product's operands as torch's tensors on the GPU, each made when it is first asked for."""

    def __init__(self, work: Work, operands: Operands) -> None:
        self.work = work
        self.torch = import_module("torch")
        self._operands = operands

    @property
    def format(self) -> str:
        """The name of the work's format."""
        return self.work.format

    @cached_property
    def a(self) -> Any:
        """The activations' codes [m, k]."""
        small = self._tensor(self._operands.activations)
        rows = self.torch.arange(self.work.m, device="cuda") % len(small)
        return self._typed(small[rows].contiguous(), self._operands.activations.dtype.name)

    @cached_property
    def w(self) -> Any:
        """The weight's codes [n, k]."""
        held = self._operands.weight
        codes = held.qvalue if isinstance(held, QTensor) else held
        return self._typed(self._tensor(codes), codes.dtype.name)

    @cached_property
    def a_scale(self) -> Any:
        """The scales of the activations, float32 [m, 1]."""
        return self._column(self._operands.row_scales(self.work.m), self.work.m)

    @cached_property
    def w_scale(self) -> Any:
        """The scales of the weight's rows, float32 [1, n]."""
        held = self._operands.weight
        scale = held.qparams.effective_scale if isinstance(held, QTensor) else None
        return self._column(scale, self.work.n).reshape(1, -1)

    @cached_property
    def a_block_scale(self) -> Any:
        """The scales of the activations' 1 × 128 blocks [m, blocks], rows next to each other as cuBLASLt wants them."""
        scales = self._operands.row_scales(self.work.m)
        assert scales is not None
        return self.torch.from_numpy(np.ascontiguousarray(scales.T)).cuda().t()

    @cached_property
    def w_block_scale(self) -> Any:
        """The scales of the weight's 128 × 128 blocks, [blocks along K, along N], whole fours apart along N."""
        held = self._operands.weight
        assert isinstance(held, QTensor)
        scales = held.qparams.scale
        wide = np.zeros((len(scales), -(-scales.shape[1] // 4) * 4), np.float32)
        wide[:, : scales.shape[1]] = scales
        return self.torch.from_numpy(wide).cuda()[:, : scales.shape[1]].t()

    @cached_property
    def a_bf16(self) -> Any:
        """The activations' values [m, k]."""
        if self._operands.block is not None:
            rows = self.torch.arange(self.work.m, device="cuda") % len(self._operands.activations)
            return self.torch.from_numpy(self._operands.values()).cuda()[rows].to(self.torch.bfloat16)
        a = self.a if self.a.dtype == self.torch.bfloat16 else self.a.float() * self.a_scale
        return a.to(self.torch.bfloat16)

    @cached_property
    def w_bf16(self) -> Any:
        """The weight's values [n, k]."""
        held = self._operands.weight
        if not isinstance(held, QTensor):
            return self.w
        if held.spec.block_size is None and held.spec.block_shape is None:
            return (self.w.float() * self.w_scale.reshape(-1, 1)).to(self.torch.bfloat16)
        return self.torch.from_numpy(dequantize(held)).cuda().to(self.torch.bfloat16)

    def _tensor(self, codes: NDArray[Any]) -> Any:
        """Codes as torch can take them from NumPy: bytes, or pairs of them."""
        raw = {1: np.int8, 2: np.int16}[codes.dtype.itemsize]
        return self.torch.from_numpy(np.ascontiguousarray(codes).view(raw).copy()).cuda()

    def _typed(self, tensor: Any, name: str) -> Any:
        types = {"float8_e4m3fn": self.torch.float8_e4m3fn, "bfloat16": self.torch.bfloat16}
        return tensor.view(types[name]) if name in types else tensor

    def _column(self, scale: NDArray[np.float32] | None, size: int) -> Any:
        flat = np.ones(1, np.float32) if scale is None else np.asarray(scale, np.float32).reshape(-1)
        return self.torch.from_numpy(np.resize(flat, size).copy()).cuda().reshape(-1, 1)


def peers_of(work: Work, operands: Operands) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return a contender for each peer's way to compute the work, and why what is installed could not be set up."""
    found, refused = _by_torch(work, operands) if find_spec("torch") is not None else ({}, {})
    if BASELINE not in found:
        # What every row is held against needs no torch, which may lack CUDA, or its libraries.
        try:
            found[BASELINE] = Contender(run=cublas_bf16(*bf16_values(operands), work.m))
        except Exception as error:
            refused[BASELINE] = _said(error)
    return found, refused


def _by_torch(work: Work, operands: Operands) -> tuple[dict[str, Contender], dict[str, str]]:
    """The peers on torch's tensors. Each library refuses in its own way; what it says is told."""
    found: dict[str, Contender] = {}
    refused: dict[str, str] = {}
    try:
        shared = TorchOperands(work, operands)
    except Exception as error:
        return {}, {"torch": _said(error)}
    for peer in PEERS:
        if find_spec(peer.module) is None:
            continue
        try:
            calls = peer.calls(shared)
        except Exception as error:
            refused[peer.name] = _said(error)
            continue
        found |= {name: Contender(run=call, framework="torch") for name, call in calls.items()}
    return found, refused


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def bf16_values(operands: Operands) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the values of activations and weight, bfloat16."""
    held = operands.weight
    w = dequantize(held) if isinstance(held, QTensor) else held
    return operands.values().astype(ml_dtypes.bfloat16), w.astype(ml_dtypes.bfloat16)


def missing_peers() -> list[str]:
    """Return the names of the packages that would be peers and are not installed."""
    return [peer.name for peer in PEERS if find_spec(peer.module) is None]


def facts_of_peers() -> dict[str, str]:
    """Return the versions of those that are installed."""
    found = {}
    for name in ("torch", "triton", "nvmath-python", "humming-kernels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _torch(x: TorchOperands) -> Calls:
    torch = x.torch
    a16, w16 = x.a_bf16, x.w_bf16
    calls: Calls = {BASELINE: lambda: a16 @ w16.t()}
    if x.format == "int8":
        a, w = x.a, x.w
        calls["cuBLASLt int8"] = lambda: torch._int_mm(a, w.t())
    if x.format == "fp8":
        a, w, rows, columns = x.a, x.w, x.a_scale, x.w_scale
        options = {"scale_a": rows, "scale_b": columns, "out_dtype": torch.bfloat16}
        calls["cuBLASLt fp8"] = lambda: torch._scaled_mm(a, w.t(), **options)
        calls["cuBLASLt fp8 fast"] = lambda: torch._scaled_mm(a, w.t(), use_fast_accum=True, **options)
    if x.format == "fp8-block":
        a, w, rows, columns = x.a, x.w, x.a_block_scale, x.w_block_scale
        options = {"scale_a": rows, "scale_b": columns, "out_dtype": torch.bfloat16}
        calls["cuBLASLt fp8-block"] = lambda: torch._scaled_mm(a, w.t(), **options)
    if x.format == "bf16":
        # cuBLAS in bf16 is the baseline already; the same format has it once more under its other name.
        calls["cuBLASLt bf16"] = calls[BASELINE]
    return calls


def _triton(x: TorchOperands) -> Calls:
    product = import_module("quantkit.bench.triton_matmul").product
    fmt = FORMATS[x.format]
    if fmt.activations != fmt.weights or x.format not in ("int8", "fp8", "bf16"):
        return {}
    a, w = x.a, x.w
    rows, columns = (None, None) if x.format == "bf16" else (x.a_scale.reshape(-1), x.w_scale.reshape(-1))
    out = x.torch.empty((x.work.m, x.work.n), dtype=x.torch.bfloat16, device="cuda")
    return {"Triton": lambda: product(a, w, out, rows, columns)}


def _nvmath(x: TorchOperands) -> Calls:
    advanced = import_module("nvmath.linalg.advanced")
    if x.format not in ("bf16", "fp8"):
        return {}
    if x.format == "bf16":
        mm = advanced.Matmul(x.a, x.w.t())
    else:
        # One scale for each operand is what it takes; the time is that of a product with scales all the same.
        options = {"result_type": import_module("nvmath").CudaDataType.CUDA_R_16BF}
        mm = advanced.Matmul(x.a, x.w.t(), options=options, quantization_scales={"a": 1.0, "b": 1.0})
    mm.plan()
    stream = x.torch.cuda.current_stream
    return {"nvmath": lambda: mm.execute(stream=stream())}


# How Humming names a format: of weights, and of activations where they are not bfloat16.
_HUMMING: dict[str, tuple[dict[str, Any], str | None]] = {
    "int8": ({"dtype": "int8"}, "int8"),
    "fp8": ({"dtype": "float8e4m3"}, "float8e4m3"),
    "w8a16": ({"dtype": "int8"}, None),
    "int4": ({"dtype": "int4", "group_size": 128}, None),
    "w4a8": ({"dtype": "int4", "group_size": 128}, "int8"),
    "mxfp4": ({"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"}, None),
    "nvfp4": ({"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3"}, None),
}


def _humming(x: TorchOperands) -> Calls:
    if x.format not in _HUMMING:
        return {}
    weight, activations = _HUMMING[x.format]
    weight = {**weight, **({"group_size": x.work.group} if x.work.group else {})}
    layer = (
        import_module("humming.layer")
        .HummingLayer(
            shape_n=x.work.n,
            shape_k=x.work.k,
            weight_config=weight,
            input_config=None if activations is None else {"dtype": activations},
            torch_dtype=x.torch.bfloat16,
        )
        .cuda()
    )
    layer.load_from_unquantized(x.w_bf16)
    layer.transform()
    if activations is None:
        a = x.a_bf16
        return {"Humming": lambda: layer(a)}
    a, scale = x.a, x.a_scale
    return {"Humming": lambda: layer(a, input_scale=scale)}


PEERS = (
    Peer(name="torch", module="torch", calls=_torch),
    Peer(name="triton", module="triton", calls=_triton),
    Peer(name="nvmath-python", module="nvmath", calls=_nvmath),
    Peer(name="humming-kernels", module="humming", calls=_humming),
)

"""Peers get the same numbers; what is not installed is told, what refuses too."""

import ml_dtypes
import numpy as np
import pytest

from quantkit.bench import peers
from quantkit.bench.operands import exact_operands, random_operands
from quantkit.kernels.dense_family import factors_of
from quantkit.kernels.work import FORMATS, Work


@pytest.mark.parametrize("form", FORMATS)
def test_a_peer_in_bf16_multiplies_the_values_that_the_codes_stand_for(form: str) -> None:
    work = Work(m=3, n=128, k=128, format=form)
    operands = exact_operands(work)
    a, w = peers.bf16_values(operands)
    assert a.dtype == w.dtype == ml_dtypes.bfloat16
    if form in ("int8", "fp8"):
        row, column, codes = factors_of(operands)
        want = (operands.activations.astype(np.float32) * row) @ (codes.astype(np.float32).T * column)
        np.testing.assert_allclose(a.astype(np.float32) @ w.astype(np.float32).T, want, rtol=1e-6)


def test_without_torch_the_baseline_is_cublas_by_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "cublas_bf16", lambda a, w, m: asked.append((*a.shape, *w.shape, m)))
    found, refused = peers.peers_of(
        Work(m=600, n=8, k=16, format="int8"), random_operands(Work(m=600, n=8, k=16, format="int8"))
    )
    assert asked == [(512, 16, 8, 16, 600)]
    assert (list(found), refused) == (["cuBLAS bf16"], {})
    assert peers.missing_peers() == ["torch", "triton", "nvmath-python", "humming-kernels"]


def test_a_peer_that_cannot_be_set_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(x: object) -> dict[str, object]:
        raise ValueError("needs K % 128 == 0\nsomewhere")

    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    monkeypatch.setattr(peers, "TorchOperands", lambda work, operands: None)
    monkeypatch.setattr(peers, "cublas_bf16", lambda a, w, m: lambda: None)
    monkeypatch.setattr(
        peers,
        "PEERS",
        (
            peers.Peer(name="strict", module="strict", calls=fail),
            peers.Peer(name="fine", module="fine", calls=lambda x: {"Fine": lambda: None}),
        ),
    )
    work = Work(m=1, n=8, k=16, format="int8")
    found, refused = peers.peers_of(work, random_operands(work))
    assert refused == {"strict": "ValueError: needs K % 128 == 0"}
    assert list(found) == ["Fine", "cuBLAS bf16"]
    assert found["Fine"].framework == "torch"


def test_with_a_torch_that_cannot_use_the_gpu_the_baseline_is_cublas_by_cupy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(work: object, operands: object) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    monkeypatch.setattr(peers, "TorchOperands", broken)
    monkeypatch.setattr(peers, "cublas_bf16", lambda a, w, m: lambda: None)
    work = Work(m=1, n=8, k=16, format="int8")
    found, refused = peers.peers_of(work, random_operands(work))
    assert list(found) == ["cuBLAS bf16"]
    assert found["cuBLAS bf16"].framework == "cupy"
    assert refused == {"torch": "AssertionError: Torch not compiled with CUDA enabled"}


def test_a_baseline_that_cannot_be_set_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(a: object, w: object, m: int) -> None:
        raise MemoryError

    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "cublas_bf16", full)
    work = Work(m=1, n=8, k=16, format="int8")
    assert peers.peers_of(work, random_operands(work)) == ({}, {"cuBLAS bf16": "MemoryError"})

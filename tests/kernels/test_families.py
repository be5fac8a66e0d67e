"""What families hand to the kernels: the weights that benchmarks make are weights that kernels take."""

from typing import Any

import numpy as np
import pytest

from quantkit.bench.operands import exact_operands, random_operands
from quantkit.formats.quantize import QTensor
from quantkit.kernels import dense_family, gemm
from quantkit.kernels.emulator import find_compiler
from quantkit.kernels.families import FAMILIES, family_of
from quantkit.kernels.gpus import GPUS, get_gpu
from quantkit.kernels.w4.layout import pack4
from quantkit.kernels.work import FORMATS, Work


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_weights_of_dense_formats_are_packed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[str] = []
    monkeypatch.setattr(gemm, "pack_codes", lambda values, scale, name, arch: packed.append(name))
    weight = random_operands(Work(m=1, n=8, k=16, format=form)).weight
    assert isinstance(weight, QTensor)
    gemm.pack_weight(weight)
    assert packed == [dense_family.FORMATS[form]]


@pytest.mark.parametrize("form", ["int4", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("make", [random_operands, exact_operands])
def test_weights_of_four_bits_are_packed(form: str, make: Any) -> None:
    work = Work(m=1, n=64, k=256, format=form)
    weight = make(work).weight
    assert isinstance(weight, QTensor)
    assert (pack4(weight).layout.n, pack4(weight).layout.group) == (64, FORMATS[form].group)


def test_a_work_goes_to_one_family_alone() -> None:
    for gpu in GPUS.values():
        for form in FORMATS:
            family = family_of(Work(m=4, n=64, k=256, format=form), gpu)
            assert family is None or family in FAMILIES


@pytest.mark.skipif(find_compiler() is None, reason="the emulator needs a C++ compiler")
@pytest.mark.parametrize(
    ("gpu", "form"),
    [
        ("h200", "int8"),
        ("h200", "fp8"),
        ("h200", "int4"),
        ("h200", "nvfp4"),
        ("h200", "mxfp4"),
        ("h200", "w4a8"),
        ("h200", "mxfp4-fp8"),
        ("l40s", "mxfp4-fp8"),
        ("h200", "fp8-block"),
        ("h200", "mxfp8"),
        ("a100", "int8"),
        ("a100", "bf16"),
        ("a100", "int4"),
        ("rtx5090", "mxfp4"),
        ("rtx5090", "mxfp8"),
        ("rtx5090", "mxfp4-fp4"),
        ("rtx5090", "nvfp4-fp4"),
    ],
)
@pytest.mark.parametrize("m", [3, 40])
def test_emulated_products_of_whole_numbers_are_exact(gpu: str, form: str, m: int) -> None:
    work = Work(m=m, n=40, k=160, format=form, bias=True, relu=True)
    family = family_of(work, get_gpu(gpu))
    assert family is not None and family.can_emulate
    operands = exact_operands(work)
    tile = family.predict(work, get_gpu(gpu)).configuration
    np.testing.assert_array_equal(family.emulate(work, operands, tile), family.reference(work, operands))

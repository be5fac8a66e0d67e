"""The kernels that there are: a table to which each further one adds one entry, those to be preferred first."""

from quantkit.kernels.family import Family, Prediction
from quantkit.kernels.gemm_family import GemmFamily
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.mma_family import MmaFamily
from quantkit.kernels.w4_family import W4Family
from quantkit.kernels.work import Work

FAMILIES: tuple[Family, ...] = (GemmFamily(), MmaFamily(), W4Family())


def best_family(work: Work, gpu: Gpu) -> tuple[Family, Prediction] | None:
    """Return the first family that takes a work, with what it would do; None where no kernel takes it."""
    family = next((family for family in FAMILIES if family.takes(work, gpu)), None)
    return None if family is None else (family, family.predict(work, gpu))


def architectures() -> tuple[str, ...]:
    """Return those that any family can be compiled for."""
    return tuple(sorted({arch for family in FAMILIES for arch in family.architectures}))

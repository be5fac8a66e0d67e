"""The kernels that there are: a table to which each further one adds one entry, those to be preferred first."""

from quantkit.kernels.blocks.family import BlocksFamily
from quantkit.kernels.family import Family, Prediction
from quantkit.kernels.gemm_family import GemmFamily
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.mma_family import MmaFamily
from quantkit.kernels.mx.family import MxFamily
from quantkit.kernels.w4.family import W4Family
from quantkit.kernels.w4.mma_family import W4MmaFamily
from quantkit.kernels.work import Work

FAMILIES: tuple[Family, ...] = (
    GemmFamily(),
    MmaFamily(),
    BlocksFamily(),
    MxFamily(),
    W4Family(),
    W4MmaFamily(),
)


def family_of(work: Work, gpu: Gpu) -> Family | None:
    """Return the family that computes a work: the first that takes it; None where no kernel does."""
    return next((family for family in FAMILIES if family.takes(work, gpu)), None)


def best_family(work: Work, gpu: Gpu) -> tuple[Family, Prediction] | None:
    """Return the family that computes a work, with what it would do; None where no kernel does."""
    family = family_of(work, gpu)
    return None if family is None else (family, family.predict(work, gpu))


def architectures() -> tuple[str, ...]:
    """Return those that any family can be compiled for."""
    return tuple(sorted({arch for family in FAMILIES for arch in family.architectures}))

"""The kernels that there are: a table to which each further one adds one entry."""

from quantkit.kernels.family import Family, Prediction
from quantkit.kernels.gemm_family import GemmFamily
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.work import Work

FAMILIES: tuple[Family, ...] = (GemmFamily(),)


def best_family(work: Work, gpu: Gpu) -> tuple[Family, Prediction] | None:
    """Return the family predicted fastest for a work, with what it would do; None where no kernel takes it."""
    found = [(family, family.predict(work, gpu)) for family in FAMILIES if family.takes(work, gpu)]
    return min(found, key=lambda pair: pair[1].time_us, default=None)


def architectures() -> tuple[str, ...]:
    """Return those that any family can be compiled for."""
    return tuple(sorted({arch for family in FAMILIES for arch in family.architectures}))

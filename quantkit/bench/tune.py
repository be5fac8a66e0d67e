"""`quantkit tune` from Python: time the best few configurations of every product, and remember the fastest."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantkit.bench.cases import Case, cases_of_shapes
from quantkit.bench.measuring import compile_ahead
from quantkit.bench.opening import products_of
from quantkit.cache import CalibrationCache
from quantkit.errors import SpecError
from quantkit.graph import ModelLike
from quantkit.kernels.families import family_of
from quantkit.kernels.family import Family
from quantkit.kernels.gpus import Gpu
from quantkit.kernels.present import present_gpu
from quantkit.kernels.timing import Contender, GpuStopwatch, Stopwatch, Timing, time_in_turns
from quantkit.tables import Cell, Table


@dataclass(frozen=True, kw_only=True)
class TunedProduct:
    """What tuning found for one product.

    first: the configuration modelled best, and its time; fastest: the one seen fastest. refused: by configuration.
    """

    case: Case
    kernel: str
    first: str
    first_us: float | None
    fastest: str
    fastest_us: float
    tried: int
    refused: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What tuning a model's products found; it lies in the timing cache already.

    untuned: why nothing was timed of the others, by their sizes and format, or by the nodes that are no products.
    """

    model: str | None
    gpu: Gpu
    products: tuple[TunedProduct, ...]
    untuned: Mapping[str, str] = field(default_factory=dict)

    def table(self) -> Table:
        """Return a row a product: the model's choice, the fastest, and what that gains."""
        rows: list[tuple[Cell, ...]] = []
        for found in self.products:
            work = found.case.work
            gain = None if found.first_us is None else f"{found.first_us / found.fastest_us:.2f}"
            rows.append(
                (
                    f"{work.m} × {work.n} × {work.k}",
                    work.format,
                    found.tried,
                    found.first,
                    None if found.first_us is None else float(f"{found.first_us:.4g}"),
                    found.fastest,
                    float(f"{found.fastest_us:.4g}"),
                    gain,
                )
            )
        return Table(("m × n × k", "format", "tried", "modelled best", "µs", "fastest", "µs", "gain"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON would hold it."""
        return {
            "model": self.model,
            "gpu": self.gpu.name,
            "products": [
                {
                    "m": x.case.work.m, "n": x.case.work.n, "k": x.case.work.k, "format": x.case.work.format,
                    "kernel": x.kernel, "tried": x.tried, "modelled_best": x.first, "modelled_best_us": x.first_us,
                    "fastest": x.fastest, "fastest_us": x.fastest_us, "refused": dict(x.refused),
                }
                for x in self.products
            ],
            "untuned": dict(self.untuned),
        }  # fmt: skip

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def tune_model(
    model: ModelLike | None = None,
    cache: CalibrationCache | str | os.PathLike[str] | None = None,
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    formats: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 64),
    dims: Mapping[str, int] | None = None,
    depth: int = 8,
    repeats: int = 15,
    pause_ms: float = 2.0,
    on_product: Callable[[int, int], object] = lambda done, count: None,
) -> Tuning:
    """Time the `depth` configurations modelled best for every product, and write the fastest into the timing cache.

    Args:
        model, cache, shapes, formats, batches, dims, repeats, pause_ms, on_product: as for `bench_model`.
        depth: configurations to time of each kernel.

    Raises:
        KernelError: no GPU is here.
        FileError: the timing cache cannot be written.
    """
    gpu = present_gpu()
    if shapes is not None:
        if model is not None:
            raise SpecError("tune: a model and shapes were given; give one of them.")
        products, name = cases_of_shapes(shapes, formats or ("int8", "fp8")), None
    else:
        products, name = products_of(model, cache, formats=formats, batches=batches, dims=dims)
    jobs = [
        (case, family, list(family.ranked(case.work, gpu))[:depth])
        for case in products.cases
        if (family := family_of(case.work, gpu)) is not None
    ]
    untuned = {
        _words(case): f"no kernel multiplies it on {gpu.architecture}"
        for case in products.cases
        if family_of(case.work, gpu) is None
    }
    compile_ahead([(f, case.work, c) for case, f, configurations in jobs for c in configurations], gpu)
    watch = GpuStopwatch()
    found = []
    for index, (case, family, configurations) in enumerate(jobs):
        tuned = tune_case(
            case, family, configurations, gpu, repeats=repeats, pause_s=pause_ms / 1e3, stopwatch=watch
        )
        if tuned is None:
            untuned[_words(case)] = f"none of {len(configurations)} configurations runs"
        else:
            found.append(tuned)
        on_product(index + 1, len(jobs))
    untuned |= {f"{left.op_type} {left.node}": left.reason for left in products.left}
    return Tuning(model=name, gpu=gpu, products=tuple(found), untuned=untuned)


def _words(case: Case) -> str:
    return f"{case.work.m} × {case.work.n} × {case.work.k} {case.work.format}"


def tune_case(
    case: Case,
    family: Family,
    configurations: Sequence[Any],
    gpu: Gpu,
    *,
    repeats: int,
    pause_s: float,
    stopwatch: Stopwatch,
) -> TunedProduct | None:
    """Time configurations of one product in turns and remember the fastest; None where not one of them runs."""
    stopwatch.release()
    operands = case.operands()
    contenders = {
        str(i): Contender(run=family.prepare(case.work, operands, configuration))
        for i, configuration in enumerate(configurations)
    }
    times, refused = time_in_turns(
        contenders, repeats=repeats, pause_s=pause_s, seed=case.work.m, stopwatch=stopwatch
    )
    if not times:
        return None
    timed: dict[Any, Timing] = {configurations[int(i)]: timing for i, timing in times.items()}
    family.remember(case.work, gpu, timed)
    fastest = min(timed, key=lambda c: timed[c].median_us)
    first = configurations[0]
    return TunedProduct(
        case=case,
        kernel=family.name,
        first=family.describe(first),
        first_us=timed[first].median_us if first in timed else None,
        fastest=family.describe(fastest),
        fastest_us=timed[fastest].median_us,
        tried=len(configurations),
        refused={family.describe(configurations[int(i)]): reason for i, reason in refused.items()},
    )

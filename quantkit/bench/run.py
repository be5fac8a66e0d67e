"""`quantkit bench` from Python: the products of a model, or of shapes, predicted, emulated or measured."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantkit.bench.cases import Case, cases_of_shapes
from quantkit.bench.cropping import cropped
from quantkit.bench.measuring import compile_ahead, facts, measured
from quantkit.bench.opening import products_of
from quantkit.bench.operands import random_operands
from quantkit.bench.peers import missing_peers
from quantkit.bench.result import Benchmark
from quantkit.bench.row import BenchRow, relative_error
from quantkit.cache import CalibrationCache
from quantkit.data import ImagePreprocessing
from quantkit.errors import KernelError, SpecError
from quantkit.graph import ModelLike
from quantkit.kernels.cublas import cublas_bf16_us
from quantkit.kernels.families import best_family
from quantkit.kernels.family import Family, Prediction
from quantkit.kernels.gpus import Gpu, get_gpu
from quantkit.kernels.present import present_gpu, why_no_gpu
from quantkit.kernels.work import Work

# What the emulator runs of a product: some seconds for a whole model.
_EMULATED = {"m": 48, "n": 192, "k": 4096}


def bench_model(
    model: ModelLike | None = None,
    cache: CalibrationCache | str | os.PathLike[str] | None = None,
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    formats: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 64),
    data: object = None,
    image: ImagePreprocessing | None = None,
    mapping: Mapping[str, str] | None = None,
    dims: Mapping[str, int] | None = None,
    device_model: str = "h200",
    dry_run: bool = False,
    emulate: bool = False,
    peers: bool = True,
    repeats: int = 25,
    pause_ms: float = 2.0,
    on_product: Callable[[int, int], object] = lambda done, count: None,
) -> Benchmark:
    """Time every product of matrices in a model on the GPU that is here, beside cuBLAS and what else is installed.

    Without a GPU, or with `dry_run`, nothing runs: the result says which kernel and tile would be chosen, how long
    they are modelled to take, and what the roofline of `device_model` allows.

    Args:
        model: a float or quantized model; None for the one that `cache` was made from.
        cache: a calibration cache or its path; its data give the activations. None for the one *.calib of the current
            folder, where there is one.
        shapes: (m, n, k), D[m, n] = A[m, k] @ W[n, k].T, instead of a model.
        formats: names of formats (int8, fp8, bf16, int4 …); None for what a quantized file stores, else int8 and fp8.
        batches: samples at a time; the rows of a product grow with them.
        data: what to run the model on instead of the cache's data. image, mapping: as for `calibrate_model`.
        dims: sizes of free dimensions by their symbol, for a model without data.
        device_model: a GPU of `kernels.gpus`, for predictions.
        dry_run: predict, also where there is a GPU.
        emulate: run a corner of every product on the CPU emulator and compare it with the oracle.
        peers: also time what others have (torch, Triton …).
        repeats: launches of each contender; the median is told.
        pause_ms: rest after each launch.
        on_product: called with how many products are done, and their number.

    Raises:
        ModelError, DataError, CacheError: the model, the data or the cache do not serve.
        UnknownNameError, SpecError: no such format, GPU or shape.
        KernelError: a kernel failed.
    """
    if shapes is not None and model is not None:
        raise SpecError("bench: a model and shapes were given; give one of them.")
    asked = get_gpu(device_model)
    if shapes is not None:
        products, name = cases_of_shapes(shapes, formats or ("int8", "fp8")), None
    else:
        products, name = products_of(
            model,
            cache,
            formats=formats,
            batches=batches,
            data=data,
            image=image,
            mapping=mapping,
            dims=dims,
        )
    no_gpu = None if dry_run or emulate else why_no_gpu()
    gpu = asked if dry_run or emulate or no_gpu else present_gpu()
    notes = [*products.notes]
    done: list[BenchRow] = []
    chosen = [_choose(case, gpu) for case in products.cases]
    run: Callable[[Case, Family, Prediction], dict[str, Any]]
    if emulate:
        mode, run = "emulated", _emulated
    elif dry_run or no_gpu:
        mode, run = "predicted", _nothing
        why = f"no GPU here ({no_gpu})" if no_gpu else "dry run"
        notes.insert(0, f"{why}: what would run on {gpu.name.upper()}, by the model of time")
    else:
        mode = "measured"
        compile_ahead(chosen_sources(products.cases, chosen, gpu), gpu)
        run = measured(gpu, peers=peers, repeats=repeats, pause_s=pause_ms / 1e3)
        if peers:
            notes += [f"peers that are not installed: {', '.join(missing_peers())}"] * bool(missing_peers())
    for index, (case, found) in enumerate(zip(products.cases, chosen, strict=True)):
        try:
            ran = {} if found is None else run(case, *found)
        except MemoryError as error:
            work = case.work
            raise KernelError(
                f"{work.m}x{work.n}x{work.k} {work.format}: does not fit into memory; "
                "give a smaller --batch or --shapes."
            ) from error
        done.append(_row(case, gpu, found, ran))
        on_product(index + 1, len(products.cases))
    if emulate:
        notes.insert(
            0,
            f"emulated on the CPU: the kernels and tiles for {gpu.name.upper()}, on a corner of each product",
        )
        silent = dict.fromkeys(f[0].name for f in chosen if f is not None and not f[0].can_emulate)
        notes += [f"{', '.join(silent)}: not emulated here"] * bool(silent)
    if any(found is None for found in chosen):
        formats_left = dict.fromkeys(
            c.work.format for c, f in zip(products.cases, chosen, strict=True) if f is None
        )
        notes.append(f"no kernel yet for {', '.join(formats_left)} on {gpu.architecture}")
    told = facts() if mode == "measured" else {}
    if told:
        versions = ", ".join(f"{what} {version}" for what, version in told.items() if what != "device")
        notes.insert(0, f"measured on {told['device']}: {versions}")
    return Benchmark(
        model=name,
        gpu=gpu,
        mode=mode,  # type: ignore[arg-type]
        rows=tuple(done),
        left=products.left,
        notes=tuple(notes),
        facts=told,
    )


def chosen_sources(
    cases: Sequence[Case], chosen: Sequence[tuple[Family, Prediction] | None], gpu: Gpu
) -> list[tuple[Family, Any, Any]]:
    """Return what must be compiled: family, work, configuration."""
    return [
        (found[0], case.work, found[1].configuration)
        for case, found in zip(cases, chosen, strict=True)
        if found is not None
    ]


def _choose(case: Case, gpu: Gpu) -> tuple[Family, Prediction] | None:
    return best_family(case.work, gpu)


def _row(case: Case, gpu: Gpu, found: tuple[Family, Prediction] | None, told: Mapping[str, Any]) -> BenchRow:
    roofline_us, bound = case.work.roofline(gpu)
    prediction = None if found is None else found[1]
    return BenchRow(
        layers=case.layers,
        op_type=case.op_type,
        batch=case.batch,
        calls=case.calls,
        asked=case.asked,
        work=case.work,
        kernel="" if prediction is None else prediction.kernel,
        configuration="" if prediction is None else prediction.words,
        tuned=prediction is not None and prediction.tuned,
        predicted_us=None if prediction is None else prediction.time_us,
        bf16_us=cublas_bf16_us(case.work.m, case.work.n, case.work.k, gpu),
        roofline_us=roofline_us,
        bound=bound,
        **told,
    )


def _nothing(case: Case, family: Family, prediction: Prediction) -> dict[str, Any]:
    return {}


def _corner(work: Work) -> Work:
    """What is emulated of a product of random numbers: no more of them need be drawn."""
    return replace(work, **{side: min(getattr(work, side), size) for side, size in _EMULATED.items()})


def _emulated(case: Case, family: Family, prediction: Prediction) -> dict[str, Any]:
    if not family.can_emulate:
        return {}
    operands = case.operands() if case.layers else random_operands(_corner(case.work))
    work, corner = cropped(case.work, operands, **_EMULATED)
    d = family.emulate(work, corner, prediction.configuration)
    return {
        "error": relative_error(d, family.reference(work, corner)),
        "checked": f"{work.m} × {work.n} × {work.k}",
        "origin": operands.origin,
    }

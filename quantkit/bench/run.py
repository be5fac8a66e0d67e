"""`quantkit bench` from Python: the products of a model, or of shapes, predicted, emulated or measured."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from quantkit.bench.cases import Case, Products, cases_of_model, cases_of_shapes
from quantkit.bench.feeding import fits
from quantkit.bench.measuring import compile_ahead, facts, measured
from quantkit.bench.operands import cropped, random_operands
from quantkit.bench.peers import missing_peers
from quantkit.bench.result import Benchmark
from quantkit.bench.row import BenchRow, relative_error
from quantkit.cache import CalibrationCache, find_cache
from quantkit.data import ImagePreprocessing, SampleSource, open_data
from quantkit.errors import CacheError, KernelError, ModelError, QuantkitError, SpecError
from quantkit.graph import Graph, ModelLike, load_graph
from quantkit.graph.clean import NEWEST_OPSET, quiet
from quantkit.kernels.cublas import cublas_bf16_us
from quantkit.kernels.families import best_family
from quantkit.kernels.family import Family, Prediction
from quantkit.kernels.gpus import Gpu, get_gpu
from quantkit.kernels.present import present_gpu, why_no_gpu
from quantkit.kernels.work import Work
from quantkit.runtime import Session, reason

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
        products, name = _of_model(model, cache, formats, batches, data, image, mapping, dims or {})
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


def products_of(
    model: ModelLike | None,
    cache: CalibrationCache | str | os.PathLike[str] | None,
    *,
    formats: Sequence[str] | None,
    batches: Sequence[int],
    dims: Mapping[str, int] | None = None,
) -> tuple[Products, str]:
    """Return the products of a model, as `bench_model` runs them, and its name."""
    return _of_model(model, cache, formats, batches, None, None, None, dims or {})


def chosen_sources(
    cases: Sequence[Case], chosen: Sequence[tuple[Family, Prediction] | None], gpu: Gpu
) -> list[tuple[Family, Any, Any]]:
    """Return what must be compiled: family, work, configuration."""
    return [
        (found[0], case.work, found[1].configuration)
        for case, found in zip(cases, chosen, strict=True)
        if found is not None
    ]


def _of_model(
    model: ModelLike | None,
    cache: CalibrationCache | str | os.PathLike[str] | None,
    formats: Sequence[str] | None,
    batches: Sequence[int],
    data: object,
    image: ImagePreprocessing | None,
    mapping: Mapping[str, str] | None,
    dims: Mapping[str, int],
) -> tuple[Products, str]:
    if min(batches, default=0) < 1:
        raise SpecError(f"batch {', '.join(map(str, batches))}: give sizes from 1 up.")
    held = CalibrationCache.load(cache) if isinstance(cache, str | os.PathLike) else cache
    if model is None:
        path = None if held is not None else find_cache(".")
        held = held or CalibrationCache.load(path or "")
        model = held.find_model(path or "cache")
        graph = load_graph(model)
        held.check_model(graph.fingerprint, str(graph.path or graph.name))
    else:
        graph = _opened(model)
        if held is None:
            held = _cache_here(graph)
        elif not _serves(held, graph):
            raise CacheError(
                f"{cache if isinstance(cache, str | os.PathLike) else 'cache'}: is of the model {held.model.name}, "
                f"whose inputs {graph.name} does not have; name the cache of its float model, or leave --cache out."
            )
    source: SampleSource | None = None
    if data is not None:
        source = open_data(data, graph.inputs, image=image, mapping=mapping)
    try:
        found = cases_of_model(graph, formats=formats, batches=batches, cache=held, source=source, dims=dims)
    except (QuantkitError, MemoryError):
        raise
    except Exception as error:
        # A quantized file is read as it lies, which a damaged one does not survive: whose fault it is, ONNX says.
        said = _why_invalid(graph)
        if said is None:
            raise
        raise ModelError(
            f"{graph.path or graph.name}: not a valid ONNX model ({said}); export it again."
        ) from error
    return found, graph.name


def _why_invalid(graph: Graph) -> str | None:
    """What ONNX's checker says of a model, else ONNX Runtime, which knows operators of its own; None for nothing."""
    try:
        onnx.checker.check_model(
            ir.to_proto(graph.model) if graph.path is None else str(graph.path), full_check=True
        )
        Session(graph.path or graph.model, optimize=False)
    except Exception as error:
        return reason(error.__cause__ or error)
    return None


def _opened(model: ModelLike) -> Graph:
    """The graph of a model, also of a file whose scales are of a type that came with a newer operator set (E8M0)."""
    if isinstance(model, str | os.PathLike) and (Path(model) / "config.json").is_file():
        raise ModelError(
            f"{os.fspath(model)}: is a folder for vLLM, which holds no graph to take shapes from; "
            "give the ONNX model that it was made of, and --format."
        )
    if isinstance(model, str | os.PathLike) and os.path.isfile(model):
        try:
            with quiet():
                raw = ir.load(model)
        except Exception:
            # `load_graph` says what is wrong with it.
            return load_graph(model)
        if raw.graph.opset_imports.get("", 0) == NEWEST_OPSET + 1 and any(
            value.dtype == ir.DataType.FLOAT8E8M0 for value in raw.graph.initializers.values()
        ):
            # Nothing but these scales is of that operator set, and they are read here, not run.
            raw.graph.opset_imports[""] = NEWEST_OPSET
            path = Path(model)
            return Graph(load_graph(raw).model, path.stem, path)
    return load_graph(model)


def _cache_here(graph: Graph) -> CalibrationCache | None:
    """The cache of this folder, if it is of a model with these inputs: the float one of a quantized file."""
    try:
        held = CalibrationCache.load(find_cache("."))
    except CacheError:
        # Real activations are a gift: without a cache, or with several, they are drawn otherwise, and that is told.
        return None
    return held if _serves(held, graph) else None


def _serves(held: CalibrationCache, graph: Graph) -> bool:
    """Whether a cache is of this model, or of one with the same inputs, as a quantized file's float model is."""
    return held.model.fingerprint == graph.fingerprint or fits(held.probe, graph.inputs)


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

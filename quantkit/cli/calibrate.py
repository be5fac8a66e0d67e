"""`quantkit calibrate`."""

import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import options

if TYPE_CHECKING:
    from quantkit.cache import CalibrationCache
    from quantkit.graph import LeftAlone, Site
    from quantkit.observing.grams import GramWork


def calibrate(
    model: Annotated[Path, typer.Argument(help="The trained ONNX model.")],
    data: options.Data,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="entropy, minmax, percentile, mse, or methods that protect accuracy, joined by + "
            "(smoothquant+percentile, awq+gptq): recorded as the default of `export`.",
        ),
    ] = "entropy",
    collect: Annotated[
        list[str] | None,
        typer.Option(
            "--collect",
            help="gram: also the products of every layer's inputs with each other, into a .gram file beside the cache. "
            "awq and gptq need them; asked for as --method, they are collected anyway.",
        ),
    ] = None,
    percentile: options.Percentile = None,
    samples: options.Samples = None,
    batch_size: options.BatchSize = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The cache to write (default: <model>.calib here).")
    ] = None,
    mean: options.Mean = None,
    std: options.Std = None,
    image_size: options.Size = None,
    layout: options.Layout = None,
    image_preset: options.ImagePreset = None,
    inputs: options.Inputs = None,
    max_memory: Annotated[
        int | None,
        typer.Option(
            "--max-memory",
            min=1,
            help="MiB that tensors may take while they are reduced (96), and Gram matrices with theirs (1024): what "
            "does not fit is collected in several runs.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="cpu, or cuda: the model runs on a GPU, and its tensors are counted where they lie.",
        ),
    ] = "cpu",
    as_json: options.AsJson = False,
) -> None:
    """Run the float model once over real inputs and keep the statistics of every tensor in a cache.

    The cache serves every method, format and target: the model is not run again to change one.
    """
    from quantkit.cache.gram_file import SUFFIX
    from quantkit.data import data_files
    from quantkit.files import check_output
    from quantkit.graph import find_sites, load_graph
    from quantkit.model_files import model_files
    from quantkit.pipeline import calibrate_model, collect_grams

    path = out or Path(f"{model.stem}.calib")
    collected = path.with_suffix(SUFFIX) if _with_grams(method, collect or []) else None
    for written in (path, collected) if collected else (path,):
        check_output(written, inputs=chain(model_files(model), data_files(data)))
    started = time.perf_counter()
    with options.before_writing():
        graph = load_graph(model)
        sites, left = find_sites(graph)
        image = options.image_preprocessing(mean, std, image_size, layout, image_preset)
        cache = calibrate_model(
            graph,
            data,
            method=method,
            method_options=options.method_options(method, percentile),
            samples=samples,
            batch_size=batch_size,
            image=image,
            mapping=options.mapping(inputs),
            max_memory=None if max_memory is None else max_memory * 2**20,
            device=device,
            progress=not as_json and options.on_terminal(),
        )
        cache.save(path)
    if collected is not None:
        collect_grams(
            graph,
            data,
            collected,
            samples=samples,
            batch_size=batch_size,
            image=image,
            mapping=options.mapping(inputs),
            max_memory=None if max_memory is None else max_memory * 2**20,
            device=device,
            on_work=lambda work: typer.echo(_estimate(work, collected), err=True),
            progress=not as_json and options.on_terminal(),
        )
    seconds = time.perf_counter() - started
    if as_json:
        options.print_json(_as_json(cache, path, collected, seconds, left))
    else:
        _show(cache, path, collected, seconds, _nodes(sites), left, told=image is not None)


def _with_grams(method: str, collect: list[str]) -> bool:
    from quantkit.errors import UnknownNameError
    from quantkit.planning.methods import parse_methods

    words = [word.strip() for given in collect for word in given.split(",")]
    unknown = [word for word in words if word != "gram"]
    if unknown:
        raise UnknownNameError(
            f"--collect {unknown[0]}: there is gram alone beside what is always collected."
        )
    return bool(words) or parse_methods(method).needs_gram


def _estimate(work: "GramWork", path: Path) -> str:
    """What collecting Gram matrices will take."""
    runs = options.count(len(work.passes), "run")
    return (
        f"gram: {len(work.views)} matri{'x' if len(work.views) == 1 else 'ces'}, "
        f"{options.size(work.file_bytes)} in {path}, "
        f"{options.size(work.memory_bytes)} of memory beside the running model, {runs} over the data"
    )


def _nodes(sites: "list[Site]") -> dict[str, int]:
    """How many linear nodes of each operator there are to quantize."""
    return Counter({s.node: s.op_type for s in sites if s.role in ("input", "weight")}.values())


def _show(
    cache: "CalibrationCache",
    path: Path,
    collected: Path | None,
    seconds: float,
    fit: dict[str, int],
    left: "list[LeftAlone]",
    *,
    told: bool,
) -> None:
    """Print what calibration did; `told` is whether an option said how to prepare images."""
    from quantkit.tables import Table

    never = [n for n, s in cache.statistics.items() if s.histogram.finite_count == 0]
    broken = [n for n, s in cache.statistics.items() if s.histogram.nan_count or s.histogram.inf_count]
    rows = [
        ["samples", str(cache.sample_count)],
        *([["images", options.SCALED]] if cache.data["kind"] == "images" and not told else []),
        ["can be quantized", ", ".join(f"{count} {op_type}" for op_type, count in sorted(fit.items()))],
        *(
            [f"stays in float: {count} {op_type}", reason]
            for (op_type, reason), count in sorted(Counter((x.op_type, x.reason) for x in left).items())
        ),
        ["tensors observed", str(len(cache.statistics))],
        ["seconds", f"{seconds:.1f}"],
        ["cache", f"{path} ({options.size(path.stat().st_size)})"],
        *([["gram", f"{collected} ({options.size(collected.stat().st_size)})"]] if collected else []),
    ]
    if broken:
        rows.append(["stay in float: NaN or infinity", ", ".join(broken)])
    if never:
        rows.append(["stay in float: no value seen", ", ".join(never)])
    typer.echo(Table(("calibrated", cache.model.name), rows).text())
    if cache.sample_count < 32:
        typer.echo(
            f"warning: {options.count(cache.sample_count, 'sample')}: few; some hundred make better ranges",
            err=True,
        )
    options.print_exports(path)


def _as_json(
    cache: "CalibrationCache", path: Path, collected: Path | None, seconds: float, left: "list[LeftAlone]"
) -> dict[str, object]:
    return {
        "cache": str(path),
        "size_bytes": path.stat().st_size,
        "gram": None if collected is None else str(collected),
        "model": cache.model.path,
        "fingerprint": cache.model.fingerprint,
        "samples": cache.sample_count,
        "method": cache.method,
        "seconds": round(seconds, 3),
        "left_in_float": [{"node": x.node, "op_type": x.op_type, "reason": x.reason} for x in left],
        "tensors": cache.summary(),
    }

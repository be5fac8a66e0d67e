"""`quantkit calibrate`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import options

if TYPE_CHECKING:
    from quantkit.cache import CalibrationCache


def calibrate(
    model: Annotated[Path, typer.Argument(help="The trained ONNX model.")],
    data: options.Data,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="entropy, minmax, percentile, mse: recorded as the default of `export`."
        ),
    ] = "entropy",
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
        typer.Option("--max-memory", min=1, help="MiB that tensors may take while they are reduced (96)."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Run the float model once over real inputs and keep the statistics of every tensor in a cache.

    The cache serves every method, format and target: the model is not run again to change one.
    """
    from quantkit.files import check_output
    from quantkit.pipeline import calibrate_model

    path = out or Path(f"{model.stem}.calib")
    check_output(path, inputs=[model])
    started = time.perf_counter()
    cache = calibrate_model(
        model,
        data,
        method=method,
        method_options=options.method_options(method, percentile),
        samples=samples,
        batch_size=batch_size,
        image=options.image_preprocessing(mean, std, image_size, layout, image_preset),
        mapping=options.mapping(inputs),
        max_memory=None if max_memory is None else max_memory * 2**20,
        progress=not as_json,
    )
    cache.save(path)
    seconds = time.perf_counter() - started
    if as_json:
        options.print_json(_as_json(cache, path, seconds))
    else:
        _show(cache, path, seconds)


def _show(cache: "CalibrationCache", path: Path, seconds: float) -> None:
    from quantkit.tables import Table

    never = [n for n, s in cache.statistics.items() if s.histogram.finite_count == 0]
    broken = [n for n, s in cache.statistics.items() if s.histogram.nan_count or s.histogram.inf_count]
    rows = [
        ["samples", str(cache.sample_count)],
        ["tensors observed", str(len(cache.statistics))],
        ["seconds", f"{seconds:.1f}"],
        ["cache", f"{path} ({options.size(path.stat().st_size)})"],
    ]
    if broken:
        rows.append(["stay in float: NaN or infinity", ", ".join(broken)])
    if never:
        rows.append(["stay in float: no value seen", ", ".join(never)])
    typer.echo(Table(("calibrated", cache.model.name), rows).text())
    if cache.sample_count < 32:
        typer.echo(
            f"warning: {cache.sample_count} samples are few; some hundred make better ranges", err=True
        )
    options.print_exports(path)


def _as_json(cache: "CalibrationCache", path: Path, seconds: float) -> dict[str, object]:
    return {
        "cache": str(path),
        "size_bytes": path.stat().st_size,
        "model": cache.model.path,
        "fingerprint": cache.model.fingerprint,
        "samples": cache.sample_count,
        "method": cache.method,
        "seconds": round(seconds, 3),
        "tensors": cache.summary(),
    }

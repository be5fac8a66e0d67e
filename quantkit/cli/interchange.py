"""`quantkit cache import` and `quantkit cache export`: the calibration files of other tools."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import options


def import_(
    file: Annotated[
        Path,
        typer.Argument(help="A TensorRT .cache, ONNX Runtime's calibration table, or AIMET's encodings."),
    ],
    model: Annotated[Path, typer.Option("--model", help="The float model that it was calibrated with.")],
    format: Annotated[
        str | None,
        typer.Option("--format", help="tensorrt, ort or aimet (default: told from the content)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The cache to write (default: <model>.calib here).")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a cache of the ranges that another tool found; `quantkit export` then uses them as they are."""
    from quantkit.cache import CalibrationCache
    from quantkit.errors import FileError
    from quantkit.files import check_output
    from quantkit.interchange import import_cache
    from quantkit.model_files import model_files

    path = out or Path(f"{model.stem}.calib")
    check_output(path, inputs=[*model_files(model), file])
    with options.before_writing():
        found = import_cache(file, model, format=format)
        if out is None and path.exists() and not CalibrationCache.load(path).ranges:
            raise FileError(f"{path}: is there, and was measured; name another file to write with --out.")
        found.cache.save(path)
    if as_json:
        options.print_json({"cache": str(path), **found.to_dict()})
        return
    typer.echo(found.table().text())
    typer.echo(f"\nwrote {path}: fixed ranges from {file} ({found.cache.data['written_by']})")
    options.print_exports(path)


def export(
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="tensorrt; ort (text), ort-json, ort-flatbuffers; aimet (1.0.0), aimet-0.6.1.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    path: Annotated[Path | None, typer.Argument(help="The cache (default: the one *.calib here).")] = None,
    method: options.Method = None,
    percentile: options.Percentile = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="The float model (default: the one the cache was made from)."),
    ] = None,
    trt: Annotated[
        str | None,
        typer.Option("--trt", help="For tensorrt: the version that the file names, without dots (8601)."),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            "--algorithm",
            help="For tensorrt: EntropyCalibration2 (what trtexec looks for), EntropyCalibration, MinMaxCalibration "
            "or LegacyCalibration.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write the ranges of a cache as another tool's calibration file, solved for INT8 as TensorRT means it.

    aimet's encodings hold the same ranges: symmetric where a range is ±amax, else asymmetric (unsigned codes from the
    range's minimum or zero to its maximum or zero), so that their scales are not TensorRT's.
    """
    from quantkit.cache import CalibrationCache, find_cache
    from quantkit.files import check_output
    from quantkit.interchange import export_cache
    from quantkit.model_files import model_files
    from quantkit.tables import Table

    cache = path or find_cache(Path())
    held = CalibrationCache.load(cache)
    if model is None and not held.ranges:
        model = held.find_model(cache)
    check_output(
        out, inputs=[cache, *(model_files(model or held.model.path) if model or held.model.path else ())]
    )
    with options.before_writing():
        written = export_cache(
            held,
            out,
            format=format,
            method=method,
            method_options=options.method_options(method or held.method, percentile),
            model=model,
            trt=trt,
            algorithm=algorithm,
        )
    if as_json:
        options.print_json(written.to_dict())
        return
    if written.left_out:
        typer.echo(Table(("left out", "why"), list(written.left_out.items())).text() + "\n")
    typer.echo(f"wrote {out}: ranges of {len(written.ranges)} tensors, method {written.method}")

"""`quantkit export`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import options

if TYPE_CHECKING:
    from quantkit.cache import CalibrationCache
    from quantkit.exported import Exported


def export(
    model: Annotated[
        Path | None, typer.Argument(help="The float model (default: the one the cache was made from).")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="The calibration cache (default: the one *.calib here).")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="INT8 activations, INT8 weights per channel.")] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="FP8 (E4M3) activations, FP8 weights per channel.")
    ] = False,
    int4: Annotated[
        bool,
        typer.Option(
            "--int4", help="INT4 weights of MatMul and Gemm in groups of 128; needs no calibration."
        ),
    ] = False,
    group: Annotated[
        int | None,
        typer.Option(
            "--group", min=1, help="For --int4: weights that share a scale (128; 64 and 32 lose less)."
        ),
    ] = None,
    method: options.Method = None,
    percentile: options.Percentile = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="tensorrt: Q/DQ as TensorRT 10 and 11 read it. ort: right on ONNX Runtime's CUDA and CPU providers. "
            "ort-cpu: uint8, placed so that the CPU provider runs integers from end to end.",
        ),
    ] = "tensorrt",
    everything: Annotated[
        bool,
        typer.Option(
            "--all", help="Quantize also what stays in float by default (FP8: narrow convolutions, Gemm)."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write (default: <model>.<int8|fp8>[.<target>].onnx here)."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a quantized model from a calibration cache, check it, and say what was quantized and what was not."""
    from quantkit.cache import CalibrationCache, find_cache
    from quantkit.errors import SpecError
    from quantkit.exporting import export_model
    from quantkit.files import check_output

    chosen = [name for name, given in (("int8", int8), ("fp8", fp8), ("int4", int4)) if given]
    if len(chosen) != 1:
        raise SpecError("export: give one of --int8, --fp8 and --int4.")
    # Weights alone need the model and nothing else.
    if cache is None and (chosen != ["int4"] or model is None):
        cache = find_cache(Path())
    held = None if cache is None else CalibrationCache.load(cache)
    if out is not None:
        check_output(out, inputs=[cache])
    if model is None and held is not None and cache is not None:
        model = held.find_model(cache)
    assert model is not None, "without a model there is a cache"
    with options.before_writing():
        exported = export_model(
            model,
            held,
            preset=chosen[0],
            method=method,
            method_options=options.method_options(method or (held.method if held else None), percentile),
            target=target,
            everything=everything,
            group=group,
            out=out,
        )
    if as_json:
        options.print_json(exported.to_dict())
    else:
        _show(exported, held, model, cache)


def _show(exported: "Exported", held: "CalibrationCache | None", model: Path, cache: Path | None) -> None:
    plan = exported.plan
    typer.echo(exported.table().text())
    share = exported.size_bytes / max(exported.float_size_bytes, 1)
    typer.echo(
        f"\nwrote {exported.path}: {plan.preset} for {plan.target}, method {plan.method}, "
        f"{options.size(exported.size_bytes)} ({share:.0%} of the float weights' "
        f"{options.size(exported.float_size_bytes)})"
    )
    if exported.verification is not None:
        found = exported.verification
        agrees = "exactly" if found.plan_sqnr_db == float("inf") else f"to {found.plan_sqnr_db:.0f} dB"
        typer.echo(f"checked: opened again, run once; follows its plan {agrees}")
    for warning in exported.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"\nnext: {shlex.join(_evaluation(exported.path, held, model, cache))}")
    typer.echo("      (better with data that calibration did not see, and their --labels)")


def _evaluation(path: Path, held: "CalibrationCache | None", model: Path, cache: Path | None) -> list[str]:
    """The words of a command that evaluates the written file on the data of the calibration."""
    if held is None or cache is None:
        return ["quantkit", "evaluate", str(model), str(path), "--data", "DATA"]
    # A merged cache has a list of them.
    paths = held.data.get("path", [])
    there = [Path(p) for p in ([paths] if isinstance(paths, str) else paths) if Path(p).exists()]
    words = ["quantkit", "evaluate", str(model), str(path)]
    words += ["--data", options.short(there[0]) if there else "DATA"]
    for name, key in held.data.get("mapping", {}).items():
        words += ["--input", f"{name}={key}"]
    if "preprocessing" in held.data and list(Path().glob(f"*{cache.suffix}")) != [cache]:
        words += ["--cache", str(cache)]
    return words

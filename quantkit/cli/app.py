"""The commands, put together."""

from typing import Annotated

import typer

from quantkit import __version__
from quantkit.cli import bench, cache, calibrate, evaluate, export, kernels, plugins, sensitivity, tune

app = typer.Typer(
    name="quantkit",
    help="Quantize a trained ONNX model to INT8 or FP8, from a folder of real inputs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("calibrate")(calibrate.calibrate)
app.command("export")(export.export)
app.command("evaluate")(evaluate.evaluate)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("bench")(bench.bench)
app.command("tune")(tune.tune)
app.add_typer(kernels.app, name="kernels")
app.add_typer(cache.app, name="cache")
app.command("plugins")(plugins.plugins)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass

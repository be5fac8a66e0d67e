"""`quantkit tune`."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import options
from quantkit.cli.bench import (
    BESIDE_SHAPES,
    DEFAULT_BATCHES,
    Batches,
    Dims,
    Formats,
    named,
    numbers,
    parse_shapes,
    progress,
    refuse_unheeded,
    sizes,
)


def tune(
    model: Annotated[
        Path | None,
        typer.Argument(help="A float or quantized model (default: the one of the cache in this folder)."),
    ] = None,
    shapes: Annotated[
        str | None, typer.Option("--shapes", help="MxNxK, several with commas, instead of a model.")
    ] = None,
    formats: Formats = None,
    batch: Batches = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="The calibration cache (default: the one *.calib here).")
    ] = None,
    dims: Dims = None,
    depth: Annotated[
        int, typer.Option("--depth", min=1, help="Configurations of each kernel to time.", show_default=True)
    ] = 8,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Launches of each.", show_default=True)
    ] = 15,
    as_json: options.AsJson = False,
) -> None:
    """Time the best few configurations of every product of a model on this GPU, and remember the fastest.

    What is found lies in ~/.cache/quantkit/timings, and is used by every later run on this GPU with this driver and
    compiler.
    """
    from quantkit.bench.tune import tune_model

    batches, asked_sizes = numbers("--batch", batch or DEFAULT_BATCHES), sizes(dims)
    if shapes is not None:
        refuse_unheeded({"--cache": cache, "--batch": batch, "--dim": dims}, BESIDE_SHAPES)
    with progress("tune", shown=not as_json) as on_product:
        found = tune_model(
            model,
            cache,
            shapes=None if shapes is None else parse_shapes(shapes),
            formats=None if formats is None else named("--format", formats),
            batches=batches,
            dims=asked_sizes,
            depth=depth,
            repeats=repeats,
            on_product=on_product,
        )
    if as_json:
        options.print_json(found.to_dict())
    else:
        typer.echo(found.table().text())
        lines = [f"not tuned: {what}, {reason}" for what, reason in found.untuned.items()]
        if lines:
            typer.echo("\n" + "\n".join(lines))

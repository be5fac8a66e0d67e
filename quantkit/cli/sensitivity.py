"""`quantkit sensitivity`."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import options


def sensitivity(
    model: Annotated[Path, typer.Argument(help="The float model.")],
    data: options.Data,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="The calibration cache (default: the one *.calib here).")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="INT8 (the default).")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8.")] = False,
    int4: Annotated[bool, typer.Option("--int4", help="INT4 weights.")] = False,
    w4a8: Annotated[bool, typer.Option("--w4a8", help="INT4 weights, INT8 activations.")] = False,
    preset: Annotated[str | None, typer.Option("--preset", help="Any format of `export`, by name.")] = None,
    group: options.Group = None,
    method: options.Method = None,
    percentile: options.Percentile = None,
    alpha: options.Alpha = None,
    folds: options.FoldsOption = "all",
    everything: Annotated[bool, typer.Option("--all", help="As of `export`.")] = False,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="As of `export`.")] = None,
    target: Annotated[str, typer.Option("--target", help="As of `export`.")] = "tensorrt",
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Use at most so many samples.", show_default=True)
    ] = 64,
    batch_size: options.BatchSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    image_size: options.Size = None,
    layout: options.Layout = None,
    image_preset: options.ImagePreset = None,
    inputs: options.Inputs = None,
    as_json: options.AsJson = False,
) -> None:
    """Quantize every layer alone, and say what the model's output loses by each: the worst first.

    Images are prepared as the cache's were, where no image option is given.
    """
    from quantkit.cache import CalibrationCache, find_cache
    from quantkit.errors import SpecError
    from quantkit.mixed_precision.sensitivity import measure_sensitivity
    from quantkit.planning.planning import Request
    from quantkit.planning.presets import get_preset
    from quantkit.planning.recipe import Recipe, load_recipe

    flags = {"int8": int8, "fp8": fp8, "int4": int4, "w4a8": w4a8}
    chosen = [name for name, given in flags.items() if given] + ([] if preset is None else [preset])
    if len(chosen) > 1:
        raise SpecError(
            f"sensitivity: {' and '.join(f'--{name}' for name in chosen)}: give one format alone."
        )
    name = chosen[0] if chosen else "int8"
    if cache is None and options.needs_cache(get_preset(name), target, method, recipe):
        cache = find_cache(Path())
    held = None if cache is None else CalibrationCache.load(cache)
    image = options.image_preprocessing(mean, std, image_size, layout, image_preset)
    with options.steps("sensitivity", "layer", shown=not as_json) as on_node:
        found = measure_sensitivity(
            model,
            held,
            data,
            request=Request(
                preset=name,
                group=options.group_of(group),
                method=method,
                method_options=options.method_options(method or (held.method if held else None), percentile),
                alpha=options.alpha_of(alpha),
                folds=options.folds_of(folds),
                everything=everything,
                recipe=Recipe() if recipe is None else load_recipe(recipe),
            ),
            target=target,
            samples=samples,
            batch_size=batch_size,
            image=image or (None if held is None else options.image_of(held)),
            mapping=options.mapping(inputs) or (None if held is None else held.data.get("mapping")),
            on_node=on_node,
        )
    if as_json:
        options.print_json(found.to_dict())
        return
    typer.echo(found.table().text())
    typer.echo(
        f"\n{found.model}: {found.preset} for {found.target}, method {found.method}, "
        f"{options.count(found.samples, 'sample')}, each layer alone"
    )

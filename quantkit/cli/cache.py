"""`quantkit cache`: look into calibration caches and put them together."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import interchange, options

app = typer.Typer(
    help="Show and merge calibration caches; read and write those of other tools.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("import")(interchange.import_)
app.command("export")(interchange.export)


@app.command("show")
def show(
    path: Annotated[Path | None, typer.Argument(help="The cache (default: the one *.calib here).")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what a cache holds: its model, its data, and the statistics of every tensor."""
    from quantkit.cache import CalibrationCache, find_cache

    cache = CalibrationCache.load(path or find_cache(Path()))
    if as_json:
        options.print_json(cache.to_dict())
    else:
        typer.echo(str(cache))


@app.command("merge")
def merge(
    paths: Annotated[list[Path], typer.Argument(help="Caches of one model over different samples.")],
    out: Annotated[Path, typer.Option("--out", help="The cache to write.")],
    method: Annotated[
        str | None,
        typer.Option("--method", help="The method to record, where the caches record different ones."),
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Count samples that are in several caches several times.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Add caches of one model up: the result is that of calibrating on all their samples at once, bit for bit.

    Where each has Gram matrices beside it, these are added up too.
    """
    from quantkit.cache import CalibrationCache
    from quantkit.cache.gram_file import SUFFIX, GramFile, merge_grams
    from quantkit.calibrators import get_calibrator
    from quantkit.files import check_output
    from quantkit.planning.methods import parse_methods

    beside = [path.with_suffix(SUFFIX) for path in paths]
    collected = [path for path in beside if path.exists()]
    grams = out.with_suffix(SUFFIX) if collected == beside else None
    check_output(out, inputs=[*paths, *collected])
    if grams is not None:
        check_output(grams, inputs=[*paths, *collected])
    ranges = None if method is None else parse_methods(method).ranges
    if ranges is not None:
        get_calibrator(ranges)
    with options.before_writing():
        first, *others = [CalibrationCache.load(path) for path in paths]
        merged = first.merge(*others, allow_overlap=allow_overlap, method=method)
        merged.save(out)
    if grams is not None:
        merge_grams(grams, [GramFile(path) for path in beside], merged.data)
    if as_json:
        said = {"cache": str(out)} if grams is None else {"cache": str(out), "gram": str(grams)}
        options.print_json({**said, "size_bytes": out.stat().st_size, **merged.to_dict()})
        return
    samples, caches = options.count(merged.sample_count, "sample"), options.count(len(paths), "cache")
    typer.echo(f"wrote {out}: {samples} from {caches}")
    if grams is not None:
        typer.echo(f"wrote {grams}: the Gram matrices of all")
    elif collected:
        lacking = next(cache for cache, path in zip(paths, beside, strict=True) if not path.exists())
        typer.echo(f"warning: {lacking} has no Gram matrices beside it, so none were merged", err=True)
    options.print_exports(out)

"""`quantkit export --budget`: mixed precision for a goal."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from quantkit.cli import options

if TYPE_CHECKING:
    from quantkit.cache import CalibrationCache
    from quantkit.mixed_precision.goals import Try
    from quantkit.planning.planning import Request


def export_within(
    budget: str,
    model: Path,
    held: "CalibrationCache | None",
    request: "Request",
    *,
    data: Path | None,
    labels: str | None,
    samples: int | None,
    target: str,
    target_options: dict[str, Any],
    out: Path | None,
    recipe_out: Path | None,
    as_json: bool,
) -> None:
    """Search, write and evaluate; print what was tried, and end with exit code 1 where the goal was not met."""
    from quantkit.errors import DataError
    from quantkit.mixed_precision.budget import meet_budget
    from quantkit.mixed_precision.goals import tries_table

    if data is None:
        raise DataError(
            f"--budget {budget}: nothing to judge by; give --data, better of what calibration did not see."
        )

    def show(found: "Try") -> None:
        if not as_json:
            typer.echo(f"tried {found.how}: {'met' if found.met else 'not met'}", err=True)

    with options.steps("layers", "layer", shown=not as_json) as on_node:
        result = meet_budget(
            model,
            held,
            data,
            budget,
            request=request,
            target=target,
            target_options=target_options,
            labels=labels,
            samples=samples,
            image=None if held is None else options.image_of(held),
            mapping=None if held is None else held.data.get("mapping"),
            out=out,
            recipe_out=recipe_out,
            on_try=show,
            on_node=on_node,
        )
    if as_json:
        options.print_json(result.to_dict())
    else:
        exported = result.exported
        typer.echo(tries_table(result.tries, result.budget).text())
        typer.echo(f"\n{exported.table().text()}\n\n{result.evaluation}")
        share = exported.size_bytes / max(exported.float_size_bytes, 1)
        typer.echo(
            f"\nwrote {exported.path}: {options.size(exported.size_bytes)}, {share:.0%} of the float weights'"
        )
        if recipe_out is not None:
            typer.echo(f"wrote {recipe_out}: the recipe of it")
        typer.echo(
            f"{result.budget}: {'met' if result.met else 'not met'}, {result.value:.4g}"
            + ("" if result.met else "; this is the best of what was tried")
        )
        for warning in exported.warnings:
            typer.echo(f"warning: {warning}", err=True)
    if not result.met:
        raise typer.Exit(1)

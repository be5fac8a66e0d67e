"""`quantkit kernels build`: compiling ahead what would else be compiled when it is first launched."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import options
from quantkit.cli.bench import DEFAULT_BATCHES, Batches, Dims, Formats, named, numbers, progress, sizes

app = typer.Typer(help="The GPU kernels: compile them ahead.", no_args_is_help=True)


@app.callback()
def _kernels() -> None:
    pass


@app.command("build")
def build(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="Build what this model's products need (default: layers of well-known networks)."
        ),
    ] = None,
    arch: Annotated[
        str, typer.Option("--arch", help="sm_90a …, several with commas; no GPU is needed.")
    ] = "sm_90a",
    formats: Formats = None,
    batch: Batches = None,
    dims: Dims = None,
    cache_folder: Annotated[
        Path | None,
        typer.Option("--cubins", help="The folder of compiled kernels (default: ~/.cache/quantkit/cubin)."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compile kernels for GPU architectures into the cache, on any machine with NVRTC."""
    from quantkit.bench.opening import products_of
    from quantkit.errors import KernelError, SpecError
    from quantkit.kernels.build import build_all, jobs_of, untaken, usual_works
    from quantkit.kernels.compile import DEFAULT_CACHE

    asked = None if formats is None else named("--format", formats)
    batches, asked_sizes = numbers("--batch", batch or DEFAULT_BATCHES), sizes(dims)
    if model is None:
        if batch or dims:
            raise SpecError(
                f"{'--batch' if batch else '--dim'}: is of a model, and none was named; name one."
            )
        works = usual_works(asked)
    else:
        products, _ = products_of(model, None, formats=asked, batches=batches, dims=asked_sizes)
        works = [case.work for case in products.cases]
    folder, archs = cache_folder or DEFAULT_CACHE, named("--arch", arch)
    jobs = jobs_of(works, archs)
    missing = [f"{form} on {architecture}" for form, architecture in untaken(works, archs)]
    if not jobs:
        raise KernelError(
            f"{', '.join(missing)}: no kernel multiplies it; choose another --format or --arch."
        )
    before = set(folder.glob("*.cubin"))
    with progress("build", shown=not as_json) as on_built:
        built = build_all(jobs, cache=folder, on_built=on_built)
    new = [kernel for kernel in built if kernel.cubin not in before]
    spilling = [kernel for kernel in built if kernel.spill_bytes]
    if as_json:
        options.print_json(
            {
                "folder": str(folder),
                "kernels": len(built),
                "compiled": len(new),
                "missing": missing,
                "spilling": [kernel.cubin.name for kernel in spilling],
                "cubins": [kernel.cubin.name for kernel in built],
            }
        )
        return
    there = len(built) - len(new)
    typer.echo(
        f"{folder}: {options.count(len(new), 'kernel')} compiled, {there:,} there already, "
        f"{options.size(sum(k.cubin.stat().st_size for k in built))}"
    )
    if missing:
        typer.echo(f"no kernel: {', '.join(missing)}")
    for kernel in spilling:
        typer.echo(f"warning: {kernel.cubin.name} spills {kernel.spill_bytes} bytes of registers", err=True)

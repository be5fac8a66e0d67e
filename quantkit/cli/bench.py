"""`quantkit bench`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import options

if TYPE_CHECKING:
    from quantkit.bench import Benchmark

Formats = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="int8, fp8, bf16, int4 …, several with commas (default: what a quantized file stores, else int8,fp8).",
    ),
]
Batches = Annotated[
    str | None, typer.Option("--batch", help="Samples at a time, several with commas (default: 1,64).")
]
DEFAULT_BATCHES = "1,64"
BESIDE_SHAPES = "is of a model, and --shapes were given instead; leave one of them out."
# Reasons of peers that a screen has room for.
_REFUSALS = 8
Dims = Annotated[
    list[str] | None,
    typer.Option(
        "--dim", help="NAME=SIZE of a free dimension, for a model without data: --dim sequence=128."
    ),
]


def bench(
    model: Annotated[
        Path | None,
        typer.Argument(help="A float or quantized model (default: the one of the cache in this folder)."),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes", help="MxNxK, several with commas, instead of a model: D = A[M, K] · W[N, K]ᵀ."
        ),
    ] = None,
    formats: Formats = None,
    batch: Batches = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="The calibration cache (default: the one *.calib here).")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="What to run the model on for activations (default: the cache's data)."),
    ] = None,
    mean: options.Mean = None,
    std: options.Std = None,
    image_size: options.Size = None,
    layout: options.Layout = None,
    image_preset: options.ImagePreset = None,
    inputs: options.Inputs = None,
    dims: Dims = None,
    device_model: Annotated[
        str, typer.Option("--device-model", help="The GPU that predictions are for.", show_default=True)
    ] = "h200",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would run, and what the roofline allows.")
    ] = False,
    emulate: Annotated[
        bool,
        typer.Option(
            "--emulate", help="Run a corner of every product on the CPU emulator, against the oracle."
        ),
    ] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Also time torch, Triton …")] = True,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Launches of each.", show_default=True)
    ] = 25,
    pause_ms: Annotated[
        float, typer.Option("--pause-ms", min=0, help="Rest after each launch.", show_default=True)
    ] = 2.0,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw a roofline into this .png, .svg or .pdf.")
    ] = None,
    as_json: options.AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the result as CSV.")] = False,
) -> None:
    """Time every matrix product and convolution of a model on the GPU, beside cuBLAS, against the roofline.

    Without a GPU it says so, and shows which kernels and tiles would be chosen and how long they are modelled to
    take. Exit code 1: a product that was run errs by more than rounding.
    """
    from quantkit.bench.plot import check_plot, save_roofline
    from quantkit.bench.run import bench_model
    from quantkit.data import data_files
    from quantkit.errors import SpecError
    from quantkit.files import check_output
    from quantkit.model_files import model_files

    if as_json and as_csv:
        raise SpecError("bench: --json and --csv were given; choose one.")
    if dry_run and emulate:
        raise SpecError("bench: --dry-run and --emulate were given; choose one.")
    batches, asked_sizes = numbers("--batch", batch or DEFAULT_BATCHES), sizes(dims)
    reading: dict[str, object] = {"--mean": mean, "--std": std, "--size": image_size, "--layout": layout}
    reading |= {"--image-preset": image_preset, "--input": inputs}
    if shapes is not None:
        refuse_unheeded(
            {"--cache": cache, "--data": data, "--batch": batch, "--dim": dims, **reading}, BESIDE_SHAPES
        )
    if data is None:
        refuse_unheeded(reading, "says how to read --data, and none were named; name them, or leave it out.")
    if plot is not None:
        check_plot(plot)
        read = data or _data_of(cache)
        inputs_read = chain(model_files(model) if model else (), data_files(read) if read else (), [cache])
        check_output(plot, inputs=inputs_read)
    with progress("bench", shown=not (as_json or as_csv)) as on_product, options.before_writing():
        found = bench_model(
            model,
            cache,
            shapes=None if shapes is None else parse_shapes(shapes),
            formats=None if formats is None else named("--format", formats),
            batches=batches,
            data=data,
            image=options.image_preprocessing(mean, std, image_size, layout, image_preset),
            mapping=options.mapping(inputs),
            dims=asked_sizes,
            device_model=device_model,
            dry_run=dry_run,
            emulate=emulate,
            peers=peers,
            repeats=repeats,
            pause_ms=pause_ms,
            on_product=on_product,
        )
    if plot is not None:
        save_roofline(found, plot)
    if as_json:
        options.print_json(found.to_dict())
    elif as_csv:
        typer.echo(found.csv(), nl=False)
    else:
        _show(found, plot)
    wrong = [row for row in found.rows if row.is_wrong]
    if wrong:
        work, more = wrong[0].work, f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        typer.echo(
            f"wrong: {wrong[0].kernel} of {work.m}x{work.n}x{work.k} {work.format} errs by {wrong[0].error:.1e}{more}; "
            "report this.",
            err=True,
        )
        raise typer.Exit(1)


def _data_of(cache: Path | None) -> Path | None:
    """What the cache in use was made from, where it is a path: it is read again, and must not be written over."""
    from quantkit.cache import CalibrationCache, find_cache
    from quantkit.errors import CacheError

    try:
        path = CalibrationCache.load(cache or find_cache(".")).data.get("path")
    except CacheError:
        # Without a cache nothing is read; one that is named and damaged is refused when its turn comes.
        return None
    return Path(path) if isinstance(path, str) else None


def _show(found: "Benchmark", plot: Path | None) -> None:
    first, *notes = found.notes
    typer.echo(f"{first}\n")
    typer.echo(found.table().text())
    if any(batch is not None for batch, _ in found.totals()) and found.mode != "emulated":
        typer.echo(f"\n{found.summary().text()}")
    refused = found.refusals()
    lines = [*notes, *refused[:_REFUSALS]]
    if len(refused) > _REFUSALS:
        lines.append(f"and {len(refused) - _REFUSALS} further reasons to refuse; --json has all")
    for (op_type, reason), nodes in _by_reason(found).items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        lines.append(f"not run: {op_type} {nodes[0]}{more}, {reason}")
    if plot is not None:
        lines.append(f"roofline: {plot}")
    if lines:
        typer.echo("\n" + "\n".join(lines))


def _by_reason(found: "Benchmark") -> dict[tuple[str, str], list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for left in found.left:
        groups.setdefault((left.op_type, left.reason), []).append(left.node)
    return groups


def refuse_unheeded(given: Mapping[str, object], why: str) -> None:
    """Refuse options that would not be heeded: they must not look as if they were.

    Args:
        given: option → what was given for it.
        why: why it is not heeded, and the mend.

    Raises:
        SpecError: one was given.
    """
    from quantkit.errors import SpecError

    for option, value in given.items():
        if value:
            raise SpecError(f"{option}: {why}")


def parse_shapes(text: str) -> list[tuple[int, int, int]]:
    """Return M, N, K of words such as 4096x7168x16384,64x8192x8192.

    Raises:
        SpecError: a word that is none.
    """
    from quantkit.errors import SpecError

    found = []
    for word in words(text) or [text]:
        sizes = word.lower().replace("×", "x").split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and 0 < int(size) < 2**31 for size in sizes):
            raise SpecError(f"--shapes {word}: write MxNxK, such as 4096x7168x16384, each below 2^31.")
        m, n, k = map(int, sizes)
        found.append((m, n, k))
    return found


def words(text: str) -> list[str]:
    """Return what stands between commas."""
    return [word for word in text.replace(",", " ").split() if word]


def named(option: str, text: str) -> list[str]:
    """Return the names that stand between commas, one at least.

    Raises:
        SpecError: none stands there.
    """
    from quantkit.errors import SpecError

    found = words(text)
    if not found:
        raise SpecError(
            f"{option} {text!r}: names nothing; give a name, several with commas, or leave it out."
        )
    return found


def numbers(option: str, text: str) -> list[int]:
    """Return whole numbers from 1 up that stand between commas.

    Raises:
        SpecError: something else stands there.
    """
    from quantkit.errors import SpecError

    found = words(text)
    if not found or not all(word.isdecimal() and int(word) > 0 for word in found):
        raise SpecError(f"{option} {text}: write whole numbers from 1 up, with commas, such as 1,64.")
    return [int(word) for word in found]


def sizes(dims: list[str] | None) -> dict[str, int]:
    """Return {symbol: size} from NAME=SIZE words.

    Raises:
        SpecError: a word that is none.
    """
    from quantkit.errors import SpecError

    found = {}
    for word in dims or ():
        name, _, size = word.partition("=")
        if not name or not size.isdecimal() or int(size) < 1:
            raise SpecError(f"--dim {word}: write NAME=SIZE, such as sequence=128.")
        found[name] = int(size)
    return found


@contextmanager
def progress(what: str, *, shown: bool) -> Iterator[Any]:
    """Yield a function that moves a bar: how many are done, of how many."""
    from tqdm import tqdm

    with tqdm(
        desc=what, unit="product", disable=not (shown and options.on_terminal()), leave=False, delay=0.5
    ) as bar:

        def moved(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        yield moved

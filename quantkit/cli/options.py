"""Options that several commands share, and what they mean together."""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

if TYPE_CHECKING:
    from quantkit.cache import CalibrationCache
    from quantkit.data import ImagePreprocessing
    from quantkit.planning.presets import Preset
    from quantkit.planning.rescaling import Folds

Data = Annotated[
    Path,
    typer.Option(
        "--data",
        help="A folder of images, .npy, .npz or .safetensors, or one such file. Arrays are keyed by the inputs' "
        "names; their first axis is samples.",
    ),
]
Samples = Annotated[
    int | None, typer.Option("--samples", min=1, help="Use at most so many samples, from the start.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, help="Samples to run at a time (default: what memory allows, at most 32)."
    ),
]
Mean = Annotated[
    str | None,
    typer.Option("--mean", help="Mean of pixels scaled to 0…1: one number, or one per channel: 0.5,0.5,0.5."),
]
Std = Annotated[
    str | None, typer.Option("--std", help="Standard deviation of pixels scaled to 0…1, likewise.")
]
Size = Annotated[
    str | None, typer.Option("--size", help="Image size, HEIGHTxWIDTH or one number (default: the model's).")
]
Layout = Annotated[
    str | None, typer.Option("--layout", help="NCHW or NHWC (default: found from the model's input).")
]
ImagePreset = Annotated[
    str | None, typer.Option("--image-preset", help="imagenet or 0-1 (0-1 is the default for images).")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", help="NAME=KEY: the model's input NAME is fed with the array KEY."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Ranges of activations: entropy, minmax, percentile, mse, or a plug-in's (see `quantkit plugins`). "
        "Protection, joined by +: equalize; smoothquant or awq; gptq; bias (awq+gptq, smoothquant+percentile). "
        "Where weights alone are quantized also how they are rounded: mse, amax, weighted, output.",
    ),
]
Alpha = Annotated[
    str | None,
    typer.Option(
        "--alpha",
        metavar="0…1|auto",
        help="For --method smoothquant: how much moves to weights (0.7); auto: the best of each layer.",
    ),
]
FoldsOption = Annotated[
    str,
    typer.Option(
        "--folds",
        metavar="norms|all|insert",
        help="Where smoothquant and awq may put scales: into norms alone, into all that takes them exactly, or also "
        "into a Mul of their own.",
    ),
]
Group = Annotated[
    str | None,
    typer.Option(
        "--group",
        metavar="N|channel",
        help="Of integer weights in groups: how many share a scale (128; 64 and 32 lose less).",
    ),
]
Percentile = Annotated[
    float | None,
    typer.Option("--percentile", help="For --method percentile: how much of the data to cover (99.999)."),
]


class NothingWrittenError(Exception):
    """Ctrl-C while nothing had been written."""


@contextmanager
def before_writing() -> Iterator[None]:
    """While the block runs, nothing has been written that would stay; say so to who interrupts it.

    Raises:
        NothingWrittenError: instead of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise NothingWrittenError("nothing was written") from error


# How pictures are prepared where nobody said how.
SCALED = "scaled to 0…1; give --mean and --std if the model was trained otherwise"


def image_preprocessing(
    mean: str | None, std: str | None, size: str | None, layout: str | None, preset: str | None
) -> "ImagePreprocessing | None":
    """Return what the image options say together; None when none was given.

    Raises:
        DataError: an option that cannot be read.
    """
    from dataclasses import replace

    from quantkit.data import ImagePreprocessing

    if mean is None and std is None and size is None and layout is None and preset is None:
        return None
    image = ImagePreprocessing.preset(preset or "0-1")
    changes: dict[str, Any] = {}
    if mean is not None:
        changes["mean"] = _numbers("--mean", mean)
    if std is not None:
        changes["std"] = _numbers("--std", std)
    if size is not None:
        changes["size"] = _height_and_width(size)
    if layout is not None:
        changes["layout"] = layout.upper()
    return replace(image, **changes)


def mapping(inputs: list[str] | None) -> dict[str, str] | None:
    """Return {input: key} from NAME=KEY words.

    Raises:
        DataError: a word without "=".
    """
    from quantkit.errors import DataError

    if not inputs:
        return None
    pairs = [word.partition("=") for word in inputs]
    for name, equals, key in pairs:
        if not (name and equals and key):
            raise DataError(f"--input {name}: write NAME=KEY, the model's input and the array that feeds it.")
    return {name: key for name, _, key in pairs}


def method_options(method: str | None, percentile: float | None) -> dict[str, float]:
    """Return the options of the calibration method.

    Raises:
        SpecError: `percentile` for a method that is another one.
    """
    from quantkit.errors import SpecError

    if percentile is None:
        return {}
    if "percentile" not in (method or "").split("+"):
        raise SpecError(
            f"--percentile {percentile}: only --method percentile has it; add --method percentile."
        )
    return {"percentile": percentile}


def group_of(text: str | None) -> int | Literal["channel"] | None:
    """Return what --group says.

    Raises:
        SpecError: it is neither a number nor "channel".
    """
    from quantkit.errors import SpecError

    if text is None:
        return None
    if text == "channel":
        return "channel"
    if not text.isdecimal() or int(text) < 1:
        raise SpecError(f"--group {text}: neither a number of weights nor channel; give one, such as 32.")
    return int(text)


def needs_cache(preset: "Preset | None", target: str, method: str | None, recipe: Path | None) -> bool:
    """Return whether a format with these methods needs more than the model.

    Args:
        preset: the format; None where a recipe alone says what is quantized.
        target: the name of what will run the model.
        method: as it was asked for.
        recipe: rules, which may name methods of their own.

    Raises:
        UnknownNameError: there is no such target, or no such method.
    """
    from quantkit.export import get_emitter
    from quantkit.planning.methods import parse_methods

    if preset is None or get_emitter(target).target.needs_calibration(preset):
        return True
    # Weights alone need the model and nothing else, unless how they are rounded looks at their inputs.
    alone = preset.activations is None
    return method is not None and recipe is None and parse_methods(method, weights_alone=alone).needs_data


def alpha_of(text: str | None) -> float | Literal["auto"] | None:
    """Return what --alpha says.

    Raises:
        SpecError: it is neither a number from 0 to 1 nor "auto".
    """
    from quantkit.errors import SpecError

    if text is None or text == "auto":
        return "auto" if text else None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise SpecError(f"--alpha {text}: neither a number from 0 to 1 nor auto; give one, such as 0.7.")
    return value


def folds_of(text: str) -> "Folds":
    """Return what --folds says.

    Raises:
        SpecError: there is no such choice.
    """
    from quantkit.errors import SpecError
    from quantkit.planning.rescaling import Folds

    known: dict[str, Folds] = {name: name for name in get_args(Folds)}
    if text not in known:
        raise SpecError(f"--folds {text}: no such choice; choose {', '.join(known)}.")
    return known[text]


def image_of(cache: "CalibrationCache") -> "ImagePreprocessing | None":
    """Return how the samples of a cache were prepared; None where they were no images, or as images are by default."""
    from quantkit.data import ImagePreprocessing

    fields = cache.data.get("preprocessing")
    return None if fields is None else ImagePreprocessing.from_json(fields)


@contextmanager
def steps(what: str, unit: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that moves a bar: how many are done, of how many."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, disable=not (shown and on_terminal()), leave=False, delay=0.5) as bar:

        def moved(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        yield moved


def print_json(value: object) -> None:
    """Print `value` as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_exports(cache: Path) -> None:
    """Print the commands that come after `cache` was written."""
    from quantkit.cache import SUFFIX

    # Where another cache lies beside it, or it lies elsewhere, `export` would not know which is meant.
    alone = list(Path().glob(f"*{SUFFIX}")) == [cache]
    given = "" if alone else f" --cache {shlex.quote(str(cache))}"
    typer.echo(f"\nnext: quantkit export --int8{given}   or   quantkit export --fp8{given}")


def short(path: Path) -> str:
    """Return how to type `path` here: relative to the current folder or absolute, whichever is shorter."""
    try:
        relative = os.path.relpath(path)
    except ValueError:
        # Another drive of Windows.
        return str(path)
    return min(relative, str(path), key=len)


def on_terminal() -> bool:
    """Whether a progress bar would be seen; in a file it would leave its every step."""
    return sys.stderr is not None and sys.stderr.isatty()


def count(number: int, thing: str) -> str:
    """Return so many things in words: 1 sample, 2 samples."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def size(size_bytes: int) -> str:
    """Return a number of bytes as people write it."""
    value, units = float(size_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.3g} {units[0]}"


def _numbers(option: str, text: str) -> tuple[float, ...]:
    from quantkit.errors import DataError

    try:
        return tuple(float(word) for word in text.replace(",", " ").split()) or _refuse(option, text)
    except ValueError:
        raise DataError(
            f"{option} {text}: not numbers; write them with commas, such as 0.5,0.5,0.5."
        ) from None


def _height_and_width(text: str) -> tuple[int, int]:
    from quantkit.errors import DataError

    found = re.fullmatch(r"(\d+)(?:[x,](\d+))?", text.strip().lower())
    if found is None:
        raise DataError(f"--size {text}: write HEIGHTxWIDTH or one number, such as 224x224.")
    return int(found[1]), int(found[2] or found[1])


def _refuse(option: str, text: str) -> tuple[float, ...]:
    raise ValueError(f"{option} {text}")

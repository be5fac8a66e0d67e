"""The command that collects Gram matrices beside a cache: what a method that lacks them tells its user."""

import shlex
from collections.abc import Iterator
from typing import Any

from quantkit.cache.cache import CalibrationCache
from quantkit.graph import Graph


def how_to_collect(held: CalibrationCache | None, graph: Graph) -> str:
    """Return what to do for the Gram matrices of a cache, in one sentence without its end.

    The command prepares the same samples in the same way, and records the same method: it writes the cache anew.
    """
    model = str(graph.path or "MODEL")
    data = {} if held is None else held.data
    path = data.get("path") or "DATA"
    if isinstance(path, list):
        part = shlex.join(
            ["quantkit", "calibrate", model, "--data", "PART", *_options(held), "--collect", "gram"]
        )
        return f"run `{part} --out PART.calib` for every part of its data, and `quantkit cache merge`"
    words = ["quantkit", "calibrate", model, "--data", path, *_options(held), "--collect", "gram"]
    if held is not None and held.path is not None and graph.path and held.path.stem != graph.path.stem:
        words += ["--out", str(held.path)]
    return f"run `{shlex.join(words)}`"


def _options(held: CalibrationCache | None) -> Iterator[str]:
    """How the samples of a cache were chosen and prepared, as options of `calibrate`, and its method."""
    if held is None:
        return
    data = held.data
    if isinstance(data.get("samples"), int):
        yield from ("--samples", str(data["samples"]))
    image: dict[str, Any] = data.get("preprocessing") or {}
    if image.get("crop_pct") is not None:
        # The one way of cutting that the command line has.
        yield from ("--image-preset", "imagenet")
    for name, neutral in (("mean", 0.0), ("std", 1.0)):
        values = image.get(name) or [neutral]
        if any(value != neutral for value in values):
            yield from (f"--{name}", ",".join(f"{value:g}" for value in values))
    if image.get("size") is not None:
        yield from ("--size", "x".join(map(str, image["size"])))
    if image.get("layout") is not None:
        yield from ("--layout", str(image["layout"]))
    for name, key in (data.get("mapping") or {}).items():
        yield from ("--input", f"{name}={key}")
    if held.method != "entropy":
        yield from ("--method", held.method)
    if "percentile" in held.method_options:
        yield from ("--percentile", f"{held.method_options['percentile']:g}")
